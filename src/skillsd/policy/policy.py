"""The policy: one base model and two LoRA adapters on it, `student` and `teacher`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn

from skillsd import parallel
from skillsd.errors import ConfigError
from skillsd.policy.adapter_files import load_adapter, trained, write_base
from skillsd.policy.budget import CacheBudget
from skillsd.policy.config import PolicySettings
from skillsd.policy.load import adapter_folder, base_digest, check_vocabulary, context_length, load_base, load_tokenizer
from skillsd.policy.logprobs import Head, compare, selected_logprobs
from skillsd.policy.module_patching import Reinstalled
from skillsd.policy.packed import TokenSequence, micro_batches, pack
from skillsd.policy.shard import OUT_OF_MEMORY, Shards
from skillsd.policy.template import closing_mark
from skillsd.policy.training_kernels import TrainingKernels, training_kernels

log = logging.getLogger(__name__)

ADAPTERS = ("student", "teacher")
EQUAL = "teacher_is_student"
"""The entry of `adapter_state` beside the tensors."""


class Scores(NamedTuple):
    """What one adapter makes of B sequences whose longest `token_ids` has T tokens, N of them all being actions.

    Args:
        logp: Log-probs [B, T] in nats, float32; 0 where the action mask is false.
        entropy: Entropy [B, T] in nats of the distributions they were drawn from, without gradient.
        hidden: Last hidden states [N, H] at the positions that predict the actions, in the row-major order of the action mask.
    """

    logp: Tensor
    entropy: Tensor
    hidden: Tensor


class Policy(nn.Module):
    """One base model, two adapters. The only place, with `load`, that knows PEFT and bitsandbytes.

    Args:
        settings: What to load and which adapters to put on it.
        device: Where it lives.
        adapters: False leaves the base bare: it then acts and is scored as it is (pre-training of all weights).

    Attributes:
        base: The causal language model.
        digest: Which weights it has: see `weights.digest`.
        model: The same with its adapters around it.
        shards: Its split over all ranks, with `settings.shard` and several of them.
        teacher_is_student: True if the two adapters hold equal weights, so that an empty skill needs no teacher forward. Whoever
            steps the optimizer says so with `student_changed`.
        updates: How often each adapter was changed.
        cache_budget: What the keys and values of rollouts in this process may take of the device's memory; None sets no limit.

    Raises:
        ConfigError: the settings do not fit the model.
    """

    def __init__(self, settings: PolicySettings, device: torch.device | str = "cpu", adapters: bool = True) -> None:
        super().__init__()
        self.settings = settings
        self.tokenizer, device = load_tokenizer(settings), torch.device(device)
        shard = settings.shard and parallel.world() > 1
        if settings.shard and not (shard and adapters):
            if not adapters:
                raise ConfigError("model.policy.shard: training all weights of the base takes it whole: set it to false.")
            log.warning("model.policy.shard: there is one rank, so the base lies whole on it.")
        self.base: Any = load_base(settings, device, torch.device("cpu") if shard else device)
        base = self.base
        check_vocabulary(settings.model, self.tokenizer, base)
        self.digest = base_digest(settings, base)
        self.context_length = context_length(settings, base.config)
        stops = base.generation_config.eos_token_id if base.generation_config is not None else None
        ids = [stops] if isinstance(stops, int) else list(stops or [])
        ids += [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        mark = closing_mark(self.tokenizer)  # which a generation config may lack
        self.stop_ids = tuple(dict.fromkeys([*ids, *([] if mark is None else [mark])]))
        self.head = Head(base)
        self.training_kernels: TrainingKernels | None = None
        self.model: Any = base
        self.teacher_is_student = True
        self.updates = dict.fromkeys(ADAPTERS, 0)
        self.cache_budget: CacheBudget | None = None
        self._adapters: dict[str, dict[str, nn.Parameter]] = {}
        self._layers: list[Any] = []  # those that carry adapters
        self._active: str | None = None
        if settings.gradient_checkpointing:
            base.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": self._checkpoint_contexts}
            )
        if adapters:
            self._add_adapters(device)
        # Its kernels have no gradients for weights of the base. It tries modules on examples: before they are sharded.
        self.training_kernels = training_kernels(base, settings.kernels, device) if adapters else None
        self.shards = Shards(base, device) if shard else None
        # The base stays in evaluation mode for good. These alone are on in the student's forward with gradient, and stay on until
        # its backward has recomputed what it needs; `acting` turns them off.
        self._train_only = [
            m for n, m in base.named_modules()
            if getattr(m, "gradient_checkpointing", False) or ("lora_dropout" in n and isinstance(m, nn.Dropout))
        ]  # fmt: skip
        for m in self._train_only:
            m.training = True

    def _add_adapters(self, device: torch.device) -> None:
        lora = self.settings.lora
        config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.targets, task_type="CAUSAL_LM")
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)  # the adapters' first values do not depend on what was drawn before
            try:
                self.model = get_peft_model(self.base, config, adapter_name="student")
            except ValueError as e:  # no layer of that name, or one that LoRA can't adapt
                raise ConfigError(f"model.policy.lora.targets: {str(e).splitlines()[0]}") from e
            self.model.add_adapter("teacher", config)
        for name in ADAPTERS:
            self._adapters[name] = trained(self.model, name)
        self._layers = [m for m in self.base.modules() if isinstance(m, BaseTunerLayer)]
        if lora.init is not None:
            folder = Path(adapter_folder(lora.init, self.settings.model))
            load_adapter(self.model, "student", self.adapter("student"), folder, lora, self.identity)
        self.sync()
        for p in self.adapter("teacher").values():
            p.requires_grad_(False)
        self.use("student")

    def train(self, mode: bool = True) -> Policy:
        """Does nothing: what is on in which forward is settled in `__init__` and `acting`, whatever a trainer switches."""
        return self

    # -- adapters -------------------------------------------------------------------------------------------------------

    @property
    def backbone(self) -> nn.Module:
        """The decoder under the head, adapters included."""
        return self.base.get_decoder()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def has_adapters(self) -> bool:
        """Return whether the base carries adapters."""
        return bool(self._adapters)

    @property
    def base_name(self) -> str:
        """Model, rank, scale and targets, for people."""
        lora = self.settings.lora
        return f"{self.settings.model} r={lora.r} alpha={lora.alpha} targets={lora.targets}"

    @property
    def identity(self) -> dict[str, Any]:
        """What an adapter of this policy belongs to: the digest of the base and its name, rank and scale."""
        lora = self.settings.lora
        return {"model": self.settings.model, "digest": self.digest, "r": lora.r, "alpha": lora.alpha}

    def adapter(self, name: str) -> dict[str, nn.Parameter]:
        """The LoRA tensors of one adapter, by a name that is the same for both."""
        return self._adapters[name]

    def use(self, name: str | None) -> None:
        """Make one adapter active, or the bare base (None). Only the student ever requires gradients.

        PEFT's own switch walks all modules and re-enables gradients; what its layers read in a forward are these two attributes.
        """
        if name == self._active or not self._adapters:
            return
        if name not in (*ADAPTERS, None):
            raise ValueError(f"no adapter {name}: one of {', '.join(ADAPTERS)}.")
        for layer in self._layers:
            layer._disable_adapters = name is None
            layer._active_adapter = [name or "student"]
        self.model.active_adapter = self.model.base_model.active_adapter = name or "student"
        for p in self.adapter("student").values():
            p.requires_grad_(name == "student")
        self._active = name

    @contextmanager
    def acting(self, adapter: str | None) -> Iterator[None]:
        """One adapter, or the untouched base (None), for inference: no gradient, no dropout, no checkpointing. Then the student is active.

        Raises:
            ConfigError: out of memory, with a sharded base: other ranks wait in a forward that cannot be repeated.
        """
        modes = [m.training for m in self._train_only]
        for m in self._train_only:
            m.training = False
        try:
            self.use(adapter)
            with torch.no_grad():
                yield
        except torch.OutOfMemoryError as e:
            if self.sharded:
                raise ConfigError(OUT_OF_MEMORY) from e
            raise
        finally:
            for m, mode in zip(self._train_only, modes, strict=True):
                m.training = mode
            self.use("student")

    def student_changed(self) -> None:
        """The optimizer has made a step: from here to the next `sync` the adapters differ."""
        self.teacher_is_student = False
        self.updates["student"] += 1

    def sync(self) -> None:
        """theta_bar <- theta: the teacher becomes a copy of the student."""
        student, teacher = self.adapter("student"), self.adapter("teacher")
        with torch.no_grad():
            for k, p in teacher.items():
                p.copy_(student[k])
        self.teacher_is_student = True
        self.updates["teacher"] += 1

    def ema(self, rate: float) -> None:
        """theta_bar <- (1 - rate) theta_bar + rate theta, over the LoRA tensors. rate in (0, 1]."""
        if not 0 < rate <= 1:
            raise ValueError(f"an EMA rate of {rate}: give a value above 0 and at most 1.")
        student, teacher = self.adapter("student"), self.adapter("teacher")
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.values()), [student[k] for k in teacher], rate)
        self.teacher_is_student = self.teacher_is_student or rate == 1.0
        self.updates["teacher"] += 1

    def student_parameters(self) -> list[nn.Parameter]:
        """What the optimizer updates."""
        self.use("student")
        return list(self.adapter("student").values())

    def adapter_state(self) -> dict[str, Tensor]:
        """Copies of both adapters' tensors on the CPU, and whether the two count as equal: after a step without a gradient equal tensors
        do not say so."""
        tensors = {f"{name}.{k}": p.detach().cpu().clone() for name in ADAPTERS for k, p in self.adapter(name).items()}
        return tensors | {EQUAL: torch.tensor(self.teacher_is_student)}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `adapter_state`; every tensor must be there with its shape."""
        own = {f"{name}.{k}": p for name in ADAPTERS for k, p in self.adapter(name).items()}
        for k in own.keys() | state.keys() - {EQUAL}:
            if k not in own or k not in state or own[k].shape != state[k].shape:
                raise ConfigError(
                    f"ckpt_path: the checkpoint's adapters do not fit [{self.base_name}] ({k}): set model.policy.lora as it was."
                )
        with torch.no_grad():
            for k, p in own.items():
                p.copy_(state[k])
        self.updates = {name: n + 1 for name, n in self.updates.items()}
        student, teacher = self.adapter("student"), self.adapter("teacher")
        equal = all(torch.equal(student[k], teacher[k]) for k in teacher)
        self.teacher_is_student = bool(state.get(EQUAL, equal))

    def save_adapter(self, folder: Path, name: str = "student") -> None:
        """Write one adapter as a PEFT folder `folder/name`. Raises OSError."""
        try:  # embeddings are never adapted; letting PEFT find that out asks the hub on every save
            self.model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
            write_base(folder / name, self.identity)
        except SafetensorError as e:  # its text alone says what the system answered
            raise OSError(f"{folder / name} could not be written: {e}") from e

    def save_student(self, folder: Path) -> None:
        """Write the student's adapter as the PEFT folder `folder`, which is there and empty. Raises OSError."""
        self.save_adapter(folder, "student")  # PEFT makes a folder of the adapter's name
        for path in (folder / "student").iterdir():
            path.rename(folder / path.name)
        (folder / "student").rmdir()

    # -- ranks ----------------------------------------------------------------------------------------------------------

    @property
    def sharded(self) -> bool:
        """Return whether every forward and backward is one of all ranks."""
        return self.shards is not None

    def together(self) -> AbstractContextManager[None]:
        """Forwards without gradient, as many as each rank likes: see `Shards.together`. Does nothing where the base is whole."""
        return self.shards.together(self.idle) if self.shards is not None else nullcontext()

    def agree(self, n: int) -> int:
        """How often all ranks must do what this one does `n` times: as often as any of them; `n` where the base is whole."""
        return parallel.all_reduce_max(n) if self.sharded else n

    def idle(self, grad: bool = False) -> Tensor:
        """Take part in other ranks' forward of `score`, with the student's gradient or without; returns a 0 whose backward joins theirs."""
        with torch.set_grad_enabled(grad):
            return self.score("student", [TokenSequence([0], [0], [True])]).logp.sum() * 0.0

    def micro_batches(self, lengths: Sequence[int], token_budget: int, idle: Callable[[], object] | None = None) -> Iterator[list[int]]:
        """Rows of these lengths by micro-batch, see `micro_batches`.

        On a sharded base all ranks do as many: one that has fewer calls `idle` (a forward without gradient) for each it lacks.
        """
        parts = micro_batches(lengths, token_budget, not self.packs)
        missing = self.agree(len(parts)) - len(parts)
        yield from parts
        for _ in range(missing):
            (idle or self.idle)()

    # -- scoring --------------------------------------------------------------------------------------------------------

    def score(self, adapter: str | None, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> Scores:
        """Log-probs of the action tokens of `sequences` under one adapter.

        Args:
            adapter: `student` (with gradient unless torch.no_grad is on), `teacher`, or None for the untouched base (without gradient).
            sequences: B of them, in one forward: see `packed`.
            temperature: The sampling temperature.
        """
        if adapter == "student" and torch.is_grad_enabled():
            self.use("student")
            return self._score(sequences, temperature)
        with self.acting(adapter):
            return self._score(sequences, temperature)

    @property
    def packs(self) -> bool:
        """Return whether rows are scored without padding."""
        return self.training_kernels is not None and self.training_kernels.packs

    def _score(self, sequences: Sequence[TokenSequence], temperature: float) -> Scores:
        p, kernels = pack(sequences, not self.packs, self.tokenizer.pad_token_id or 0, self.device), self.training_kernels
        kwargs, weight = {}, None
        if kernels is not None:
            kwargs, weight = kernels.arguments(p.cu_seqlens, p.max_seqlen), self.head.weight()
            if self._active is not None:
                kernels.lower(self._active)
        with nullcontext() if kernels is None else kernels.installed():
            hidden = self.backbone(input_ids=p.ids, position_ids=p.position_ids, use_cache=False, **kwargs).last_hidden_state
        hidden, chunk = hidden.flatten(0, 1).index_select(0, p.logits_indices), self.settings.head_chunk
        if kernels is not None and weight is not None:
            logp, entropy = kernels.logprobs(hidden, weight, p.targets, temperature, chunk)
        else:
            logp, entropy = selected_logprobs(self.head, hidden, p.targets, temperature, chunk)
        size = p.shape[0] * p.shape[1]
        logp, entropy = (torch.zeros(size, device=x.device).scatter(0, p.scatter_indices, x).view(p.shape) for x in (logp, entropy))
        return Scores(logp, entropy, hidden)

    def recomputing(self) -> AbstractContextManager[None]:
        """For a backward of `score`: puts the kernels in place once, and not anew for each layer that it computes again.

        It may be left out.
        """
        kernels = self.training_kernels if self.settings.gradient_checkpointing else None
        return nullcontext() if kernels is None else kernels.installed()

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a checkpointed forward and of the backward's repetition of it, which goes the same way."""
        kernels = self.training_kernels
        return nullcontext(), Reinstalled(kernels) if kernels is not None and kernels.active else nullcontext()

    def compare(
        self, student_hidden: Tensor, teacher_hidden: Tensor, divergence: Callable[[Tensor, Tensor], Tensor], temperature: float = 1.0
    ) -> Tensor:
        """A divergence between full next-token distributions, from the `hidden` of two `Scores`. See `logprobs.compare`.

        Raises:
            ConfigError: the language-model head carries an adapter, so that it is not one head for both.
        """
        if isinstance(self.base.get_output_embeddings(), BaseTunerLayer):
            raise ConfigError(
                "model.policy.lora.targets includes the language-model head: divergences over the full vocabulary need a head without "
                "adapters: name the layers to adapt, or all-linear (which leaves the head out)."
            )
        return compare(self.head, student_hidden, teacher_hidden, divergence, temperature, self.settings.head_chunk)

    def extra_repr(self) -> str:
        return self.base_name

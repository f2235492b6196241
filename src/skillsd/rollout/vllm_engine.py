"""vLLM as an engine (`pip install skillsd[vllm]`): its own copy of the base, adapters loaded anew after each update and never merged.

It draws with the noise of the default engine, from a logits processor: the same key and position give the same token, up to the rounding
of logits, and the log-prob that comes back is that of the distribution drawn from, at any temperature.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
import random
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from skillsd.errors import ConfigError
from skillsd.policy import Policy, model_folder
from skillsd.rollout.cache import Room
from skillsd.rollout.engine import STRIDE, Completion, Request, Session
from skillsd.rollout.versions import Versions
from skillsd.rollout.vllm_noise import noise_processor

log = logging.getLogger(__name__)

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM makes room for."""
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
"""Where the user has not set it: no usage statistics, a quiet terminal, and no sampler that would be compiled for nothing."""


class VllmEngine:
    """An `Engine` on vLLM in this process. Prompts and earlier turns are in its prefix cache.

    Args:
        policy: Who acts. Its base is loaded a second time, from the same files.
        rows: Most rows in one step.
        memory: Share of the GPU's memory for vLLM's weights and cache.
        eager: Without compilation and CUDA graphs: slower, and ready sooner.

    Attributes:
        held: Its share of the GPU in bytes.
        room: Not used.

    Raises:
        ConfigError: vLLM or a GPU is missing, the policy has no adapters or is not on the first GPU, or vLLM refuses the model.
    """

    def __init__(self, policy: Policy, rows: int = 64, memory: float = 0.4, eager: bool = False) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError("rollout.engine is vllm, which is not installed: pip install 'skillsd[vllm]', or set it to default.")
        total = _gpu_bytes(policy)
        if not total:
            raise ConfigError("rollout.engine is vllm, which needs a GPU: set it to default, or trainer.accelerator to gpu.")
        if policy.device.index:
            raise ConfigError(
                f"rollout.engine is vllm, which takes the first GPU, and the policy is on {policy.device}: set trainer.devices to 1 "
                f"and CUDA_VISIBLE_DEVICES to {policy.device.index}."
            )
        if not policy.has_adapters:
            raise ConfigError("rollout.engine is vllm, which acts with adapters only: set it to default.")
        if policy.settings.lora.r > RANKS[-1]:
            raise ConfigError(f"policy.lora.r is {policy.settings.lora.r}: vLLM takes ranks up to {RANKS[-1]}.")
        self.policy = policy
        self.room: Room | None = None
        self.held = int(memory * total)
        log.warning("vLLM starts and loads the base a second time: this takes a minute or two.")
        try:
            self.llm = self._start(rows, memory, eager)
        except (ImportError, OSError, ValueError, RuntimeError, AssertionError) as e:
            given = f"rollout.vllm_memory {memory}, policy.context_length {policy.context_length}"
            raise ConfigError(f"rollout.engine: vLLM does not start with {policy.settings.model} ({given}): {_told(e)}") from e
        self.versions = Versions(policy, None)
        self._serial = itertools.count(1)
        self._loaded: dict[str, Any] = {}  # version -> the request that names it
        self._asked: dict[str, weakref.ref[VllmSession]] = {}  # unfinished requests, of whom

    def _start(self, rows: int, memory: float, eager: bool) -> Any:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process, one GPU
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        from vllm import LLM

        s, dtype = self.policy.settings, self.policy.base.dtype
        folder = model_folder(s.model)
        options: dict[str, Any] = {}
        if s.quantise == "nf4":
            options = {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}
            if (stored := getattr(AutoConfig.from_pretrained(folder), "dtype", None)) != dtype:
                text = "%s is stored in %s: vLLM quantises that, the policy quantises it rounded to %s, and a few weights get other codes."
                log.warning(text, s.model, stored, dtype)
        options["compilation_config"] = {"cudagraph_capture_sizes": [*(n for n in (1, 2, 4, *range(8, rows, 8)) if n < rows), rows]}
        before = random.getstate(), np.random.get_state()  # vLLM seeds what is the whole process's
        try:
            with torch.random.fork_rng():
                return LLM(
                    model=folder, dtype=str(dtype).removeprefix("torch."), skip_tokenizer_init=True,
                    max_model_len=self.policy.context_length, max_num_seqs=rows, gpu_memory_utilization=memory, enforce_eager=eager,
                    enable_prefix_caching=True, enable_lora=True, max_loras=2, logits_processors=[noise_processor()],
                    max_lora_rank=next(r for r in RANKS if r >= s.lora.r), logprobs_mode="processed_logits",
                    disable_log_stats=True, seed=0, **options,
                ).llm_engine  # fmt: skip
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])

    def open(self, temperature: float, adapter: str | None = "student") -> VllmSession:
        """What a session that is gone has left unfinished is dropped."""
        self.abort([name for name, session in self._asked.items() if session() is None])
        return VllmSession(self, temperature, self._adapter(adapter) if adapter is not None else None)

    def _adapter(self, name: str) -> Any:
        """vLLM's name of an adapter as it is now; what has changed since is written and loaded under a new one."""
        from vllm.lora.request import LoRARequest

        version, over = self.versions.now(name)
        for old in over:
            if (request := self._loaded.pop(old, None)) is not None:
                self.abort([n for n, session in self._asked.items() if (s := session()) is None or s.lora is request])
                self.llm.remove_lora(request.lora_int_id)
        self.versions.remove(over)
        if version.name not in self._loaded:
            request = LoRARequest(version.name, next(self._serial), str(version.folder))
            self.llm.add_lora(request)
            self._loaded[version.name] = request
        return self._loaded[version.name]

    def most_rows(self, tokens: int) -> int:
        return 1 << 30  # vLLM makes rows wait

    def most_tokens(self) -> int:
        return self.policy.context_length

    def release(self, everything: bool = False) -> None:
        """vLLM keeps its memory. `everything`: whatever is unfinished is dropped, of a session that an error holds on to, too."""
        if everything:
            self.abort(list(self._asked))

    def close(self) -> None:
        self.abort(list(self._asked))
        self.llm.engine_core.shutdown()
        self.versions.cleanup()

    def ask(self, session: VllmSession, ids: list[int], request: Request) -> str:
        """Begin a turn; the name of its request."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        noise = {"key": request.key, "position": request.position, "temperature": session.temperature}
        params = SamplingParams(
            temperature=0.0, max_tokens=request.limit, stop_token_ids=list(self.policy.stop_ids), ignore_eos=True, logprobs=0,
            detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, extra_args={"skillsd": noise},
        )  # fmt: skip
        name = str(next(self._serial))
        self._asked[name] = weakref.ref(session)
        self.llm.add_request(name, {"prompt_token_ids": ids}, params, lora_request=session.lora)
        return name

    def abort(self, names: Sequence[str]) -> None:
        """Drop unfinished requests."""
        for name in names:
            del self._asked[name]
        if names:
            self.llm.abort_request(list(names))

    def step(self) -> None:
        """One step of everybody's rows; who has ended goes to its session."""
        for output in self.llm.step():
            session = self._asked.pop(output.request_id)() if output.finished and output.request_id in self._asked else None
            if session is not None:
                session.ended(output.request_id, output.outputs[0])


class VllmSession(Session):
    """Rows by name; each turn is a request of its own, with all that the row has seen and sampled as its prompt."""

    continuous = True

    def __init__(self, engine: VllmEngine, temperature: float, lora: Any) -> None:
        self.engine, self.temperature, self.lora = engine, temperature, lora
        self.stop_ids = frozenset(engine.policy.stop_ids)
        self.ids: dict[int, list[int]] = {}
        self.going: dict[str, int] = {}  # request -> row
        self.done: list[tuple[int, Completion]] = []

    @property
    def busy(self) -> bool:
        return bool(self.going or self.done)

    def submit(self, requests: Sequence[Request]) -> None:
        for r in requests:
            ids = self.ids.setdefault(r.row, [])
            ids += r.new_ids
            self.going[self.engine.ask(self, list(ids), r)] = r.row

    def ended(self, name: str, output: Any) -> None:
        """vLLM has finished a request: its `CompletionOutput`."""
        row, ids = self.going.pop(name), list(output.token_ids)
        logprobs = [step[i].logprob for i, step in zip(ids, output.logprobs, strict=True)]
        self.ids[row] += ids
        self.done.append((row, Completion(ids, logprobs, ids[-1] in self.stop_ids)))

    def step(self) -> list[tuple[int, Completion]]:
        for _ in range(STRIDE):
            if self.done or not self.going:
                break
            self.engine.step()
        done, self.done = self.done, []
        return done

    def forget(self, rows: Iterable[int]) -> None:
        gone = set(rows)
        self.engine.abort([name for name, row in self.going.items() if row in gone])
        self.going = {name: row for name, row in self.going.items() if row not in gone}
        self.done = [(row, c) for row, c in self.done if row not in gone]
        for row in gone:
            self.ids.pop(row, None)


def _gpu_bytes(policy: Policy) -> int:
    """Of the GPU's memory; 0 without one."""
    return torch.cuda.get_device_properties(policy.device).total_memory if policy.device.type == "cuda" else 0


def _told(e: Exception) -> str:
    """What vLLM said, under the names that its settings have here."""
    errors = getattr(e, "errors", None)  # pydantic's
    text = "; ".join(str(x.get("msg")) for x in errors()) if callable(errors) else str(e)
    for theirs, ours in (("max_model_len", "policy.context_length"), ("gpu_memory_utilization", "rollout.vllm_memory")):
        text = text.replace(theirs, ours)
    return " ".join(text.split())[:600] or repr(e)

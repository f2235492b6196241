"""As much of vLLM 0.24 as the engine touches, on transformers and a CPU: a persistent batch whose rows move, adapters read from folders.

`install` puts it where `import vllm` finds it.
"""

import importlib.machinery
import sys
from enum import Enum
from types import ModuleType, SimpleNamespace

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


class Direction(Enum):
    UNIDIRECTIONAL = 0
    SWAP = 1


class LogitsProcessor:
    pass


class LoRARequest(SimpleNamespace):
    def __init__(self, lora_name, lora_int_id, lora_path):
        super().__init__(lora_name=lora_name, lora_int_id=lora_int_id, lora_path=lora_path)


class LLM:
    def __init__(self, **settings):
        self.settings, self.llm_engine = settings, self
        self.engine_core, self.closed = SimpleNamespace(shutdown=self.shutdown), False
        base = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=getattr(torch, settings["dtype"])).eval()
        self.model, self.base = None, base
        (kind,) = settings["logits_processors"]
        assert issubclass(kind, LogitsProcessor) and settings["logprobs_mode"] == "processed_logits"
        self.processor = kind(None, torch.device("cpu"), False)
        self.rows = settings["max_num_seqs"]
        self.waiting, self.batch = [], []
        self.loaded, self.reads = set(), 0

    def shutdown(self):
        self.closed = True

    def add_lora(self, request):
        self.reads += 1
        self.loaded.add(request.lora_int_id)
        assert len(self.loaded) <= self.settings["max_loras"]
        name = str(request.lora_int_id)
        if self.model is None:
            self.model = PeftModel.from_pretrained(self.base, request.lora_path, adapter_name=name)
        else:
            self.model.load_adapter(request.lora_path, adapter_name=name)
        self.model.eval()

    def remove_lora(self, number):
        self.loaded.remove(number)

    def add_request(self, name, prompt, params, lora_request=None):
        ids = prompt["prompt_token_ids"]
        assert ids and len(ids) + 1 <= self.settings["max_model_len"]
        self.waiting.append(SimpleNamespace(name=name, ids=ids, params=params, lora=lora_request, out=[], logprobs=[]))

    def abort_request(self, names):
        self.waiting = [r for r in self.waiting if r.name not in names]
        for r in self.batch:
            if r.name in names:
                r.name = None  # leaves at the next step

    def step(self):
        removed = [i for i, r in enumerate(self.batch) if r.name is None]
        holes, added, moved = sorted(removed), [], []
        while self.waiting and (holes or len(self.batch) < self.rows):
            r = self.waiting.pop(0)
            if holes:
                i = holes.pop(0)
                self.batch[i] = r
            else:
                i = len(self.batch)
                self.batch.append(r)
            added.append((i, r.params, r.ids, r.out))
        while holes:  # the last row takes a hole
            while self.batch and self.batch[-1].name is None:
                self.batch.pop()
            i = holes.pop(0)
            if i < len(self.batch):
                moved.append((len(self.batch) - 1, i, Direction.UNIDIRECTIONAL))
                self.batch[i] = self.batch.pop()
        if len(self.batch) > 2:  # as a scheduler that reorders
            self.batch[0], self.batch[1] = self.batch[1], self.batch[0]
            moved.append((0, 1, Direction.SWAP))
        update = SimpleNamespace(batch_size=len(self.batch), removed=removed, added=added, moved=moved)
        self.processor.update_state(update if removed or added or moved else None)
        if not self.batch:
            return []
        logits = self.processor.apply(torch.stack([self._logits(r) for r in self.batch]).float())
        done = []
        for row, r in zip(logits, self.batch, strict=True):
            i = int(row.argmax())
            r.out.append(i)
            r.logprobs.append({i: SimpleNamespace(logprob=float(row[i]))})
            if i in r.params.stop_token_ids or len(r.out) >= r.params.max_tokens:
                output = SimpleNamespace(token_ids=tuple(r.out), logprobs=r.logprobs)
                done.append(SimpleNamespace(request_id=r.name, finished=True, outputs=[output]))
                r.name = None
        return done

    @torch.no_grad()
    def _logits(self, r):
        ids = torch.tensor([r.ids + r.out])
        if r.lora is None:
            if self.model is None:
                return self.base(ids).logits[0, -1]
            with self.model.disable_adapter():
                return self.model(ids).logits[0, -1]
        assert r.lora.lora_int_id in self.loaded
        self.model.set_adapter(str(r.lora.lora_int_id))
        return self.model(ids).logits[0, -1]


def install(monkeypatch):
    """For the time of a test."""
    parts = {
        "vllm": {"LLM": LLM, "SamplingParams": SimpleNamespace},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(FINAL_ONLY=2)},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.v1": {},
        "vllm.v1.sample": {},
        "vllm.v1.sample.logits_processor": {"LogitsProcessor": LogitsProcessor},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)

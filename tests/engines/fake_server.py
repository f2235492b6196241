"""As much of a vLLM 0.24 server as the client touches: threads of the standard library, a model of its own that reads adapters from the
folders that it loads, and `skillsd.engines.vllm_noise`'s own processor for the draws."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from skillsd.engines.vllm_noise import MIN_LOGPROB, Noise


class Model:
    """The weights that all fake servers of a test share; one forward at a time."""

    def __init__(self, folder):
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.peft, self.read, self.lock = None, {}, threading.Lock()
        self.context = self.base.config.max_position_embeddings

    def load(self, name, path):
        if not Path(path, "adapter_config.json").is_file():
            raise FileNotFoundError(path)
        with self.lock:
            if name not in self.read:
                if self.peft is None:
                    self.peft = PeftModel.from_pretrained(self.base, path, adapter_name=name)
                else:
                    self.peft.load_adapter(path, adapter_name=name)
                self.peft.eval()
                self.read[name] = path

    @torch.no_grad()
    def logits(self, name, ids):
        with self.lock:
            if self.peft is None:
                return self.base(ids).logits[:, -1]
            if name is None:
                with self.peft.disable_adapter():
                    return self.base(ids).logits[:, -1]
            self.peft.set_adapter(name)
            return self.peft(ids).logits[:, -1]


class FakeServer:
    """Settings that a test turns: `broken` (path -> function of the handler that answers instead), `before` (called before a turn)."""

    def __init__(self, model, key="", port=0):
        self.model, self.key = model, key
        self.adapters, self.asked, self.loads, self.unloads = {}, [], [], []
        self.broken, self.before = {}, lambda body: None
        self.processor, self.mode = Noise, "processed_logits"
        self.http = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (Handler,), {"fake": self}))
        self.http.daemon_threads, self.http.block_on_close = True, False
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.dead, self.lock = False, threading.Lock()
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def kill(self):
        """As a process that ends: connections that are open break off."""
        self.dead = True
        self.http.shutdown()
        self.http.server_close()

    def complete(self, body):
        name = body["model"]
        if name != "base" and name not in self.adapters:
            return 404, {"error": {"message": f"The model `{name}` does not exist."}}
        self.before(body)
        self.asked.append(body)
        assert body["temperature"] == 0.0 and body["ignore_eos"] and body["return_token_ids"] and body["logprobs"] == 0
        assert all(type(x) in (str, int, float) for x in body["vllm_xargs"].values()), "what vLLM takes"
        ids, out, logprobs = list(body["prompt"]), [], []
        processor = self.processor()
        params = SimpleNamespace(extra_args=body["vllm_xargs"])
        processor.update_state(SimpleNamespace(removed=(), added=[(0, params, ids, out)], moved=()))
        while len(out) < body["max_tokens"] and not (out and out[-1] in body["stop_token_ids"]):
            if self.dead:
                raise ConnectionAbortedError
            raw = self.model.logits(None if name == "base" else name, torch.tensor([ids + out])).float()
            row = processor.apply(raw.clone())[0] if self.processor is Noise else raw[0]
            if self.mode == "raw_logprobs":
                row = torch.log_softmax(row, -1)
            i = int(row.argmax())
            out.append(i)
            logprobs.append(max(float(row[i]), MIN_LOGPROB))
        choice = {"index": 0, "text": "", "token_ids": out, "logprobs": {"token_logprobs": logprobs}, "finish_reason": "length"}
        return 200, {"choices": [choice], "model": name}

    def answer(self, path, body):
        if path == "/health":
            return 200, None
        if path == "/v1/models":
            cards = [{"id": "base", "max_model_len": self.model.context, "parent": None}]
            cards += [{"id": n, "parent": "base", "root": str(folder), "max_model_len": None} for n, folder in self.adapters.items()]
            return 200, {"data": cards}
        if path == "/v1/completions":
            return self.complete(body)
        if path == "/v1/load_lora_adapter":
            name = body["lora_name"]
            with self.lock:
                if name in self.adapters:
                    return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
                try:
                    self.model.load(name, body["lora_path"])
                except (OSError, ValueError) as e:
                    return 500, {"error": {"message": str(e)}}
                self.adapters[name] = body["lora_path"]
                self.loads.append(name)
            return 200, "Success"
        if path == "/v1/unload_lora_adapter":
            self.unloads.append(body["lora_name"])
            return (200, "Success") if self.adapters.pop(body["lora_name"], None) else (404, {"error": {"message": "cannot be found"}})
        return 404, {"detail": "Not Found"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeServer

    def do_GET(self):
        self.handle_any(None)

    def do_POST(self):
        self.handle_any(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def handle_any(self, body):
        if self.path in self.fake.broken:
            return self.fake.broken[self.path](self)
        if self.fake.key and self.headers.get("Authorization") != f"Bearer {self.fake.key}" and self.path.startswith("/v1"):
            return self.say(401, {"error": "Unauthorized"})
        try:
            status, answer = self.fake.answer(self.path, body)
        except ConnectionAbortedError:
            self.close_connection = True
            return None
        return self.say(status, answer)

    def say(self, status, answer):
        text = b"" if answer is None else json.dumps(answer).encode()
        self.raw(status, text)

    def raw(self, status, text, length=None, **headers):
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(text) if length is None else length), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)
        except OSError:  # it has hung up
            self.close_connection = True

    def log_message(self, *args):
        pass


@contextmanager
def serving(folder, n=1, **settings):
    """`n` fake servers on one model."""
    model = Model(folder)
    servers = [FakeServer(model, **settings) for _ in range(n)]
    try:
        yield servers
    finally:
        for s in servers:
            if not s.dead:
                s.kill()

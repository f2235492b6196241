"""An HTTP server that speaks the chat-completions format, well or badly."""

import gzip
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ANSWER = json.dumps({"success_analysis": "s", "mistake_analysis": "m", "golden_workflow": "w"})
"""A summary as a model writes it."""

CONTENTS = {
    "chat": "I cannot.",
    "empty": None,
    "fence": f"```json\n{ANSWER}\n```",
    "prose": f"The agent printed {{title, artist}} and then f'{{x}}'.\n\n{ANSWER}",
    "parts": [{"type": "thinking", "thinking": "{}"}, {"type": "text", "text": ANSWER[:9]}, {"type": "text", "text": ANSWER[9:]}],
    "thoughts": f"<think>A draft: {ANSWER}</think>\n<think>Another: {ANSWER}</think>{ANSWER}",
    "both": f"Here it is:\n```json\n{ANSWER}\n```\nI hope that {{it}} helps.",
}
"""What the server's model says at a step; at others it says ANSWER."""


class ChatServer(ThreadingHTTPServer):
    """`plan[task]` is the list of what to do at each try of that task; the last entry repeats. A status may come with its Retry-After."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.tries, self.lock = {}, {}, threading.Lock()
        self.bodies, self.busy, self.max_busy, self.refusal = [], 0, 0, "refused"
        self.hung_up = threading.Event()  # a client has closed a connection

    def shutdown_request(self, request):
        super().shutdown_request(request)
        self.hung_up.set()

    def step(self, body):
        text = body["messages"][-1]["content"]
        task = next((task for task in self.plan if f"task={task}." in text), "")
        with self.lock:
            self.bodies.append(body)
            count = self.tries[task] = self.tries.get(task, 0) + 1
        plan = self.plan.get(task, ["good"])
        return plan[min(count, len(plan)) - 1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self.send_error(404)
            return
        assert body["model"] == "m" and self.headers["Accept-Encoding"] == "identity"
        step, status, kind = self.server.step(body), 200, "application/json"
        step, retry_after = step if isinstance(step, tuple) else (step, None)
        message = {"role": "assistant", "content": CONTENTS.get(step, ANSWER)}
        if step == "reasoning":
            message |= {"content": None, "reasoning_content": "Let me see."}
        data = {"id": "x", "object": "chat.completion", "created": 0, "model": "m",
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}  # fmt: skip
        if step == "cut":
            data["choices"][0] = {"finish_reason": "length", "message": {"content": ANSWER[:-9]}}
        elif step == "no choices":
            data["choices"] = []
        payload = json.dumps(data).encode()
        if isinstance(step, int):
            status, payload = step, json.dumps({"error": {"message": self.server.refusal}}).encode()
        elif step == "hang":
            self.server.stop.wait(20)
            return
        elif step == "html":
            payload, kind = b"<html>garbage</html>", "text/html"
        elif step == "broken":
            payload = b'{"choices": ['
        elif step == "stream":
            payload, kind = b'data: {"choices": []}\n\ndata: [DONE]\n\n', "text/event-stream"
        elif step == "packed":
            payload = gzip.compress(payload)
        elif step in ("full", "over"):  # 1 MiB, and a byte more
            payload = payload.ljust((1 << 20) + (step == "over"))
        elif step == "nap":
            with self.server.lock:
                self.server.busy += 1
                self.server.max_busy = max(self.server.max_busy, self.server.busy)
            time.sleep(0.05)
            with self.server.lock:
                self.server.busy -= 1
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(payload)))
        if step == "packed":
            self.send_header("Content-Encoding", "gzip")
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        if step == "drip":  # a byte now and then: no socket time-out ever fires
            for byte in payload:
                if self.server.stop.wait(0.1):
                    return
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
            return
        self.wfile.write(payload)

    def log_message(self, *_):
        pass


@contextmanager
def serving(server):
    """Answer in a thread; at the end `stop` is set, for which an answer that hangs may wait."""
    server.daemon_threads, server.stop = True, threading.Event()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.stop.set()
        server.shutdown()
        server.server_close()

"""Requests to a vLLM server, and the answers that are accepted: the completions API, and vLLM's own calls for adapters."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from skillsd.engines.engine import Completion, Request
from skillsd.engines.http import HttpCall, ServerError, in_one_line
from skillsd.engines.vllm_noise import MIN_LOGPROB

MAX_BYTES = 1 << 20
"""Bytes of an answer without tokens."""


class VllmApi:
    """Args: the size of the model's vocabulary, and the ids that end a turn."""

    def __init__(self, vocabulary: int, stop_ids: Collection[int]) -> None:
        self.vocabulary, self.stop_ids = vocabulary, frozenset(stop_ids)

    def handshake(self, call: HttpCall, context: int) -> tuple[str, set[str]]:
        """The server's name for the base model, and the names of its adapters.

        Raises:
            ServerError: it is not healthy, its rows are shorter than `context` tokens, or it does not draw with our noise.
        """
        call.ask("/health", MAX_BYTES)
        base, length, loaded = self._models(call)
        if length < context:
            raise ServerError(f"its --max-model-len {length} is below model.policy.context_length {context}: change either")
        # At this temperature every token is as likely as any other, which only a server that draws with our noise and tells of it knows.
        one = Request(0, (), 0, 0, 1)
        text = call.ask("/v1/completions", MAX_BYTES, self.body(base, [1, 2, 3], one, 1e9))
        try:
            (logprob,) = self.completion(text, one).logprobs
        except ServerError:
            logprob = math.nan
        if not abs(logprob + math.log(self.vocabulary)) < 0.01:
            raise ServerError(
                "it does not draw with our noise, or has another vocabulary: start it with skillsd serve and this run's settings"
            )
        gone = {name for name, folder in loaded.items() if name.startswith("skillsd-") and not folder.is_dir()}
        for name in gone:
            with suppress(ServerError):
                self.unload(call, name)
        return base, set(loaded) - gone

    @staticmethod
    def _models(call: HttpCall) -> tuple[str, int, dict[str, Path]]:
        """The base model's name, its longest row in tokens, and the adapters that are loaded, with their folders.

        One whose folder is gone, left behind by a run that was killed or while the server was lost, is not to be used: vLLM reads it again
        when others have displaced it, and its engine dies of what it does not find.
        """
        text = call.ask("/v1/models", MAX_BYTES)
        try:
            cards = json.loads(text)["data"]
            base = next(c for c in cards if not c.get("parent"))
            return str(base["id"]), int(base["max_model_len"]), {str(c["id"]): Path(c.get("root") or "") for c in cards if c.get("parent")}
        except (ValueError, TypeError, KeyError, AttributeError, StopIteration, RecursionError) as e:
            raise ServerError(
                in_one_line(f"what it says at /v1/models is no list of models: {text[:1000].decode(errors='replace')}")
            ) from e

    def load(self, call: HttpCall, name: str, folder: Path) -> None:
        """An adapter. Raises ServerError."""
        body = {"lora_name": name, "lora_path": str(folder)}  # load_inplace would have it read again at every step
        try:
            call.ask("/v1/load_lora_adapter", MAX_BYTES, body)
        except ServerError as e:
            there = self._models(call)[2].get(name) if e.status == 400 else None
            if there is None:
                raise
            if not there.is_dir():  # otherwise another rank was faster
                with suppress(ServerError):
                    self.unload(call, name)
                call.ask("/v1/load_lora_adapter", MAX_BYTES, body)

    @staticmethod
    def unload(call: HttpCall, name: str) -> None:
        """Raises ServerError."""
        call.ask("/v1/unload_lora_adapter", MAX_BYTES, {"lora_name": name})

    def body(self, model: str, ids: list[int], request: Request, temperature: float) -> dict[str, Any]:
        """A turn. The key goes as text: it has 64 bits, and JSON's numbers have 53 wherever they pass through JavaScript."""
        noise = {"skillsd_key": str(request.key), "skillsd_position": request.position, "skillsd_temperature": temperature}
        return {
            "model": model, "prompt": ids, "max_tokens": request.limit, "temperature": 0.0, "repetition_penalty": 1.0, "logprobs": 0,
            "stop_token_ids": sorted(self.stop_ids), "ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True,
            "vllm_xargs": noise,
        }  # fmt: skip

    @staticmethod
    def max_bytes(ids: list[int], request: Request) -> int:
        """Bytes that the answer to a turn may have: a token comes with its text, its id and its log-prob, each twice."""
        return (1 << 16) + 512 * request.limit + 32 * len(ids)

    def completion(self, text: bytes, request: Request) -> Completion:
        """A turn as it was answered. Raises ServerError for what no turn can be."""
        try:
            (choice,) = json.loads(text)["choices"]
            ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            known = all(type(i) is int and 0 <= i < self.vocabulary for i in ids)
            numbers = all(type(x) in (int, float) and x <= 0.01 for x in logprobs)  # nan is not; above 0 by rounding
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise ServerError("its answer is no completion") from e
        if not known or not numbers:
            raise ServerError(f"its answer has {'log-probs' if known else 'tokens'} that are none")
        stops = [i in self.stop_ids for i in ids]
        if not ids or len(ids) != len(logprobs) or len(ids) > request.limit or any(stops[:-1]):
            raise ServerError(
                f"its answer has {len(ids)} tokens and {len(logprobs)} log-probs, of {request.limit} tokens that were asked for"
            )
        if not stops[-1] and len(ids) < request.limit:
            raise ServerError(f"it ended a turn after {len(ids)} of {request.limit} tokens: start it with skillsd serve")
        return Completion(ids, [float(x) if x > MIN_LOGPROB else math.nan for x in logprobs], stops[-1])

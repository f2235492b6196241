"""A run that goes on: what must be as it was, since the record would lie otherwise, and what may change and is said."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from skillsd.config_errors import leaves
from skillsd.errors import ConfigError
from skillsd.trajectory import Task

LOCATION_KEYS = ("ckpt_path", "config", "overwrite", "steal_lock", "weights_only", "trainer.default_root_dir")
"""Keys that say how a run is started and where it lies, and nothing about it."""
WITHOUT_EFFECT = "lora.init"
"""Where an adapter's weights come from in a run that starts anew; one that goes on has its checkpoint's."""
MAX_CHANGES, MAX_VALUE_CHARS = 8, 60
"""How many changes are listed, and how many characters of a value."""


def episodes(env: str, env_kwargs: Mapping[str, Any], tasks: Sequence[Task], tokenizer: Any = None, **numbers: int) -> dict[str, str]:
    """What decides which episodes a run plays, as text by key.

    Args:
        env, env_kwargs: The environment.
        tasks: The training tasks in their order; what is kept of them is a digest of their ids and options.
        tokenizer: With a chat template; likewise a digest of it and of the vocabulary.
        **numbers: Seed, tasks an iteration, trajectories a task.
    """
    named = {"env": env, **dict(leaves(dict(env_kwargs), "env_kwargs")), **numbers}
    kept = {f"data.{k}": _text(v) for k, v in named.items()}
    kept["data.tasks"] = f"{len(tasks)} with the digest {_digest([[t.task_id, t.options] for t in tasks])}"
    if tokenizer is not None:
        kept["model.policy.chat_template"] = f"one with the digest {_digest(tokenizer.chat_template)}"
        kept["model.policy.model (its tokenizer)"] = f"one with the digest {_digest(sorted(tokenizer.get_vocab().items()))}"
    return kept


def _digest(value: Any) -> str:
    return blake2b(_text(value).encode(errors="surrogatepass"), digest_size=8).hexdigest()


def check_episodes(saved: Mapping[str, str] | None, now: Mapping[str, str]) -> None:
    """Refuse to go on with other episodes than a checkpoint's run had.

    Args:
        saved, now: What `episodes` gave for the run, and gives here.

    Raises:
        ConfigError: They differ, or the checkpoint does not say.
    """
    if saved is None:
        raise ConfigError(
            "ckpt_path: the checkpoint does not say which episodes its run plays: an older skillsd made it: start a new run folder."
        )
    if changed := changes(saved, now):
        raise ConfigError(
            f"a run goes on with the episodes that it began with, and {_listed(changed)}: set it as it was, or name a new run folder "
            "(trainer.default_root_dir)."
        )


def settings(config: Mapping[str, Any], folder: str) -> dict[str, str]:
    """A resolved configuration as text by key, for a checkpoint; paths in the run folder are kept without it."""
    found = {}
    for key, value in leaves(config):
        if key not in LOCATION_KEYS:
            inside = isinstance(value, str) and f"{value}/".startswith(f"{folder.rstrip('/')}/")
            found[key] = f"(run folder){value[len(folder.rstrip('/')) :]}" if inside else _text(value)
    return found


def describe_changes(saved: Mapping[str, str], now: Mapping[str, str]) -> str:
    """One line about settings that are no longer a checkpoint's; "" if all are."""
    changed = changes(saved, now) if saved and now else []  # a run from a script has no configuration
    changed = [c for c in changed if not c[0].endswith(WITHOUT_EFFECT)]
    return f"going on with other settings: {_listed(changed)}" if changed else ""


def changes(saved: Mapping[str, str], now: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Key, old and new value of what differs, in the order of the keys."""
    keys = sorted(saved.keys() | now.keys())
    return [(k, saved.get(k, "not set"), now.get(k, "not set")) for k in keys if saved.get(k) != now.get(k)]


def _listed(changed: Sequence[tuple[str, str, str]]) -> str:
    said = [f"{key} was {_cut(old)} and is {_cut(new)}" for key, old, new in changed[:MAX_CHANGES]]
    return ", ".join(said) + (f", and {len(changed) - MAX_CHANGES} more" if len(changed) > MAX_CHANGES else "")


def _cut(text: str) -> str:
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[: MAX_VALUE_CHARS - 3]}..."


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=_kind, ensure_ascii=False)


def _kind(value: Any) -> str:
    """An object that is no plain data has no text that the next process would give it too."""
    return f"<{type(value).__module__}.{type(value).__qualname__}>"

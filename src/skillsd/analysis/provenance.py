"""What a run is, and what it ran on, as far as its folder has it on record."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from skillsd import __version__
from skillsd.analysis.render import Table
from skillsd.analysis.run import Run
from skillsd.bounded import visible
from skillsd.errors import redacted, without_keys
from skillsd.files.run_folder import ADAPTER, CONFIG_FILE
from skillsd.words import count

KEYS = {
    "environment": "data.env", "model": "model.policy.model", "quantised": "model.policy.quantise",
    "LoRA rank": "model.policy.lora.r", "LoRA starts from": "model.policy.lora.init", "method": "method",
    "loss": "model.objective.loss", "distillation weight": "model.objective.distillation_weight",
    "policy weight": "model.objective.policy_weight", "advantage": "model.objective.advantage",
    "multiplier": "model.objective.multiplier", "gate": "model.objective.gate", "teacher": "teacher.mode",
    "who acts": "data.actor", "summariser": "skills.summariser", "what the teacher sees": "skills.context",
    "learning rate": "model.optimizer.lr", "tasks an iteration": "data.batch_tasks",
    "trajectories a task": "data.group_size", "seed": "seed_everything",
}  # fmt: skip
"""Keys of the configuration in the table at the report's top."""
_SENTENCE = ("environment", "model", "seed")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lightning")


def lookup(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key, of a class its path; None where there is none."""
    found: Any = config
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found.get("class_path") if isinstance(found, Mapping) else found


def summary(run: Run) -> str:
    """The run in a sentence."""
    env, model, seed = ("unknown" if (v := lookup(run.config, KEYS[k])) is None else _plain(v) for k in _SENTENCE)
    loss = next((_plain(v) for k in ("loss", "advantage", "multiplier") if (v := lookup(run.config, KEYS[k])) is not None), "")
    loss = loss or ("skillsd.objective.SampledReverseKL" if lookup(run.config, KEYS["model"]) is not None else "unknown")
    when, made = _begun(run.folder), recorded(run).get("skillsd")
    ends = (f", begun {when}" if when else "") + (f", skillsd {_plain(made)}" if made else ", skillsd's version not recorded")
    return f"A run of {model} on {env}, loss {loss}, seed {seed}; {count(len(run.metrics), 'iteration')}{ends}."


def facts(run: Run) -> Table:
    """What was trained on what, how, with which seed, and how far."""
    rows = [(label, _plain(value)) for label, key in KEYS.items() if (value := lookup(run.config, key)) is not None]
    metrics, played = run.metrics, run.trajectories
    rows.append(("iterations", f"{len(metrics):,}"))
    rows.append(("trajectories", f"{len(played):,} of {count(played['task_id'].nunique(), 'task')}"))
    if "rollout/env_steps" in metrics:
        rows.append(("environment steps", f"{metrics['rollout/env_steps'].sum():,.0f}"))
    if parts := [name for name in ("time/rollout_s", "time/teacher_s", "time/update_s", "time/summary_s") if name in metrics]:
        rows.append(("seconds of training, panels left out", f"{metrics[parts].sum().sum():,.0f}"))
    rows += [("begun", begun)] if (begun := _begun(run.folder)) else []
    return Table(("", ""), rows, 2)


def versions(run: Run) -> Table:
    """Beside each other what the run recorded and what the machine has that writes the report."""
    then, now = recorded(run), {"skillsd": __version__, "Python": platform.python_version()} | {name: _installed(name) for name in PACKAGES}
    rows = [(name, _plain(then.get(name, "not recorded")), now.get(name, "see below")) for name in (*now, "device")]
    if "commit" in then:
        rows.insert(1, ("commit", _plain(then["commit"]), "not asked"))
    return Table(("", "the run", "this report's machine"), rows, 3)


def recorded(run: Run) -> dict[str, str]:
    """What the run's folder says of its versions and its device: name -> version. A study's cell has the most."""
    found: dict[str, str] = {}
    if match := re.match(r"# lightning\.pytorch==(\S+)", _read(run.folder / CONFIG_FILE)):
        found["lightning"] = match[1]
    student = run.folder / ADAPTER / "student"
    if match := re.search(r"by skillsd (\d\S*)", _read(student / "README.md")):
        found["skillsd"] = match[1]
    found |= _strings(student / "adapter_config.json", {"peft_version": "peft"})
    found |= _strings(run.folder / "cell.json", {"version": "skillsd", "commits": "commit"})
    devices = {part["device"]: None for part in run.panel.values() if isinstance(part, dict) and "device" in part}
    return found | ({"device": ", ".join(map(str, devices))} if devices else {})


def installed(checks: Sequence[Mapping[str, str]]) -> Table:
    """The rows of `skillsd doctor`, the home folder's name left out."""
    home = os.path.expanduser("~")  # as it stands where there is no home
    rows = [(c["check"], c["state"], visible(redacted(c["detail"].replace(home, "~")))) for c in checks]
    return Table(("check", "state", "what was found"), rows, 3)


def _plain(value: Any) -> str:
    return visible(without_keys(f"{value:g}" if isinstance(value, float) else str(value)))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _strings(path: Path, names: Mapping[str, str]) -> dict[str, str]:
    """Some values of a JSON file, under other names; of one that is damaged none."""
    found: Any = {}
    with suppress(ValueError, RecursionError):
        found = json.loads(_read(path) or "{}")
    given = {new: found.get(old) for old, new in names.items()} if isinstance(found, dict) else {}
    return {k: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in given.items() if v}


def _begun(folder: Path) -> str:
    """By the name of the first TensorBoard log."""
    times = [
        int(m[1]) for path in folder.glob("tensorboard/events.out.tfevents.*") if (m := re.search(r"tfevents\.(\d{1,11})\.", path.name))
    ]
    return f"{datetime.fromtimestamp(min(times), UTC):%Y-%m-%d %H:%M} UTC" if times else ""


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"

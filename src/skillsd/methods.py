"""`method:` of a configuration: what makes a method of the family. It is set and replaced whole.

A mapping of

    teacher      the TeacherSync callback
    skills       the SkillBank callback, as far as the method needs it: `context`, `min_reward`
    objective    model.objective
    actor        data.actor

of which each may be left out, or the name of a file that holds such a mapping under `method`: conf/method/ comes with skillsd. What it
leaves out has the defaults of the code, which are Skill-SD's. Settings of the same names in the same file, in later ones and in flags
change it; those of earlier files are not the method's, and do not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from skillsd._conf import conf_dir
from skillsd.config_errors import nearest
from skillsd.config_file import read_config
from skillsd.errors import ConfigError

PARTS = ("teacher", "skills", "objective", "actor")
OBJECTIVE = ("loss", "advantage", "multiplier", "gate", "group_filter", "distillation_weight", "policy_weight")
"""What is looked for one level too high."""
SKILLS = ("context", "min_reward")
"""Settings of `skills` that belong to a method, whether it names them or not; others are an experiment's."""


def method_names() -> list[str]:
    """The methods that come with skillsd."""
    return sorted(p.stem for p in (conf_dir() / "method").glob("*.yaml"))


def read_method(method: Any) -> dict[str, Any]:
    """The mapping that `method` is, or names.

    Args:
        method: A mapping, a name of `method_names`, or a file.

    Raises:
        ConfigError: It is none of them, or has other parts than PARTS.
    """
    where = "method"
    if isinstance(method, str):
        where, path = f"method {method}", conf_dir() / "method" / f"{method}.yaml"
        if not path.is_file():
            path = Path(method).expanduser()
        if not path.is_file():
            near = nearest(method, method_names()) or method_names()
            raise ConfigError(f"method: {method[:200]} is no method that comes with skillsd, and no file. The nearest: {', '.join(near)}.")
        method = read_config(path, method).get("method")
    if not isinstance(method, Mapping):
        raise ConfigError(f"{where}: give a name, or a mapping of {', '.join(PARTS)}.")
    if odd := [key for key in method if key not in PARTS]:
        cure = "write it under `objective:`" if odd[0] in OBJECTIVE else "set other keys beside `method:`"
        raise ConfigError(f"{where}.{odd[0]}: a method has {', '.join(PARTS)}: {cure}.")
    return dict(method)


def settings_of(method: Mapping[str, Any]) -> dict[str, Any]:
    """A method's mapping under the keys of a configuration."""
    out: dict[str, Any] = {key: deepcopy(method[key]) for key in ("teacher", "skills") if key in method}
    for key, under, name in (("objective", "model", "objective"), ("actor", "data", "actor")):
        if key in method:
            out[under] = {name: deepcopy(method[key])}
    return out


def without_method(config: Mapping[str, Any], method: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A configuration without what a later method replaces.

    Args:
        config: Nested, as a file has it.
        method: The later method's mapping.

    Returns:
        The rest, and the keys that were taken out, dotted.
    """
    rest, gone = deepcopy(dict(config)), []
    skills = method.get("skills")
    for key, names in (
        ("skills", {*SKILLS, *(skills if isinstance(skills, Mapping) else ())}),
        ("model", {"objective"}),
        ("data", {"actor"}),
    ):
        if isinstance(node := rest.get(key), dict):
            for name in [name for name in node if name in names]:
                del node[name]
                gone.append(f"{key}.{name}")
    if "teacher" in rest:
        del rest["teacher"]
        gone.append("teacher")
    return rest, gone


def merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with `above` on it, as the parser puts a later file on an earlier one; another class has other arguments."""
    for key, value in above.items():
        other = below.get(key)
        if isinstance(value, Mapping) and isinstance(other, dict):
            if value.get("class_path", other.get("class_path")) != other.get("class_path"):
                other = below[key] = {}
            merge(other, value)
        else:
            below[key] = dict(value) if isinstance(value, Mapping) else value
    return below


def expanded(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with its method's settings below its own."""
    rest = {key: value for key, value in config.items() if key != "method"}
    if config.get("method") is None:
        return dict(rest)
    return merge(settings_of(read_method(config["method"])), rest)

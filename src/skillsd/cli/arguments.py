"""Command-line arguments before they are parsed: short names of configuration files, bare switches, nulls."""

from __future__ import annotations

import json
from typing import Any

from skillsd import conf_dir
from skillsd.paths import read_path


def resolve_configs(args: list[str]) -> list[str]:
    """`-c sokoban` finds the packaged conf/sokoban.yaml where no such path exists; a bare `--skill` (or another of `bare`) means true."""
    bare, values = ("--skill", "--overwrite", "--only_report", "--steal_lock"), ("true", "false")
    args = [a.replace("--steal-lock", "--steal_lock", 1) if a.partition("=")[0] == "--steal-lock" else a for a in args]
    out = [f"{a}=true" if a in bare and b not in values else a for a, b in zip(args, [*args[1:], ""], strict=True)]
    for i, arg in enumerate(out):
        flag, _, value = arg.partition("=")
        if flag in ("-c", "--config") and not value and i + 1 < len(out):
            out[i + 1] = packaged(out[i + 1])
        elif flag == "--config" and value:
            out[i] = f"--config={packaged(value)}"
    return _nulls(out)


def _nulls(args: list[str]) -> list[str]:
    """`--model.init_args.a.b=null` as a configuration: jsonargparse 4.53 takes such a flag's null for a text or refuses it."""
    out: list[str] = []
    rest = iter(zip(args, [*args[1:], ""], strict=True))
    for arg, following in rest:
        flag, sign, value = arg.partition("=")
        if not flag.startswith("--model.init_args.") or (value if sign else following) != "null":
            out.append(arg)
            continue
        if not sign:
            next(rest)
        nested: Any = None
        for key in reversed(flag[2:].split(".")):
            nested = {key: nested}
        out.append(f"--config={json.dumps(nested)}")
    return out


def packaged(name: str) -> str:
    if (path := read_path(name, "config")).exists():
        return str(path) if name.startswith("~") else name
    relative = name.removeprefix("conf/")
    for candidate in (relative, f"{relative}.yaml"):
        if (conf_dir() / candidate).is_file():
            return str(conf_dir() / candidate)
    return name

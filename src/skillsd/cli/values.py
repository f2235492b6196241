"""Corrections of jsonargparse 4.53, for all parsers of a process: values arrive as they were given."""

from __future__ import annotations

from contextlib import suppress
from contextvars import ContextVar
from copy import deepcopy
from functools import wraps
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from jsonargparse import _typehints, set_dumper, set_parsing_settings

from skillsd.config_file import as_yaml, dump_config

_flag: ContextVar[str | None] = ContextVar("flag", default=None)
"""The text of the flag that is being parsed: it alone is still to be read as YAML. What a file holds in quotes is a text."""


_original_typehints, _original_class_type = _typehints.adapt_typehints, _typehints.adapt_class_type
_original_call, _original_check = _typehints.ActionTypeHint.__call__, _typehints.ActionTypeHint._check_type


CALLS_ANY = ["lightning.pytorch.callbacks.LambdaCallback", "lightning.pytorch.callbacks.lambda_function", "pytorch_lightning"]
"""Class paths that are refused before they are imported, beside jsonargparse's own list (os, subprocess, pickle, ...): the callback calls
any function a file names."""


def prepare_parsers() -> None:
    """Set what all parsers of a process have in common, and correct jsonargparse."""
    correct_jsonargparse()
    set_parsing_settings(import_path_denylist=CALLS_ANY, instantiate_subclass_spec_in_any=False, docstring_parse_attribute_docstrings=True)


def correct_jsonargparse() -> None:
    """Make these corrections, once.

    - The value of `--model.policy.lora='{r: 4, init: null}'` reached the parser of the class as Python prints it: null became the
      text "None", a line break two characters.
    - `--data.env_kwargs.splits.train=...` dropped the other splits.
    - Where a key takes anything, a text in quotes was read as YAML once more: "no" became false, "Task: go" a mapping.
    - The text "1e-4" was written to config.yaml as what is read back as a number.
    - A class of the user's was refused for an annotation that differs from its Protocol's. What its methods are called and take counts.
    """
    if _typehints.adapt_typehints is _adapt_typehints:
        return
    _typehints.adapt_typehints, _typehints.adapt_class_type = _adapt_typehints, _adapt_class_type
    _typehints.ActionTypeHint.__call__, _typehints.ActionTypeHint._check_type = _call, _check_type
    _typehints.protocol_type_matches = lambda *_, **__: True
    set_dumper("yaml", dump_config)


@wraps(_original_call)
def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    token = _flag.set(args[2] if len(args) == 4 and isinstance(args[2], str) else None)
    try:
        return _original_call(self, *args, **kwargs)
    finally:
        _flag.reset(token)


@wraps(_original_check)
def _check_type(self: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    return value if _is_final(value, self._typehint) else _original_check(self, value, *args, **kwargs)


@wraps(_original_typehints)
def _adapt_typehints(val: Any, typehint: Any, *args: Any, **kwargs: Any) -> Any:
    if _is_final(val, typehint):
        return val
    if isinstance(val, _typehints.NestedArg) and get_origin(typehint) is dict and get_args(typehint) == (str, Any):
        val = _put(kwargs.get("prev_val"), val.key.split("."), _read(val.val))
    return _original_typehints(val, typehint, *args, **kwargs)


def _is_final(value: Any, hint: Any) -> bool:
    """A text for a key that takes anything, beside a flag's own."""
    hints = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return isinstance(value, str) and value != _flag.get() and any(map(_typehints.accepts_any_value, hints))


def _put(mapping: Any, keys: list[str], value: Any) -> dict[str, Any]:
    """A copy of the mapping with one value in it replaced."""
    made = dict(mapping) if isinstance(mapping, dict) else {}
    made[keys[0]] = _put(made.get(keys[0]), keys[1:], value) if keys[1:] else deepcopy(value)
    return made


def _read(value: Any) -> Any:
    with suppress(yaml.YAMLError):
        value, _ = _typehints.parse_value_or_config(value, enable_path=False, simple_types=True)
    return value


@wraps(_original_class_type)
def _adapt_class_type(value: Any, *args: Any, **kwargs: Any) -> Any:
    nested = value.get("init_args") if isinstance(value, _typehints.Namespace) else None
    if isinstance(nested, _typehints.NestedArg) and not isinstance(nested.val, str):
        plain = nested.val.as_dict() if isinstance(nested.val, _typehints.Namespace) else nested.val
        value = value.clone()
        value["init_args"] = nested._replace(val=as_yaml(plain))
    return _original_class_type(value, *args, **kwargs)

"""Versions, configuration files, citation and the import rules that import-linter cannot state."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest

import skillsd

ROOT = Path(__file__).resolve().parents[1]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT)


def test_one_version() -> None:
    assert importlib.metadata.version("skillsd") == skillsd.__version__
    assert f"\nversion: {skillsd.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_console_script() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["skillsd"]
    script = importlib.metadata.EntryPoint("skillsd", declared, "console_scripts")
    assert (
        script.load() is importlib.import_module("skillsd.__main__").main
    )  # which is light: it tells what fails while others are imported


def test_every_module_at_the_top_is_described() -> None:
    """The package's docstring says what each file and folder of the listing is for."""
    top = {p.stem for p in Path(skillsd.__file__).parent.glob("*.py")} - {"__init__", "__main__"}
    top |= {f"{p.parent.name}/" for p in Path(skillsd.__file__).parent.glob("*/__init__.py")}
    described = set(re.findall(r"\w+/?", skillsd.__doc__ or ""))
    assert top <= described


def test_conf_dir_is_the_repository_s() -> None:
    assert skillsd.conf_dir() == ROOT / "conf"
    assert (skillsd.conf_dir() / "sokoban.yaml").is_file()


def test_citation_validates() -> None:
    result = run("-m", "check_jsonschema", "--builtin-schema", "vendor.citation-file-format", "CITATION.cff")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("given", [{}, {"PYTORCH_ALLOC_CONF": "a:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "b:1"}])
def test_the_allocator_s_blocks_grow(given: dict[str, str]) -> None:
    """Set before torch is imported, unless the user has set it."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    code = f"import os, skillsd; print([os.environ.get(n) for n in {names}])"
    env = {k: v for k, v in os.environ.items() if k not in names} | given
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert eval(out) == ([given.get(n) for n in names] if given else ["expandable_segments:True", None])


@pytest.mark.parametrize(
    "name",
    [
        "skillsd",
        "skillsd.testing",
        "skillsd.trajectory",
        "skillsd.skills.bank",
        "skillsd.skills.retrieval",
        "skillsd_sokoban",
        "skillsd_appworld",
    ],
)
def test_imports_neither_torch_nor_lightning(name: str) -> None:
    """The package's __init__ counts too, which import-linter does not see."""
    result = run("-c", f"import sys, {name}; print([m for m in ('torch', 'lightning', 'transformers') if m in sys.modules])")
    assert result.stdout == "[]\n", result.stdout + result.stderr


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("skillsd_sokoban", {"numpy", "gymnasium"}),
        ("skillsd_appworld", {"gymnasium"}),
        ("skillsd.objective", {"torch"}),
        ("skillsd.kernels", {"torch", "triton"}),
    ],
)
def test_imports_only(package: str, allowed: set[str]) -> None:
    graph = grimp.build_graph(package.partition(".")[0], include_external_packages=True, cache_dir=None)
    modules = {package, *graph.find_descendants(package)}
    imported = {name for module in modules for name in graph.find_modules_directly_imported_by(module)} - modules
    assert {name for name in imported if name not in sys.stdlib_module_names} <= allowed


def test_every_environment_has_its_import_rule() -> None:
    """A package under envs/ that pyproject.toml does not name would escape the import rules."""
    config = (ROOT / "pyproject.toml").read_text()
    for package in (ROOT / "envs").glob("*/__init__.py"):
        assert f'"{package.parent.name}"' in config.split("root_packages")[1].splitlines()[0]
        assert importlib.util.find_spec(package.parent.name) is not None

"""The wheel, built from the sdist and installed in an empty environment, trains from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = "runs/wheel"
FIT = ["fit", "-c", "sokoban", "--trainer.max_steps=2", f"--trainer.default_root_dir={RUN}"]
WEIGHTS = "skillsd/policy/weights/nano"

pytestmark = pytest.mark.slow


def run(*args: str | Path, cwd: Path, timeout: int = 900) -> str:
    """Run a command without the clone on any path; return its output."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    result = subprocess.run(
        [str(arg) for arg in args], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    assert result.returncode == 0, result.stdout[-5000:]
    return result.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist from the clone and the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def venv(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel in an empty environment; its dependencies are borrowed from the running one, to save minutes."""
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", folder, cwd=dist)
    run(folder / "bin" / "pip", "install", "--no-index", "--no-deps", *dist.glob("*.whl"), cwd=dist)
    (site,) = folder.glob("lib/python*/site-packages")
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site / "borrowed.pth").write_text("\n".join(paths) + "\n")  # the .pth files inside are not read: the clone stays invisible
    return folder


def test_wheel_and_sdist_hold_the_package_and_its_data(dist: Path) -> None:
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    inside = set(zipfile.ZipFile(wheel).namelist())
    environments = {path.parent.name for path in ROOT.glob("envs/*/__init__.py")}
    assert {path.split("/")[0].partition("-")[0] for path in inside} == {"skillsd", *environments}
    conf = {f"skillsd/conf/{path.relative_to(ROOT / 'conf')}" for path in ROOT.glob("conf/**/*.yaml")}
    assert "skillsd/conf/sokoban.yaml" in conf
    assert conf <= inside
    data = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / WEIGHTS).rglob("*") if path.is_file()}
    assert any(path.endswith(".safetensors") for path in data)
    assert data <= inside
    assert not [path for path in inside if path.endswith(".pyc")]
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CITATION.cff", "Makefile", "constraints.txt", "conf/sokoban.yaml", "tests/e2e/test_wheel.py"} <= names


def test_nothing_of_the_clone_is_imported(venv: Path, tmp_path: Path) -> None:
    code = "import skillsd, skillsd_sokoban; print(skillsd.__file__, skillsd_sokoban.__file__, skillsd.conf_dir())"
    for path in run(venv / "bin" / "python", "-c", code, cwd=tmp_path).split():
        assert Path(path).is_relative_to(venv.resolve())


def test_the_version_is_printed(venv: Path, tmp_path: Path) -> None:
    import skillsd

    assert skillsd.__version__ in run(venv / "bin" / "python", "-m", "skillsd", "--version", cwd=tmp_path)


def test_a_fit_runs_from_an_empty_folder(venv: Path, tmp_path: Path) -> None:
    run(venv / "bin" / "skillsd", *FIT, cwd=tmp_path)
    assert (tmp_path / RUN / "adapter" / "student" / "adapter_config.json").is_file()

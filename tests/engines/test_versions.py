"""Adapters in a folder that ranks share."""

import errno
from pathlib import Path

import pytest

from skillsd.engines.versions import Versions


def test_a_folder_that_cannot_be_written(make_policy, tmp_path, monkeypatch):
    """Told, and tried again; but a folder that is there by now is another rank's, who was faster."""
    versions, rename = Versions(make_policy(), str(tmp_path)), Path.rename

    def full(path, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        versions.now("student")
    assert not list(tmp_path.iterdir())

    def late(path, target):
        rename(path, target)
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(Path, "rename", late)
    version, _ = versions.now("student")
    assert (version.folder / "adapter_config.json").is_file() and list(tmp_path.iterdir()) == [version.folder.parent]

"""The commands that read runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from skillsd import cli


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `skillsd ARGS`; what it printed. Nothing of it commands a terminal, and an error is one line."""

    def call(*args: object, code: int = 0) -> str:
        assert cli.main(list(map(str, args))) == code
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err
        if code:
            assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        else:
            assert err == ""
        return err or out

    return call

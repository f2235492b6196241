"""The `skillsd` command, also as `python -m skillsd`."""

from __future__ import annotations

import os
import sys

from skillsd import cli


def main() -> int:
    open_streams()
    return cli.main()


def open_streams() -> None:
    """Standard streams that the caller has closed lead nowhere: otherwise the next file opened, a checkpoint say, would get their number
    and what libraries print.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


if __name__ == "__main__":
    raise SystemExit(main())

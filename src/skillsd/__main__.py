"""`python -m skillsd` is the `skillsd` command."""

from skillsd.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

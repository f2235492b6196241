"""A long run as data frames and in the browser: how long it takes to open one, to follow it while it grows, to read a trajectory and to
make a page of `skillsd view`, and in how much memory.

    python -m benchmarks.analysis                                  # 100,000 trajectories of 400 tokens
    python -m benchmarks.analysis --trajectories 20000 --tokens 4000

A thousand different trajectories are written over and over, into the temporary folder. Beside it, as the measure, the time that
reading the same file's bytes takes.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.bank import resident, timed

from skillsd.analysis import Run
from skillsd.analysis.view import pages
from skillsd.analysis.view.site import OpenRun
from skillsd.files.run_folder import CONFIG_FILE, TRAJECTORIES_FILE, write_record
from skillsd.trajectory import Trajectory, Turn


def made(n: int, tokens: int) -> Trajectory:
    rng = random.Random(n)
    turns = tuple(Turn("x" * (3 * tokens // 10), "move", 0.0) for _ in range(10))
    mask = tuple(at % 10 == 0 for at in range(tokens))
    ids, logprobs = (tuple(rng.choices(range(150_000), k=tokens)), tuple(-rng.random() if sampled else 0.0 for sampled in mask))
    return Trajectory(n // 64, f"task-{n % 500}", n % 8, 0, "", (1,) * 40, ids, mask, logprobs, turns, 0.5, 0.5, False, "horizon", n)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=400)
    args = parser.parse_args()
    lines = [(made(n, args.tokens).to_json() + "\n").encode() for n in range(1000)]
    with tempfile.TemporaryDirectory() as folder:
        write_record(Path(folder))
        Path(folder, CONFIG_FILE).touch()
        path = Path(folder, TRAJECTORIES_FILE)
        with path.open("wb") as f:
            for n in range(args.trajectories):
                f.write(lines[n % 1000])
        size = path.stat().st_size / 2**20

        def read() -> None:
            with path.open("rb") as f:
                for _ in f:
                    pass

        plain, before = min(timed(read) for _ in range(2)), resident()
        run = Run(folder)
        opened = timed(lambda: run.trajectories)
        held = resident() - before
        with path.open("ab") as f:
            f.writelines(lines[:64])

        def grown() -> None:
            run.refresh()
            assert len(run.trajectories) == args.trajectories + 64

        more = timed(grown)
        one = sorted(timed(lambda: run.tokens(random.randrange(args.trajectories))) for _ in range(200))[100]
        opened_run = OpenRun("run", Path(folder), "cpu")
        made_pages: dict[str, Callable[[], object]] = {
            "overview": lambda: pages.overview(opened_run),
            "tasks": lambda: pages.tasks(opened_run, "", "all", "-reward", 1),
            "trajectory": lambda: pages.trajectory(opened_run, args.trajectories // 2, ""),
        }

        def asked(make: Callable[[], object]) -> tuple[float, float]:
            """Seconds of the page after 64 more trajectories, and asked for again."""
            with path.open("ab") as f:
                f.writelines(lines[:64])
            return timed(lambda: (opened_run.update(), make())), timed(lambda: (opened_run.update(), make()))

        asked(made_pages["tasks"])  # the first page opens the run
        shown = {name: asked(make) for name, make in made_pages.items()}
        print(f"{args.trajectories:,} trajectories, {size:,.0f} MiB: read as bytes {plain:.1f} s")
        print(f"opened {opened:.1f} s ({opened / plain:.1f} x), {held:,.0f} MiB held")
        print(f"64 more {more * 1000:.0f} ms; the tokens of one {one * 1000:.1f} ms")
        for name, (new, again) in shown.items():
            print(f"page {name}: {new * 1000:.0f} ms after 64 more trajectories, {again * 1000:.0f} ms again")


if __name__ == "__main__":
    main()

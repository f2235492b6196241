"""A headless Chromium. `python -m tests.analysis.view.browser docs/view TRAJECTORY RUN RUN`: the pictures there, of finished runs."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
from playwright.sync_api import Browser, sync_playwright
from werkzeug.serving import make_server

from skillsd.analysis import plots
from skillsd.analysis.view.app import create_app
from skillsd.analysis.view.site import Site

SHOTS = {
    "overview": "",
    "tasks": "tasks?only=uneven",
    "trajectory": "trajectory/{n}?heat=skill",
    "skills": "skills?sort=-uses",
    "compare": "compare",
}


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's; without it tests are skipped, but not where SKILLSD_NEEDS_CHROMIUM=1, as in CI."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None and os.environ.get("SKILLSD_NEEDS_CHROMIUM") != "1":
        pytest.skip("no chromium: apt-get install chromium")
    assert found, "no chromium: apt-get install chromium"
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found, args=["--no-sandbox"])  # root has no sandbox; the pages are our own
        yield browser
        browser.close()


def main(out: str, n: str, *runs: str) -> None:
    with Site(runs) as site, chromium() as browser:
        server = make_server("127.0.0.1", 0, create_app(site, "t"), threaded=True)
        Thread(target=server.serve_forever, daemon=True).start()
        name, opened = next(iter(site.runs.items()))
        for shot, path in SHOTS.items():
            where = f"http://127.0.0.1:{server.server_port}/t/run/{name}/{path.format(n=n)}"
            for width, scheme in ((1280, "light"), (400, "dark")):
                page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
                page.goto(where)
                page.screenshot(path=Path(out) / f"{shot}-{width}.png")
                page.close()
        figure = plots.curves({name: opened.run}, "reward/success", "training episodes solved, share")
        (Path(out) / "curve.png").write_bytes(plots.png(figure, dpi=174))


if __name__ == "__main__":
    main(*sys.argv[1:])

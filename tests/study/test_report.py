"""The report's numbers, computed again from the run folders in plain Python; its files; its words."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import struct
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
from tests.study.conftest import METHODS, SEEDS

T95 = {1: 12.706205, 2: 4.302653, 3: 3.182446, 4: 2.776445}
"""97.5% quantiles of Student's t by degrees of freedom."""


def mean_interval(x: list[float]) -> tuple[float, float, float]:
    mean = sum(x) / len(x)
    half = T95[len(x) - 1] * sqrt(sum((v - mean) ** 2 for v in x) / (len(x) - 1) / len(x))
    return mean, mean - half, mean + half


def p_three(d: list[float]) -> float:
    """Two-sided p of the t test on three numbers, in closed form."""
    mean = sum(d) / 3
    t = abs(mean) / sqrt(sum((v - mean) ** 2 for v in d) / 2 / 3)
    return 1 - t / sqrt(t * t + 2)


def p_flip(d: list[float]) -> float:
    sums = [abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in itertools.product((1, -1), repeat=len(d))]
    return sum(s >= abs(sum(d)) - 1e-12 for s in sums) / len(sums)


def shown(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3g}"


def text(triple: tuple[float, float, float], sign: str = "") -> str:
    return "{} [{}, {}]".format(*(f"{100 * x:{sign}.1f}" for x in triple))


def sections(report: str) -> dict[str, str]:
    parts = re.split(r"^## (.*)$", report, flags=re.M)
    return {"head": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def table(section: str) -> dict[str, list[str]]:
    """First column -> the others."""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return {r[0]: r[1:] for r in rows}


@pytest.fixture
def panels(finished_study: Any) -> dict[str, dict[int, dict[str, Any]]]:
    """panel.json of every cell."""
    read = {m: {s: finished_study.folder / "cells" / m / f"seed-{s}" / "panel.json" for s in SEEDS} for m in METHODS}
    return {m: {s: json.loads(p.read_text()) for s, p in by_seed.items()} for m, by_seed in read.items()}


@pytest.mark.parametrize("metric", ["success", "completion"])
def test_the_report_s_numbers_are_those_of_the_run_folders(finished_study, studies, panels, metric):
    shutil.copytree(finished_study.folder, studies.folder)
    flags = ("--controls={shuffled: skillsd}", "--set.trainer.max_epochs=3", f"--metric={metric}", "--only_report=true")
    assert studies(*flags, methods=METHODS, seeds=SEEDS) == 0
    found = sections((studies.folder / "report.md").read_text())
    got = table(found[f"{metric.capitalize()} after training"])
    after = {m: [panels[m][s]["after"][metric] for s in SEEDS] for m in METHODS}
    before = [panels["grpo"][s]["before"][metric] for s in SEEDS]
    assert got["base"][:2] == ["3", text((before[0],) * 3)] and got["base"][6] == "0"
    minus = {m: [a - b for a, b in zip(v, after["grpo"], strict=True)] for m, v in {**after, "base": before}.items()}
    p = {m: p_three(minus[m]) for m in ("skillsd", "shuffled")}
    first, second = sorted(p, key=lambda m: p[m])
    holm = {first: min(1, 2 * p[first]), second: min(1, max(2 * p[first], p[second]))}
    steps = sum(4 * (10 + s) for s in SEEDS) / 3
    for m in METHODS:
        assert got[m][:2] == ["3", text(mean_interval(after[m]))] and got[m][6] == f"{steps:,.0f}"
    for m in ("skillsd", "shuffled"):
        assert got[m][2:6] == [text(mean_interval(minus[m]), "+"), shown(p[m]), shown(p_flip(minus[m])), shown(holm[m])]
    assert got["base"][2:6] == [text(mean_interval(minus["base"]), "+"), shown(p_three(minus["base"])), shown(p_flip(minus["base"])), ""]
    assert got["grpo"][2:6] == [""] * 4
    gain = [a - b for a, b in zip(after["skillsd"], after["shuffled"], strict=True)]
    expected = ["shuffled", "3", text(mean_interval(gain), "+"), shown(p_three(gain)), shown(p_flip(gain)), shown(p_three(gain))]
    assert table(found["Methods and their controls"])["skillsd"] == expected
    word = "beats" if holm["skillsd"] <= 0.05 else "cannot be told from"
    assert f"- skillsd {word} grpo: {text(mean_interval(minus['skillsd']), '+')} points over 3 seeds, Holm p" in found["Verdict"]
    assert "With 3 seeds the sign-flip test cannot give a p below 0.25" in found["Verdict"]


def test_cost_and_health(finished_study):
    found = sections((finished_study.folder / "report.md").read_text())
    cost = table(found["Cost per iteration"])["skillsd"]
    assert cost[:9] == ["1.50", "0.250", "0.500", "n/a", "2.25", "1.00", "100", "300", "1.00"]
    health = table(found["Health"])
    assert health["skillsd"] == ["0.500", "0.250", "n/a", "n/a", "0.250"] and health["grpo"][1] == "n/a"


def test_the_report_states_what_was_run(finished_study):
    head = sections((finished_study.folder / "report.md").read_text())["head"]
    commits = sorted({c for m in METHODS for s in SEEDS for c in finished_study.record(m, s)["commits"]})
    for part in (
        "3 methods x 3 seeds (0, 1, 2); how they are made stands at the end.",
        "The panel: 3 held-out episodes a run",
        "Environment steps of a run: 40 to 48.",
        "Missing cells: none.",
        "The unit is the seed",
        *commits,
    ):
        assert part in head
    ran = table(sections((finished_study.folder / "report.md").read_text())["What was run"])
    assert ran["skillsd"] == ["skillsd", ""] and ran["shuffled"] == ["shuffled", "skillsd"]
    assert (ran["configs"], ran["trainer.max_epochs"]) == (["plain"], ["3"])
    assert "WARNING" not in head or len(commits) > 1


def test_the_report_warns_of_what_spoils_a_comparison(studies):
    assert studies(seeds=(0,)) == 0
    studies.plan = {"n": 5}
    assert studies(seeds=(0, 1)) == 0
    for path, key, value in [("grpo/seed-1/cell.json", "commits", ["a", "b"]), ("grpo/seed-0/panel.json", "before", {"success": 0.4})]:
        file = studies.folder / "cells" / path
        content = json.loads(file.read_text())
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
        file.write_text(json.dumps(content))
    assert studies("--only_report=true", seeds=(0, 1)) == 0
    head = sections((studies.folder / "report.md").read_text())["head"]
    for part in (
        "not all cells were played on the same panel",
        "before training, not all methods scored the same",
        "cells were made by different commits",
    ):
        assert f"WARNING: {part}" in head
    assert "The panel: 3, 5 held-out episodes" in head


def test_one_seed_gives_no_interval_and_no_crash(studies):
    assert studies(seeds=(4,)) == 0
    report = (studies.folder / "report.md").read_text()
    assert (
        "one seed says nothing about others" in report and "[n/a, n/a]" in table(sections(report)["Success after training"])["skillsd"][1]
    )


def test_a_method_without_any_cell(studies):
    studies.plan = {f"grpo-{s}": {"fail_at": 0} for s in (0, 1)}
    assert studies() == 1
    report = sections((studies.folder / "report.md").read_text())
    assert table(report["Success after training"])["grpo"][:2] == ["0", "n/a [n/a, n/a]"]
    assert table(report["Cost per iteration"])["skillsd"][5] == "n/a"


def test_the_baseline_alone(studies):
    assert studies(methods=("grpo",)) == 0
    report = sections((studies.folder / "report.md").read_text())
    assert report["Verdict"].strip() == "" and set(table(report["Success after training"])) == {"method", "---", "base", "grpo"}


def test_the_html_needs_no_other_file(finished_study):
    page = (finished_study.folder / "report.html").read_text()
    markdown = (finished_study.folder / "report.md").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 6 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert not re.search(r"https?://|url\(|@import|<script|<link", page)
    assert len(re.findall("<table>", page)) == 6 and page.count("<tr>") == markdown.count("\n| ") - markdown.count("\n| ---")
    for sentence in sections(markdown)["Verdict"].strip().splitlines():
        assert sentence.removeprefix("- ").replace("<", "&lt;") in page
    assert "`" not in page and "nan" not in page.split("<body>")[1].split("base64")[0]


def test_the_figures_are_there_and_pictures(finished_study):
    names = re.findall(r"!\[[^]]*\]\(([^)]*)\)", (finished_study.folder / "report.md").read_text())
    assert names == ["differences.png", *(f"curves-{x}.png" for x in ("env_steps", "tokens", "seconds")), "seeds.png", "seconds.png"]
    for name in names:
        content = (finished_study.folder / name).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert 300 < width < 2500 and 200 < height < 2500


def test_an_old_run_without_times_has_fewer_figures(studies):
    assert studies() == 0
    for path in studies.folder.glob("cells/*/*/metrics.csv"):
        rows = [line.split(",")[:8] for line in path.read_text().splitlines()]
        path.write_text("".join(",".join(r) + "\n" for r in rows))
    assert studies("--only_report=true") == 0
    names = re.findall(r"\(([^)]*\.png)\)", (studies.folder / "report.md").read_text())
    assert names == ["differences.png", "seeds.png"] and "Environment steps of a run: not measured." in (
        Path(studies.folder / "report.md").read_text(encoding="utf-8")
    )

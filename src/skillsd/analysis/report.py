"""`skillsd report`: a run as one HTML file that needs no other, and as Markdown. The same run folder gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from rich.console import Console
from rich.text import Text

from skillsd.analysis import examples, origin, panel, plots
from skillsd.analysis.document import Block, Cards, Code, Heading, Picture, entities, html, markdown
from skillsd.analysis.pictures import TRUST, Pictures
from skillsd.analysis.run import Run
from skillsd.bounded import visible
from skillsd.durable import check_replaceable, sealed_folder
from skillsd.errors import ConfigError, Parser, hold_keys, without_keys
from skillsd.keys import leaves
from skillsd.paths import read_path
from skillsd.run_folder import CONFIG_FILE, check_not_of_run

CURVES = {
    "reward/success": "success", "reward/mean": "reward", "reward/completion": "completion", "teacher/gap_mean": "gap, nats",
    "policy/entropy": "entropy, nats", "loss/total": "loss", "loss/policy": "policy loss", "loss/distillation": "distillation loss",
    "time/rollout_tokens_per_s": "tokens/s, rollout", "time/learner_tokens_per_s": "tokens/s, learner", "memory/peak_gib": "memory, GiB",
}  # fmt: skip
"""Metrics that are drawn, and their titles."""
STYLE = """:root{color-scheme:light dark;--ink:#222;--paper:#fff;--line:#ccc;--soft:#f4f4f2;--word:#0550ae;--text:#0a6640;--dim:#666}
@media (prefers-color-scheme:dark){:root{--ink:#ddd;--paper:#16181b;--line:#444;--soft:#212428;--word:#79b8ff;--text:#85d6a5;--dim:#999}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;max-width:80rem;margin:1.5rem auto;padding:0 1rem;color:var(--ink);background:var(--paper)}
h1,h2,h3,p,li,.name:last-child{overflow-wrap:anywhere}
h2{margin:2.5rem 0 .5rem;border-bottom:1px solid var(--line)}h3{margin:2rem 0 .3rem;font-size:1rem}
p{margin:.4rem 0}.wide{overflow-x:auto}table{border-collapse:collapse;margin:.6rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .9rem .2rem 0;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}.name{text-align:left}
pre{font:12.5px/1.45 ui-monospace,monospace;margin:.3rem 0;padding:.4rem .6rem;background:var(--soft);border-radius:4px;
white-space:pre-wrap;overflow-wrap:anywhere;max-height:20rem;overflow-y:auto}
td:not(.name){white-space:nowrap}
@media (max-width:30rem){th,td{font-size:.74rem;padding-right:.4rem}}
.cards{display:grid;gap:.8rem;margin:.6rem 0}.cards.small{grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr))}
.cards.medium{grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr))}
.card{min-width:0}.card>p:first-child{color:var(--dim);font-size:.85rem;margin:0}.small img{width:100%;max-width:12rem;display:block}
.small pre:last-child,.large pre:last-child{border-left:3px solid var(--word)}
figure{margin:0}svg{width:100%;height:auto;display:block}summary{color:var(--dim);font-size:.8rem;cursor:pointer}
.nt,.k,.kn,.kc,.nb{color:var(--word)}.s,.s1,.s2,.l,.mi,.mf{color:var(--text)}.c,.c1{color:var(--dim)}
@media print{:root{--ink:#000;--paper:#fff;--line:#bbb;--soft:#f4f4f2;--word:#0550ae;--text:#0a6640;--dim:#555}body{margin:0;max-width:none}
pre{max-height:none}.card,figure,tr{break-inside:avoid}h2,h3{break-after:avoid}}"""
KIND = "report.html"
"""The file by which a report is known."""
META = '<meta name="viewport" content="width=device-width,initial-scale=1">'


def report(args: Sequence[str], checks: Callable[[], Sequence[dict[str, str]]]) -> None:
    """Write report.html, report.md and its pictures, and say where they are.

    Args:
        args: What follows `skillsd report`.
        checks: Gives the rows of `skillsd doctor`.

    Raises:
        ConfigError: unknown arguments, no run folder, a damaged file, or something in the report's place that is none.
    """
    parser = Parser(
        prog="skillsd report", description=f"Write a run as one HTML file that needs no other, and as Markdown with pictures. {TRUST}"
    )
    parser.add_argument("run", metavar="RUN", help="a run folder (trainer.default_root_dir), also one that is training")
    parser.add_argument("-o", "--out", metavar="FOLDER", help="a new folder, or an earlier report; default: RUN/report")
    given = parser.parse_args(args)
    run = Run(given.run)
    hold_keys(dict(leaves(run.config)))
    folder, key = (run.folder / "report", "RUN") if given.out is None else (read_path(given.out, "-o"), "-o")
    check_not_of_run(folder, key)
    check_replaceable(folder, key, KIND)
    with Console(stderr=True).status(Text(visible(f"reading {run.folder}"))), closing(Pictures(run)) as pictures:
        made = blocks(run, pictures, checks())
    try:
        with sealed_folder(folder, key, KIND) as work:
            for picture in _pictures(made):
                (work / picture.name).write_bytes(picture.png)
            (work / "report.md").write_bytes(markdown(made, entities).encode())
            (work / KIND).write_bytes(html(made, STYLE, META).encode())
    except OSError as e:
        raise ConfigError(f"-o {visible(str(folder))}: it cannot be written ({e.strerror}): name another folder.") from e
    print(f"report: {folder / KIND}, {folder / 'report.md'}")


def blocks(run: Run, pictures: Pictures, checks: Sequence[dict[str, str]]) -> list[Block]:
    """The report.

    Args:
        run: The run.
        pictures: Draws its observations.
        checks: Rows of `skillsd doctor`.
    """
    out: list[Block] = [Heading(f"Run {visible(run.folder.resolve().name)}", 1), origin.summary(run), Heading("Panel")]
    if panel.rounds(run.panel):
        out += [f"{panel.title(run.panel).capitalize()}.", panel.table(run.panel), *([told] if (told := panel.notes(run.panel)) else [])]
    else:
        out.append("No panel was played yet.")
    out += [Heading("What was run"), origin.facts(run), Heading("Curves")]
    if drawn := [[p] for p in _curves(run)]:
        shaded = "over the groups of the iterations that a point stands for, where each group measures a metric"
        out.append(f"Shaded: 95% intervals (Student's t) {shaded}.")
        out.append(Cards(drawn, "medium"))
    else:
        out.append("No iteration is finished yet.")
    shown, learnt = examples.trajectories(run, pictures), examples.skills(run)
    out += [Heading("Trajectories"), *([examples.RULE, *shown] if shown else ["None are recorded."])]
    rule = f"The {examples.SKILLS} most used of {len(run.skills)} that ever entered the bank; of equal use the older first."
    out += [Heading("Skills"), *([rule, *learnt] if learnt else ["The run has none."])]
    out += [Heading("Configuration"), _config(run), Heading("Environment"), origin.versions(run)]
    out += ["What skillsd doctor finds on the machine that wrote this report, which need not be the run's:", origin.installed(checks)]
    return out


def _curves(run: Run) -> Iterator[Picture]:
    for name, title in CURVES.items():
        if name in run.metrics and run.metrics[name].notna().any():
            figure = plots.curves({"": run}, name, title)
            yield Picture(f"{name.replace('/', '-')}.png", title, plots.png(figure), plots.svg(figure))


def _config(run: Run) -> Block:
    """As the run wrote it; `Run.config` has refused what is none."""
    if not run.config:
        return f"There is no {CONFIG_FILE}."
    text = (run.folder / CONFIG_FILE).read_text(encoding="utf-8")
    return Code(visible(without_keys(text.rstrip())), "yaml")


def _pictures(made: Sequence[Block]) -> Iterator[Picture]:
    for b in made:
        if isinstance(b, Picture):
            yield b
        elif isinstance(b, Cards):
            for card in b.cards:
                yield from _pictures(card)

"""The families of the tiny AppWorld-format tasks as plain data: what can be said about them without AppWorld."""

import ast
import re
import subprocess
import sys
from itertools import combinations, count
from pathlib import Path
from types import SimpleNamespace

import pytest

from skillsd_appworld import install

WORKER = Path(__file__).resolve().parents[2] / "envs" / "skillsd_appworld" / "worker"


@pytest.fixture(scope="module")
def source():
    """The generator's modules, found as its own interpreter finds them: beside the script."""
    sys.path.insert(0, str(WORKER))
    try:
        import make_tiny
        from tiny import content, world

        yield SimpleNamespace(make_tiny=make_tiny, content=content, world=world)
    finally:
        sys.path.remove(str(WORKER))
        for name in [name for name in sys.modules if name == "make_tiny" or name.split(".")[0] == "tiny"]:
            del sys.modules[name]


def rows_world(source, me):
    """A World that keeps its rows in `rows`, {model: [record]}, instead of a database."""

    class Rows(source.world.World):
        def __init__(self) -> None:
            super().__init__(None, me)
            self.rows: dict[str, list[SimpleNamespace]] = {}
            self.ids = count(1)

        def add(self, name, rows):
            records = [SimpleNamespace(id=next(self.ids), **row) for row in rows]
            self.rows.setdefault(name, []).extend(records)
            return records

        def ago(self, days):
            return -days

    return Rows()


def tasks(source, seed=0):
    """(family, split, scenario, content, world, draft) of every task, drawn as the generator draws them."""
    for family in (make() for make in source.make_tiny.FAMILIES):
        for split, scenarios in source.make_tiny.SCENARIOS.items():
            for scenario in range(scenarios):
                for number in range(source.make_tiny.TASKS):
                    content = source.content.Content(seed, split, f"{family.name} {scenario} {number}")
                    world = rows_world(source, content.person())
                    world.sign_up()
                    yield family, split, scenario, content, world, family.build(world, content)


def test_words_are_dealt_without_overlap(source) -> None:
    pools = (source.content.FIRST_NAMES, source.content.LAST_NAMES, source.content.ADJECTIVES, source.content.NOUNS)
    words = [word.lower() for pool in pools for word in pool]
    assert len(words) == len(set(words))
    for pool in pools:
        hands = source.content.deal(pool, seed=3)
        assert sorted(word for hand in hands.values() for word in hand) == sorted(set(pool))
        assert min(len(hand) for hand in hands.values()) == len(pool) // len(hands) >= 15


@pytest.mark.parametrize("seed", [0, 7])
def test_splits_share_no_value_and_no_instruction(source, seed: int) -> None:
    drawn: dict[str, set[str]] = {split: set() for split in source.make_tiny.SCENARIOS}
    instructions: list[str] = []
    for family, split, scenario, content, _, draft in tasks(source, seed):
        drawn[split] |= content.drawn
        instructions.append(family.phrasings[scenario % len(family.phrasings)].format(**draft.public))
        if draft.answer is not None:
            assert str(draft.answer) in content.drawn
    for one, other in combinations(drawn, 2):
        assert not drawn[one] & drawn[other]
    assert len(instructions) == len(set(instructions)) == 180


def test_code_of_every_family(source) -> None:
    names: set[str] = set()
    for make in source.make_tiny.FAMILIES:
        family = make()
        names.add(family.name)
        solution = family.solution_code({})
        ast.parse(solution)
        ast.parse(family.evaluation_code())
        assert set(re.findall(r"apis\.(\w+)\.", solution)) == {*family.apps, "supervisor"}
        assert len(family.apps) == (2 if family.tier == 3 else 1)
        labels = [check["label"] for check in family.test_data()]
        assert 4 <= len({check["requirement"] for check in family.test_data()}) == len(labels) <= 6
        assert set(labels) == {"no_op_pass", "no_op_fail"}
    assert len(names) == len(source.make_tiny.FAMILIES)


def test_an_answer_lies_beyond_the_first_page(source) -> None:
    """Songs and payments are listed in the order of their rows, contacts from the newest: the first page holds at most 20."""
    seen = set()
    for family, _, _, _, world, draft in tasks(source):
        assert (family.tier == 2) == (draft.answer is not None)
        if family.name == "most_played":
            first = {record.song_id for record in world.rows["spotify.UserLibrarySong"][:20]}
            assert draft.answer not in {song.title for song in world.rows["spotify.Song"] if song.id in first}
        elif family.name == "money_sent":
            me = world.user("venmo")
            sent: dict[int, list[float]] = {}
            for one in world.rows["venmo.Transaction"]:
                if one.sender_id == me:
                    sent.setdefault(one.receiver_id, []).append(one.amount)
            [amounts] = [amounts for amounts in sent.values() if sum(amounts) == draft.answer]
            assert len(amounts) > 20 and min(amounts) > 0 and len(sent) > 1
        elif family.name == "born_on":
            contacts = sorted(world.rows["phone.Contact"], key=lambda one: -one.created_at)
            born = [i for i, one in enumerate(contacts) if one.birthday == draft.public["date"]]
            assert len(born) == 1 and born[0] >= 20
            assert draft.answer == f"{contacts[born[0]].first_name} {contacts[born[0]].last_name}"
        else:
            assert family.tier != 2, f"say here why the first page of {family.name} does not do"
        seen.add(family.name)
    assert {"most_played", "money_sent", "born_on"} <= seen


def run(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(WORKER / "make_tiny.py"), str(root)], capture_output=True, text=True)


@pytest.mark.parametrize(("name", "says"), [("mine", "holds no tiny AppWorld-format tasks"), ("a_memory/tiny", "contains 'memory'")])
def test_refuses_a_root_in_one_line(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tiny.json").write_text('{"kind": "something else"}')
    result = run(tmp_path / name)
    assert result.returncode == 2 and says in result.stderr and result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "tiny.json"]


def test_refuses_an_interpreter_without_appworld(tmp_path: Path) -> None:
    result = run(tmp_path / "tiny")
    assert result.returncode == 2 and "has no appworld" in result.stderr and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_others_have_put_into_a_root_stays(source, tmp_path):
    for name in ("root/tiny.json", "root/experiments/mine.txt", "new/tiny.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    source.make_tiny.replace(tmp_path / "root", tmp_path / "new")
    left = {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"root/tiny.json": "new/tiny.json", "root/experiments/mine.txt": "root/experiments/mine.txt"}


def test_somebody_s_interpreter_is_not_made_anew(tmp_path, capsys, monkeypatch):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "mine.txt").write_text("precious")
    monkeypatch.setattr(sys, "argv", ["install", str(tmp_path)])
    assert install.main() == 2 and "venv" in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob("*")] == ["venv", "mine.txt"]

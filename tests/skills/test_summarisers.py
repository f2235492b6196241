"""Summaries by rules and by the policy's own model: what they say, what they are asked, and what is refused."""

import inspect
import json
import random
from functools import partial
from pathlib import Path

import pytest
from tests.skills.chat_server import ANSWER

from skillsd.skills import BaseSummariser, RulesSummariser, Summariser
from skillsd.skills.skill import FIELDS
from skillsd.skills.summarisers import FIELD_PROMPT, FIELD_QUESTIONS, SYSTEM_PROMPT, analyst_messages
from skillsd.skills.summarisers.transcript import MIN_CHARS, conversation
from skillsd.trajectory import Turn


def turns(text):
    """`A1 B2`: sees A, does 1, sees B, does 2."""
    return [Turn(pair[0], pair[1], 0.0) for pair in text.split()]


@pytest.mark.parametrize(
    ("episode", "actions", "blocked", "loops"),
    [
        ("A1", "1", 0, 0),
        ("A1 B2 C3", "123", 0, 0),
        ("A1 A2 A3 B4", "34", 2, 0),  # two turns changed nothing
        ("A1 B2 A3 C4", "34", 0, 1),
        ("A1 B2 C3 B4 D5", "145", 0, 1),
        ("A1 B2 C3 B4 A5 D6", "56", 0, 2),  # a loop inside a loop
        ("A1 B2 A3 B4 C5", "345", 0, 2),  # B was cut before it is seen again
        ("A1 B2 A3", "3", 0, 1),
    ],
)
def test_loops_are_cut(episode, actions, blocked, loops):
    digest = RulesSummariser().digest(turns(episode))
    assert ("".join(digest.actions), digest.blocked, digest.loops) == (actions, blocked, loops)
    uncut = RulesSummariser(cut_loops=False).digest(turns(episode))
    assert (uncut.kept, uncut.blocked, uncut.loops) == (len(turns(episode)), blocked, loops)


def test_cut_workflow_leads_to_the_same_place():
    # A walk on a ring of 6 cells: replaying the kept actions ends where the walk ended.
    rng = random.Random(0)
    for _ in range(50):
        cell, episode = 0, []
        for _ in range(rng.randrange(1, 20)):
            action = rng.choice("+-.")
            episode.append(Turn(str(cell), action, 0.0))
            cell = (cell + {"+": 1, "-": -1, ".": 0}[action]) % 6
        kept = RulesSummariser().digest(episode).actions
        assert sum({"+": 1, "-": -1, ".": 0}[action] for action in kept) % 6 == cell
        assert len(kept) <= 6


def test_patterns_extract_action_and_state():
    rules = RulesSummariser(joiner=" ", action_pattern="```(.*?)```", observation_pattern=r"map: (\w+)", solved_workflow="{workflow}")
    episode = [
        Turn("hello map: A", "I think ```up``` or rather\n```\nleft\n```", 0.0),
        Turn("bumped! map: A", "```down```", 0.0),
        Turn("map: B", "no action here", 0.0),
        Turn("try again, map: B", "```right```", 0.0),
    ]
    assert rules.summarise_one(episode, True, 1.0).golden_workflow == "down right"
    digest = rules.digest(episode)
    assert (digest.blocked, digest.unparsed) == (2, 1)


def test_templates_solved_and_unsolved():
    rules = RulesSummariser(
        joiner="",
        solved_success="won",
        solved_mistakes="{blocked}",
        solved_workflow="{workflow}",
        unsolved_success="lost",
        unsolved_mistakes="{completion:.2f} {turns} {kept} {cut} {blocked} {loops} {unparsed}",
        unsolved_workflow="?",
    )
    assert rules.summarise_one(turns("A1 A2"), True, 1.0).texts == ("won", "1", "2")
    assert rules.summarise_one(turns("A1 B2 A3 A4"), False, 0.5).texts == ("lost", "0.50 4 1 3 1 1 0", "?")
    with pytest.raises(ValueError, match="without turns"):
        rules.summarise_one([], True, 1.0)


def test_default_texts_are_readable_and_do_not_sell_failure():
    rules = RulesSummariser()
    for success, completion in ((True, 1.0), (False, 0.5)):
        skill = rules.summarise_one(turns("A1 B2 A3 C4"), success, completion)
        assert all(20 <= len(text.split()) <= 60 for text in skill.texts)
    assert "FAILED" in skill.golden_workflow and "50%" in skill.success_analysis


def test_the_words_of_default_skills_and_prompts_are_those_on_record(make_trajectory):
    """What skills are made with, unless set otherwise, is part of a run: whoever changes a word changes results, and this file."""
    solved = make_trajectory(pairs=[("s0", "up"), ("s1", "down"), ("s0", "left")])
    unsolved = make_trajectory(pairs=[("s0", "up"), ("s0", "left")], completion=0.5)
    ask = partial(analyst_messages, solved, FIELD_PROMPT, "")
    words = {
        "rules, solved": RulesSummariser().summarise([solved])[0].texts,
        "rules, not solved": RulesSummariser().summarise([unsolved])[0].texts,
        "analyst": [message["content"] for message in analyst_messages(solved)],
        "analyst, not solved": [message["content"] for message in analyst_messages(unsolved, system="")],
        "analyst, a field": [message["content"] for field in FIELDS for message in ask(question=FIELD_QUESTIONS[field])],
    }
    path = Path(__file__).parent / "data" / "words.json"
    assert {name: list(texts) for name, texts in words.items()} == json.loads(path.read_text(encoding="utf-8"))


def test_rules_and_prompt_defaults():
    patterns = {"joiner": ", ", "action_pattern": None, "observation_pattern": None, "cut_loops": True}
    assert patterns.items() <= {name: p.default for name, p in inspect.signature(RulesSummariser).parameters.items()}.items()
    assert [inspect.signature(f).parameters["max_chars"].default for f in (conversation, analyst_messages)] == [24_000] * 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"solved_workflow": "{workflow[1]}"}, "rules template"),
        ({"unsolved_workflow": "{plan}"}, "rules template '{plan}'"), ({"solved_success": "{"}, "rules template '{'"),
        ({"action_pattern": "("}, "^action_pattern .* no regular expression"),
        ({"observation_pattern": "["}, "^observation_pattern .* no regular expression"),
    ],
)  # fmt: skip
def test_bad_templates_are_refused_at_once(bad, message):
    with pytest.raises(ValueError, match=message):
        RulesSummariser(**bad)


def test_a_pattern_that_finds_nothing_in_its_group_finds_no_action():
    digest = RulesSummariser(action_pattern=r"go(?: (\w+))?").digest([Turn("s0", "go up", 0.0), Turn("s1", "go", 0.0)])
    assert digest.actions == ("up",) and digest.unparsed == 1


def test_rules_are_a_summariser_whose_skills_come_in_order(make_trajectory):
    rules = RulesSummariser()
    assert isinstance(rules, Summariser) and not rules.asynchronous
    group = [make_trajectory(task, member) for task in ("t2", "t1") for member in (1, 0)]
    rules.submit(5, [*group, make_trajectory("t3", pairs=())])
    rules.drain()
    ((iteration, skills, n_failed),) = rules.collect()
    assert (iteration, n_failed) == (5, 1)
    assert [(skill.task_id, skill.source_member) for skill in skills] == [("t1", 0), ("t1", 1), ("t2", 0), ("t2", 1)]
    assert rules.collect() == [] and rules.summarise(group) == RulesSummariser().summarise(group)
    rules.submit(6, group)
    rules.close()
    assert rules.collect() == []


def test_base_asks_the_bound_model(make_trajectory, caplog):
    caplog.set_level("INFO")
    base, calls = BaseSummariser(max_new_tokens=9, batch_size=2), []

    def generate(messages, max_new_tokens, keys):
        calls.append((len(messages), max_new_tokens, keys))
        return [ANSWER if key[3] != 1 else "I would rather not" for key in keys]

    group = [make_trajectory(member=member) for member in range(3)]
    with pytest.raises(RuntimeError, match="bind"):
        base.summarise(group)
    base.bind(generate)
    first, second, third = base.summarise(group)
    assert second is None and first.texts == ("s", "m", "w") and third.source_member == 2
    (said,) = caplog.messages
    assert said.startswith("no skill from t1, member 1: ")
    assert calls == [(2, 9, [(7, 3, "t1", 0), (7, 3, "t1", 1)]), (1, 9, [(7, 3, "t1", 2)])]
    base.submit(3, group)
    assert [(f.iteration, len(f.skills), f.n_failed) for f in base.collect()] == [(3, 2, 1)]
    base.bind(lambda *_: [])
    with pytest.raises(RuntimeError, match="0 answers to 2"):
        base.summarise(group)


def test_prompt_carries_what_the_analyst_needs(make_trajectory):
    system, user = analyst_messages(make_trajectory(pairs=[("map {x}", "go"), ("map 2", "on")], completion=0.5))
    assert system["role"] == "system" and user["role"] == "user"
    for part in ("Solve it.", "map {x}", "on", "Result: not solved", "Number of steps: 2", "Completion rate: 50%", '{"success_analysis"'):
        assert part in user["content"]
    assert [message["role"] for message in analyst_messages(make_trajectory(), system="")] == ["user"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens and batch_size must be >= 1"),
        ({"batch_size": 0}, "max_new_tokens and batch_size must be >= 1"),
        ({"max_chars": MIN_CHARS - 1}, f"max_chars must be >= {MIN_CHARS}, got {MIN_CHARS - 1}"),
        ({"form": "xml"}, "one of json, fields"),
        ({"questions": {"golden_workflow": "How?"}}, "set form to fields"),
        ({"form": "fields", "questions": {"plan": "How?"}}, "names plan: the fields are success_analysis"),
        ({"template": "no conversation"}, "summary template .*no {conversation}"),
        ({"template": "{"}, "summary template .*cannot be filled"),
        ({"template": "{conversation[1]}"}, "summary template .*cannot be filled"),
        ({"template": "{conversation} {result[7]}"}, "summary template .*cannot be filled"),  # only `not solved` is that long
        ({"template": "{nothing} {conversation}"}, "its fields are conversation, result, steps, completion; double other braces"),
        ({"template": "{conversation} {question}"}, "completion; double other braces"),
        ({"form": "fields", "template": "{question}"}, "no {conversation}"),
        ({"form": "fields", "template": "{conversation}"}, "summary template .*no {question}"),
        ({"form": "fields", "template": "{conversation} {question[1]}"}, "summary template .*cannot be filled"),
        ({"form": "fields", "template": "{conversation} {question} {plan}"}, "completion, question; double other braces"),
    ],
)
def test_bad_settings_of_an_analyst_say_what_to_do(bad, message):
    with pytest.raises(ValueError, match=message):
        BaseSummariser(**bad)


def test_an_analyst_s_defaults_and_least_settings():
    assert {name: p.default for name, p in inspect.signature(BaseSummariser).parameters.items()} == dict(
        max_new_tokens=512, batch_size=None, template=None, system=SYSTEM_PROMPT, max_chars=24_000, form="json", questions=None
    )
    smallest = BaseSummariser(max_new_tokens=1, batch_size=1, max_chars=MIN_CHARS)
    assert (smallest.max_new_tokens, smallest.batch_size, smallest.max_chars) == (1, 1, MIN_CHARS)

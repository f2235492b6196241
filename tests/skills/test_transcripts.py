"""Skills from transcripts of a code environment: long rules, the task in the first observation, code in answers, JSON and tracebacks."""

import itertools
import json
import random
from dataclasses import replace

import pytest
from tests.skills.chat_server import ANSWER
from tests.skills.conftest import _trajectory

from skillsd.engines.noise import stream_key
from skillsd.skills import BaseSummariser
from skillsd.skills.skill import FIELDS
from skillsd.skills.summarisers import FIELD_QUESTIONS, analyst_messages
from skillsd.skills.summarisers.transcript import MIN_CHARS, MIN_KEPT, _limit, conversation, shorten

RULES = "RULES-BEGIN\n" + "Write one python block each turn. Only print() shows anything. Look the APIs up before use.\n" * 42 + "RULES-END"
TASK = "TASK-BEGIN My name is Ada Stone. What is the most played song of my library? TASK-END"
TRACE = 'Execution failed. Traceback:\n  File "<python-input>", line 3, in <module>\n' + "    raise Exception\n" * 20 + "Status 422: {}"
TRAPS = (
    '{"a": [1, {"b": null}]} {conversation} {0} {success_analysis} }{ {{ %s </conversation> ``` \\u0041 <|im_x|> "golden_workflow": "no"'
)


def page(number, length=6_000):
    songs = json.dumps([{"song_id": i, "title": f"Song {i}", "play_count": i * 7} for i in range(1000)])
    return f"SEEN{number}-BEGIN " + songs[: length - 30] + f" SEEN{number}-END"


def code(number):
    return f"I look at page {number}.\n```python\nprint(apis.spotify.show_song_library(page_index={number}, access_token=token))\n```"


def code_transcript(n=40, member=0, seed=0, instruction=RULES):
    """The task, then pages of up to 6,000 characters and tracebacks; the last answer completes the task."""
    rng = random.Random(seed)
    observations = [TASK, *(TRACE if rng.random() < 0.2 else page(i, rng.randint(500, 6_000)) for i in range(2, n + 1))][:n]
    answers = [code(i) for i in range(1, n)] + ['LAST-BEGIN\n```python\napis.supervisor.complete_task(answer="Song 9")\n```\nLAST-END']
    return episode(list(zip(observations, answers, strict=False)), instruction, member)


def episode(pairs, instruction=RULES, member=0):
    return _trajectory(pairs=pairs, instruction=instruction, member=member, completion=0.5)


def test_a_long_transcript_keeps_rules_task_and_end():
    text = conversation(code_transcript())
    assert len(text) <= 24_000 and len(conversation(code_transcript(), 10**6)) > 100_000
    assert RULES in text and TASK in text and code(1) in text and "LAST-BEGIN" in text and "LAST-END" in text
    assert "characters left out]" in text  # each page keeps its two ends
    assert "SEEN2-BEGIN" in text and "SEEN2-END" in text and "[Turn 40: agent]" in text


def test_one_long_page_does_not_push_the_rest_out():
    pairs = [(TASK, code(1)), *((f"short {i}", code(i)) for i in range(2, 30)), (page(30, 60_000), "done")]
    text = conversation(episode(pairs))
    assert len(text) <= 24_000
    assert all(f"short {i}" in text and code(i) in text for i in range(2, 30)) and "turns" not in text.partition("RULES-END")[2]
    assert text.count("characters left out]") == 1 and "SEEN30-BEGIN" in text and "SEEN30-END" in text


def test_turns_are_left_out_in_the_middle_alone():
    pairs = [(TASK, "A1"), *((f"O{i} " + "o" * 900, f"A{i} " + "a" * 900) for i in range(2, 61))]
    text = conversation(episode(pairs), 12_000)
    (notice,) = [line for line in text.splitlines() if line.startswith("[turns ")]
    first, last = (int(word) for word in notice.split() if word.isdigit())
    shown = [i for i in range(1, 61) if f"[Turn {i}: agent]\nA{i}" in text]
    assert shown == [*range(1, first), *range(last + 1, 61)] and 1 < first < last < 60
    assert abs((first - 1) - (60 - last)) <= 1  # as many at either side
    kept = text.split("[Turn 60: environment]\n")[1].split("\n[Turn 60: agent]\n")
    assert MIN_KEPT - 40 < len(kept[0]) <= MIN_KEPT and 2 * MIN_KEPT - 40 < len(kept[1]) <= 2 * MIN_KEPT
    unheaded = conversation(episode(pairs, instruction=""), 12_000)
    (notice,) = [line for line in unheaded.splitlines() if line.startswith("[turns ")]
    first, last = (int(word) for word in notice.split() if word.isdigit())
    assert [i for i in range(1, 61) if f"[Turn {i}: agent]" in unheaded] == [*range(1, first), *range(last + 1, 61)]


def test_no_more_turns_are_left_out_than_it_takes():
    """The first turn and the last stay, then the second, the last but one, ...: as many as fit, to the character."""
    pairs = [("o" * 50, "a" * 50)] * 60  # short enough to stay whole
    order = [n for i in range(10) for n in (60 - i, 2 + i)]
    whole = {n: f"[Turn {n}: environment]\n{observation}\n[Turn {n}: agent]\n{answer}" for n, (observation, answer) in enumerate(pairs, 1)}
    budget = len(f"[Instruction]\nI\n\n{whole[1]}\n\n[turns 61 to 61 left out]")

    def shown(max_chars):
        text = conversation(episode(pairs, "I"), max_chars)
        return {n for n in whole if f"[Turn {n}: agent]" in text}

    for k, n in enumerate(order, 1):
        budget += len(whole[n]) + 2
        if budget > MIN_CHARS:
            assert shown(budget) == {1, *order[:k]} and shown(budget - 1) == {1, *order[: k - 1]}


def test_texts_are_cut_no_more_than_it_takes():
    rng = random.Random(0)
    for _ in range(200):
        texts = ["x" * rng.randint(0, 12) for _ in range(rng.randint(0, 5))]
        weights, room, least = [rng.randint(1, 2) for _ in texts], rng.randint(0, 40), rng.randint(1, 3)
        longest = max([least, *map(len, texts)])
        fits = [x for x in range(least, longest + 1) if sum(min(len(t), w * x) for t, w in zip(texts, weights, strict=True)) <= room]
        assert _limit(texts, weights, room, least) == max(fits, default=least)
    assert shorten("x" * 100, 40) == "\n[100 characters left out]\n"


def test_an_instruction_over_the_budget_keeps_both_ends_and_leaves_half():
    long = "RULES-BEGIN " + "r" * 50_000 + " RULES-END"
    text = conversation(code_transcript(instruction=long), 8_000)
    for part in ("RULES-BEGIN", "RULES-END", TASK, "LAST-BEGIN", "LAST-END", code(1)):
        assert part in text
    assert len(text) <= 8_000 and len(text.partition("[Turn 1: agent]")[0]) <= 4_100
    alone = conversation(episode([], long), 8_000)  # nothing else wants the room
    assert 7_900 < len(alone) <= 8_000 and "RULES-BEGIN" in alone and "RULES-END" in alone


def test_a_long_first_observation_keeps_both_ends():
    text = conversation(episode([(TASK + "x" * 40_000 + "ENVIRONMENT", code(1)), *((page(i), code(i)) for i in range(2, 41))]))
    assert len(text) <= 24_000 and RULES in text and TASK in text and "ENVIRONMENT" in text


def test_the_last_answer_of_the_environment_stands_at_the_end():
    t = replace(code_transcript(), final_observation="END-BEGIN " + "You have won. " * 1000 + "END-END")
    assert conversation(replace(t, turns=t.turns[-1:])).endswith("END-END")
    text = conversation(t)
    assert len(text) <= 24_000 and "LAST-END\n[After the last turn: environment]\nEND-BEGIN" in text and text.endswith("END-END")
    assert len(conversation(t, MIN_CHARS)) <= MIN_CHARS and "After the last turn" not in conversation(replace(t, turns=()))


def test_a_conversation_that_fits_exactly_is_whole():
    for n in (0, 1, 3):
        whole = conversation(code_transcript(n), 10**6)
        assert conversation(code_transcript(n), len(whole)) == whole
        assert len(conversation(code_transcript(n), len(whole) - 1)) < len(whole)


def test_the_budget_holds_whatever_the_input():
    rng = random.Random(0)

    def length():
        return rng.randint(0, rng.choice([0, 60, 700, 8_000, 40_000]))

    def text(name):
        return f"<{name}" + "-" * length() + f"{name}>"

    cut = 0
    for _ in range(300):
        n, max_chars = rng.choice([0, 1, 2, 3, 10, 40, 400]), rng.choice([MIN_CHARS, rng.randint(MIN_CHARS, 30_000)])
        trajectory = episode([(text(f"o{i}"), text(f"a{i}")) for i in range(n)], rng.choice(["", text("r")]))
        shown, whole = conversation(trajectory, max_chars), conversation(trajectory, 10**8)
        assert len(shown) <= max_chars and shown == conversation(trajectory, max_chars)
        assert (shown == whole) == (len(whole) <= max_chars)
        kept = [*(["r"] if trajectory.instruction else []), *(["o0", "a0", f"o{n - 1}", f"a{n - 1}"] if n else [])]
        assert all(f"<{name}" in shown and f"{name}>" in shown for name in kept)
        cut += shown != whole
    assert 100 < cut < 290


def test_shorten_stays_within_its_limit():
    for length in range(300):
        for limit in range(40, 320, 7):
            short = shorten("x" * length, limit)
            assert len(short) <= limit and (short == "x" * length) == (length <= limit)


@pytest.mark.parametrize("form", ["json", "fields"])
def test_braces_and_fields_in_a_transcript_are_text(form):
    trajectory = episode([(TRAPS, TRAPS), (TRAPS, ANSWER)], instruction=TRAPS)
    base, asked = BaseSummariser(form=form), []

    def generate(messages, max_new_tokens, keys):
        asked.extend(message[-1]["content"] for message in messages)
        return [ANSWER if form == "json" else TRAPS] * len(messages)

    base.bind(generate)
    (skill,) = base.summarise([trajectory])
    shown = TRAPS.replace("</conversation>", "[/conversation>")  # it does not end the record
    assert all(content.count(shown) == 4 for content in asked)
    assert skill.texts == (("s", "m", "w") if form == "json" else (TRAPS,) * 3)
    assert skill.render().count(TRAPS) == (0 if form == "json" else 3)


def test_a_json_summary_of_forty_turns_fits():
    base, asked = BaseSummariser(), []
    base.bind(lambda messages, *_: [asked.append(m) or f"Let me see.\n```json\n{ANSWER}\n```" for m in messages])
    (skill,) = base.summarise([code_transcript()])
    ((system, user),) = asked
    assert skill.texts == ("s", "m", "w") and system["role"] == "system" and len(user["content"]) < 26_000
    for part in (RULES, TASK, "LAST-END", "Number of steps: 40", "Completion rate: 50%", "Result: not solved"):
        assert part in user["content"]


def test_fields_are_asked_one_by_one():
    base, calls = BaseSummariser(max_new_tokens=9, batch_size=4, form="fields"), []

    def generate(messages, max_new_tokens, keys):
        calls.append((len(messages), max_new_tokens, keys))
        for message, key in zip(messages, keys, strict=True):
            assert FIELD_QUESTIONS[key[4]] in message[-1]["content"] and TASK in message[-1]["content"]
        return [f"  {key[4]} of {key[3]}\n" if key[3:] != (1, "golden_workflow") else " \n" for key in keys]

    base.bind(generate)
    group = [code_transcript(3, member=member) for member in range(3)]
    first, second, third = base.summarise(group)
    assert first.texts == tuple(f"{name} of 0" for name in FIELDS) and (third.source_member, third.source_iteration) == (2, 3)
    assert second is None  # a blank answer
    assert [(n, limit) for n, limit, _ in calls] == [(4, 9), (4, 9), (1, 9)]
    keys = [key for *_, batch in calls for key in batch]
    assert keys == [(7, 3, "t1", member, name) for member, name in itertools.product(range(3), FIELDS)]
    assert len({stream_key("generate", *key) for key in keys}) == 9  # no two answers share their noise
    base.submit(3, group[::-1])
    ((iteration, skills, n_failed),) = base.collect()
    assert (iteration, [skill.source_member for skill in skills], n_failed) == (3, [0, 2], 1)
    base.bind(lambda messages, *_: [""] * (len(messages) - 1))
    with pytest.raises(RuntimeError, match="3 answers to 4"):
        base.summarise(group)


def test_questions_can_be_set():
    base = BaseSummariser(form="fields", questions={"golden_workflow": "How {so}?"}, template="{conversation}|{question}", system="")
    base.bind(lambda messages, *_: [message[0]["content"].rpartition("|")[2] for message in messages])
    (skill,) = base.summarise([code_transcript(1)])
    assert skill.texts == (FIELD_QUESTIONS["success_analysis"], FIELD_QUESTIONS["mistake_analysis"], "How {so}?")
    (message,) = analyst_messages(code_transcript(1), "{conversation}|{question}", "", question="why")
    assert message["content"].endswith("|why")

"""Skills are read from a model's answer, rendered into a prompt, and take their source from a trajectory."""

import inspect
import json
import time

import pytest

from skillsd.skills import FIELDS, SKILL_TEMPLATE, Skill, SkillBank
from skillsd.skills.skill import MAX_ANSWER_CHARS, MAX_ANSWER_FIELD_CHARS, MAX_CHARS, without_thoughts

GOOD = {"success_analysis": "go", "mistake_analysis": "no {x}", "golden_workflow": "a, b"}
TEXT = json.dumps(GOOD)


def answer(**texts):
    return json.dumps({**GOOD, **texts})


@pytest.mark.parametrize(
    "answer",
    [
        TEXT,
        f"```json\n{TEXT}\n```",
        f"Sure {{thinking}}: here it is.\n```\n{TEXT}\n```\nHope {{it}} helps.",
        f'The last call was {{}} with {{{{"a": 1}}}}, so:\n{TEXT}',
        TEXT.replace('"go"', '"  go\\n"'),
        f"{{{TEXT}}}",
        "{x} " * 20 + "so: " * 8_000 + "{x} " * 20 + TEXT,
    ],
)
def test_parse_reads_the_three_fields(answer):
    assert Skill.parse(answer) == Skill("go", "no {x}", "a, b")


def test_parse_strips_what_control_characters_leave():
    """Found by fuzzing: what was read is read again as it is."""
    texts = ("\x87a\x00b\x87", "c", "d")
    assert Skill.parse(json.dumps(dict(zip(GOOD, texts, strict=True)))).texts == ("a b", "c", "d")


def test_parse_allows_raw_line_breaks_in_strings():
    assert Skill.parse(TEXT.replace("a, b", "a\nb")).golden_workflow == "a\nb"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("", "found 0"),
        ("no json", "found 0 in 'no json'$"),
        ("x" * 80, "found 0 in 'x{80}'$"),
        ("x" * 81, r"found 0 in 'x{80}\.\.\.'$"),
        (TEXT[:-5], "found 0"),
        (TEXT + TEXT, "found 2"),
        (json.dumps({**GOOD, "extra": "x"}), "; unexpected: extra"),
        (json.dumps({"success_analysis": "x"}), "; missing: mistake_analysis, golden_workflow"),
        (TEXT[:-1] + ', "golden_workflow": "c"}', "; repeated: golden_workflow"),
        (json.dumps({**GOOD, "golden_workflow": ["a"]}), "golden_workflow must be a string, not list"),
        (json.dumps({**GOOD, "golden_workflow": None}), "golden_workflow must be a string"),
        (json.dumps({**GOOD, "golden_workflow": {"a": 1}}), "golden_workflow must be a string"),
        (json.dumps({**GOOD, "mistake_analysis": " \n"}), "mistake_analysis is empty"),
        (TEXT.replace('"go"', '"\\ud800"'), "lone surrogate"),
        ("x" * 100_000, "100000 characters is not read"),
        (TEXT + " " * MAX_ANSWER_CHARS, "is not read: at most 64000$"),
        (answer(golden_workflow="x" * (MAX_ANSWER_FIELD_CHARS + 1)), "golden_workflow has 4001 characters, more than 4000"),
        (TEXT.replace('"go"', "NaN"), "must be a string, not float"),
        (TEXT.replace('"go"', "-Infinity"), "must be a string, not float"),
        (TEXT.replace('"go"', "1e999999"), "must be a string, not float"),
        (TEXT.replace('"go"', "9" * 5000), "found 0"),  # an int that Python refuses to read
        (TEXT.replace('"go"', "[" * 20_000), "found 0"),
        (answer(mistake_analysis="\0\x1b\x07"), "mistake_analysis is empty"),
        (answer(task_id="other", source_reward=9), "unexpected: source_reward, task_id"),
        (f"[{TEXT},{TEXT}]", "found 2"),
    ],
)
def test_parse_says_what_is_wrong(answer, message):
    with pytest.raises(ValueError, match=message):
        Skill.parse(answer)


@pytest.mark.parametrize("text", ['{"a":' * 12_000, '{"a":[' * 10_000, '{"a":{"b":"' * 5_000, "{" * 64_000, '{"a":[' * 900 + "0," * 29_000])
def test_no_answer_takes_long_to_read(text):
    started = time.process_time()
    with pytest.raises(ValueError, match="found 0"):
        Skill.parse(text)
    assert time.process_time() - started < 2


def test_bounds_of_texts_are_inclusive():
    longest = "x" * MAX_ANSWER_FIELD_CHARS
    assert Skill.parse(answer(**dict.fromkeys(FIELDS, longest))).texts == (longest,) * 3
    assert Skill("a", "b", "x" * MAX_CHARS).admitted().golden_workflow == "x" * MAX_CHARS
    with pytest.raises(ValueError, match="success_analysis has 24001 characters"):
        Skill("x" * (MAX_CHARS + 1), "b", "c").admitted()


@pytest.mark.parametrize("text", ["先推左边的箱子", "Толкни ящик 🙂", "أولا", "{0.__class__} {golden_workflow} %s $x {{", "a\n\tb"])
def test_other_languages_and_braces_are_data(text):
    skill = Skill.parse(answer(golden_workflow=text))
    assert skill.golden_workflow == text and skill.render("{golden_workflow}|{success_analysis}") == f"{text}|go"
    bank = SkillBank()
    (number,) = bank.insert([Skill(*skill.texts, "t")], 0)
    assert bank.get(number).golden_workflow == text


def test_control_characters_are_taken_out():
    skill = Skill.parse(answer(golden_workflow="a\x1b[31mred\x00\x9b2J\r\u202eb\x7f"))
    assert skill.golden_workflow == "a [31mred  2J  b"


def test_render_fills_the_template_and_leaves_braces_in_texts_alone():
    skill = Skill.parse(TEXT)
    assert skill.render("{golden_workflow}|{mistake_analysis}") == "a, b|no {x}"
    assert all(text in skill.render(SKILL_TEMPLATE) for text in skill.texts)


@pytest.mark.parametrize("template", ["{task_id}", "{", "{0}", "{success_analysis.nope}"])
def test_render_refuses_other_fields(template):
    with pytest.raises(ValueError, match="use only success_analysis"):
        Skill.parse(TEXT).render(template)


def test_texts_are_replaced_together():
    skill = Skill.parse(TEXT)
    assert skill.with_texts(["a", "b", "c"]).texts == ("a", "b", "c")
    with pytest.raises(ValueError, match="zip"):
        skill.with_texts(["a", "b"])


def test_a_new_skill_s_defaults():
    """A new skill was never used, has one source, and no reward."""
    given = {name: p.default for name, p in inspect.signature(Skill).parameters.items() if p.default is not p.empty}
    assert {name for name, value in given.items() if value} == {"sources"} and given["sources"] == 1


def test_of_takes_the_source(make_trajectory):
    skill = Skill("a", "b", "c").of(make_trajectory("t9", member=2, completion=0.5, iteration=4))
    assert (skill.task_id, skill.source_member, skill.source_iteration) == ("t9", 2, 4)
    assert skill.source_reward == skill.source_completion == skill.mean_reward == 0.5


@pytest.mark.parametrize(
    "wrapped",
    [
        "<think>{draft}</think>{answer}", "<think>{draft}</think> And <THINKING>{draft}</THINKING>\n{answer}", 
        "{draft}\n</think>\n{answer}",
        "{answer}<think>{draft}", "<think></think>```json\n{answer}\n```",
    ],
)  # fmt: skip
def test_drafts_among_thoughts_are_no_answer(wrapped):
    texts = dict(zip(FIELDS, ("Write <think>a plan</think> first.", "b", "c"), strict=True))
    draft, answer = json.dumps(dict.fromkeys(FIELDS, "draft")), json.dumps(texts)
    assert Skill.parse(wrapped.format(draft=draft, answer=answer)).texts == tuple(texts.values())


def test_thoughts_without_an_end_hold_no_answer():
    with pytest.raises(ValueError, match="found 0"):
        Skill.parse("<think>" + json.dumps(dict.fromkeys(FIELDS, "draft")))


def test_plain_answers_lose_the_thoughts_in_front_alone():
    quoting = "Write <think>a plan</think> first."
    for text in (quoting, f"<think>x</think>\n<think>y</think>{quoting}", f"x</think>{quoting}"):
        assert without_thoughts(text).strip() == quoting
    assert without_thoughts("<think>x") == ""


def test_spaces_around_a_text_do_not_count_to_its_length():
    long = "x" * MAX_ANSWER_FIELD_CHARS
    assert Skill.parse(json.dumps(GOOD | {"success_analysis": f" {long}\n"})).success_analysis == long


def test_thoughts_that_began_in_the_prompt_may_be_followed_by_more():
    assert Skill.parse(f"{{}} </think> so <think> {TEXT} or </think> {TEXT}") == Skill("go", "no {x}", "a, b")


def test_braces_that_cost_their_square_are_not_read_to_the_end():
    nested = '{"a":' * 800  # each of them is read to the end of all: 1,600,000 characters
    assert Skill.parse('{"a":' * 80 + "!" + TEXT) == Skill("go", "no {x}", "a, b")
    with pytest.raises(ValueError, match="found 0"):
        Skill.parse(nested + "!" + TEXT)

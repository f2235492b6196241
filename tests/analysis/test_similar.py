"""Skills by what they say."""

import warnings

import numpy as np
import pandas as pd
import pytest

from skillsd.analysis import SkillIndex
from skillsd.errors import ConfigError

TEXTS = {
    3: ("Push the box along the wall.", "Got stuck in a corner.", "left left up"),
    5: ("Push the box along the wall.", "Got stuck in a corner.", "up left left"),
    6: ("Log in first, then list the playlists.", "Forgot the password.", "login(); playlists()"),
    9: ("Log in first, then list the songs.", "Asked for a wrong page.", "login(); songs()"),
}


def skills(texts: dict[int, tuple[str, str, str]] = TEXTS) -> pd.DataFrame:
    columns = ["success_analysis", "mistake_analysis", "golden_workflow"]
    return pd.DataFrame(list(texts.values()), columns=columns, index=pd.Index(list(texts), name="skill_id", dtype=int))


def test_search_finds_words_and_the_order_of_moves():
    index = SkillIndex(skills())
    assert index.search("a password for playlists").index[0] == 6
    assert index.search("left left up").index[0] == 3 and index.search("UP left left").index[0] == 5
    found = index.search("box", n=100)
    assert list(found.index) == [3, 5] and list(found.columns) == [*skills().columns, "similarity"]
    assert found["similarity"].between(0, 1, inclusive="right").all()
    assert len(index.search("the", n=1)) == 1 and index.search("the", n=0).empty


def test_search_knows_a_skill_by_its_own_text_and_moves_of_one_letter():
    index = SkillIndex(skills())
    found = index.search("\n".join(TEXTS[9]))
    assert found.index[0] == 9 and found["similarity"].iloc[0] == pytest.approx(1) and found["similarity"].is_monotonic_decreasing
    letters = SkillIndex(skills({1: ("a", "b", "u u l"), 2: ("a", "b", "u l u")}))
    assert letters.search("u u l").index[0] == 1 and letters.search("l u").index[0] == 2


def test_neighbours_leave_the_skill_itself_out():
    index = SkillIndex(skills())
    assert index.neighbours(3, 1).index.tolist() == [5] and index.neighbours(np.int64(9)).index[0] == 6
    with pytest.raises(KeyError):
        index.neighbours(4)


def test_clusters_part_what_differs_and_are_the_seeds():
    index = SkillIndex(skills())
    two = index.clusters(2, seed=1)
    assert two.to_dict() == {3: 0, 5: 0, 6: 1, 9: 1} and two.index.name == "skill_id"
    assert index.clusters(2, seed=1).equals(two)


def test_more_clusters_than_skills_that_differ_are_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        many = SkillIndex(skills(TEXTS | {10: TEXTS[3]})).clusters(50)
    assert many.nunique() == 4 and many[3] == many[10]


@pytest.mark.parametrize("texts", [{}, {1: ("!", "?", "..."), 2: ("-", "-", "-")}])
def test_no_skills_have_no_neighbours(texts: dict[int, tuple[str, str, str]]):
    index = SkillIndex(skills(texts))
    assert index.search("left").empty and index.clusters(3).tolist() == [0] * len(texts)
    assert all(index.neighbours(skill_id).empty for skill_id in texts)


def test_unknown_words_find_nothing():
    assert SkillIndex(skills()).search("zebra \x1b[31m").empty
    assert SkillIndex(skills()).search("").empty


def test_impossible_numbers_are_refused():
    with pytest.raises(ConfigError, match=r"n: -1 .*0 or more"):
        SkillIndex(skills()).search("left", n=-1)
    with pytest.raises(ConfigError, match=r"n: 0 .*1 or more"):
        SkillIndex(skills()).clusters(0)

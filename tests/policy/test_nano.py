"""The nano tokenizer: what it decodes it reads back."""

import pytest

from skillsd.policy import PolicySettings
from skillsd.policy.load import load_tokenizer
from skillsd.policy.nano import build_tokenizer

BOARD = "######\n#____#\n#_XOP#\n#__###\n#T_S##\n######"


@pytest.mark.parametrize("text", ["left", "up left", BOARD, f"answer with one move.\n{BOARD}", "plan:up,left,12\nno"])
def test_round_trip(text):
    t = build_tokenizer()
    ids = t(text, add_special_tokens=False).input_ids
    assert t.unk_token_id not in ids and t.decode(ids) == text


def test_a_board_costs_a_token_a_cell_and_a_row():
    t = build_tokenizer()
    assert len(t(BOARD, add_special_tokens=False).input_ids) == 4 * 4 + 5


def test_the_packaged_tokenizer_is_this_one():
    packaged, built = load_tokenizer(PolicySettings()), build_tokenizer()
    assert packaged.get_vocab() == built.get_vocab() and packaged.chat_template == built.chat_template
    assert packaged.backend_tokenizer.to_str() == built.backend_tokenizer.to_str()

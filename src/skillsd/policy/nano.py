"""The nano agent's tokenizer and shape: a Qwen3 decoder of about 1M parameters that reads Sokoban as tokens.

The tokenizer is word-level and made in code. A board costs one token per inner cell and one per row: the outer wall that
ends one row and begins the next is a single token (`#\\n#`). Spaces between words are not tokens; decoding puts them back.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

PAD, UNK, SYSTEM, ASSISTANT, END = "<|pad|>", "<|unk|>", "<|system|>", "<|assistant|>", "<|end|>"
SIDES = range(4, 11)
SYMBOLS = "#_OXPTS"
WORDS = """up down left right solved unsolved partly none plan skill success mistakes workflow answer with one of the not a move
moves turns turn repeated blocked loops loop avoid box boxes on target wall stuck corner accepted is in after no yes try again and
to from first then last push pulled player goal all map rules before at""".split()

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|end|>"
    "{% elif m['role'] == 'system' %}<|system|>{{ m['content'] }}<|end|>"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer with its chat template. Unknown words become `<|unk|>`."""
    tops = [f"{'#' * n}\n#" for n in SIDES]
    bottoms = [f"#\n{'#' * n}" for n in SIDES]
    special = [PAD, UNK, SYSTEM, ASSISTANT, END]
    words = [*special, *SYMBOLS, "#\n#", *tops, *bottoms, "\n", *map(str, range(10)), *",.:;()`-/", *WORDS]
    vocab = {w: i for i, w in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    # The longest wall first; a bottom wall is one that no further row follows.
    board = [rf"(?<![#_OXPTS])#{{{n}}}\n#(?=[#_OXPTS])" for n in reversed(SIDES)]
    board += [rf"#\n#{{{n}}}(?![#_OXPTS]|\n[#_OXPTS])" for n in reversed(SIDES)] + [r"#\n#"]
    pattern = "|".join([*board, r"\n", r"[#_OXPTS]", r"[a-z]+", r"[0-9]", r"[^\sa-z0-9]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    # A space behind every word, then only those between two words are kept.
    behind, spare = decoders.Replace(Regex(r"(?<=[a-z])$"), " "), decoders.Replace(Regex(r" (?![a-z])"), "")
    tokenizer.decoder = decoders.Sequence([behind, decoders.Fuse(), spare])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNK, eos_token=END)
    fast.add_special_tokens({"additional_special_tokens": [SYSTEM, ASSISTANT]})
    fast.chat_template = TEMPLATE
    return fast


def build_config(vocab_size: int, **overrides: object) -> Qwen3Config:
    """The architecture of the nano agent."""
    settings: dict[str, object] = dict(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, pad_token_id=0, eos_token_id=4, bos_token_id=None,
    )  # fmt: skip
    return Qwen3Config(**{**settings, **overrides})

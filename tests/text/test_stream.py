"""Text from tokens piece by piece."""

from pathlib import Path

import pytest

from jmoe.text import encode, load_tokenizer
from jmoe.text.stream import REPLACEMENT, TextStream

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"
TEXT = "Licensed under π and 漢字 and 🙂, \n the Apache License"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_character_waits_for_all_its_bytes(size: int) -> None:
    tokenizer = load_tokenizer(TINY)
    tokens = encode(tokenizer, TEXT)
    stream = TextStream(tokenizer)
    pieces = [stream.push(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == TEXT
    assert any(tokenizer.decode([token]) == REPLACEMENT for token in tokens)


def test_a_character_cut_short_is_replaced_at_the_end() -> None:
    tokenizer = load_tokenizer(TINY)
    tokens = encode(tokenizer, "so 🙂")[:-1]
    stream = TextStream(tokenizer)
    assert stream.push(tokens) == "so "
    assert stream.finish() == REPLACEMENT
    assert stream.finish() == ""


def test_bytes_that_are_no_character_do_not_hold_up_the_text() -> None:
    tokenizer = load_tokenizer(TINY)
    broken = encode(tokenizer, "🙂")[:-1] + encode(tokenizer, "a") + encode(tokenizer, "b")
    stream = TextStream(tokenizer)
    assert [stream.push([token]) for token in broken][-2:] == [REPLACEMENT + "a", "b"]


@pytest.mark.parametrize(("show", "want"), [(False, "Hi"), (True, "<|start|>Hi<|end|>")])
def test_special_tokens_are_shown_on_demand(show: bool, want: str) -> None:
    tokenizer = load_tokenizer(TINY)
    assert TextStream(tokenizer, show_special=show).push(encode(tokenizer, "<|start|>Hi<|end|>")) == want

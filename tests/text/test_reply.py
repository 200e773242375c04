"""Replies by channel, up to the strings that end them."""

from typing import Any

import pytest

from jmoe.text import encode, load_tokenizer
from jmoe.text.channels import FINAL, ChannelText
from jmoe.text.reply import Form, Reply
from tests.channel_tokenizer import TINY, channel_tokenizer

THOUGHT = "<|channel|>analysis<|message|>Say: one\n\ntwo STOP<|end|>"
ANSWER = "<|start|>assistant<|channel|>final<|message|>one STOP two"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return channel_tokenizer()


def read(tokenizer: Any, text: str, size: int, stop: tuple[str, ...] = (), **options: Form) -> Reply:
    """The reply of a text's tokens, so many at a time; its pieces make up its messages."""
    reply = Reply(tokenizer, stop, **options)
    tokens = encode(tokenizer, text)
    pieces = [piece for i in range(0, len(tokens), size) for piece in reply.push(tokens[i : i + size])]
    pieces += reply.finish()
    assert "".join(piece.text for piece in pieces) == "".join(message.text for message in reply.messages)
    return reply


@pytest.mark.parametrize("size", [1, 3, 100])
def test_stop_strings_act_in_the_final_channel_alone(tokenizer: Any, size: int) -> None:
    reply = read(tokenizer, THOUGHT + ANSWER, size, ("STOP", "\n\n"))
    assert reply.channels == {"analysis": "Say: one\n\ntwo STOP", "final": "one "}
    assert reply.stop_string == "STOP"
    assert reply.answered
    assert len(reply.tokens) == len(encode(tokenizer, THOUGHT + ANSWER.removesuffix(" two")))


def test_a_reply_that_only_thinks_has_no_answer(tokenizer: Any) -> None:
    reply = read(tokenizer, THOUGHT, 2, ("STOP",))
    assert (reply.text(), reply.text("analysis"), reply.answered) == ("", "Say: one\n\ntwo STOP", False)
    assert reply.stop_string is None


def test_a_call_names_its_tool(tokenizer: Any) -> None:
    reply = read(tokenizer, '<|channel|>commentary to=functions.f<|message|>{"a": 1}', 2)
    assert reply.messages == [ChannelText("commentary", '{"a": 1}', "functions.f")]


def test_what_is_held_back_comes_at_the_end(tokenizer: Any) -> None:
    assert read(tokenizer, "<|channel|>final<|message|>one ST", 2, ("STOP",)).channels == {FINAL: "one ST"}


def test_whole_replies_have_all_tokens(tokenizer: Any) -> None:
    assert read(tokenizer, THOUGHT + ANSWER, 2, form="tokens").text() == THOUGHT + ANSWER
    assert read(tokenizer, THOUGHT + ANSWER, 2, ("<|end|>",), form="tokens").text() == THOUGHT.removesuffix("<|end|>")


def test_without_channels_all_text_is_the_answer() -> None:
    reply = read(load_tokenizer(TINY), "one STOP", 1, ("STOP",))
    assert (reply.text(), reply.answered) == ("one ", True)

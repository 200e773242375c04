"""Replies by channel: whole ones, broken ones, and the same however their tokens come."""

from typing import Any

import pytest

from jmoe.text import encode, load_tokenizer
from jmoe.text.channels import COMMENTARY, FINAL, OUTSIDE, ChannelReader, ChannelText, has_channels
from tests.channel_tokenizer import TINY, channel_tokenizer

THOUGHT = "<|channel|>analysis<|message|>Let me think: π 🙂<|end|>"
ANSWER = "<|start|>assistant<|channel|>final<|message|>It is 4 漢字.<|return|>"
CALL = '<|channel|>commentary to=functions.get_time <|constrain|>json<|message|>{"zone": "UTC"}<|call|>'


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return channel_tokenizer()


def read(tokenizer: Any, reply: str, size: int | None = None) -> tuple[ChannelReader, list[ChannelText]]:
    """(the reader, its pieces) of a reply, `size` tokens at a time."""
    reader = ChannelReader(tokenizer)
    tokens = encode(tokenizer, reply)
    size = size or len(tokens) or 1
    pieces = [piece for i in range(0, len(tokens), size) for piece in reader.push(tokens[i : i + size])]
    return reader, pieces + reader.finish()


def joined(pieces: list[ChannelText]) -> dict[str, str]:
    """The text of each channel."""
    channels = dict.fromkeys(piece.channel for piece in pieces)
    return {channel: "".join(piece.text for piece in pieces if piece.channel == channel) for channel in channels}


@pytest.mark.parametrize("size", [1, 2, 5, None])
def test_thinking_and_answer_are_apart(tokenizer: Any, size: int | None) -> None:
    reader, pieces = read(tokenizer, THOUGHT + ANSWER, size)
    assert joined(pieces) == {"analysis": "Let me think: π 🙂", "final": "It is 4 漢字."}
    assert reader.text("analysis") == "Let me think: π 🙂"
    assert reader.reached_final
    assert reader.final_ended
    assert not any("\ufffd" in piece.text for piece in pieces)


def test_a_reply_that_is_still_thinking_has_not_reached_its_answer(tokenizer: Any) -> None:
    reader, _ = read(tokenizer, THOUGHT + "<|start|>assistant<|channel|>final")
    assert not reader.reached_final
    begun, _ = read(tokenizer, THOUGHT + ANSWER.removesuffix("<|return|>"))
    assert (begun.reached_final, begun.final_ended) == (True, False)


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        CALL.replace("<|channel|>commentary to=functions.get_time ", " to=functions.get_time<|channel|>commentary "),
        f"{THOUGHT}<|start|>assistant to=functions.get_time{CALL.replace(' to=functions.get_time ', ' ')}",
    ],
)
@pytest.mark.parametrize("size", [1, None])
def test_a_tool_call_has_its_recipient_wherever_the_header_says_it(tokenizer: Any, call: str, size: int | None) -> None:
    reader, pieces = read(tokenizer, call, size)
    calls = [piece for piece in pieces if piece.channel == COMMENTARY]
    assert {piece.recipient for piece in calls} == {"functions.get_time"}
    assert reader.text(COMMENTARY) == '{"zone": "UTC"}'
    assert reader.text(OUTSIDE) == ""
    assert not reader.reached_final


@pytest.mark.parametrize("size", [1, None])
def test_each_call_is_one_as_it_was_written(tokenizer: Any, size: int | None) -> None:
    call = CALL.removesuffix("<|call|>") + "<|end|><|start|>assistant"
    said = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
    nothing = "<|channel|>commentary to=functions.now<|message|><|call|>"
    reader, _ = read(tokenizer, said + call + call + nothing, size)
    zone = ChannelText(COMMENTARY, '{"zone": "UTC"}', "functions.get_time")
    assert reader.calls == [zone, zone, ChannelText(COMMENTARY, "", "functions.now")]


@pytest.mark.parametrize("size", [1, 3, None])
@pytest.mark.parametrize(
    ("reply", "texts"),
    [
        ("Just an answer.<|return|>", {FINAL: "Just an answer."}),
        ("to be or not<|return|>", {FINAL: "to be or not"}),
        (" to=3", {FINAL: " to=3"}),
        ("<|message|>No channel<|return|>", {FINAL: "No channel"}),
        ("Answer<|end|><|start|>user<|message|>And?", {FINAL: "Answer", OUTSIDE: "And?"}),
        ("<|channel|>musing<|message|>Hm<|end|>", {"musing": "Hm"}),
        ("<|channel|>analysis", {OUTSIDE: "analysis"}),
        ("<|channel|>analysis<|end|>lost?", {OUTSIDE: "analysis\nlost?"}),
        ("<|channel|>final<|channel|>final<|message|>4", {OUTSIDE: "final", FINAL: "4"}),
        ("<|channel|><|message|>4", {OUTSIDE: "4"}),
        ("<|channel|>analysis<|message|>a<|channel|>final<|message|>b", {"analysis": "a", FINAL: "b"}),
        ("<|channel|>analysis<|message|>a<|start|>assistant<|message|>b", {"analysis": "a", FINAL: "b"}),
        ("<|channel|>final<|message|>a<|message|>b<|constrain|>c", {FINAL: "abc"}),
        ("<|start|>assistant to=functions.x<|message|>{}<|call|>", {COMMENTARY: "{}"}),
        (THOUGHT + "<|start|>assistant" + CALL + THOUGHT.replace("Let", "Now"), {
            "analysis": "Let me think: π 🙂\nNow me think: π 🙂", COMMENTARY: '{"zone": "UTC"}'}),
        ("<|end|><|call|><|constrain|><|message|>", {}),
        ("", {}),
    ],
)  # fmt: skip
def test_no_sequence_loses_text_or_is_an_error(
    tokenizer: Any, reply: str, texts: dict[str, str], size: int | None
) -> None:
    reader, pieces = read(tokenizer, reply, size)
    assert joined(pieces) == texts
    assert all(reader.text(channel) == text for channel, text in texts.items())
    assert reader.reached_final == (FINAL in texts)


def test_plain_text_is_not_held_back(tokenizer: Any) -> None:
    reader = ChannelReader(tokenizer)
    assert "".join(piece.text for piece in reader.push(encode(tokenizer, "Well, to"))) == "Well, to"


def test_a_character_cut_short_is_replaced_at_its_messages_end(tokenizer: Any) -> None:
    begun = encode(tokenizer, "<|channel|>analysis<|message|>so 🙂")[:-1]
    reader = ChannelReader(tokenizer)
    assert joined(reader.push(begun)) == {"analysis": "so "}
    assert reader.push(encode(tokenizer, "<|end|>")) == [ChannelText("analysis", "\ufffd")]


def test_without_channels_all_text_is_final() -> None:
    tokenizer = load_tokenizer(TINY)
    assert (has_channels(tokenizer), has_channels(channel_tokenizer())) == (False, True)
    reader, pieces = read(tokenizer, "One<|end|><|start|>two", size=1)
    assert joined(pieces) == {FINAL: "Onetwo"}
    assert reader.reached_final

"""Turns of a conversation as people write them: roles, contents in parts, thinking, calls, and what is not trained."""

import datetime
import json
from typing import Any

import pytest

from jmoe.conversations.turns import Turn, read_turns

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Ho"}


def read(message: Any) -> Turn:
    (turn,) = read_turns("messages", [message])
    return turn


def call(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("message", "want"),
    [
        ({"from": "human", "value": "Hi"}, USER),
        ({"from": "gpt", "value": "Ho"}, ASSISTANT),
        ({"from": "system", "value": "a"}, {"role": "system", "content": "a"}),
        ({"from": "observation", "value": "a"}, {"role": "tool", "content": "a"}),
        ({"role": "function", "name": "f", "content": "3"}, {"role": "tool", "name": "f", "content": "3"}),
        ({**USER, "thinking": None, "tool_calls": None, "name": None}, USER),
        ({**ASSISTANT, "tool_calls": []}, ASSISTANT),
        ({**ASSISTANT, "reasoning_content": "hm"}, {**ASSISTANT, "thinking": "hm"}),
        ({**ASSISTANT, "reasoning": "hm", "thinking": "hm"}, {**ASSISTANT, "thinking": "hm"}),
        ({**USER, "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, USER),
        ({**USER, "content": ["H", {"text": "i", "image_url": None}]}, USER),
        ({**ASSISTANT, "content": [{"type": "output_text", "text": "Ho"}]}, ASSISTANT),
        ({**ASSISTANT, "channel": "final"}, ASSISTANT),
        ({**USER, "id": 3}, {**USER, "id": 3}),
    ],
)
def test_turns_are_read_as_templates_know_them(message: Any, want: Any) -> None:
    assert read(message).message == want


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'])
def test_arguments_are_an_object_or_one_as_json(arguments: Any) -> None:
    assert read(call(arguments)).message == call({"city": "Oslo"})


@pytest.mark.parametrize("message", [call(None), {"role": "assistant", "tool_calls": [{"name": "f"}]}])
def test_a_call_without_arguments_has_none(message: Any) -> None:
    (found,) = read(message).message["tool_calls"]
    assert found.get("function", found) == {"name": "f", "arguments": {}}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"role": "assistant", "tool_calls": '[{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]'},
        {"role": "assistant", "tool_calls": ['{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}']},
    ],
)
def test_older_forms_of_calls_and_those_written_as_json_are_read(message: Any) -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    assert read(message).message == {"role": "assistant", "tool_calls": calls}


@pytest.mark.parametrize(
    ("said", "trained"),
    [
        ({}, None),
        ({"weight": 0}, False),
        ({"weight": 1}, True),
        ({"weight": 0.0}, False),
        ({"train": False}, False),
        ({"train": True, "weight": 1}, True),
        ({"weight": None, "train": None}, None),
    ],
)
def test_weight_and_train_say_whether_a_turn_is_trained(said: Any, trained: bool | None) -> None:
    assert read({**ASSISTANT, **said}) == Turn(ASSISTANT, trained)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({**ASSISTANT, "weight": 0.5}, r"weight must be 0 \(not trained\) or 1, got 0.5"),
        ({**ASSISTANT, "weight": -1}, r"weight must be 0 .* got -1"),
        ({**ASSISTANT, "weight": "0"}, r"weight must be 0 .* got '0'"),
        ({**ASSISTANT, "weight": True}, r"weight must be 0 .* got True"),
        ({**ASSISTANT, "weight": []}, r"weight must be 0 .* got \[\]"),
        ({**ASSISTANT, "train": 0}, r"train must be true or false, got 0"),
        ({**ASSISTANT, "train": "false"}, r"train must be true or false, got 'false'"),
        ({**ASSISTANT, "train": True, "weight": 0}, r"must say one thing, got weight 0 and train true"),
        ({**USER, "weight": 1}, r"must be the assistant's to be trained, got role 'user'"),
        ({"from": "narrator", "value": "a"}, r"from must be one of human, .* got 'narrator'"),
        ({"from": [], "value": "a"}, r"from must be one of human, .* got \[\]"),
        ({"from": "human"}, r"value must be a string, got None"),
        ({**USER, "role": 3}, r"role must be a string that is not empty, got 3"),
        ({**USER, "content": 4}, r"content must be a string, got 4"),
        ({**ASSISTANT, "content": 4}, r"content must be a string that is not empty, got 4"),
        ({**ASSISTANT, "content": {"a": 1}}, r"content must be a string that is not empty, got \{'a': 1\}"),
        ({"role": "tool", "content": {"a": 1}}, r"content must be a string, got \{'a': 1\}"),
        ({**USER, "content": [{"type": "image_url", "image_url": "u"}]}, r"content\[0\] must be text, .*'image_url'"),
        (
            {**USER, "content": [{"type": "text"}]},
            r"content\[0\] must be \{\"type\": \"text\", .*got \{'type': 'text'\}",
        ),
        ({**USER, "content": [3]}, r"content\[0\] must be .* got 3"),
        ({**ASSISTANT, "content": "", "thinking": "hm"}, r"must have content or a call, got thinking alone"),
        ({**ASSISTANT, "content": None, "reasoning_content": "hm"}, r"got thinking alone"),
        ({**ASSISTANT, "thinking": 3}, r"thinking must be a string, got 3"),
        ({**ASSISTANT, "thinking": "a", "reasoning_content": "b"}, r"one thinking, got different thinking and reason"),
        ({**ASSISTANT, "channel": "analysis"}, r"channel must be \"final\": .* got 'analysis'"),
        ({**ASSISTANT, "name": 3}, r"name must be a string, got 3"),
        ({**ASSISTANT, "tool_calls": {"name": "f"}}, r"tool_calls must be a list of calls, got \{'name': 'f'\}"),
        ({**ASSISTANT, "tool_calls": ["f"]}, r"tool_calls\[0\] must be a call .* got 'f'"),
        ({**ASSISTANT, "tool_calls": [{"function": {}}]}, r"tool_calls\[0\] must be a call"),
        ({**ASSISTANT, "tool_calls": [{"function": {"arguments": {}}}]}, r"tool_calls\[0\]'s name must be a string"),
        ({**call({}), "function_call": {"name": "f"}}, r"must have tool_calls or function_call, got both"),
        (call("{city: Oslo}"), r"tool_calls\[0\]: the arguments of f must be JSON .* got '\{city: Oslo\}'"),
        (call(""), r"the arguments of f must be JSON"),
        (call('{"a": 1, "a": 2}'), r"the arguments of f must be JSON .*each name once, got 'a' with 1 and 2"),
        (call('{"a": NaN}'), r"the arguments of f must be JSON \(NaN is not JSON\)"),
        (call("[1]"), r"the arguments of f must be an object, or one as JSON, got '\[1\]'"),
        (call(json.dumps('{"a": 1}')), r"the arguments of f must be an object"),
        (call("null"), r"the arguments of f must be an object, or one as JSON, got 'null'"),
        (call([1]), r"the arguments of f must be an object, or one as JSON, got \[1\]"),
        (call({"a": float("nan")}), r"the arguments of f must be JSON .* got \{'a': nan\}"),
        (call({"a": datetime.date(2026, 1, 2)}), r"the arguments of f must be JSON .*date"),
        (call("[" * 100_000), r"the arguments of f must be JSON"),
    ],
)
def test_turns_that_cannot_be_read_are_named(message: Any, error: str) -> None:
    with pytest.raises(ValueError, match=rf"^messages\[0\]\.?.*{error}"):
        read(message)


def test_keys_that_no_format_has_are_named() -> None:
    assert read({**USER, "id": 3, "timestamp": "now"}).unknown == ("id", "timestamp")

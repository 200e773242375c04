"""Words that a chat template leaves out: gpt-oss's own, and small ones."""

from pathlib import Path
from typing import Any

import pytest

from jmoe.conversations.guard import check_conversation
from jmoe.conversations.rows import Conversation
from jmoe.text import load_tokenizer
from tests.conversations.reading import parse_row

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Ho"}
RESULT = {"role": "tool", "content": "sunny"}


def call(*names: str, **more: Any) -> dict[str, Any]:
    calls = [
        {"id": f"id-{name}", "type": "function", "function": {"name": name, "arguments": {"city": "Oslo", "days": 2}}}
        for name in names
    ]
    return {"role": "assistant", "tool_calls": calls, **more}


def check(tokenizer: Any, *messages: Any, **columns: Any) -> int:
    row = parse_row({"messages": list(messages), **columns})
    assert isinstance(row, Conversation)
    return check_conversation(tokenizer, row)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be brief"}, USER, ASSISTANT],
        [{"role": "developer", "content": " Be brief\n"}, USER, {**ASSISTANT, "thinking": "hm"}],
        [USER, {**USER, "content": ""}, {**ASSISTANT, "content": ' "π"\n'}],
        [USER, call("f"), {**RESULT, "content": ' {"a": "π\\n"}\n'}, ASSISTANT],
        [USER, call("f", thinking="hm"), {**RESULT, "name": "f"}],
        [USER, call("f"), {**RESULT, "name": "functions.f"}],
        [USER, call("f", content="hm")],
        [USER, call("f"), {**RESULT, "tool_call_id": "id-f"}, call("g"), {**RESULT, "tool_call_id": "id-g"}, ASSISTANT],
    ],
)
def test_gpt_oss_writes_all_words_of_these(harmony_tokenizer: Any, messages: list[Any]) -> None:
    assert check(harmony_tokenizer, *messages) == 0


@pytest.mark.parametrize(
    ("messages", "left_out"),
    [
        ([USER, ASSISTANT, {"role": "system", "content": "Hi"}, USER, ASSISTANT], r"messages\[2\]\.content \(system\)"),
        ([USER, ASSISTANT, {"role": "developer", "content": "i"}, USER, ASSISTANT], r"messages\[2\]\.content"),
        (
            [{"role": "system", "content": "a"}, {"role": "developer", "content": "a"}, USER, ASSISTANT],
            r"messages\[1\]",
        ),
        ([USER, call("f", "f"), RESULT, ASSISTANT], r"messages\[1\]\.tool_calls\[1\]\.function\.name .* 'f'"),
        ([USER, call("f", content="Ho"), RESULT, ASSISTANT], r"messages\[1\]\.content .*'Ho': write words that"),
        ([USER, call("f"), call("g"), {**RESULT, "name": "f"}], r"messages\[3\]\.name \(tool\), 'f'"),
        (
            [USER, call("f"), call("g"), {**RESULT, "tool_call_id": "id-f"}],
            r"messages\[3\]\.tool_call_id \(tool\), 'f'",
        ),
        ([USER, call("f"), {**RESULT, "name": "Oslo"}], r"messages\[2\]\.name \(tool\), 'Oslo'"),
        ([{**USER, "thinking": "Hi"}, ASSISTANT], r"messages\[0\]\.thinking \(user\), 'Hi'"),
    ],
)
def test_what_gpt_oss_leaves_out_is_named_though_others_say_the_same(
    harmony_tokenizer: Any, messages: list[Any], left_out: str
) -> None:
    with pytest.raises(ValueError, match=f"the chat template leaves out {left_out}"):
        check(harmony_tokenizer, *messages)


def test_thinking_that_gpt_oss_leaves_out_of_earlier_turns_is_counted(harmony_tokenizer: Any) -> None:
    thinking = {**ASSISTANT, "thinking": "Ho"}
    assert check(harmony_tokenizer, USER, thinking, USER, call("f", thinking="hm"), RESULT, thinking) == 2
    assert check(harmony_tokenizer, USER, thinking, USER) == 1


def test_tools_must_be_known_to_the_template(harmony_tokenizer: Any) -> None:
    tools = [{"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]
    assert check(harmony_tokenizer, USER, ASSISTANT, tools=tools) == 0
    with pytest.raises(ValueError, match=r"leaves out tools\[0\]\.function\.name, 'get_weather'"):
        check(load_tokenizer(TINY), USER, ASSISTANT, tools=tools)


def test_the_last_turns_thinking_is_not_left_out() -> None:
    with pytest.raises(ValueError, match=r"leaves out messages\[1\]\.thinking \(assistant\), 'Hi'"):
        check(load_tokenizer(TINY), USER, {**ASSISTANT, "thinking": "Hi"})


@pytest.mark.parametrize(
    ("write", "left_out"),
    [
        ("{{ m.content | trim }}", None),
        ("{{ m.content | tojson }}", None),
        ("{{ m.content | tojson(ensure_ascii=True) }}", None),
        ("{% if m.content != 'b' %}{{ m.content }}{% endif %}", "'b'"),
        ("{{ m.content.split('</think>')[-1] }}", "'t</think>c'"),
        ("{{ m.content | upper }}", "' a \"π\"\\\\n'"),
        ("{% if 'zq' in m.content %}{{ raise_exception('words') }}{% endif %}{{ m.content }}", None),
    ],
)
def test_what_a_template_makes_of_words(write: str, left_out: str | None) -> None:
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = "{% for m in messages %}<|start|>" + write + "<|end|>{% endfor %}"
    contents = (' a "π"\n', "b", "t</think>c")
    messages = [{"role": "user", "content": content} for content in contents]
    if left_out is None:
        assert check(tokenizer, *messages, ASSISTANT) == 0
    else:
        with pytest.raises(ValueError, match=rf"leaves out messages\[\d\]\.content \(user\), {left_out}"):
            check(tokenizer, *messages, ASSISTANT)


def test_arguments_may_be_written_in_another_order_but_all() -> None:
    tokenizer = load_tokenizer(TINY)
    template = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}"
    template += "{{ ARGUMENTS | tojson(sort_keys=True) }}{% endfor %}{% endfor %}"
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"z": 1, "a": [True, None]}}}]}
    tokenizer.chat_template = template.replace("ARGUMENTS", "c.function.arguments")
    assert check(tokenizer, USER, call) == 0
    tokenizer.chat_template = template.replace("ARGUMENTS", "(c.function.arguments.values() | list)")
    with pytest.raises(ValueError, match=r"leaves out messages\[1\]\.tool_calls\[0\]\.arguments\.z \(assistant\), 'z'"):
        check(tokenizer, USER, call)


@pytest.mark.parametrize("role", ["usr", "User", "human", "model", "<|end|>"])
def test_unknown_roles_are_named(role: str) -> None:
    with pytest.raises(ValueError, match=r"messages\[1\]\.role must be one of system, developer, .* got"):
        check(load_tokenizer(TINY), USER, {"role": role, "content": "a"}, ASSISTANT)


def test_roles_that_the_template_names_are_known() -> None:
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template += "{% if false and messages[0].role == 'critic' %}{% endif %}"
    assert check(tokenizer, USER, {"role": "critic", "content": "a"}, ASSISTANT) == 0

"""Rows of text in the forms that people use, and what is said of those that are none."""

import json
from pathlib import Path
from typing import Any

import pytest

from jmoe.conversations.rows import Completion, Conversation, Row, Text, parse
from tests.conversations.reading import parse_row, read_rows

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Ho"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


def test_three_forms_are_read_in_order(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "π"}, {"completion": "b", "prompt": "a"}, {"messages": [USER, ASSISTANT]}]
    file.write_text("\n \n".join(json.dumps(row) for row in rows))
    assert list(read_rows(file)) == [Text("π"), Completion("a", "b"), Conversation((USER, ASSISTANT))]


def test_what_else_a_message_says_is_kept() -> None:
    turn = {**ASSISTANT, "thinking": "hm"}
    assert parse_row(json.dumps({"messages": [USER, turn]}).encode()) == Conversation((USER, turn))


def test_a_tool_call_needs_no_content() -> None:
    row = parse_row(json.dumps({"messages": [USER, CALL]}).encode())
    assert row == Conversation((USER, {"role": "assistant", "tool_calls": CALL["tool_calls"]}))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"must be JSON .* got '\{\"text\":'"),
        ("[1]", r"must be a JSON object.* got \[1\]"),
        ("{}", r"must be one of .*, got keys \[\]"),
        ('{"prompt": "a"}', r"got keys \['prompt'\]"),
        ('{"instruction": "a", "input": "b"}', r"got keys \['input', 'instruction'\]"),
        ('{"instruction": "a", "output": ""}', r"output must be a string that is not empty, got ''"),
        ('{"instruction": "a", "input": 3, "output": "b"}', "input must be a string, got 3"),
        ('{"prompt": [{"role": "user", "content": "Hi"}], "completion": "a"}', "completion must be a list of turns"),
        ('{"prompt": "a", "completion": [{"role": "assistant", "content": "Hi"}]}', "completion must be a string"),
        ('{"conversations": [{"from": "user", "value": 3}]}', r"conversations\[0\]\.content must be a string, got 3"),
        ('{"text": ""}', "text must be a string that is not empty, got ''"),
        ('{"text": 3}', "text must be a string that is not empty, got 3"),
        ('{"prompt": "a", "completion": null}', "completion must be .* got None"),
        ('{"prompt": "", "completion": "a"}', "prompt must be .* got ''"),
        ('{"text": "\\ud800"}', "must be Unicode text"),
        ('{"text": "a", "text": "b"}', r"must be JSON .*each name once, got 'text' with 'a' and 'b'"),
        ('{"messages": "[{\\"role\\": \\"user\\", \\"role\\": \\"tool\\"}]"}', "each name once, got 'role'"),
        (f'{{"text": "a", "n": {"1" * 5000}}}', r"must be JSON .*4300 digits"),
        ('{"messages": "Hi"}', "messages must be a list .* got 'Hi'"),
        ('{"messages": []}', r"messages must be a list .* got \[\]"),
        ('{"messages": ["Hi"]}', r"messages\[0\] must be an object .* got 'Hi'"),
        ('{"messages": [{"content": "Hi"}]}', r"messages\[0\]\.role must be .* got None"),
        ('{"messages": [{"role": "user", "content": 1}]}', r"messages\[0\]\.content must be a string, got 1"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', r"must have an assistant's turn .* \['user'\]"),
        ('{"messages": [{"role": "assistant", "content": "Hi"}]}', r"must begin with .* \['assistant'\]"),
        (
            '{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]}',
            r"messages\[1\]\.content must be .* not empty, got ''",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"text": "good"}}\n\n{line}\n')
    rows = read_rows(file)
    assert next(rows) == Text("good")
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 3: .*{message}"):
        next(rows)


def test_a_line_in_another_encoding_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ValueError, match=r"line 1: a row must be Unicode text in UTF-8"):
        list(read_rows(file))


def test_long_values_are_cut_in_errors() -> None:
    with pytest.raises(ValueError, match=r"must be JSON") as error:
        parse_row(b"x" * 10_000)
    assert len(str(error.value)) < 300


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
        list(read_rows(tmp_path / "none.jsonl"))


SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
SYSTEM = {"role": "system", "content": "Be brief"}
TOOL = {"type": "function", "function": {"name": "f", "description": "d"}}
NAMED = {"type": "function", "function": {"name": "f", "description": ""}}


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ({"conversations": SHAREGPT}, Conversation((USER, ASSISTANT))),
        ({"conversations": [USER, ASSISTANT]}, Conversation((USER, ASSISTANT))),
        ({"messages": SHAREGPT}, Conversation((USER, ASSISTANT))),
        ({"conversations": SHAREGPT, "system": "Be brief"}, Conversation((SYSTEM, USER, ASSISTANT))),
        ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, Conversation((SYSTEM, USER, ASSISTANT))),
        ({"instruction": "Hi", "output": "Ho"}, Conversation((USER, ASSISTANT))),
        ({"instruction": "Hi", "input": "", "output": "Ho"}, Conversation((USER, ASSISTANT))),
        ({"messages": [USER, ASSISTANT], "tools": [TOOL]}, Conversation((USER, ASSISTANT), (TOOL,))),
        ({"messages": [USER, ASSISTANT], "tools": json.dumps([TOOL])}, Conversation((USER, ASSISTANT), (TOOL,))),
        ({"messages": [USER, ASSISTANT], "tools": [TOOL["function"]]}, Conversation((USER, ASSISTANT), (TOOL,))),
        ({"messages": [USER, ASSISTANT], "tools": [{"name": "f"}]}, Conversation((USER, ASSISTANT), (NAMED,))),
        ({"messages": [USER, ASSISTANT], "tools": None}, Conversation((USER, ASSISTANT))),
        ({"text": None, "prompt": "a", "completion": "b"}, Completion("a", "b")),
    ],
)
def test_rows_of_other_forms_are_read(row: dict[str, Any], want: Row) -> None:
    assert parse_row(json.dumps(row).encode()) == want


def test_an_instruction_and_its_input_are_one_turn() -> None:
    row = parse_row({"instruction": "Add.", "input": "2 3", "output": "5"})
    assert isinstance(row, Conversation)
    assert [message["content"] for message in row.messages] == ["Add.\n\n2 3", "5"]


def test_a_prompts_turns_are_not_trained() -> None:
    row = parse_row({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT, USER, ASSISTANT]})
    assert isinstance(row, Conversation)
    assert row.untrained == {1}
    with pytest.raises(ValueError, match="a prompt's turns are not trained"):
        parse_row({"prompt": [USER, {**ASSISTANT, "weight": 1}, USER], "completion": [ASSISTANT]})


@pytest.mark.parametrize(
    ("row", "form", "ignored"),
    [
        ({"messages": [USER, ASSISTANT], "id": 3, "source": "x"}, "messages", {"id", "source"}),
        ({"messages": [USER, ASSISTANT], "prompt": "a", "completion": "b"}, "messages", {"prompt", "completion"}),
        ({"instruction": "a", "output": "b", "text": "ab", "id": None}, "instruction and output", {"text"}),
        ({"text": "a", "tools": [TOOL]}, "text", {"tools"}),
        ({"prompt": "a", "completion": "b", "tools": [TOOL]}, "prompt and completion", {"tools"}),
    ],
)
def test_columns_that_a_form_has_not_are_ignored_and_named(row: dict[str, Any], form: str, ignored: set[str]) -> None:
    parsed = parse(row)
    assert (parsed.form, parsed.ignored) == (form, ignored)


@pytest.mark.parametrize("tools", ["f", [3], [{"type": "function"}], [{"type": "browser", "name": "f"}], {"name": "f"}])
def test_tools_that_are_no_functions_are_refused(tools: Any) -> None:
    with pytest.raises(ValueError, match="tools"):
        parse_row({"messages": [USER, ASSISTANT], "tools": tools})

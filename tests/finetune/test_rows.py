"""Rows of text from a file of JSON lines, and what is said of lines that are none."""

import json
from pathlib import Path

import pytest

from jmoe.finetune.rows import Completion, Conversation, Text, parse_row, read_rows

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
        ("{}", r"no other keys, got keys \[\]"),
        ('{"text": "a", "messages": []}', r"got keys \['messages', 'text'\]"),
        ('{"prompt": "a"}', r"got keys \['prompt'\]"),
        ('{"text": "a", "tools": []}', r"got keys \['text', 'tools'\]"),
        ('{"text": ""}', "text must be a string that is not empty, got ''"),
        ('{"text": 3}', "text must be a string that is not empty, got 3"),
        ('{"prompt": "a", "completion": null}', "completion must be .* got None"),
        ('{"prompt": "", "completion": "a"}', "prompt must be .* got ''"),
        ('{"text": "\\ud800"}', "must be Unicode text"),
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

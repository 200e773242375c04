"""How answers are printed and written."""

import errno
import io
import json
from pathlib import Path
from typing import Any

import pytest

from jmoe.generation.batches import Answer, Request
from jmoe.generation.output import REPLY_KEYS, Printer, RowFile, as_row, json_line
from jmoe.generation.prompts import Prompt
from jmoe.text import encode
from jmoe.text.channels import FINAL, ChannelText
from jmoe.text.reply import Reply
from tests.channel_tokenizer import channel_tokenizer

THINKS = "<|channel|>analysis<|message|>Hm.<|end|>"
ANSWERS = "<|start|>assistant<|channel|>final<|message|>π is 3."


def answer(text: str) -> Answer:
    """The answer of tokens that the limit has ended."""
    tokenizer: Any = channel_tokenizer()
    reply = Reply(tokenizer)
    reply.push(encode(tokenizer, text))
    reply.finish()
    return Answer(Request(0, 0, [1, 2, 3]), reply, "length", None)


def test_a_pipe_gets_the_final_channel_alone(capsys: pytest.CaptureFixture[str]) -> None:
    printer, found = Printer(), answer(THINKS + ANSWERS)
    for piece in found.reply.messages:
        printer.push([piece])
    printer.finish(found)
    assert capsys.readouterr() == ("π is 3.\n", "[analysis] Hm.\n")


def test_of_several_replies_each_line_has_its_number(capsys: pytest.CaptureFixture[str]) -> None:
    printer = Printer()
    for number, text in enumerate((THINKS + ANSWERS, THINKS)):
        found = answer(text)
        printer.begin(f"[{number}] ")
        printer.push(found.reply.messages)
        printer.finish(found)
    out, err = capsys.readouterr()
    assert out == "[0] π is 3.\n[1] \n"
    assert err.startswith("[0] [analysis] Hm.\n[1] [analysis] Hm.\n[1] (no final channel: ")


def test_a_terminal_has_the_thinking_dimmed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    styled: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        "jmoe.generation.output.echo", lambda text="", *, nl=True, err=False: styled.append((text, err))
    )
    Printer().push([ChannelText("analysis", "Hm."), ChannelText(FINAL, "So.")])
    assert ("\x1b[2mHm.\x1b[0m", True) in styled
    assert ("So.", False) in styled
    monkeypatch.setenv("NO_COLOR", "1")
    Printer().push([ChannelText("analysis", "Ha.")])
    assert ("Ha.", True) in styled


def test_a_reply_without_an_answer_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    printer, found = Printer(), answer(THINKS)
    printer.push(found.reply.messages)
    printer.finish(found)
    out, err = capsys.readouterr()
    assert out == "\n"
    assert "no final channel: cut at " in err
    assert "--max-new-tokens" in err


def test_a_row_has_the_prompt_its_columns_and_the_reply() -> None:
    call = '<|channel|>commentary to=functions.f<|message|>{"a": 1}'
    row = as_row(Prompt("", "Hi", {"prompt": "Hi", "id": 7}), answer(THINKS + call))
    assert list(row) == ["prompt", "id", *REPLY_KEYS]
    assert row["channels"] == {"analysis": "Hm.", "commentary": '{"a": 1}'}
    assert row["tool_calls"] == [{"recipient": "functions.f", "arguments": '{"a": 1}'}]
    assert (row["text"], row["finish_reason"], row["stop"], row["prompt_tokens"]) == ("", "length", None, 3)
    assert json_line({"a": "π"}) == '{"a": "π"}'
    assert json_line({"a": "π"}, "ascii") == '{"a": "\\u03c0"}'


def test_rows_are_in_the_file_as_they_come_and_nothing_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    file = RowFile(out)
    assert not out.exists()
    file.write([{"a": "π"}])
    assert [json.loads(line) for line in out.read_text().splitlines()] == [{"a": "π"}]
    file.close()
    with pytest.raises(FileExistsError, match=r"out.jsonl exists already, and is not overwritten"):
        RowFile(out)
    with pytest.raises(FileExistsError):
        RowFile(tmp_path)
    with pytest.raises(FileNotFoundError, match="gone is not a folder"):
        RowFile(tmp_path / "gone" / "out.jsonl")


class FullDisk(io.StringIO):
    """A file for which no space is left."""

    def flush(self) -> None:
        if not self.closed:
            raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        """Leaves out the flush."""


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", lambda *args, **options: FullDisk())
    with pytest.raises(OSError, match=r"No space left on device: '.*out\.jsonl'"):
        RowFile(tmp_path / "out.jsonl").write([{"a": 1}])

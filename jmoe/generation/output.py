"""Answers as people and programs read them."""

import json
import os
import sys
from pathlib import Path
from typing import IO, Any

import typer

from jmoe.files import naming
from jmoe.generation.batches import Answer
from jmoe.generation.prompts import Prompt
from jmoe.text.channels import FINAL, ChannelText

REPLY_KEYS = ("sample", "text", "channels", "tool_calls", "finish_reason", "stop", "prompt_tokens", "new_tokens")
"""What a row of JSON has of the reply."""


class Printer:
    """Prints replies: the final channel on standard output; what the model thought or calls, dimmed, on standard error.

    So a pipe gets the answer alone, and a terminal both, in the order in which they come.
    """

    def __init__(self) -> None:
        self._place: tuple[str, str | None] = ("", None)  # the channel and recipient that stand last on standard error
        self._at_line_begin = True
        self._label = ""
        self._label_is_due = False

    def begin(self, label: str) -> None:
        """Has the next reply's lines begin with a label, on either side."""
        self._label, self._label_is_due = label, True

    def push(self, pieces: list[ChannelText]) -> None:
        """Prints what is new."""
        for channel, text, recipient in pieces:
            if channel == FINAL:
                self._end_line()
                self._print_label()
                echo(text, nl=False)
            else:
                self._aside(channel, recipient, text)

    def finish(self, answer: Answer) -> None:
        """Ends the reply's line, and says so if there is no answer in it."""
        self._end_line()
        self._print_label()
        echo()
        if not answer.reply.answered:
            echo(dimmed(f"{self._label}(no final channel: {why_none(answer)})"), err=True)

    def _print_label(self) -> None:
        if self._label_is_due:
            echo(self._label, nl=False)
        self._label_is_due = False

    def _aside(self, channel: str, recipient: str | None, text: str) -> None:
        if self._place != (channel, recipient):
            self._end_line()
            to = "" if recipient is None else f" to={recipient}"
            echo(dimmed(f"{self._label}[{channel or 'no channel'}{to}] "), err=True, nl=False)
            self._place = (channel, recipient)
            text = text.removeprefix("\n")  # which keeps it apart from the channel's message before
        echo(dimmed(text), err=True, nl=False)
        self._at_line_begin = text.endswith("\n")

    def _end_line(self) -> None:
        if not self._at_line_begin:
            echo(err=True)
        self._at_line_begin, self._place = True, ("", None)


def echo(text: str = "", *, nl: bool = True, err: bool = False) -> None:
    """Prints on standard output, or standard error, which errors of a full disk then name."""
    with naming("standard error" if err else "standard output"):
        typer.echo(text, nl=nl, err=err)


def why_none(answer: Answer) -> str:
    """Why a reply has no final channel."""
    if answer.finish_reason == "length":
        return f"cut at {len(answer.reply.tokens)} new tokens, see --max-new-tokens"
    return f"ended by {answer.stop}"


def dimmed(text: str) -> str:
    """The text in a terminal's dim style, unless standard error is not a terminal or NO_COLOR is set."""
    return typer.style(text, dim=True) if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else text


def as_row(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """The row of JSON: what came with the prompt, and REPLY_KEYS."""
    reply = answer.reply
    calls = [{"recipient": each.recipient, "arguments": each.text} for each in reply.calls]
    return {
        **prompt.row,
        "sample": answer.request.sample,
        "text": reply.text(),
        "channels": reply.channels,
        "tool_calls": calls,
        "finish_reason": answer.finish_reason,
        "stop": answer.stop,
        "prompt_tokens": len(answer.request.tokens),
        "new_tokens": len(reply.tokens),
    }


def json_line(row: dict[str, Any], encoding: str | None = "utf-8") -> str:
    """The row in one line, escaped where the encoding has not all of Unicode."""
    is_unicode = (encoding or "").lower().replace("-", "").startswith("utf")
    return json.dumps(row, ensure_ascii=not is_unicode, default=str)  # a Parquet file has dates, say


class RowFile:
    """A new file of JSON Lines, written row by row; it comes to be with its first row."""

    def __init__(self, path: Path) -> None:
        """Refuses a path that could not be written, before anything is generated.

        Raises:
          FileExistsError: there is something already.
          FileNotFoundError: there is not a folder for it.
        """
        if path.exists() or path.is_symlink():
            raise FileExistsError(f"{path} exists already, and is not overwritten")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent} is not a folder: {path} cannot be written")
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"{path.parent} may not be written into")
        self._path = path
        self._file: IO[str] | None = None

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Adds rows, and sees that they are in the file.

        Raises:
          OSError: they could not be written; the file is named.
        """
        with naming(self._path):
            if self._file is None:
                self._file = self._path.open("x", encoding="utf-8")
            self._file.writelines(json_line(row) + "\n" for row in rows)
            self._file.flush()

    def close(self) -> None:
        """Closes the file if there is one."""
        if self._file is not None:
            self._file.close()

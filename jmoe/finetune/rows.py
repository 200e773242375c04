"""A file of text to train on: one JSON object a line, in one of three forms."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jmoe.text import Message

FORMS = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'


class Conversation(NamedTuple):
    """Turns for the chat template, of which the assistant's are learnt; the first is not the assistant's."""

    messages: tuple[Message, ...]


class Completion(NamedTuple):
    """A prompt, and what is learnt to follow it."""

    prompt: str
    completion: str


class Text(NamedTuple):
    """A text, all of which is learnt."""

    text: str


type Row = Conversation | Completion | Text


class Line(NamedTuple):
    """A line that is not blank, and where it stands: the file and the line's number, from 1."""

    place: str
    content: bytes


def read_lines(path: str | os.PathLike[str]) -> Iterator[Line]:
    """The lines of a file that are not blank.

    Raises:
      FileNotFoundError: there is no such file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist, or is no file")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if content := line.strip():
                yield Line(f"{file}, line {number}", content)


def read_rows(path: str | os.PathLike[str]) -> Iterator[Row]:
    """The rows of a file of JSON lines.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is no row. The message has the file, the line's number, what was expected and what was seen.
    """
    for line in read_lines(path):
        try:
            row = parse_row(line.content)
        except ValueError as error:
            raise ValueError(f"{line.place}: {error}") from error
        yield row


def parse_row(content: bytes) -> Row:
    """The row that one line holds.

    Raises:
      ValueError: it is not JSON in UTF-8, or not exactly one of the three forms.
    """
    fields = _parse_object(content)
    match sorted(fields):
        case ["messages"]:
            return Conversation(_check_messages(fields["messages"]))
        case ["completion", "prompt"]:
            return Completion(_check_text("prompt", fields["prompt"]), _check_text("completion", fields["completion"]))
        case ["text"]:
            return Text(_check_text("text", fields["text"]))
        case keys:
            raise ValueError(f"a row must be {FORMS} and have no other keys, got keys {keys}")


def _parse_object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content.decode())
        if b"\\u" in content:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, and no text
    except UnicodeError as error:
        raise ValueError(f"a row must be Unicode text in UTF-8: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"a row must be JSON ({error}), got {_shorten(content.decode())}") from error
    if not isinstance(value, dict):
        raise ValueError(f"a row must be a JSON object, {FORMS}, got {_shorten(value)}")
    return value


def _check_text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a string that is not empty, got {_shorten(value)}")
    return value


def _check_messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages must be a list of turns that is not empty, got {_shorten(value)}")
    messages = tuple(_check_message(f"messages[{i}]", message) for i, message in enumerate(value))
    _check_roles([message["role"] for message in messages])
    return messages


def _check_message(name: str, value: Any) -> Message:
    """The message as it is, less a null `content` beside tool calls, which means what its absence does."""
    if not isinstance(value, dict):
        raise ValueError(f'{name} must be an object {{"role": ..., "content": ...}}, got {_shorten(value)}')
    role = _check_text(f"{name}.role", value.get("role"))
    if value.get("tool_calls") and not value.get("content"):
        return {key: part for key, part in value.items() if key != "content"}
    if role == "assistant":
        _check_text(f"{name}.content", value.get("content"))
    elif not isinstance(value.get("content"), str):
        raise ValueError(f"{name}.content must be a string, got {_shorten(value.get('content'))}")
    return value


def _check_roles(roles: Sequence[str]) -> None:
    if "assistant" not in roles:
        raise ValueError(f"messages must have an assistant's turn to learn, got roles {_shorten(roles)}")
    if roles[0] == "assistant":
        raise ValueError(f"messages must begin with another's turn than the assistant's, got roles {_shorten(roles)}")


def _shorten(value: Any) -> str:
    """The value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

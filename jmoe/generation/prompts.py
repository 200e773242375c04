"""Prompts as people give them: arguments, standard input, a text file, JSON Lines."""

import codecs
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from jmoe.conversations.guard import check_conversation
from jmoe.conversations.rows import Conversation
from jmoe.conversations.sources import open_source
from jmoe.conversations.tools import read_tools
from jmoe.conversations.turns import read_turns
from jmoe.errors import in_short
from jmoe.text import Message, chat_text, encode

ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz")
"""What the names of files end with that hold rows; others hold text."""

PROMPT_KEYS = ("prompt", "messages")

STANDARD_INPUT = "-"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a reply is asked for.

    Attributes:
      place: where it came from, for errors.
      words: one text, or the turns of a conversation.
      row: what stands beside the reply in JSON, the prompt itself among it.
      tools: functions that the model may call.
    """

    place: str
    words: str | Sequence[Message]
    row: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """What is around each prompt.

    Attributes:
      raw: leave out the chat template; the prompt is the text so far, in which control tokens may be written out.
      system, developer: messages before a conversation that begins with no such message itself.
      reasoning_effort: for the chat template.
      tools: functions that the model may call, for prompts that name none themselves.
    """

    raw: bool = False
    system: str | None = None
    developer: str | None = None
    reasoning_effort: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()


def from_arguments(texts: Sequence[str], standard_input: BinaryIO) -> list[Prompt]:
    """The prompts of a command line, of which `-` is what standard input holds.

    Raises:
      ValueError: standard input is asked for twice, is empty or is not UTF-8.
    """
    if list(texts).count(STANDARD_INPUT) > 1:
        raise ValueError(f"{STANDARD_INPUT} may be given once, as standard input can be read once")
    found = [_read(standard_input) if text == STANDARD_INPUT else text for text in texts]
    return [Prompt(f"prompt {i}", text, {"prompt": text}) for i, text in enumerate(found)]


def _read(standard_input: BinaryIO) -> str:
    """All of standard input but for one newline at its end, as shells leave it out of `$(...)`."""
    try:
        text = standard_input.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8: {error}") from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise ValueError("standard input is empty: give a prompt as argument, on standard input or by --prompts")
    return text


def from_file(file: Path, *, reserved: Sequence[str] = ()) -> list[Prompt]:
    """The prompts of a file; lines without anything are left out.

    A name that ends in one of ROWS is of rows, read as jmoe.conversations.sources reads them: of each `prompt`, a text
    or a list of messages, or `messages`; a line of JSON may be a text itself. Other files hold a prompt a line.

    Args:
      reserved: names that a row may not have, since its reply has them.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it holds no prompt, or a line none that can be read; the line's number is said.
    """
    prompts = list(_of_lines(file, reserved))
    if not prompts:
        raise ValueError(f"{file} holds no prompt")
    return prompts


def _of_lines(file: Path, reserved: Sequence[str]) -> Iterator[Prompt]:
    if not file.exists() or file.is_dir():
        raise FileNotFoundError(f"{file} does not exist, or is not a file")
    if file.suffix.lower() in ROWS:
        for record in open_source(file).records:
            try:
                yield _of_row(record.place, record.content, reserved)
            except ValueError as error:
                raise ValueError(f"{record.place}: {error}") from error
        return
    for number, line in enumerate(file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        place = f"{file}, line {number}"
        try:
            text = line.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: not UTF-8: {error}") from None
        if text.strip():
            yield Prompt(place, text, {"prompt": text})


def _of_row(place: str, content: bytes | Mapping[str, Any] | ValueError, reserved: Sequence[str]) -> Prompt:
    if isinstance(content, ValueError):
        raise content
    row: Any = content
    if isinstance(content, bytes):
        try:
            row = json.loads(content.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not valid JSON: {error}") from None
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        raise ValueError(f"a row must be an object or a text, got {in_short(row)}")
    given = [key for key in PROMPT_KEYS if row.get(key) is not None]
    if len(given) != 1:
        raise ValueError(f"a row must have one of {' and '.join(PROMPT_KEYS)}, got the keys {list(row)}")
    if taken := sorted(set(row) & set(reserved)):
        raise ValueError(f"{', '.join(taken)} would be the reply's in what is written: rename it in the row")
    words = row[given[0]]
    if not (isinstance(words, str) and given == ["prompt"]):
        words = _conversation(given[0], words)
    return Prompt(place, words, row, _tools(row["tools"]) if row.get("tools") else ())


def _conversation(name: str, value: Any) -> list[Message]:
    """The turns of a conversation whose next one is the assistant's."""
    messages = [turn.message for turn in read_turns(name, value)]
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last turn is the assistant's: leave out the reply that is to be generated")
    return messages


def tools_of_file(file: Path) -> tuple[Mapping[str, Any], ...]:
    """The functions that a JSON file lists, in the form that chat templates take (jmoe.conversations.tools.read_tools).

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it is not JSON, or not a list of functions with names.
    """
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    try:
        return _tools(found)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Raises ValueError unless these are tools whose parameters are JSON schemas."""
    tools = read_tools(value)
    for i, tool in enumerate(tools):
        parameters = tool["function"].get("parameters")
        properties = parameters.get("properties", {}) if isinstance(parameters, dict) else None
        if parameters is not None and not isinstance(properties, dict):
            raise ValueError(f"tools[{i}].function.parameters must be a JSON schema, got {in_short(parameters)}")
    return tools


def tokens_of(tokenizer: Any, prompt: Prompt, frame: Frame) -> list[int]:
    """The prompt's tokens, up to where the reply begins.

    Raises:
      ValueError: the chat template refuses it, knows no tools or no reasoning effort though they are given, or drops
        something of it; or with `frame.raw` the prompt is a conversation or empty.
    """
    try:
        if not frame.raw:
            return encode(tokenizer, as_chat(tokenizer, prompt, frame))
        if not isinstance(prompt.words, str):
            raise ValueError("messages need the chat template, which --raw leaves out")
        if not prompt.words:
            raise ValueError("--raw needs a text to continue, got an empty one")
        return encode(tokenizer, prompt.words)
    except ValueError as error:
        raise ValueError(f"{prompt.place}: {error}") from error


def as_chat(tokenizer: Any, prompt: Prompt, frame: Frame) -> str:
    """The prompt in the chat template; marked as jmoe.text.chat_text marks it."""
    turns = [{"role": "user", "content": prompt.words}] if isinstance(prompt.words, str) else list(prompt.words)
    before = [
        {"role": role, "content": text} for role, text in (("system", frame.system), ("developer", frame.developer))
    ]
    if turns[0]["role"] not in ("system", "developer"):
        turns = [*(turn for turn in before if turn["content"] is not None), *turns]
    tools = prompt.tools or frame.tools
    variables = {} if frame.reasoning_effort is None else {"reasoning_effort": frame.reasoning_effort}
    for name in [*(["tools"] if tools else []), *variables]:
        if tokenizer.chat_template is not None and name not in str(tokenizer.chat_template):
            raise ValueError(f"the chat template of {tokenizer.name_or_path} knows no {name}")
    check_conversation(tokenizer, Conversation(tuple(turns), tuple(tools)))
    return chat_text(tokenizer, turns, reply=True, tools=tools, variables=variables)

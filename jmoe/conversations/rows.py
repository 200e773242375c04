"""A row of text to train on: its columns, in whichever of the forms that people use."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jmoe.conversations.tools import read_tools
from jmoe.conversations.turns import Turn, check_text, from_json, once, read_turns, unknown_keys
from jmoe.errors import in_short
from jmoe.text import Message


class Conversation(NamedTuple):
    """Turns for the chat template, of which the assistant's are learnt; the first is not the assistant's.

    Fields:
      tools: functions that the template is given beside the turns.
      untrained: the assistant's turns that are not learnt, by their place among all.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    untrained: frozenset[int] = frozenset()


class Completion(NamedTuple):
    """A prompt, and what is learnt to follow it."""

    prompt: str
    completion: str


class Text(NamedTuple):
    """A text, all of which is learnt."""

    text: str


type Row = Conversation | Completion | Text


class Parsed(NamedTuple):
    """A row, and how it was read.

    Fields:
      form: what the row was known by.
      ignored: its columns that the form has not.
      unknown: keys of its messages that no format has; the chat template may know them.
    """

    row: Row
    form: str
    ignored: frozenset[str]
    unknown: frozenset[str] = frozenset()


def parse(content: bytes | Mapping[str, Any] | ValueError) -> Parsed:
    """The row that a line of JSON, or values by column, hold, and how it was read.

    Of several forms, the first counts: the others' columns are ignored.

    Raises:
      ValueError: it is not JSON in UTF-8, or has none of the forms; what is wrong with the row, where that is given in
        its place.
    """
    if isinstance(content, ValueError):
        raise content
    columns = _parse_object(content) if isinstance(content, bytes) else _with_lists(content)
    values = {name: value for name, value in columns.items() if value is not None}
    # Columns that are null count where no form has all of its own: what is wrong with the row is then their values.
    form = next((form for held in (values, columns) for form in FORMS if set(form.needs) <= set(held)), None)
    if form is None:
        raise ValueError(
            f"a row must be one of {'; '.join(form.shape for form in FORMS)}, got keys {sorted(map(str, columns))}"
        )
    row, unknown = form.read({**dict.fromkeys(form.needs), **values})
    may_have = form.may_have if isinstance(row, Conversation) else ()
    return Parsed(row, form.name, frozenset(map(str, set(values) - {*form.needs, *may_have})), frozenset(unknown))


def _parse_object(content: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(content.decode(), object_pairs_hook=once)
        if b"\\u" in content:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, and no text
    except UnicodeError as error:
        raise ValueError(f"a row must be Unicode text in UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a row must be JSON ({error}), got {in_short(content.decode())}") from error
    if not isinstance(value, dict):
        raise ValueError(f"a row must be a JSON object, got {in_short(value)}")
    return value


def _with_lists(columns: Mapping[str, Any]) -> Mapping[str, Any]:
    """A table's row, whose prompt and completion may be lists of messages that are written as JSON, as in CSV."""
    lists = {name: from_json(columns.get(name), "[") for name in ("prompt", "completion")}
    are_messages = all(
        isinstance(turns, list) and turns and all(isinstance(turn, dict) and "role" in turn for turn in turns)
        for turns in lists.values()
    )
    return {**columns, **lists} if are_messages else columns


type Read = tuple[Row, set[str]]


def _read_messages(values: Mapping[str, Any]) -> Read:
    return _conversation(read_turns("messages", values["messages"]), values)


def _read_conversations(values: Mapping[str, Any]) -> Read:
    return _conversation([*_system(values), *read_turns("conversations", values["conversations"])], values)


def _read_completion(values: Mapping[str, Any]) -> Read:
    if not isinstance(values["prompt"], list):
        texts = (check_text(name, values[name]) for name in ("prompt", "completion"))
        return Completion(*texts), set()
    prompt, completion = (read_turns(name, values[name]) for name in ("prompt", "completion"))
    if any(turn.trained for turn in prompt):
        raise ValueError("a prompt's turns are not trained, got one whose weight or train says so")
    return _conversation([*(turn._replace(trained=False) for turn in prompt), *completion], values)


def _read_instruction(values: Mapping[str, Any]) -> Read:
    instruction, given = check_text("instruction", values["instruction"]), values.get("input", "")
    if not isinstance(given, str):
        raise ValueError(f"input must be a string, got {in_short(given)}")
    user = {"role": "user", "content": f"{instruction}\n\n{given}" if given else instruction}
    assistant = {"role": "assistant", "content": check_text("output", values["output"])}
    return _conversation([*_system(values), Turn(user), Turn(assistant)], values)


def _read_text(values: Mapping[str, Any]) -> Read:
    return Text(check_text("text", values["text"])), set()


def _system(values: Mapping[str, Any]) -> list[Turn]:
    """The turn that a column `system` is."""
    system = values.get("system", "")
    if not isinstance(system, str):
        raise ValueError(f"system must be a string, got {in_short(system)}")
    return [Turn({"role": "system", "content": system})] if system else []


class Form(NamedTuple):
    """One way to write rows.

    Fields:
      needs: the columns that tell it.
      may_have: columns that it reads too, where the row is a conversation.
      shape: how an error writes it.
    """

    name: str
    needs: tuple[str, ...]
    may_have: tuple[str, ...]
    shape: str
    read: Callable[[Mapping[str, Any]], Read]


FORMS = (
    Form("messages", ("messages",), ("tools",), '{"messages": [...]}', _read_messages),
    Form(
        "conversations",
        ("conversations",),
        ("tools", "system"),
        '{"conversations": [{"from": ..., "value": ...}, ...]}',
        _read_conversations,
    ),
    Form(
        "prompt and completion",
        ("prompt", "completion"),
        ("tools",),
        '{"prompt": ..., "completion": ...}',
        _read_completion,
    ),
    Form(
        "instruction and output",
        ("instruction", "output"),
        ("input", "system", "tools"),
        '{"instruction": ..., "input": ..., "output": ...}',
        _read_instruction,
    ),
    Form("text", ("text",), (), '{"text": ...}', _read_text),
)


def _conversation(turns: Sequence[Turn], values: Mapping[str, Any]) -> Read:
    messages = tuple(turn.message for turn in turns)
    tools = values.get("tools")
    _check_roles([message["role"] for message in messages])
    untrained = frozenset(
        i for i, turn in enumerate(turns) if turn.trained is False and turn.message["role"] == "assistant"
    )
    if untrained == {i for i, message in enumerate(messages) if message["role"] == "assistant"}:
        raise ValueError("a row must have a turn to learn, got weight 0 or train false for each of the assistant's")
    found = read_tools(tools) if from_json(tools, "[") not in (None, "", []) else ()
    return Conversation(messages, found, untrained), unknown_keys(turns)


def _check_roles(roles: Sequence[str]) -> None:
    if "assistant" not in roles:
        raise ValueError(f"messages must have an assistant's turn to learn, got roles {in_short(roles)}")
    if roles[0] == "assistant":
        raise ValueError(f"messages must begin with another's turn than the assistant's, got roles {in_short(roles)}")

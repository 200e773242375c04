"""A conversation's turns as people write them, to those that chat templates know."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jmoe.errors import in_short
from jmoe.text import Message

ROLES = ("system", "developer", "user", "assistant", "tool")

SENDERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
"""Who says a turn that has `from` and `value`, as ShareGPT's have."""

THINKING = ("thinking", "reasoning_content", "reasoning")
TEXT_PARTS = ("text", "input_text", "output_text")
KNOWN = {"role", "content", "tool_calls", "function_call", "tool_call_id", "name", "weight", "train", *THINKING}


class Turn(NamedTuple):
    """A message for the chat template.

    Fields:
      trained: what the row says of whether the turn is learnt; None: nothing.
      unknown: keys of the message that no format has, kept in it.
    """

    message: Message
    trained: bool | None = None
    unknown: tuple[str, ...] = ()


def read_turns(name: str, value: Any) -> list[Turn]:
    """The turns of a list, or of one that is written as JSON.

    Raises:
      ValueError: it is not a list, or one of its turns cannot be read, which is named.
    """
    value = from_json(value, "[")
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a list of turns that is not empty, got {in_short(value)}")
    return [_read_turn(f"{name}[{i}]", turn) for i, turn in enumerate(value)]


def _read_turn(name: str, value: Any) -> Turn:
    if not isinstance(value, dict):
        raise ValueError(f'{name} must be an object {{"role": ..., "content": ...}}, got {in_short(value)}')
    fields = {key: part for key, part in value.items() if part is not None}
    if "from" in fields and "role" not in fields:
        fields = _from_sender(name, fields)
    role = check_text(f"{name}.role", fields.get("role"))
    if role == "function":  # what the results of functions had before tools did
        role = "tool"
    message = {key: part for key, part in fields.items() if key not in ("weight", "train", "function_call", *THINKING)}
    message["role"] = role
    if "name" in fields and not isinstance(fields["name"], str):
        raise ValueError(f"{name}.name must be a string, got {in_short(fields['name'])}")
    calls = _read_calls(name, fields)
    message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = calls
    if (thinking := _read_thinking(name, fields)) is not None:
        message["thinking"] = thinking
    if role == "assistant" and message.pop("channel", "final") != "final":
        raise ValueError(
            f'{name}.channel must be "final": thinking goes into the "thinking" of the turn that it leads to, got '
            f"{in_short(fields['channel'])}"
        )
    return Turn(_with_content(name, message), _read_trained(name, role, fields), tuple(sorted(set(message) - KNOWN)))


def _from_sender(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A turn with `from` and `value` as one with `role` and `content`."""
    sender = fields["from"]
    if not isinstance(sender, str) or sender not in SENDERS:
        raise ValueError(f"{name}.from must be one of {', '.join(SENDERS)}, got {in_short(sender)}")
    rest = {key: part for key, part in fields.items() if key not in ("from", "value")}
    if sender == "function_call":
        return {**rest, "role": "assistant", "function_call": fields.get("value")}
    if "value" not in fields:
        raise ValueError(f"{name}.value must be a string, got None")
    return {**rest, "role": SENDERS[sender], "content": fields["value"]}


def _with_content(name: str, message: dict[str, Any]) -> Message:
    """The message with its content as one text; less a content that is empty beside calls, as if there were none."""
    content = _join_parts(f"{name}.content", message.get("content"))
    if message.get("tool_calls") and not content:
        return {key: part for key, part in message.items() if key != "content"}
    if message["role"] == "assistant" and not content and message.get("thinking"):
        raise ValueError(
            f"{name} must have content or a call, got thinking alone: training on it would teach an empty answer"
        )
    if message["role"] == "assistant":
        check_text(f"{name}.content", content)
    elif not isinstance(content, str):
        raise ValueError(f"{name}.content must be a string, got {in_short(content)}")
    return {**message, "content": content}


def _join_parts(name: str, value: Any) -> Any:
    """The text of a list of texts, one after the other; what is not a list as it is."""
    if not isinstance(value, list):
        return value
    texts = []
    for i, part in enumerate(value):
        if isinstance(part, dict) and part.get("type", "text") not in TEXT_PARTS:
            raise ValueError(f"{name}[{i}] must be text, got a part of type {in_short(part.get('type'))}")
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise ValueError(f'{name}[{i}] must be {{"type": "text", "text": ...}}, got {in_short(part)}')
        texts.append(text)
    return "".join(texts)


def _read_thinking(name: str, fields: Mapping[str, Any]) -> str | None:
    """What led to the turn, under whichever of its names."""
    found = {key: _join_parts(f"{name}.{key}", fields[key]) for key in THINKING if key in fields}
    for key, text in found.items():
        if not isinstance(text, str):
            raise ValueError(f"{name}.{key} must be a string, got {in_short(text)}")
    if len(set(found.values())) > 1:
        raise ValueError(f"{name} must have one thinking, got different {' and '.join(found)}")
    return next(iter(found.values()), None)


def _read_calls(name: str, fields: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    calls = from_json(fields.get("tool_calls", []), "[")
    if not isinstance(calls, list):
        raise ValueError(f"{name}.tool_calls must be a list of calls, got {in_short(calls)}")
    if "function_call" not in fields:
        return [_read_call(f"{name}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    if calls:
        raise ValueError(f"{name} must have tool_calls or function_call, got both")
    call = from_json(fields["function_call"], "{")
    return [_read_call(f"{name}.function_call", {"type": "function", "function": call})]


def _read_call(name: str, value: Any) -> Mapping[str, Any]:
    """The call with its arguments as an object, which is what templates write as JSON."""
    given = from_json(value, "{")
    call = {key: part for key, part in given.items() if part is not None} if isinstance(given, dict) else {}
    function = from_json(call.get("function", call), "{")
    if not isinstance(function, dict) or not function:
        raise ValueError(
            f'{name} must be a call {{"function": {{"name": ..., "arguments": ...}}}}, got {in_short(value)}'
        )
    called = check_text(f"{name}'s name", function.get("name"))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, parse_constant=_refuse_constant, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{name}: the arguments of {called} must be JSON ({error}), got {in_short(arguments)}"
            ) from error
    if arguments is None and function.get("arguments") is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(
            f"{name}: the arguments of {called} must be an object, or one as JSON, "
            f"got {in_short(function['arguments'])}"
        )
    try:
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError) as error:  # NaN, or a date that a data set was given
        raise ValueError(
            f"{name}: the arguments of {called} must be JSON ({error}), got {in_short(arguments)}"
        ) from error
    whole = {**{key: part for key, part in function.items() if part is not None}, "arguments": arguments}
    return {**call, "function": whole} if "function" in call else whole


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _read_trained(name: str, role: str, fields: Mapping[str, Any]) -> bool | None:
    """What `weight` (0 or 1) and `train` say; None: nothing."""
    weight, train = fields.get("weight"), fields.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise ValueError(f"{name}.weight must be 0 (not trained) or 1, got {in_short(weight)}")
    if train is not None and not isinstance(train, bool):
        raise ValueError(f"{name}.train must be true or false, got {in_short(train)}")
    said = {bool(part) for part in (weight, train) if part is not None}
    if len(said) > 1:
        raise ValueError(f"{name} must say one thing, got weight {weight} and train {str(train).lower()}")
    if said == {True} and role != "assistant":
        raise ValueError(f"{name} must be the assistant's to be trained, got role {in_short(role)}")
    return said.pop() if said else None


class RepeatedNameError(ValueError):
    """A JSON object has a name twice."""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of these names and values, for json.loads, which else keeps the last of a name's values.

    Raises:
      RepeatedNameError: a name has two values.
    """
    entries = dict(pairs)
    if len(entries) < len(pairs):
        for name, value in pairs:
            if entries[name] != value:
                raise RepeatedNameError(
                    f"a JSON object must have each name once, got {in_short(name)} with {in_short(value)} and "
                    f"{in_short(entries[name])}"
                )
    return entries


def from_json(value: Any, begin: str) -> Any:
    """What a text holds as JSON that begins so, as in CSV's columns; any other value as it is.

    Raises:
      RepeatedNameError: an object in it has a name twice.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(begin):
        return value
    try:
        return json.loads(value, object_pairs_hook=once)
    except RepeatedNameError:
        raise
    except (ValueError, RecursionError):
        return value


def check_text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a string that is not empty, got {in_short(value)}")
    return value


def unknown_keys(turns: Iterable[Turn]) -> set[str]:
    return {key for turn in turns for key in turn.unknown}

"""Words of a conversation that its chat template leaves out, which would be trained without a word."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jmoe.finetune.rows import Conversation
from jmoe.finetune.turns import ROLES, shorten
from jmoe.text import Message, chat_text, without_marks

STAND_IN = re.compile(r"zq(\d{6})qz")
"""A word in the place of another, each its own, which tells where the template writes what it stands for."""


class Word(NamedTuple):
    """A value of the row that must be in the text.

    Fields:
      part: the values that the template may write in any order.
    """

    place: str
    value: Any
    kind: Literal["content", "thinking", "call", "argument", "name of a result", "tool"]
    turn: int
    part: int


def check_conversation(tokenizer: Any, conversation: Conversation) -> int:
    """How many earlier turns' thinking the template leaves out, as it may.

    Words may occur in the text by chance, where others say the same. So the template first writes the conversation with
    a word of its own in place of each value, which tells what it writes and in which order; then the values are looked
    for in that order, up to JSON's escapes and whitespace at their ends.

    Raises:
      ValueError: a role is unknown; the template leaves out a content, a tool's name, an argument or the last turn's
        thinking; it refuses the messages.
    """
    messages, tools = conversation.messages, conversation.tools
    _check_roles(tokenizer, messages)
    text = without_marks(chat_text(tokenizer, messages, reply=False, tools=tools))
    words, stand_ins, named = _stand_in(messages, tools)
    try:
        outline = without_marks(chat_text(tokenizer, stand_ins, reply=False, tools=named))
    except ValueError:  # a template that reads the words: their order is the row's
        places = {i: i for i in range(len(words))}
    else:
        places = {}
        for found in STAND_IN.finditer(outline.lower()):
            places.setdefault(int(found[1]), found.start())
    missing = [word for i, word in enumerate(words) if i not in places]
    missing += _not_in_order(text, [words[i] for i in sorted(places, key=places.__getitem__)])
    forgotten = {word.turn for word in missing if _may_be_left_out(word, messages)}
    for word in sorted(missing, key=lambda word: (word.turn, word.part)):
        if word.turn not in forgotten or word.kind != "thinking":
            _check_result(word, messages, {other.place for other in missing})
    return len(forgotten)


def _check_roles(tokenizer: Any, messages: Sequence[Message]) -> None:
    template = str(tokenizer.chat_template)
    for i, message in enumerate(messages):
        role = message["role"]
        if role not in ROLES and f"'{role}'" not in template and f'"{role}"' not in template:
            raise ValueError(f"messages[{i}].role must be one of {', '.join(ROLES)}, got {shorten(role)}")


def _stand_in(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> tuple[list[Word], list[Message], list[Mapping[str, Any]]]:
    """The row's words, and its messages and tools with others in their place."""
    words: list[Word] = []
    parts = 0

    def put(place: str, value: Any, kind: Any, turn: int) -> Any:
        words.append(Word(place, value, kind, turn, parts))
        return f"zq{len(words) - 1:06d}qz"

    def put_all(place: str, value: Any, turn: int) -> Any:
        """In place of a call's argument: of each of its values, and of the names that they have."""
        match value:
            case dict():
                return {
                    put(f"{place}.{key}", key, "argument", turn): put_all(f"{place}.{key}", part, turn)
                    for key, part in value.items()
                }
            case list():
                return [put_all(f"{place}[{i}]", part, turn) for i, part in enumerate(value)]
            case str() if not value.strip():
                return value
        return put(place, value, "argument", turn)

    turns: list[Message] = []
    for i, message in enumerate(messages):
        changed = dict(message)
        for kind in ("content", "thinking"):
            parts += 1
            if isinstance(text := message.get(kind), str) and text.strip():
                changed[kind] = put(f"messages[{i}].{kind}", text, kind, i)
        if message["role"] == "tool" and message.get("name"):
            parts += 1
            changed["name"] = put(f"messages[{i}].name", message["name"], "name of a result", i)
        calls = []
        for j, call in enumerate(message.get("tool_calls", ())):
            parts += 1
            place, function = f"messages[{i}].tool_calls[{j}]", call.get("function", call)
            name = put(place, function["name"], "call", i)
            arguments = put_all(f"{place}.arguments", function.get("arguments", {}), i)
            function = {**function, "name": name, "arguments": arguments}
            calls.append({**call, "function": function} if "function" in call else function)
        turns.append({**changed, "tool_calls": calls} if calls else changed)
    named: list[Mapping[str, Any]] = []
    for j, tool in enumerate(tools):
        parts += 1
        name = put(f"tools[{j}].function.name", tool["function"]["name"], "tool", -1)
        named.append({**tool, "function": {**tool["function"], "name": name}})
    return words, turns, named


def _not_in_order(text: str, words: Sequence[Word]) -> list[Word]:
    """The words that do not occur in the text after those before them, of one part in any order."""
    missing = []
    begin = end = 0
    for last, word in zip([None, *words], words, strict=False):
        if last is None or last.part != word.part:
            begin = end
        stop = _find(text, word.value, begin)
        if stop is None:
            missing.append(word)
        else:
            end = max(end, stop)
    return missing


def _find(text: str, value: Any, begin: int) -> int | None:
    """Where the first of the ways to write a value ends; None: none is there."""
    if isinstance(value, str):
        ways = {value.strip()}
        ways |= {json.dumps(way, ensure_ascii=ascii)[1:-1] for way in (value, *ways) for ascii in (False, True)}
    else:
        ways = {str(value), json.dumps(value, default=str)}
    found = [(place, place + len(way)) for way in ways if (place := text.find(way, begin)) >= 0]
    return min(found)[1] if found else None


def _may_be_left_out(word: Word, messages: Sequence[Message]) -> bool:
    earlier = word.turn < len(messages) - 1
    return word.kind == "thinking" and earlier and messages[word.turn]["role"] == "assistant"


def _check_result(word: Word, messages: Sequence[Message], missing: set[str]) -> None:
    """Raises ValueError for what is left out; the name of a call's result may be written as the call's name is."""
    if word.kind == "name of a result":
        callers = [i for i, message in enumerate(messages[: word.turn]) if message.get("tool_calls")]
        calls = messages[callers[-1]]["tool_calls"] if callers else []
        if word.value in [call.get("function", call)["name"] for call in calls]:
            return
    hint = ""
    if word.kind == "content" and messages[word.turn].get("tool_calls"):
        hint = '; words that lead to a call and may be left out go into "thinking"'
    role = f" ({messages[word.turn]['role']})" if word.turn >= 0 else ""
    raise ValueError(f"the chat template leaves out {word.place}{role}, {shorten(word.value)}{hint}")

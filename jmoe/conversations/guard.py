"""Words of a conversation that its chat template leaves out, and that would be lost without notice."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jmoe.conversations.rows import Conversation
from jmoe.conversations.turns import ROLES
from jmoe.errors import in_short
from jmoe.text import Message, chat_text, without_marks

STAND_IN = re.compile(r"zq(\d{6})qz")

type Kind = Literal["content", "thinking", "call", "argument", "result", "tool"]


class Word(NamedTuple):
    """A value of the row that must be in the text.

    Fields:
      kind: "result" is the name of the function whose result a turn has.
      turn: the message that has it, by its place; -1: the row's tools.
      part: the values that have it in common may be written in any order.
    """

    place: str
    value: Any
    kind: Kind
    turn: int
    part: int


def check_conversation(tokenizer: Any, conversation: Conversation) -> int:
    """How many earlier turns' thinking the template leaves out, as it may.

    A value that is left out may occur in the text by chance, as others' words. So the template first writes the
    conversation with a word of its own in place of each value, which tells what it writes and in which order; then the
    values are looked for in that order, as they are, with JSON's escapes, or without whitespace at their ends.

    Raises:
      ValueError: a role is unknown; the template leaves out a content, a tool's name, an argument or the last turn's
        thinking; it refuses the messages.
    """
    messages, tools = conversation.messages, conversation.tools
    _check_roles(tokenizer, messages)
    text = without_marks(chat_text(tokenizer, messages, reply=False, tools=tools))
    others = _Others()
    changed = [others.of_message(i, message) for i, message in enumerate(messages)]
    named = [others.of_tool(i, tool) for i, tool in enumerate(tools)]
    try:
        outline = chat_text(tokenizer, changed, reply=False, tools=named).lower()
    except ValueError:  # of a template that reads the words: they are looked for in the row's order
        order = list(range(len(others.words)))
    else:
        order = list(dict.fromkeys(int(found[1]) for found in STAND_IN.finditer(outline)))
    missing = [others.words[i] for i in sorted(set(range(len(others.words))) - set(order))]
    missing += _not_in_order(text, [others.words[i] for i in order])
    if "tool_call_id" not in str(tokenizer.chat_template):
        missing += _results_by_id(messages)
    forgotten = {word.turn for word in missing if _may_be_left_out(word, messages)}
    for word in missing:
        if not _may_be_left_out(word, messages) and not _is_named_by_call(word, messages):
            raise ValueError(_refusal(word, messages))
    return len(forgotten)


def _check_roles(tokenizer: Any, messages: Sequence[Message]) -> None:
    template = str(tokenizer.chat_template)
    for i, message in enumerate(messages):
        role = message["role"]
        if role not in ROLES and f"'{role}'" not in template and f'"{role}"' not in template:
            raise ValueError(f"messages[{i}].role must be one of {', '.join(ROLES)}, got {in_short(role)}")


class _Others:
    """A conversation's words, and others in their place."""

    def __init__(self) -> None:
        self.words: list[Word] = []
        self.parts = itertools.count()

    def of_message(self, turn: int, message: Message) -> Message:
        place = f"messages[{turn}]"
        changed = dict(message)
        for kind in ("content", "thinking"):
            if isinstance(text := message.get(kind), str) and text.strip():
                changed[kind] = self._put(f"{place}.{kind}", text, kind, turn, next(self.parts))
        if message["role"] == "tool" and message.get("name"):
            changed["name"] = self._put(f"{place}.name", message["name"], "result", turn, next(self.parts))
        if calls := message.get("tool_calls"):
            changed["tool_calls"] = [self._of_call(f"{place}.tool_calls[{i}]", c, turn) for i, c in enumerate(calls)]
        return changed

    def of_tool(self, number: int, tool: Mapping[str, Any]) -> Mapping[str, Any]:
        function = tool["function"]
        name = self._put(f"tools[{number}].function.name", function["name"], "tool", -1, next(self.parts))
        return {**tool, "function": {**function, "name": name}}

    def _of_call(self, place: str, call: Mapping[str, Any], turn: int) -> Mapping[str, Any]:
        function = call.get("function", call)
        name = self._put(f"{place}.function.name", function["name"], "call", turn, next(self.parts))
        arguments = self._of_argument(f"{place}.arguments", function.get("arguments", {}), turn, next(self.parts))
        changed = {**function, "name": name, "arguments": arguments}
        return {**call, "function": changed} if "function" in call else changed

    def _of_argument(self, place: str, value: Any, turn: int, part: int) -> Any:
        match value:
            case dict():
                return {
                    self._put(f"{place}.{key}", key, "argument", turn, part): self._of_argument(
                        f"{place}.{key}", below, turn, part
                    )
                    for key, below in value.items()
                }
            case list():
                return [self._of_argument(f"{place}[{i}]", below, turn, part) for i, below in enumerate(value)]
            case str() if not value.strip():
                return value
        return self._put(place, value, "argument", turn, part)

    def _put(self, place: str, value: Any, kind: Kind, turn: int, part: int) -> str:
        self.words.append(Word(place, value, kind, turn, part))
        return f"zq{len(self.words) - 1:06d}qz"


def _not_in_order(text: str, words: Sequence[Word]) -> list[Word]:
    """The words that do not occur in the text after those before them."""
    missing = []
    end = 0
    for _, part in itertools.groupby(words, key=lambda word: word.part):
        begin = end
        for word in part:
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


def _is_named_by_call(word: Word, messages: Sequence[Message]) -> bool:
    """Whether the word names a result, and is the name of a call right before, by which the template names it."""
    calls = next((message["tool_calls"] for message in messages[word.turn :: -1] if message.get("tool_calls")), ())
    names = [call.get("function", call)["name"] for call in calls]
    return word.kind == "result" and word.value.removeprefix("functions.") in names


def _results_by_id(messages: Sequence[Message]) -> list[Word]:
    """The names that results without one have by the ids of their calls."""
    names: dict[str, str] = {}
    words = []
    for i, message in enumerate(messages):
        names |= {
            str(call["id"]): call.get("function", call)["name"]
            for call in message.get("tool_calls", ())
            if "id" in call
        }
        if message["role"] == "tool" and "name" not in message and str(message.get("tool_call_id")) in names:
            words.append(Word(f"messages[{i}].tool_call_id", names[str(message["tool_call_id"])], "result", i, i))
    return words


def _refusal(word: Word, messages: Sequence[Message]) -> str:
    role = f" ({messages[word.turn]['role']})" if word.turn >= 0 else ""
    hint = ""
    if word.kind == "content" and messages[word.turn].get("tool_calls"):
        hint = ': write words that lead to a call as its "thinking", which may be left out'
    return f"the chat template leaves out {word.place}{role}, {in_short(word.value)}{hint}"

"""A conversation of a request to the tokens of a prompt, by the checkpoint's chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from jmoe.conversations.tools import read_tools
from jmoe.conversations.turns import read_turns
from jmoe.errors import in_short
from jmoe.generation.prompts import Frame, Prompt, tokens_of
from jmoe.serve.errors import ApiError


def conversation_tokens(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    reasoning_effort: str | None,
) -> list[int]:
    """The tokens up to where the reply begins; no word of a message becomes a control token.

    Raises:
      ApiError: 400, with the field: a message or tool that cannot be read, or that the chat template refuses or leaves
        out.
    """
    turns = _turns(messages)
    try:
        functions = read_tools(list(tools or ()))
    except ValueError as error:
        raise ApiError.of_value("tools", error) from None
    try:
        return tokens_of(
            tokenizer,
            Prompt("messages", turns, {}, functions),
            Frame(reasoning_effort=reasoning_effort),
        )
    except ValueError as error:
        raise ApiError.of_value("messages", error) from None


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    try:
        turns = [turn.message for turn in read_turns("messages", [dict(message) for message in messages])]
    except ValueError as error:
        raise ApiError.of_value("messages", error) from None
    if turns[-1]["role"] == "assistant":
        raise ApiError.invalid("messages", "messages: the last must not be the assistant's, whose turn is next")
    return turns


def tools_to_render(
    tools: Sequence[Mapping[str, Any]] | None, tool_choice: str | Mapping[str, Any] | None
) -> Sequence[Mapping[str, Any]] | None:
    """The tools that the model is told of.

    Raises:
      ApiError: 400, a call is demanded, which nothing here can make the model do.
    """
    if tool_choice in (None, "auto"):
        return tools
    if tool_choice == "none":
        return None
    raise ApiError.invalid(
        "tool_choice",
        f'tool_choice: "auto" and "none" are known, as no call can be enforced, got {in_short(tool_choice)}',
    )

"""Text to tokens and back, by a checkpoint's own tokenizer and chat template."""

import datetime
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jmoe.checkpoint.config_file import why_no_tokenizer
from jmoe.text.control_tokens import MARK, ControlTokens, control_tokens, keep_within, mark_all, mark_within, stretches

type Message = Mapping[str, Any]
"""One turn of a conversation: `role` and `content`, and what else the chat template knows."""

ReasoningEffort = Literal["low", "medium", "high"]
"""What gpt-oss's chat template tells the model of how much to think."""

NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
"""Where a chat template asks for the time, in a format that is written out."""

MISSING = 'text needs the package transformers: pip install "jmoe[model]"'


def load_tokenizer(path: str | os.PathLike[str], day: datetime.date | None = None) -> Any:
    """The tokenizer of a checkpoint's directory, as transformers.AutoTokenizer reads it.

    Args:
      day: what its chat template writes for today, as gpt-oss's does; None: today.

    Raises:
      FileNotFoundError: tokenizer.json is missing.
      ValueError: transformers cannot read it.
      ImportError: transformers is not installed.
    """
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist{why_no_tokenizer(path)}")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(MISSING) from error
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(os.fspath(path))
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"{path} has no tokenizer that transformers can read: {error}") from error
    if day is not None and isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = NOW.sub(lambda now: repr(day.strftime(now[2])), tokenizer.chat_template)
    return tokenizer


def chat_text(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    reply: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as the checkpoint's chat template writes it.

    Every string of messages, tools and variables is plain text: a control token that is written in one, or that one
    makes with what the template writes beside it, is marked in what is returned, and `encode` makes text of it.

    Args:
      reply: end with what begins the assistant's next turn.
      tools: functions that the assistant may call, as JSON schemas.
      variables: what else the template knows, as gpt-oss's does reasoning_effort and model_identity.

    Raises:
      ValueError: the checkpoint has no chat template, or the template refuses the messages; a role holds a control
        token, or the template reads the text of one.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{tokenizer.name_or_path} has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json), which messages need"
        )
    plain = _render(tokenizer, messages, reply, tools, variables or {})
    known = control_tokens(tokenizer)
    words = [_without_role(known, message) for message in messages], list(tools or []), dict(variables or {})
    marked = mark_all(known, list(words))
    if marked == list(words):
        return plain
    if MARK in plain:
        raise ValueError("messages with control tokens in their words must not have the noncharacter U+FDD0 too")
    turns = [{**message, **found} for message, found in zip(messages, marked[0], strict=True)]
    text = _render(tokenizer, turns, reply, marked[1], marked[2])
    if without_marks(text) != plain:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} must write control tokens in messages as the text they are"
        )
    return keep_within(known, text)


def _render(
    tokenizer: Any,
    messages: Sequence[Message],
    reply: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> str:
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tools=[dict(tool) for tool in tools] if tools else None,
            tokenize=False,
            add_generation_prompt=reply,
            **variables,
        )
    except Exception as error:  # whatever the template raises
        raise ValueError(f"the chat template of {tokenizer.name_or_path} refuses these messages: {error}") from error


def _without_role(known: ControlTokens, message: Message) -> Message:
    """The message without its role, which templates compare and write into tokens."""
    role = message.get("role")
    if isinstance(role, str) and known.found.search(role):
        raise ValueError(f"a message's role must not hold a control token, got {role!r}")
    return {name: value for name, value in message.items() if name != "role"}


def mark(tokenizer: Any, value: Any) -> Any:
    """The JSON-like value with the control tokens in its strings marked, so that `encode` makes text of them."""
    return mark_within(control_tokens(tokenizer), value)


def without_marks(text: str) -> str:
    """The text as people wrote it: what to show of what chat_text returns."""
    return text.replace(MARK, "")


def check_vocabulary(largest: int, vocabulary: int) -> None:
    """Raises ValueError unless the model has the largest token that its tokenizer made."""
    if largest >= vocabulary:
        raise ValueError(
            f"token ids must be in [0, {vocabulary}), got {largest}: the model lacks what its tokenizer has"
        )


def encode(tokenizer: Any, text: str) -> list[int]:
    """The text's tokens, and no others.

    Control tokens may be written out in it; those that chat_text or mark has marked become text.

    Raises:
      ValueError: it has halves of surrogate pairs, as arguments that are not UTF-8 get from Python.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text must be Unicode, got {text[error.start]!r} at character {error.start}") from None
    if MARK not in text:
        return tokenizer.encode(text, add_special_tokens=False)
    tokens: list[int] = []
    for part, bare in stretches(control_tokens(tokenizer), text):
        if part:
            tokens += _encode_bare(tokenizer, part) if bare else tokenizer.encode(part, add_special_tokens=False)
    return tokens


def _encode_bare(tokenizer: Any, text: str) -> list[int]:
    """The text's tokens where no control token is known: each step of the tokenizer but the one that finds them.

    Its own switch for that (encode_special_tokens) would be on for all who hold the tokenizer, and still finds added
    tokens that are not special.
    """
    steps = tokenizer.backend_tokenizer
    if steps.normalizer is not None:
        text = steps.normalizer.normalize_str(text)
    words = [text] if steps.pre_tokenizer is None else [word for word, _ in steps.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in steps.model.tokenize(word)]

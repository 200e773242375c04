"""Rows of text to tokens, and which of the tokens are learnt."""

import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from jmoe.finetune.rows import Completion, Conversation, Row, Text, parse_row, read_lines
from jmoe.text import Message, chat_text, encode


class Example(NamedTuple):
    """One sequence. tokens int32 [n]; trained bool [n]: whether the loss has a token as a target.

    The first token never is one, as nothing comes before it.
    """

    tokens: Int32[np.ndarray, " n"]
    trained: Bool[np.ndarray, " n"]


class Examples(NamedTuple):
    """A file's examples in its order, and what became of its rows: rows = len(examples) + the three that are skipped.

    Fields:
      truncated: examples that were cut.
      skipped_untrained: rows that, once cut, had no trained token.
    """

    examples: tuple[Example, ...]
    rows: int
    skipped_bad: int
    skipped_too_long: int
    skipped_untrained: int
    truncated: int


class Piece(NamedTuple):
    """A part of a row's text, encoded apart from the others."""

    text: str
    trained: bool


def read_examples(
    path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    max_length: int,
    too_long: Literal["error", "skip", "truncate"] = "skip",
    bad_rows: Literal["error", "skip"] = "error",
) -> Examples:
    """The examples of a file of rows (jmoe.finetune.rows).

    Args:
      tokenizer: what jmoe.text.load_tokenizer gives.
      max_length: the most tokens an example has, at least 2.
      too_long: what becomes of longer ones; "truncate" keeps their first max_length tokens.
      bad_rows: whether a row that cannot be read or rendered is an error or is skipped.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: an argument is out of range; a row is bad or too long where that is an error, named by file and line;
        no example is left.
    """
    _check_options(tokenizer, max_length, too_long, bad_rows)
    examples: list[Example] = []
    rows = truncated = untrained = overlong = 0
    refusals: list[str] = []
    for line in read_lines(path):
        rows += 1
        try:
            example = make_example(parse_row(line.content), tokenizer)
        except ValueError as error:
            refusals.append(f"{line.place}: {error}")
            if bad_rows == "error":
                raise ValueError(refusals[-1]) from error
            continue
        if (length := len(example.tokens)) > max_length:
            if too_long == "error":
                raise ValueError(f"{line.place}: a row must be at most {max_length} tokens, got {length}")
            if too_long == "skip":
                overlong += 1
                continue
            example = Example(example.tokens[:max_length].copy(), example.trained[:max_length].copy())
            if not example.trained.any():
                untrained += 1
                continue
            truncated += 1
        examples.append(example)
    if not examples:
        raise ValueError(
            f"{os.fspath(path)} has no row to train on: of {rows} rows, {len(refusals)} are bad, {overlong} longer "
            f"than {max_length} tokens, {untrained} untrained once cut"
            + "".join(f"; {first}" for first in refusals[:1])
        )
    return Examples(tuple(examples), rows, len(refusals), overlong, untrained, truncated)


def make_example(row: Row, tokenizer: Any) -> Example:
    """A row's tokens.

    A conversation is its chat template's text, in which the assistant's turns are trained: what follows the header that
    begins a reply, with the token that ends the turn. A prompt and its completion, or a text, stand as they are and end
    with the tokenizer's eos_token_id; all but the prompt is trained.

    What generation is given, a prompt or a reply's header, is encoded apart from what it is to write, so that training
    sees the tokens that generation does.

    Raises:
      ValueError: the chat template refuses the conversation, or writes its turns so that replies cannot be told.
    """
    match row:
        case Conversation(messages):
            return _join(tokenizer, conversation_pieces(tokenizer, messages), [])
        case Completion(prompt, completion):
            pieces = [Piece(prompt, trained=False), Piece(completion, trained=True)]
            return _join(tokenizer, pieces, [tokenizer.eos_token_id])
        case Text(text):
            return _join(tokenizer, [Piece(text, trained=True)], [tokenizer.eos_token_id])


def conversation_pieces(tokenizer: Any, messages: Sequence[Message]) -> list[Piece]:
    """The conversation as the chat template writes it, cut where each of the assistant's turns begins and ends.

    A turn begins where the turns before it end, followed by the header of a reply. It ends where another reply's header
    would begin, or with the text. gpt-oss ends the last turn with another token than the ones before, whose thinking it
    leaves out; so each is found in the text as a turn with others to come.

    Raises:
      ValueError: the template refuses the messages, or does not write the turns up to some point as the beginning of
        the whole.
    """
    whole = chat_text(tokenizer, messages, reply=False)
    header = _reply_header(tokenizer, messages)
    pieces: list[Piece] = []
    end = 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        begin = len(_beginning(tokenizer, whole, messages[:turn], header)) + len(header)
        pieces.append(Piece(whole[end:begin], trained=False))
        last = turn == len(messages) - 1
        end = len(whole) if last else len(_beginning(tokenizer, whole, messages[: turn + 1], header))
        if not whole.startswith(header, begin - len(header)) or end <= begin:
            raise ValueError(
                f"the chat template must write messages[{turn}] behind a reply's header {header!r}, got "
                f"{whole[begin - len(header) : end][:40]!r}"
            )
        pieces.append(Piece(whole[begin:end], trained=True))
    return [*pieces, Piece(whole[end:], trained=False)]


def _reply_header(tokenizer: Any, messages: Sequence[Message]) -> str:
    """What the template writes for a reply to begin, by the messages before the assistant's first."""
    before = messages[: [message["role"] for message in messages].index("assistant")]
    without, text = (chat_text(tokenizer, before, reply=reply) for reply in (False, True))
    _check_prefix(without, text, "a reply's header must follow the messages")
    return text.removeprefix(without)


def _beginning(tokenizer: Any, whole: str, messages: Sequence[Message], header: str) -> str:
    """The first messages as the template writes them before a reply, the reply's header left out.

    gpt-oss leaves out what led to a tool's call once an answer follows: so does this, where that gives the whole.
    """
    bare = [_call_alone(message) if message.get("tool_calls") else message for message in messages]
    if bare != list(messages):
        text = chat_text(tokenizer, bare, reply=True)
        if text.endswith(header) and whole.startswith(text.removesuffix(header)):
            return text.removesuffix(header)
    text = chat_text(tokenizer, messages, reply=True)
    if not text.endswith(header):
        raise ValueError(
            f"the chat template must begin a reply after messages[:{len(messages)}] with {header!r}, as the first, "
            f"got {text[-40:]!r}"
        )
    beginning = text.removesuffix(header)
    _check_prefix(beginning, whole, f"the text of messages[:{len(messages)}] must stay when more follow")
    return beginning


def _call_alone(message: Message) -> Message:
    """The turn without what led to its call, which may be its thinking or its content."""
    return {name: "" if name == "content" else value for name, value in message.items() if name != "thinking"}


def _check_prefix(beginning: str, whole: str, rule: str) -> None:
    if not whole.startswith(beginning):
        same = next((i for i, (a, b) in enumerate(zip(beginning, whole, strict=False)) if a != b), len(whole))
        raise ValueError(
            f"the chat template does not let replies be told from the rest: {rule}, expected "
            f"{beginning[same : same + 40]!r} at character {same}, got {whole[same : same + 40]!r}"
        )


def _join(tokenizer: Any, pieces: Sequence[Piece], end: Sequence[int]) -> Example:
    """The pieces' tokens one after the other, then trained tokens that no text stands for."""
    parts = [(encode(tokenizer, piece.text), piece.trained) for piece in pieces] + [(list(end), True)]
    tokens = np.concatenate([np.array(part, np.int32) for part, _ in parts])
    trained = np.repeat([trained for _, trained in parts], [len(part) for part, _ in parts])
    trained[:1] = False
    return Example(tokens, trained)


def _check_options(tokenizer: Any, max_length: int, too_long: str, bad_rows: str) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{tokenizer.name_or_path} must have an eos_token, which ends texts and completions, got none")
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    for name, value, choices in (
        ("too_long", too_long, ("error", "skip", "truncate")),
        ("bad_rows", bad_rows, ("error", "skip")),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")

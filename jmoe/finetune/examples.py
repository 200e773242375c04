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
    begins a reply, with the token that ends the turn. A prompt and its completion, or a text, stand as they are, and
    end with the tokenizer's eos_token_id; all but the prompt is trained.

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

    A turn begins behind the header of a reply to the turns before it, and ends where the header of another reply would
    begin. The last one ends with the text: gpt-oss's template ends it with another token than those before.

    Raises:
      ValueError: the template refuses the messages, or does not write the turns up to some point as the beginning of
        the whole.
    """
    whole = chat_text(tokenizer, messages, reply=False)
    pieces: list[Piece] = []
    end = 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        begin = len(_beginning(tokenizer, whole, messages[:turn]))
        pieces.append(Piece(whole[end:begin], trained=False))
        if turn == len(messages) - 1:
            end = len(whole)
        else:
            header = _reply_header(tokenizer, messages[:turn])
            end = len(_beginning(tokenizer, whole, messages[: turn + 1], without=header))
        pieces.append(Piece(whole[begin:end], trained=True))
    return [*pieces, Piece(whole[end:], trained=False)]


def _beginning(tokenizer: Any, whole: str, messages: Sequence[Message], *, without: str = "") -> str:
    """The messages with the header of a reply, or without it, which must be how the whole text begins."""
    text = chat_text(tokenizer, messages, reply=True).removesuffix(without)
    if not whole.startswith(text):
        same = next((i for i, (a, b) in enumerate(zip(whole, text, strict=False)) if a != b), len(whole))
        raise ValueError(
            f"replies cannot be told from the rest, as the chat template writes the first {len(messages)} messages "
            f"otherwise when more follow: expected {text[same : same + 40]!r} at character {same}, got "
            f"{whole[same : same + 40]!r}"
        )
    return text


def _reply_header(tokenizer: Any, messages: Sequence[Message]) -> str:
    """What the template writes at the beginning of a reply to these messages."""
    return chat_text(tokenizer, messages, reply=True).removeprefix(chat_text(tokenizer, messages, reply=False))


def _join(tokenizer: Any, pieces: Sequence[Piece], after: Sequence[int]) -> Example:
    """The pieces' tokens one after another, and what comes after the last, which is trained.

    Raises:
      ValueError: there are fewer than 2 tokens, or none is trained.
    """
    tokens: list[int] = []
    trained: list[bool] = []
    for piece in pieces:
        new = encode(tokenizer, piece.text)
        tokens += new
        trained += [piece.trained] * len(new)
    tokens += after
    trained += [True] * len(after)
    if len(tokens) < 2 or not any(trained[1:]):
        raise ValueError(f"a row must have a token to learn after another, got {len(tokens)} tokens")
    # Nothing comes before the first token, so that it is no target.
    return Example(np.array(tokens, np.int32), np.array([False, *trained[1:]]))


def _check_options(tokenizer: Any, max_length: int, too_long: str, bad_rows: str) -> None:
    """Raises ValueError for an argument that read_examples does not take."""
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    if too_long not in ("error", "skip", "truncate"):
        raise ValueError(f'too_long must be "error", "skip" or "truncate", got {too_long!r}')
    if bad_rows not in ("error", "skip"):
        raise ValueError(f'bad_rows must be "error" or "skip", got {bad_rows!r}')
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no end-of-text token (eos_token)")

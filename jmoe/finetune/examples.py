"""Rows of text to tokens, and which of the tokens are learnt."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from jmoe.conversations.guard import check_conversation
from jmoe.conversations.rows import Completion, Conversation, Row, Text, parse
from jmoe.conversations.sources import open_source
from jmoe.finetune.pieces import Piece, conversation_pieces
from jmoe.text import encode


class Example(NamedTuple):
    """One sequence. tokens int32 [n]; trained bool [n]: whether the loss has a token as a target.

    The first token never is one, as nothing comes before it.
    """

    tokens: Int32[np.ndarray, " n"]
    trained: Bool[np.ndarray, " n"]


class Examples(NamedTuple):
    """The sources' examples in their order, and what became of the rows: len(examples) + the three that are skipped.

    Fields:
      truncated: examples that were cut.
      skipped_untrained: rows that, once cut, had no trained token.
      forms: how many rows were read of each form, those that were skipped for their length too.
      notices: what the user should know of how the rows were read, a line each.
      refusals: why rows are bad, with their places; the first REFUSALS.
      lengths: int32 [n], tokens of each row that is not bad, before it was skipped or cut.
    """

    examples: tuple[Example, ...]
    rows: int
    skipped_bad: int
    skipped_too_long: int
    skipped_untrained: int
    truncated: int
    forms: Mapping[str, int]
    notices: tuple[str, ...]
    refusals: tuple[str, ...]
    lengths: Int32[np.ndarray, " n"]


REFUSALS = 100
"""How many are kept: those that people read."""


def read_examples(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    tokenizer: Any,
    *,
    max_length: int,
    too_long: Literal["error", "skip", "truncate"] = "skip",
    bad_rows: Literal["error", "skip"] = "error",
) -> Examples:
    """The examples of one source of rows or several (jmoe.conversations.sources), one after the other.

    Args:
      tokenizer: what jmoe.text.load_tokenizer gives.
      max_length: the most tokens an example has, at least 2.
      too_long: what becomes of longer ones; "truncate" keeps their first max_length tokens.
      bad_rows: whether a row that cannot be read or rendered is an error or is skipped.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: an argument is out of range; a source cannot be read; a row is bad or too long where that is an error,
        named by file and line; no example is left.
      ImportError: a source needs packages that are not installed.
    """
    _check_options(tokenizer, max_length, too_long, bad_rows)
    reading = _Reading(tokenizer, max_length, too_long, bad_rows)
    paths = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    if not paths:
        raise ValueError("sources must have a file, a directory or a data set, got none")
    for path in paths:
        reading.read(path)
    if not reading.examples:
        raise ValueError(
            f"{', '.join(os.fspath(path) for path in paths)} has no row to train on: of {reading.rows} rows, "
            f"{reading.bad} are bad, {reading.overlong} longer than {max_length} tokens, {reading.untrained} untrained "
            "once cut" + "".join(f"; {first}" for first in reading.refusals[:1])
        )
    return reading.result()


class _Reading:
    """What is read so far."""

    def __init__(self, tokenizer: Any, max_length: int, too_long: str, bad_rows: str) -> None:
        self.tokenizer, self.max_length, self.too_long, self.bad_rows = tokenizer, max_length, too_long, bad_rows
        self.examples: list[Example] = []
        self.lengths: list[int] = []
        self.rows = self.bad = self.overlong = self.untrained = self.truncated = self.forgotten = 0
        self.refusals: list[str] = []
        self.notices: list[str] = []
        self.forms: Counter[str] = Counter()

    def read(self, path: str | os.PathLike[str]) -> None:
        source = open_source(path)
        ignored: set[str] = set()
        for record in source.records:
            self.rows += 1
            try:
                parsed = parse(record.content)
                example, forgotten = _make_example(parsed.row, self.tokenizer)
            except ValueError as error:
                self._refuse(f"{record.place}: {error}", error)
                continue
            except RecursionError as error:
                self._refuse(f"{record.place}: a row must not be nested so deeply: {error}", error)
                continue
            self.forms[parsed.form] += 1
            self.forgotten += forgotten
            ignored |= parsed.ignored
            ignored |= {f"messages[].{key}" for key in parsed.unknown if not _reads(self.tokenizer, key)}
            self._add(record.place, example)
        if source.notice is not None:
            self.notices.append(source.notice)
        if ignored:
            self.notices.append(f"{os.fspath(path)}: ignored: {', '.join(key or repr(key) for key in sorted(ignored))}")

    def _refuse(self, refusal: str, error: Exception) -> None:
        if self.bad_rows == "error":
            raise ValueError(refusal) from error
        self.bad += 1
        if len(self.refusals) < REFUSALS:
            self.refusals.append(refusal)

    def _add(self, place: str, example: Example) -> None:
        length = len(example.tokens)
        self.lengths.append(length)
        if length > self.max_length:
            if self.too_long == "error":
                raise ValueError(f"{place}: a row must be at most {self.max_length} tokens, got {length}")
            if self.too_long == "skip":
                self.overlong += 1
                return
            example = Example(*(part[: self.max_length].copy() for part in example))
            if not example.trained.any():
                self.untrained += 1
                return
            self.truncated += 1
        self.examples.append(example)

    def result(self) -> Examples:
        read = ", ".join(f"{count:,} of {form}" for form, count in self.forms.most_common())
        notices = [f"rows read: {read}", *self.notices]
        if self.forgotten:
            notices.append(f"earlier turns whose thinking the chat template leaves out: {self.forgotten:,}")
        return Examples(
            tuple(self.examples),
            self.rows,
            self.bad,
            self.overlong,
            self.untrained,
            self.truncated,
            dict(self.forms),
            tuple(notices),
            tuple(self.refusals),
            np.array(self.lengths, np.int32),
        )


def make_example(row: Row, tokenizer: Any) -> Example:
    """A row's tokens.

    A conversation is its chat template's text, in which the assistant's turns are trained: what follows the header that
    begins a reply, with the token that ends the turn. A prompt and its completion, or a text, stand as they are and end
    with the tokenizer's eos_token_id; all but the prompt is trained. Control tokens in the words of a conversation are
    text; in a prompt, a completion or a text they are control tokens.

    What generation is given, a prompt or a reply's header, is encoded apart from what it is to write, so that training
    sees the tokens that generation does.

    Raises:
      ValueError: the chat template refuses the conversation, leaves out words of it, or writes its turns so that
        replies cannot be told.
    """
    return _make_example(row, tokenizer)[0]


def _make_example(row: Row, tokenizer: Any) -> tuple[Example, int]:
    """A row's tokens, and how many of its turns' thinking they leave out."""
    match row:
        case Conversation(messages, tools, untrained):
            forgotten = check_conversation(tokenizer, row)
            return _join(tokenizer, conversation_pieces(tokenizer, messages, tools, untrained), []), forgotten
        case Completion(prompt, completion):
            pieces = [Piece(prompt, trained=False), Piece(completion, trained=True)]
            return _join(tokenizer, pieces, [tokenizer.eos_token_id]), 0
        case Text(text):
            return _join(tokenizer, [Piece(text, trained=True)], [tokenizer.eos_token_id]), 0


def _join(tokenizer: Any, pieces: Iterable[Piece], end: Sequence[int]) -> Example:
    """The pieces' tokens one after the other, then trained tokens that no text stands for."""
    parts = [(encode(tokenizer, piece.text), piece.trained) for piece in pieces] + [(list(end), True)]
    tokens = np.concatenate([np.array(part, np.int32) for part, _ in parts])
    trained = np.repeat([trained for _, trained in parts], [len(part) for part, _ in parts])
    trained[:1] = False
    return Example(tokens, trained)


def _reads(tokenizer: Any, key: str) -> bool:
    """Whether the chat template seems to read a key of messages."""
    name = re.escape(key)
    return re.search(rf"""\.{name}\b|["']{name}["']""", str(tokenizer.chat_template)) is not None


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

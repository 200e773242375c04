"""A reply's tokens to text by channel, as gpt-oss writes replies: its thinking, its tool calls, its answer.

The format is Harmony (https://cookbook.openai.com/articles/openai-harmony); a reply is for instance

    <|channel|>analysis<|message|>thinking<|end|><|start|>assistant<|channel|>final<|message|>the answer<|return|>

The library openai-harmony reads it with one fixed vocabulary, which it downloads; this reads the tokens of whatever
tokenizer a checkpoint has.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jmoe.text.control_tokens import added_tokens
from jmoe.text.stream import TextStream

FINAL = "final"
"""The channel of the answer; also of a reply without channels."""

COMMENTARY = "commentary"
"""The channel of tool calls, and of words between them."""

OUTSIDE = ""
"""What holds text that belongs to no channel of the reply."""

CONTROL = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")

ENDS_OF_REPLIES = ("<|return|>", "<|call|>")
"""The control tokens after which a reply has no more messages."""

BEGUN_RECIPIENT = re.compile(r"\s*(t|to|to=\S*\s*)?")
"""The recipient that may follow the template's `<|start|>assistant`, whole or in part."""

RECIPIENT = re.compile(r"(?:^|\s)to=(\S+)")


class ChannelText(NamedTuple):
    """A piece of text, its channel, and the tool that its message is for (`to=functions.x` in the header)."""

    channel: str
    text: str
    recipient: str | None = None


def has_channels(tokenizer: Any) -> bool:
    """Whether the tokenizer has the control tokens of channels."""
    return {"<|channel|>", "<|message|>"} <= added_tokens(tokenizer).keys()


class ChannelReader:
    """The text of one reply by channel, as its tokens come; the same however they are split into calls.

    The tokens are those after the header of the assistant's turn, `<|start|>assistant`. No sequence of them is an
    error, and no text is lost:

    - Text at the very beginning, before any control token, is the final channel's, as is the text of a message without
      a channel: so reply models trained without channels, or asked by a template that begins the message itself.
    - A channel of another name than gpt-oss's has that name.
    - A header that never comes to its `<|message|>`, text between a message's end and the next `<|start|>`, and the
      messages of other roles than the assistant's are in the channel OUTSIDE.
    - `<|start|>` and `<|channel|>` within a message end it. `<|message|>` and `<|constrain|>` within one are dropped,
      as special tokens that mean nothing here are.

    Several messages of one channel have a newline between them. With a tokenizer that has no channels, all text is the
    final channel's.
    """

    def __init__(self, tokenizer: Any) -> None:
        """A reader of no tokens yet.

        Args:
          tokenizer: as jmoe.text.load_tokenizer returns it.
        """
        self._tokenizer = tokenizer
        added = added_tokens(tokenizer)
        self._control = {added[name]: name for name in CONTROL if name in added} if has_channels(tokenizer) else {}
        self._texts: dict[str, list[str]] = {}
        self._calls: list[ChannelText] = []
        self._reached_final = self._final_ended = False
        self._header: list[int] | None = None
        self._begin(FINAL)
        if self._control:
            self._header, self._reached_final = [], False

    @property
    def reached_final(self) -> bool:
        """Whether a message of the final channel has begun."""
        return self._reached_final

    @property
    def final_ended(self) -> bool:
        """Whether a message of the final channel has ended, by a control token."""
        return self._final_ended

    def text(self, channel: str) -> str:
        """All text of the channel so far."""
        return "".join(self._texts.get(channel, []))

    @property
    def calls(self) -> list[ChannelText]:
        """The messages to tools so far, each whole and as it was written, that may be nothing."""
        return list(self._calls)

    def push(self, tokens: Sequence[int]) -> list[ChannelText]:
        """What these tokens add to the text; a character whose bytes are not all there waits for the rest."""
        new: list[ChannelText] = []
        run: list[int] = []  # of the message's own tokens
        for token in tokens:
            name = self._control.get(token)
            if name is None and self._header is None:
                run.append(token)
                continue
            new += self._add(self._stream.push(run))
            run = []
            new += self._add_to_header(token) if name is None else self._control_token(token, name)
        return [*new, *self._add(self._stream.push(run))]

    def finish(self) -> list[ChannelText]:
        """What is left when no more tokens come: part of a character, or of a header."""
        return self._end()

    def _control_token(self, token: int, name: str) -> list[ChannelText]:
        header = self._header
        if name == "<|message|>":
            if header is not None:
                self._begin(*self._read(header))
            return []
        if name == "<|constrain|>" or (name == "<|channel|>" and header is not None and token not in header):
            if header is not None:
                header.append(token)
            return []
        self._final_ended |= header is None and self._channel == FINAL
        new = self._end()
        if name in ("<|start|>", "<|channel|>"):
            self._header = [token]
        return new

    def _add_to_header(self, token: int) -> list[ChannelText]:
        """Adds a token of text; what a reply begins with may turn out to be no header."""
        assert self._header is not None
        self._header.append(token)
        if self._control.keys() & set(self._header) or BEGUN_RECIPIENT.fullmatch(self._decode(self._header)):
            return []
        tokens = self._header
        self._begin(FINAL)
        return self._add(self._stream.push(tokens))

    def _begin(self, channel: str, recipient: str | None = None) -> None:
        """Begins a message: its tokens follow."""
        self._header = None
        self._channel, self._recipient = channel, recipient
        self._stream = TextStream(self._tokenizer)
        self._apart = channel in self._texts
        self._reached_final |= channel == FINAL
        if recipient is not None:
            self._calls.append(ChannelText(channel, "", recipient))

    def _end(self) -> list[ChannelText]:
        """Ends the message, or the header that came to none; what follows is outside."""
        header = self._header
        new: list[ChannelText] = []
        if header is None:
            new = self._add(self._stream.finish())
        elif text := self._decode(header):
            self._begin(OUTSIDE if self._control.keys() & set(header) else FINAL)
            new = self._add(text)
        self._begin(OUTSIDE)
        return new

    def _add(self, text: str) -> list[ChannelText]:
        """Adds the text to the message's channel."""
        if not text:
            return []
        if self._recipient is not None:
            self._calls[-1] = self._calls[-1]._replace(text=self._calls[-1].text + text)
        if self._apart:
            text, self._apart = "\n" + text, False
        self._texts.setdefault(self._channel, []).append(text)
        return [ChannelText(self._channel, text, self._recipient)]

    def _read(self, header: Sequence[int]) -> tuple[str, str | None]:
        """(channel, recipient) that a header names."""
        parts: dict[str, list[int]] = {"": []}  # by the control token before them; "" is what begins a reply
        own = ""
        for token in header:
            if token in self._control:
                own = self._control[token]
                parts[own] = []
            else:
                parts[own].append(token)
        words = {name: self._decode(tokens) for name, tokens in parts.items()}
        if "<|start|>" in words and words["<|start|>"].split()[:1] != ["assistant"]:
            return OUTSIDE, None
        found = RECIPIENT.search(" ".join(words.values()))
        recipient = None if found is None else found[1]
        if "<|channel|>" not in words:
            return (FINAL if recipient is None else COMMENTARY), recipient
        names = [word for word in words["<|channel|>"].split() if not word.startswith("to=")]
        return (names[0] if names else OUTSIDE), recipient

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            [token for token in tokens if token not in self._control],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)
        return text

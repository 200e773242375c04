"""One reply: its tokens to text by channel, up to the strings that end it."""

from collections.abc import Sequence
from typing import Any, Literal

from jmoe.text.channels import FINAL, ChannelReader, ChannelText
from jmoe.text.stop_strings import StopStrings
from jmoe.text.stream import TextStream

type Form = Literal["channels", "text", "tokens"]
"""How a reply's tokens are read: by channel; as text alone, whatever channels they name; or special tokens too."""


class Reply:
    """A reply as its tokens come.

    With a tokenizer of channels the strings that end it act in the final channel, else in all its text.

    Attributes:
      messages: its text so far, a piece for each message: one channel, one recipient.
      tokens: those so far; a stop token is none of them, those that hold a string that ends the reply are.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = (), *, form: Form = "channels") -> None:
        """A reply without tokens.

        Args:
          tokenizer: as jmoe.text.load_tokenizer returns it.
          stop_strings: the text ends before the first of them.
          form: how the tokens are read.
        """
        self.messages: list[ChannelText] = []
        self.tokens: list[int] = []
        self._reader = ChannelReader(tokenizer) if form == "channels" else _TextReader(tokenizer, form == "tokens")
        self._stop = StopStrings(stop_strings)

    @property
    def stop_string(self) -> str | None:
        """The string that has ended the reply."""
        return self._stop.found

    @property
    def calls(self) -> Sequence[ChannelText]:
        """Its messages to tools, each whole."""
        return self._reader.calls

    @property
    def answered(self) -> bool:
        """Whether it came to its final channel; True without channels."""
        return self._reader.reached_final

    @property
    def final_ended(self) -> bool:
        """Whether a message of its final channel has ended; False without channels."""
        return self._reader.final_ended

    def text(self, channel: str = FINAL) -> str:
        """All text of a channel so far."""
        return "".join(message.text for message in self.messages if message.channel == channel)

    @property
    def channels(self) -> dict[str, str]:
        """All text so far, by channel; in order of appearance."""
        return {message.channel: self.text(message.channel) for message in self.messages}

    def push(self, tokens: Sequence[int]) -> list[ChannelText]:
        """What these tokens add to the text; nothing once a stop string was found."""
        new: list[ChannelText] = []
        for token in tokens:
            if self.stop_string is not None:
                break
            self.tokens.append(token)
            new += self._cut(self._reader.push([token]))
        return self._keep(new)

    def finish(self) -> list[ChannelText]:
        """What is left when no more tokens come."""
        new = [] if self.stop_string is not None else self._cut(self._reader.finish())
        if held := self._stop.finish():
            new.append(ChannelText(FINAL, held))
        return self._keep(new)

    def _cut(self, pieces: Sequence[ChannelText]) -> list[ChannelText]:
        """The pieces, the final channel's without what is held back or lies behind a stop string."""
        found = []
        for channel, text, recipient in pieces:
            kept = self._stop.push(text) if channel == FINAL else text
            if kept:
                found.append(ChannelText(channel, kept, recipient))
        return found

    def _keep(self, pieces: list[ChannelText]) -> list[ChannelText]:
        for piece in pieces:
            last = self.messages[-1] if self.messages else None
            if last is not None and (last.channel, last.recipient) == (piece.channel, piece.recipient):
                self.messages[-1] = ChannelText(last.channel, last.text + piece.text, last.recipient)
            else:
                self.messages.append(piece)
        return pieces


class _TextReader:
    """A reader of tokens that are all text."""

    reached_final = True
    final_ended = False
    calls: Sequence[ChannelText] = ()

    def __init__(self, tokenizer: Any, show_special: bool) -> None:
        self._stream = TextStream(tokenizer, show_special=show_special)

    def push(self, tokens: Sequence[int]) -> list[ChannelText]:
        return [ChannelText(FINAL, self._stream.push(tokens))]

    def finish(self) -> list[ChannelText]:
        return [ChannelText(FINAL, self._stream.finish())]

"""What a model writes after a context, up to any of some strings, and how it ended."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jmoe.gpt_oss.generate import generate
from jmoe.gpt_oss.model import GptOss
from jmoe.text.channels import FINAL, ChannelReader


class Reply(NamedTuple):
    """What a model wrote.

    Attributes:
      text: the answer: the final channel's text of a reply in channels, else all text, without special tokens; up to
        the first of the strings that end it.
      whole: all that was written, special tokens too.
      cut: whether the limit of tokens ended it.
      reached_final: whether it came to its final channel; True without channels.
    """

    text: str
    whole: str
    cut: bool
    reached_final: bool


class GrowingReply:
    """A reply as its tokens come."""

    def __init__(self, tokenizer: Any, until: Sequence[str], channels: bool) -> None:
        """A reply without tokens; channels: whether it is in gpt-oss's channels."""
        self.tokenizer = tokenizer
        self.until = [string for string in until if string]
        self.reader = ChannelReader(tokenizer) if channels else None
        self.tokens: list[int] = []
        self.ended = False

    def add(self, tokens: Sequence[int], stopped: bool) -> None:
        """Adds tokens, after which a stop token may have come."""
        if self.reader is None:
            self.tokens += tokens
        else:
            for token in tokens:
                self.tokens.append(token)
                self.reader.push([token])
                if self.reader.final_ended:
                    stopped = True
                    break
        self.ended = stopped or cut(text := self.written(), self.until) != text

    def written(self) -> str:
        """The text that the strings of `until` are looked for in."""
        if self.reader is not None:
            return self.reader.text(FINAL)
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def finish(self) -> Reply:
        """The reply, to which nothing more comes."""
        if self.reader is not None:
            self.reader.finish()
        return Reply(
            cut(self.written(), self.until),
            self.tokenizer.decode(self.tokens, skip_special_tokens=False),
            not self.ended,
            self.reader is None or self.reader.reached_final,
        )


def cut(text: str, until: Sequence[str]) -> str:
    """The text up to the first occurrence of any of the strings."""
    return text[: min((text.find(string) for string in until if string in text), default=len(text))]


def generate_replies(
    model: GptOss,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    until: Sequence[str],
    channels: bool,
    **options: Any,
) -> list[Reply]:
    """What the model writes after each prompt, up to the first of the strings in `until`.

    Steps end once every reply has.

    Args:
      channels: whether the replies are in channels; `until` acts in their final channel alone.
      options: of jmoe.gpt_oss.generate.
    """
    replies = [GrowingReply(tokenizer, until, channels) for _ in prompts]

    def add(tokens: np.ndarray, is_text: np.ndarray) -> np.ndarray:
        """Adds a chunk of tokens [B, n], and says which replies have ended; is_text: what comes before a stop token."""
        for reply, own, text in zip(replies, tokens, is_text, strict=True):
            if not reply.ended:
                reply.add(own[text].tolist(), stopped=not text.all())
        return np.array([reply.ended for reply in replies])

    generate(model, prompts, callback=add, **options)
    return [reply.finish() for reply in replies]

"""What a model writes after a context, up to any of some strings, and how it ended."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jmoe.gpt_oss.generate import generate
from jmoe.gpt_oss.model import GptOss
from jmoe.text.reply import Reply


class FinishedReply(NamedTuple):
    """What a model wrote.

    Attributes:
      text: the answer: the final channel's text of a reply in channels, else all text, without special tokens; up to
        the string that ends it.
      whole: all that was written, special tokens too.
      cut: whether the limit of tokens ended it.
      reached_final: whether it came to its final channel; True without channels.
    """

    text: str
    whole: str
    cut: bool
    reached_final: bool


def generate_replies(
    model: GptOss,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    until: Sequence[str],
    channels: bool,
    **options: Any,
) -> list[FinishedReply]:
    """What the model writes after each prompt, up to any of the strings in `until`.

    Steps end once every reply has.

    Args:
      channels: whether the replies are in channels; `until` acts in their final channel alone.
      options: of jmoe.gpt_oss.generate.
    """
    replies = [Reply(tokenizer, until, form="channels" if channels else "text") for _ in prompts]
    ended = np.zeros(len(prompts), bool)

    def add(tokens: np.ndarray, is_text: np.ndarray) -> np.ndarray:
        """Adds a chunk of tokens [B, n], and says which replies have ended; is_text: what comes before a stop token."""
        for i in np.flatnonzero(~ended):
            push_until_ended(replies[i], tokens[i, is_text[i]].tolist())
            ended[i] = has_ended(replies[i]) or not is_text[i].all()
        return ended.copy()

    generate(model, prompts, callback=add, **options)
    return [finished(reply, bool(over), tokenizer) for reply, over in zip(replies, ended, strict=True)]


def push_until_ended(reply: Reply, tokens: Sequence[int]) -> None:
    """Adds tokens, up to that which ends the reply."""
    for token in tokens:
        if has_ended(reply):
            return
        reply.push([token])


def has_ended(reply: Reply) -> bool:
    """Whether a string of `until` or its final message's end has ended it."""
    return reply.stop_string is not None or reply.final_ended


def finished(reply: Reply, ended: bool, tokenizer: Any) -> FinishedReply:
    """The reply, to which nothing more comes."""
    reply.finish()
    whole = tokenizer.decode(reply.tokens, skip_special_tokens=False)
    return FinishedReply(reply.text(), whole, not ended, reply.answered)

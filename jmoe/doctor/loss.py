"""The loss on a fixed English paragraph: whether a model's weights fit together, for `jmoe doctor --loss`.

Shapes cannot say that a square projection lies the wrong way round, that a tensor belongs to another layer or that a
tokenizer is another model's. A loss can.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.adapters.settings import LoraBLayout
from jmoe.gpt_oss.load import Quantize, load, local_directory
from jmoe.gpt_oss.log_probs import log_probs
from jmoe.gpt_oss.model import GptOss
from jmoe.text import chat_text, check_vocabulary, encode, load_tokenizer

REQUEST = "Write a short paragraph about how people in a small town get their bread."

PARAGRAPH = (
    "Every morning before the sun comes up, the baker in our town lights the oven and begins to shape the dough "
    "that he left to rise the night before. By six o'clock the first loaves are on the shelf, and the smell has "
    "reached the far end of the street. The children pass the shop on their way to school, and some of them stop to "
    "buy a roll with the coins their parents have given them. Older people come a little later, because they like "
    "to sit down with a cup of coffee and talk about the weather, the news and each other. By noon most of the "
    "bread is gone. What is left in the evening is sold for half the price, or given to the farmer next door, who "
    "feeds it to his pigs. On Sundays the shop is closed, so everyone buys two loaves on Saturday, and nobody minds "
    "that the second one is a day old."
)
"""English as plain as it comes, written for this."""


def bound(vocabulary: int) -> float:
    """The loss above which a model is not to be trusted: half of ln(vocabulary), 6.1 nats a token for gpt-oss.

    ln(vocabulary) is what a model has that knows nothing. One that knows how frequent each word or letter is, and no
    more, has about half of that or a little over, whatever the tokens are: Shannon's estimates for English (Prediction
    and Entropy of Printed English, 1951) are 11.8 bits, 8.2 nats, for a word and 4.03 bits, 2.8 nats, for a letter or
    space, where half of ln(201088) is 6.1 and half of ln(256) is 2.8.
    """
    return math.log(vocabulary) / 2


@dataclasses.dataclass(frozen=True)
class ParagraphLoss:
    """Nats a token, of the model itself ("model") and with each adapter.

    tokens: how many of the paragraph are scored. in_template: whether they are an answer in the chat template.
    """

    losses: dict[str, float]
    tokens: int
    in_template: bool
    vocabulary: int

    @property
    def too_high(self) -> tuple[str, ...]:
        """Whose loss is above the bound, or not a number."""
        return tuple(name for name, loss in self.losses.items() if not loss <= bound(self.vocabulary))


def examine_loss(
    path: str | os.PathLike[str],
    adapters: Sequence[Path] = (),
    *,
    lora_b_layout: LoraBLayout | None = None,
    quantize: Quantize | None = None,
) -> ParagraphLoss:
    """The loss of a checkpoint, and of it with each adapter, on PARAGRAPH.

    Where there is a chat template the paragraph is the answer to a question: a model that was trained on conversations
    alone may do badly on bare text (gpt-oss-20b was measured at 5.3 nats a token of WikiText, ggml-org/llama.cpp issue
    15155), and that is not a fault.

    Args:
      path, lora_b_layout, quantize: as in jmoe.gpt_oss.load; the path has the tokenizer too.

    Raises:
      FileNotFoundError, ValueError, ImportError: as jmoe.gpt_oss.load and jmoe.text.load_tokenizer.
    """
    directory = local_directory(path)
    tokenizer = load_tokenizer(directory)
    before, paragraph, in_template = paragraph_tokens(tokenizer)
    model = load(directory, adapter=list(adapters), lora_b_layout=lora_b_layout, quantize=quantize)
    check_vocabulary(max(before + paragraph), model.config.vocab_size)
    names = ["model", *map(str, adapters)]
    row = jnp.array([before + paragraph], jnp.int32)

    @jax.jit
    def loss(model: GptOss, adapter_ids: Any) -> Any:
        return -log_probs(model, row, adapter_ids=adapter_ids)[0, len(before) - 1 :].mean()

    # One after another, as the memory that is left beside a model may be little.
    ids = [None] if not adapters else [jnp.array([i], jnp.int32) for i in range(-1, len(adapters))]
    losses = {name: float(np.asarray(loss(model, one))) for name, one in zip(names, ids, strict=True)}
    return ParagraphLoss(losses, len(paragraph), in_template, model.config.vocab_size)


def paragraph_tokens(tokenizer: Any) -> tuple[list[int], list[int], bool]:
    """(what stands before, at least one token; the paragraph's tokens that are scored; whether it is in a template)."""
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": REQUEST}, {"role": "assistant", "content": PARAGRAPH}]
        try:
            text = chat_text(tokenizer, messages, reply=False)
        except ValueError:
            text = ""  # a broken template is another line of the report
        start = text.rfind(PARAGRAPH)
        if start > 0:
            return encode(tokenizer, text[:start]), encode(tokenizer, PARAGRAPH), True
    tokens = encode(tokenizer, PARAGRAPH)
    if tokenizer.bos_token_id is not None:
        tokens.insert(0, tokenizer.bos_token_id)
    if len(tokens) < 2:
        raise ValueError(
            f"{tokenizer.name_or_path} makes {len(tokens)} tokens of a paragraph: there is no loss to take"
        )
    return tokens[:1], tokens[1:], False

"""Text to tokens and back, by a checkpoint's own tokenizer and chat template."""

import datetime
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jmoe.config_file import why_no_tokenizer

type Message = Mapping[str, Any]
"""One turn of a conversation: `role` and `content`, and what else the chat template knows."""

NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
"""Where a chat template asks for the time, in a format that is written out."""

MISSING = "text needs the package transformers: pip install transformers"


def load_tokenizer(path: str | os.PathLike[str], day: datetime.date | None = None) -> Any:
    """The tokenizer of a checkpoint's directory, as transformers.AutoTokenizer reads it.

    Args:
      day: what its chat template writes for today, as gpt-oss's does; None: today.

    Raises:
      FileNotFoundError: there is no tokenizer.json.
      ValueError: it is none.
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


def chat_text(tokenizer: Any, messages: Sequence[Message], *, reply: bool) -> str:
    """The conversation as the checkpoint's chat template writes it.

    Args:
      reply: end with what begins the assistant's next turn.

    Raises:
      ValueError: the checkpoint has no chat template, or the template refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{tokenizer.name_or_path} has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json), which messages need"
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=reply)
    except Exception as error:  # whatever the template raises
        raise ValueError(f"the chat template of {tokenizer.name_or_path} refuses these messages: {error}") from error


def check_vocabulary(largest: int, vocabulary: int) -> None:
    """Raises ValueError unless the model has the largest token that its tokenizer made."""
    if largest >= vocabulary:
        raise ValueError(
            f"token ids must be in [0, {vocabulary}), got {largest}: the model lacks what its tokenizer has"
        )


def encode(tokenizer: Any, text: str) -> list[int]:
    """The text's tokens, and no others; special tokens may be written out in it.

    Raises:
      ValueError: it has halves of surrogate pairs, as arguments that are no UTF-8 get from Python.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text must be Unicode, got {text[error.start]!r} at character {error.start}") from None
    return tokenizer.encode(text, add_special_tokens=False)

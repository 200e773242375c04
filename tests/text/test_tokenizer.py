"""Text to tokens: a checkpoint's tokenizer and its chat template."""

import datetime
import shutil
from pathlib import Path

import pytest

from jmoe.text import chat_text, encode, load_tokenizer

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def test_text_survives_its_tokens() -> None:
    tokenizer = load_tokenizer(TINY)
    text = "Licensed under π and \n the Apache License"
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(ValueError, match=r"text must be Unicode, got '\\udcff' at character 1"):
        encode(load_tokenizer(TINY), "a\udcff")


def test_special_tokens_are_tokens() -> None:
    assert encode(load_tokenizer(TINY), "<|start|>") == [2]


def test_a_conversation_ends_where_its_reply_does() -> None:
    tokenizer = load_tokenizer(TINY)
    assert chat_text(tokenizer, MESSAGES, reply=False) == (
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|message|>Ho<|return|>"
    )
    assert chat_text(tokenizer, MESSAGES[:1], reply=True) == (
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|message|>"
    )


def test_today_in_a_template_is_the_day_that_is_asked_for(tmp_path: Path) -> None:
    for file in ("tokenizer.json", "config.json"):
        shutil.copy(TINY / file, tmp_path)
    (tmp_path / "chat_template.jinja").write_text('{{ strftime_now("%Y-%m-%d") }}: {{ messages[0].content }}')
    tokenizer = load_tokenizer(tmp_path, datetime.date(2025, 8, 5))
    assert chat_text(tokenizer, MESSAGES, reply=False) == "2025-08-05: Hi"
    today = chat_text(load_tokenizer(tmp_path), MESSAGES, reply=False).removesuffix(": Hi")
    assert abs((datetime.date.fromisoformat(today) - datetime.date.today()).days) <= 1


def test_messages_need_a_template(tmp_path: Path) -> None:
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    shutil.copy(TINY / "config.json", tmp_path)
    with pytest.raises(ValueError, match="has no chat template"):
        chat_text(load_tokenizer(tmp_path), MESSAGES, reply=True)


def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=f"{tmp_path} has no tokenizer that transformers can read"):
        load_tokenizer(tmp_path)

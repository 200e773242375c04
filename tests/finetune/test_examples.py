"""Rows to tokens: what is trained, in the small checkpoint's chat template and in gpt-oss's own manner."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jmoe.conversations.rows import Completion, Conversation, Text
from jmoe.finetune.examples import Example, conversation_pieces, make_example, read_examples
from jmoe.text import chat_text, encode, load_tokenizer

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"

# As gpt-oss's: a reply's header ends before the channel, thinking is written in the last turn alone.
CHANNELS = """
{%- for m in messages -%}
{%- if m.role != "assistant" -%}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>
{%- elif m.tool_calls -%}<|start|>assistant to={{ m.tool_calls[0].name }}<|message|>{}<|end|>
{%- elif loop.last and not add_generation_prompt -%}
{%- if m.thinking -%}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{%- endif -%}
<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>
{%- else -%}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""
SYSTEM = {"role": "system", "content": "Be brief"}
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Ho"}
THINKING = {**ASSISTANT, "thinking": "hm"}
CALL = {"role": "assistant", "tool_calls": [{"name": "f"}]}
TOOL = {"role": "tool", "content": "3"}


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(TINY)


def trained_texts(tokenizer: Any, messages: list[dict[str, Any]]) -> list[str]:
    return [piece.text for piece in conversation_pieces(tokenizer, messages) if piece.trained]


def trained_text(tokenizer: Any, example: Example) -> str:
    return tokenizer.decode(example.tokens[example.trained])


def write(folder: Path, *rows: Any) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def test_the_assistants_turns_are_trained_with_their_ends(tokenizer: Any) -> None:
    messages = [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]
    assert trained_texts(tokenizer, messages) == ["Ho<|end|>", "Ho<|return|>"]


def test_a_last_turn_that_is_no_reply_is_not_trained(tokenizer: Any) -> None:
    assert trained_texts(tokenizer, [USER, ASSISTANT, USER]) == ["Ho<|end|>"]


def test_replies_in_channels_are_trained_from_the_channel_on(tokenizer: Any) -> None:
    tokenizer.chat_template = CHANNELS
    final = "<|channel|>final<|message|>Ho"
    assert trained_texts(tokenizer, [USER, THINKING, USER, THINKING]) == [
        f"{final}<|end|>",
        f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant{final}<|return|>",
    ]
    assert trained_texts(tokenizer, [USER, CALL, TOOL, ASSISTANT]) == [
        " to=f<|message|>{}<|end|>",
        f"{final}<|return|>",
    ]
    assert trained_texts(tokenizer, [USER, ASSISTANT, ASSISTANT]) == [f"{final}<|end|>", f"{final}<|return|>"]


def test_what_a_tools_call_was_thought_out_by_is_left_out_where_the_template_leaves_it_out(tokenizer: Any) -> None:
    answered = "messages[-1].role == 'assistant' and not messages[-1].tool_calls"
    text = "<|start|>assistant<|message|>{{ m.thinking or m.content }}<|end|>"
    thought = "{%- if (m.thinking or m.content) and not (" + answered + ") -%}" + text + "{%- endif -%}"
    tokenizer.chat_template = CHANNELS.replace("{%- elif m.tool_calls -%}", "{%- elif m.tool_calls -%}" + thought)
    for led in ("thinking", "content"):
        assert trained_texts(tokenizer, [USER, {**CALL, led: "hm"}, TOOL, ASSISTANT]) == [
            " to=f<|message|>{}<|end|>",
            "<|channel|>final<|message|>Ho<|return|>",
        ]


@pytest.mark.parametrize("template", [None, CHANNELS])
def test_a_conversations_tokens_are_those_of_its_whole_text(tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    messages = (SYSTEM, {**USER, "content": " π \n"}, {**ASSISTANT, "content": " a  b\n"}, USER, ASSISTANT)
    example = make_example(Conversation(messages), tokenizer)
    assert example.tokens.tolist() == encode(tokenizer, chat_text(tokenizer, messages, reply=False))
    prompt = encode(tokenizer, chat_text(tokenizer, messages[:-1], reply=True))
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert example.trained[len(prompt) :].all()
    assert not example.trained[len(prompt) - 1]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}", r"must stay when more follow"),
        ("{% if add_generation_prompt %}?{% endif %}{{ messages[0].content }}", "header must follow the messages"),
        ("{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}", r"must write messages\[1\] behind"),
    ],
)
def test_a_template_in_which_replies_cannot_be_told_is_refused(tokenizer: Any, template: str, message: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        conversation_pieces(tokenizer, [USER, ASSISTANT])


def test_a_completion_is_trained_after_its_prompt(tokenizer: Any) -> None:
    example = make_example(Completion("Lic", "ense"), tokenizer)
    assert example.tokens.dtype == np.int32
    assert example.trained.dtype == bool
    assert example.tokens[~example.trained].tolist() == encode(tokenizer, "Lic")
    assert trained_text(tokenizer, example) == "ense<|endoftext|>"


def test_all_of_a_text_is_trained_but_the_first_token(tokenizer: Any) -> None:
    example = make_example(Text("Apache License"), tokenizer)
    assert example.tokens.tolist() == [*encode(tokenizer, "Apache License"), tokenizer.eos_token_id]
    assert not example.trained[0]
    assert example.trained[1:].all()


LONG = {"prompt": "π" * 30, "completion": "a"}


def test_rows_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path, {"text": "abc"}, {"txt": "a"}, LONG, {"text": "é" * 30})
    skipped = read_examples(file, tokenizer, max_length=16, bad_rows="skip")
    assert (len(skipped.examples), *skipped[1:6]) == (1, 4, 1, 2, 0, 0)
    assert skipped.lengths.tolist() == [3, 62, 61]
    assert skipped.notices == ("rows read: 2 of text, 1 of prompt and completion",)
    cut = read_examples(file, tokenizer, max_length=16, bad_rows="skip", too_long="truncate")
    assert (len(cut.examples), *cut[1:6]) == (2, 4, 1, 0, 1, 1)
    assert len(cut.examples[1].tokens) == len(cut.examples[1].trained) == 16


def test_the_first_bad_rows_are_named(tokenizer: Any, tmp_path: Path) -> None:
    found = read_examples(write(tmp_path, {"text": "a"}, *[{}] * 200), tokenizer, max_length=4, bad_rows="skip")
    assert (found.skipped_bad, len(found.refusals)) == (200, 100)
    assert "line 4: a row must be one of" in found.refusals[2]


@pytest.mark.parametrize("cut", [0, 1])
def test_a_row_that_is_cut_loses_its_stop_token(cut: int, tokenizer: Any, tmp_path: Path) -> None:
    whole = make_example(Conversation((USER, ASSISTANT)), tokenizer)
    file = write(tmp_path, {"messages": [USER, ASSISTANT]})
    length = len(whole.tokens) - cut
    (example,) = read_examples(file, tokenizer, max_length=length, too_long="truncate").examples
    assert example.tokens.tolist() == whole.tokens[:length].tolist()
    assert trained_text(tokenizer, example) == ("Ho" if cut else "Ho<|return|>")


def test_errors_name_the_line(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: a row must be"):
        read_examples(write(tmp_path, {"text": "abc"}, {"txt": "a"}), tokenizer, max_length=16)
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: a row must be at most 16 tokens, got \d\d"):
        read_examples(write(tmp_path, {"text": "abc"}, LONG), tokenizer, max_length=16, too_long="error")
    tokenizer.chat_template = "{{ raise_exception('no tools') }}"
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: the chat template of .* no tools"):
        read_examples(write(tmp_path, {"messages": [USER, ASSISTANT]}), tokenizer, max_length=16)


def test_a_file_with_nothing_to_train_on_is_an_error(tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path, {"txt": "a"}, LONG)
    with pytest.raises(ValueError, match=r"of 2 rows, 1 are bad, 1 longer than 4 tokens, 0 .* line 1: a row must be"):
        read_examples(file, tokenizer, max_length=4, bad_rows="skip")


def test_options_out_of_range_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path, {"text": "abc"})
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        read_examples(file, tokenizer, max_length=1)
    with pytest.raises(ValueError, match=r"too_long must be one of .* got 'cut'"):
        read_examples(file, tokenizer, max_length=4, too_long="cut")
    with pytest.raises(ValueError, match=r"sources must have a file, .* got none"):
        read_examples([], tokenizer, max_length=4)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="must have an eos_token"):
        read_examples(file, tokenizer, max_length=4)

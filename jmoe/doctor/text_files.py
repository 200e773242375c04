"""Whether the files that text needs are in a checkpoint's directory and fit each other: facts, for `jmoe doctor`."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from jmoe.checkpoint.config_file import read_json
from jmoe.errors import first_line
from jmoe.gpt_oss.config import token_ids
from jmoe.text import chat_text, encode, load_tokenizer

PROBES = ("What does a heron eat?", "Mostly fish and frogs.")
"""A question and an answer, which a chat template must write out."""

CONTROL = re.compile(r"<\|[^|<>\s]+\|>")
"""How gpt-oss and others spell control tokens."""


class TextFile(NamedTuple):
    """What was found of one file: `wrong` says whether that is missing or broken."""

    name: str
    found: str
    wrong: bool = False


def examine_text_files(directory: Path) -> tuple[TextFile, ...]:
    """The tokenizer, the chat template and generation_config.json of a checkpoint; nothing here raises."""
    try:
        vocabulary = read_json(directory / "config.json").get("vocab_size")
    except (OSError, ValueError):
        vocabulary = None  # that config.json is missing or broken is said where the model is read
    size = vocabulary if isinstance(vocabulary, int) else None
    try:
        tokenizer = load_tokenizer(directory)
    except (OSError, ValueError, ImportError) as error:
        missing = isinstance(error, FileNotFoundError)
        found = (
            "missing: prompts and data can be neither read nor printed" if missing else f"broken: {first_line(error)}"
        )
        return (
            TextFile("tokenizer.json", found, wrong=True),
            examine_template_alone(directory),
            examine_generation_config(directory, None, size),
        )
    return (
        examine_tokenizer(tokenizer, size),
        examine_chat_template(tokenizer),
        examine_generation_config(directory, tokenizer, size),
    )


def examine_tokenizer(tokenizer: Any, vocabulary: int | None) -> TextFile:
    """Whether it makes tokens of English, and none that the model lacks."""
    name = "tokenizer.json"
    known = tokenizer.get_vocab()
    largest = max(known.values(), default=-1)
    if vocabulary is not None and largest >= vocabulary:
        return TextFile(name, f"broken: it has token {largest}, the model {vocabulary} tokens", wrong=True)
    try:
        tokens = encode(tokenizer, PROBES[0])
    except Exception as error:  # whatever tokenizers raises
        return TextFile(name, f"broken: it cannot encode text: {first_line(error)}", wrong=True)
    if not tokens:
        return TextFile(name, "broken: it makes no tokens of English text", wrong=True)
    return TextFile(name, f"{len(known)} tokens" + ("" if vocabulary is None else f" of the model's {vocabulary}"))


NO_TEMPLATE = "missing: messages need it (generate without --raw, rows of messages, eval --apply-chat-template)"


def examine_template_alone(directory: Path) -> TextFile:
    """Whether there is a chat template; it cannot be tried without a tokenizer."""
    name = "chat template"
    try:
        there = (directory / "chat_template.jinja").is_file() or bool(
            read_json(directory / "tokenizer_config.json").get("chat_template")
        )
    except (OSError, ValueError):
        there = False
    return TextFile(name, "not tried, for want of a tokenizer") if there else TextFile(name, NO_TEMPLATE, wrong=True)


def examine_chat_template(tokenizer: Any) -> TextFile:
    """Whether it writes out what is said, in control tokens that the tokenizer has."""
    name = "chat template"
    if tokenizer.chat_template is None:
        return TextFile(name, NO_TEMPLATE, wrong=True)
    question, answer = ({"role": role, "content": PROBES[i]} for i, role in enumerate(("user", "assistant")))
    try:
        begun = chat_text(tokenizer, [question], reply=True)
        whole = chat_text(tokenizer, [question, answer], reply=False)
    except ValueError as error:
        return TextFile(name, f"broken: {first_line(error)}", wrong=True)
    for role, probe, text in (("user", PROBES[0], begun), ("assistant", PROBES[1], whole)):
        if probe not in text:
            return TextFile(name, f"broken: it does not write what the {role} says", wrong=True)
    known = tokenizer.get_added_vocab()
    unknown = [word for word in dict.fromkeys(CONTROL.findall(begun + whole)) if word not in known]
    if unknown:
        return TextFile(name, f"broken: it writes {', '.join(unknown)}, which the tokenizer does not have", wrong=True)
    return TextFile(name, "writes a question and an answer")


def examine_generation_config(directory: Path, tokenizer: Any | None, vocabulary: int | None) -> TextFile:
    """Whether it says what ends a text, and that is what ends one in gpt-oss's format."""
    name = "generation_config.json"
    file = directory / name
    if not file.is_file():
        return TextFile(name, "missing: config.json's eos_token_id says what ends a text", wrong=True)
    try:
        stop = token_ids(file, "eos_token_id", read_json(file).get("eos_token_id"))
    except (OSError, ValueError) as error:
        return TextFile(name, f"broken: {first_line(error)}", wrong=True)
    if not stop:
        return TextFile(name, "has no eos_token_id: config.json's says what ends a text", wrong=True)
    if vocabulary is not None and (outside := [token for token in stop if token >= vocabulary]):
        return TextFile(name, f"broken: eos_token_id has {outside}, the model {vocabulary} tokens", wrong=True)
    if tokenizer is None:
        return TextFile(name, f"a text ends with any of {list(stop)}")
    words = [tokenizer.convert_ids_to_tokens(token) for token in stop]
    known = tokenizer.get_added_vocab()
    lacking = [word for word in ("<|return|>", "<|call|>") if word in known and word not in words]
    if lacking:
        found = f"eos_token_id lacks {' and '.join(lacking)}: a model runs on after an answer or a call that ends so"
        return TextFile(name, found, wrong=True)
    if "<|end|>" in words and "<|channel|>" in known:
        return TextFile(name, "eos_token_id has <|end|>, which ends a reply after its analysis", wrong=True)
    return TextFile(name, f"a text ends with any of {', '.join(map(str, words))}")

"""config.json of a checkpoint: Hugging Face's, or the one that lies in OpenAI's folder `original/`."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, Self, get_type_hints

from jmoe.triton_src.activation import SwiGLU

CONFIG = "config.json"
LARGEST_INT = 2**31 - 1
"""Of any size or token id: they end up in int32."""
SHOWN = 200
"""Characters of a value that an error shows."""


class CheckpointWarning(UserWarning):
    """What was decided about a checkpoint that its files leave open, or that changes what they hold."""


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it does not hold a JSON object; it is nested too deeply; a name in it has two different values.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for name, value in pairs:
            if name in entries and entries[name] != value:
                raise ValueError(f"{in_json(name)} has two values, {in_json(entries[name])} and {in_json(value)}")
            entries[name] = value
        return entries

    try:
        value = json.loads(file.read_bytes(), object_pairs_hook=once)
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply to be read") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(value).__name__}")
    return value


def in_json(value: Any) -> str:
    """A JSON value for an error: as the file has it, its end left out if it is long."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply to show"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def is_number(value: object, kind: type) -> bool:
    """Whether a JSON value is positive, finite and of the kind int or float: an int is a float too, a bool neither."""
    accepted = (int,) if kind is int else (int, float)
    if not isinstance(value, accepted) or isinstance(value, bool):
        return False
    try:
        return 0 < float(value) < math.inf
    except OverflowError:
        return False


def number(value: object, kind: type) -> Any:
    """A JSON value as a positive, finite number of the kind int (in int32) or float; None for any other value.

    A float that is whole, as some programs write them, is an int too.
    """
    if not is_number(value, float):
        return None
    converted: float = float(value)  # type: ignore[arg-type]
    if kind is float:
        return converted
    return int(converted) if converted.is_integer() and converted <= LARGEST_INT else None


ORIGINAL = {
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    **{
        name: name
        for name in (
            "num_hidden_layers",
            "hidden_size",
            "intermediate_size",
            "vocab_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "sliding_window",
            "swiglu_limit",
            "initial_context_length",
        )
    },
}
ORIGINAL_ROPE = {
    "rope_theta": "rope_theta",
    "factor": "rope_scaling_factor",
    "beta_fast": "rope_ntk_beta",
    "beta_slow": "rope_ntk_alpha",
    "original_max_position_embeddings": "initial_context_length",
}
"""Hugging Face's names of settings, and those of OpenAI's config.json."""


def is_original(entries: dict[str, Any]) -> bool:
    """Whether config.json is OpenAI's own, which comes with the layout of `original/`."""
    return "model_type" not in entries and not {"num_experts", "rope_scaling_factor"}.isdisjoint(entries)


def model_entries(path: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of a checkpoint directory in Hugging Face's names, whichever it is written in.

    Raises:
      FileNotFoundError: config.json is missing.
      ValueError: it does not hold a JSON object.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file() and (folder / "original" / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder / CONFIG} does not exist, but {folder / 'original'} holds a checkpoint in OpenAI's layout: "
            "give that directory"
        )
    entries = read_json(folder / CONFIG)
    if not is_original(entries):
        return entries
    named = {name: entries[own] for name, own in ORIGINAL.items() if own in entries}
    rope = {name: entries[own] for name, own in ORIGINAL_ROPE.items() if own in entries}
    # What OpenAI's model has built in.
    built_in = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "rms_norm_eps": 1e-5}
    built_in |= {"attention_bias": True, "tie_word_embeddings": False, "hidden_act": "silu"}
    factor, length = (number(rope.get(name), float) for name in ("factor", "original_max_position_embeddings"))
    if factor and length:
        named["max_position_embeddings"] = int(factor * length)
    return {**built_in, **named, "rope_parameters": {"rope_type": "yarn", "truncate": False, **rope}}


def why_no_tokenizer(path: str | os.PathLike[str]) -> str:
    """What to say to one who misses a tokenizer in a directory: OpenAI's layout has none."""
    folder = Path(path).absolute()
    if not (folder / CONFIG).is_file() or not is_original(read_json(folder / CONFIG)):
        return ""
    said = f": {folder} is in OpenAI's layout, which has no tokenizer; "
    if all((folder.parent / name).is_file() for name in (CONFIG, "tokenizer.json")):
        return f"{said}give the directory that it lies in, {folder.parent}, which has one"
    return f"{said}put the tokenizer's files of the same model in Hugging Face's layout into it"


@dataclasses.dataclass(frozen=True)
class Config:
    """The part of config.json that the mixture-of-experts layers and the embedding need; names as in the file."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_local_experts: int
    num_experts_per_tok: int
    vocab_size: int
    rms_norm_eps: float
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702  # the released files leave it out

    @property
    def activation(self) -> SwiGLU:
        """The experts'."""
        return SwiGLU(alpha=self.swiglu_alpha, limit=self.swiglu_limit)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads config.json of a checkpoint directory; `experts_per_token` may stand for `num_experts_per_tok`.

        Raises:
          FileNotFoundError: config.json is missing.
          ValueError: it is not JSON, it is for another architecture, or fields are missing or no positive numbers
            (all are listed).
        """
        file = Path(path) / CONFIG
        entries = model_entries(path)
        if (kind := entries.get("model_type", "gpt_oss")) != "gpt_oss":
            raise ValueError(f"{file}: model_type must be 'gpt_oss', got {kind!r:.{SHOWN}}")
        if "experts_per_token" in entries:
            entries.setdefault("num_experts_per_tok", entries["experts_per_token"])
        kinds = get_type_hints(cls)
        given = {name: number(entries[name], kind) for name, kind in kinds.items() if name in entries}
        required = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
        problems = [f"{name} is missing" for name in required if name not in given]
        problems += [
            f"{name} must be a positive {kinds[name].__name__}, got {in_json(entries[name])}"
            for name, value in given.items()
            if value is None
        ]
        if problems:
            raise ValueError(f"{file}: {'; '.join(problems)}")
        config = cls(**given)
        if config.num_experts_per_tok > config.num_local_experts:
            raise ValueError(
                f"{file}: num_experts_per_tok must be at most num_local_experts = {config.num_local_experts}, "
                f"got {config.num_experts_per_tok}"
            )
        return config

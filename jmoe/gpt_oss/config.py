"""What config.json of a gpt-oss checkpoint says about the model."""

import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any, Literal, Self

from jmoe.checkpoint import config_file
from jmoe.checkpoint.config_file import LARGEST_INT, in_json, model_entries, number, read_json
from jmoe.gpt_oss.rope_settings import Rope, read_rope

RELEASED_STOP_TOKENS = (200002, 199999, 200012)
"""<|return|>, <|endoftext|> and <|call|>."""

type LayerType = Literal["sliding_attention", "full_attention"]


class PositionsWarning(UserWarning):
    """A text is longer than the model was made for."""


MOST_LAYERS = 10_000
"""More are a mistake, which is better found before there is a name for each tensor of each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config_file.Config):
    """A gpt-oss model's sizes; names as in config.json. Defaults are what both released models share.

    max_position_embeddings: the longest text that the model was made for; None: the file does not say.
    """

    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 64
    sliding_window: int = 128
    layer_types: tuple[LayerType, ...]
    rope: Rope = Rope()
    max_position_embeddings: int | None = None
    eos_token_id: int = 200002
    pad_token_id: int = 199999
    stop_tokens: tuple[int, ...] = ()
    """What ends a text. Left empty, it is what the released models have, or eos_token_id where that is not theirs."""

    def __post_init__(self) -> None:
        """Fills in stop_tokens."""
        if not self.stop_tokens:
            object.__setattr__(self, "stop_tokens", with_released((self.eos_token_id,)))

    @classmethod
    def gpt_oss_20b(cls) -> Self:
        """The 20b model."""
        return cls._released(layers=24, experts=32)

    @classmethod
    def gpt_oss_120b(cls) -> Self:
        """The 120b model."""
        return cls._released(layers=36, experts=128)

    @classmethod
    def _released(cls, layers: int, experts: int) -> Self:
        return cls(
            num_hidden_layers=layers,
            hidden_size=2880,
            intermediate_size=2880,
            num_local_experts=experts,
            num_experts_per_tok=4,
            vocab_size=201088,
            rms_norm_eps=1e-5,
            layer_types=alternating(layers),
            max_position_embeddings=131072,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads config.json of a checkpoint directory, in transformers 4's spelling, in 5's or in OpenAI's own.

        stop_tokens are those of generation_config.json where it is there.

        Raises:
          FileNotFoundError: config.json is missing.
          ValueError: a field is missing or not one that this model has; an unknown kind of rope, of quantisation or of
            layer, each named with its value.
        """
        sizes = config_file.Config.load(path)
        file = Path(path) / "config.json"
        entries = model_entries(path)
        fields: dict[str, Any] = {}
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window"):
            fields[name] = positive_int(file, entries, name)
        if entries.get("max_position_embeddings") is not None:
            fields["max_position_embeddings"] = positive_int(file, entries, "max_position_embeddings")
        if sizes.num_hidden_layers > MOST_LAYERS:
            raise ValueError(f"{file}: num_hidden_layers must be at most {MOST_LAYERS}, got {sizes.num_hidden_layers}")
        if fields["head_dim"] % 2:
            raise ValueError(f"{file}: head_dim must be even, got {fields['head_dim']}")
        if fields["num_attention_heads"] % fields["num_key_value_heads"]:
            raise ValueError(
                f"{file}: num_attention_heads must be a multiple of num_key_value_heads = "
                f"{fields['num_key_value_heads']}, got {fields['num_attention_heads']}"
            )
        check_settings(file, entries)
        fields["layer_types"] = layer_types(file, entries, sizes.num_hidden_layers)
        fields["rope"] = read_rope(file, entries)
        if tokens := token_ids(file, "eos_token_id", entries.get("eos_token_id")):
            fields["eos_token_id"] = tokens[0]
        if isinstance(padding := entries.get("pad_token_id"), int):
            if abs(padding) > LARGEST_INT:
                raise ValueError(f"{file}: pad_token_id must be a token id, got {in_json(padding)}")
            fields["pad_token_id"] = padding
        config = cls(**dataclasses.asdict(sizes), **fields)
        return dataclasses.replace(config, stop_tokens=stop_tokens(path, config))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Keys that a query of each layer sees, its own among them; None: all before it."""
        return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in self.layer_types)


def positive_int(file: Path, entries: dict[str, Any], name: str) -> int:
    """An entry that must be there and be one."""
    value = number(entries.get(name), int)
    if value is None:
        raise ValueError(f"{file}: {name} must be a positive int, got {in_json(entries.get(name))}")
    return value


def warn_past_positions(config: Config, length: int) -> None:
    """Warns if a text of so many tokens is longer than the model was made for: what it says there may be no sense."""
    longest = config.max_position_embeddings
    if longest is not None and length > longest:
        warnings.warn(
            f"a text of {length:,} tokens is longer than the {longest:,} that the model was made for "
            "(max_position_embeddings in config.json)",
            PositionsWarning,
            stacklevel=3,
        )


def stop_tokens(path: str | os.PathLike[str], config: Config) -> tuple[int, ...]:
    """The tokens that end a text: eos_token_id of generation_config.json, else of config.json.

    config.json of the released models lists <|return|> alone, which then stands for RELEASED_STOP_TOKENS.

    Raises:
      ValueError: a file is not a JSON object, or its eos_token_id neither a token id nor a list of them.
    """
    name = "eos_token_id"
    generation, model = Path(path) / "generation_config.json", Path(path) / "config.json"
    if generation.is_file() and (tokens := token_ids(generation, name, read_json(generation).get(name))):
        if max(tokens) >= config.vocab_size:
            raise ValueError(
                f"{generation}: {name} must be below the vocabulary's {config.vocab_size}, got {max(tokens)}"
            )
        return tokens
    listed = token_ids(model, name, read_json(model).get(name)) if model.is_file() else ()
    return with_released(listed or (config.eos_token_id,))


def with_released(tokens: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens, or in place of <|return|> alone what generation_config.json of the released models lists."""
    return RELEASED_STOP_TOKENS if tokens == RELEASED_STOP_TOKENS[:1] else tokens


def token_ids(file: Path, name: str, value: Any) -> tuple[int, ...]:
    """The value, null for none, as token ids.

    Raises:
      ValueError: it is neither a token id nor a list of them.
    """
    if value is None:
        return ()
    tokens = value if isinstance(value, list) else [value]
    if not all(type(token) is int and 0 <= token <= LARGEST_INT for token in tokens):
        raise ValueError(f"{file}: {name} must be a token id or a list of them, got {in_json(value)}")
    return tuple(tokens)


def alternating(layers: int) -> tuple[LayerType, ...]:
    """What config.json without layer_types means: even layers slide."""
    return tuple("full_attention" if layer % 2 else "sliding_attention" for layer in range(layers))


KNOWN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (True,),
    "tie_word_embeddings": (False,),
    "attention_dropout": (0, 0.0),
}
"""Settings that this model has one way; absent is that way too."""


def check_settings(file: Path, entries: dict[str, Any]) -> None:
    """Raises ValueError if a setting asks for another model than this."""
    for name, values in KNOWN.items():
        if name in entries and entries[name] not in values:
            raise ValueError(f"{file}: {name} must be {in_json(values[0])}, got {in_json(entries[name])}")
    for name in ("quantization_config", "compression_config"):
        given = entries.get(name)
        method = given.get("quant_method", given.get("method")) if isinstance(given, dict) else given
        if given and (method != "mxfp4" or name != "quantization_config"):
            raise ValueError(
                f'{file}: {name}.quant_method must be "mxfp4", got {in_json(method)}; save the model dequantised'
            )


def layer_types(file: Path, entries: dict[str, Any], layers: int) -> tuple[LayerType, ...]:
    """The kind of each layer's attention."""
    types = entries.get("layer_types")
    if types is None:
        return alternating(layers)
    if not isinstance(types, list) or len(types) != layers:
        raise ValueError(f"{file}: layer_types must list num_hidden_layers = {layers} kinds, got {in_json(types)}")
    for kind in types:
        if kind not in ("sliding_attention", "full_attention"):
            raise ValueError(
                f'{file}: layer_types must be "sliding_attention" or "full_attention", got {in_json(kind)}'
            )
    return tuple(types)

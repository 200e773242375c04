"""What a fine-tuning run is told: one typed configuration, from a file and from flags."""

import dataclasses
import json
import math
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from jmoe.gpt_oss.weights import TARGETS

type Remat = Literal["nothing", "experts", "layers"]
type Schedule = Literal["cosine", "linear", "constant"]


def option(default: Any = dataclasses.MISSING, *, help: str) -> Any:
    """A field with the help that the command line shows."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """One run. The same names are flags of `jmoe finetune` and keys of its file."""

    model: str = option(help="A gpt-oss directory, or a repository on the Hugging Face Hub.")
    data: str = option(help="JSONL: rows with messages, with prompt and completion, or with text.")
    out: str = option(help="Directory of the adapter, checkpoints and metrics; a run that stopped goes on there.")
    validation: str | None = option(None, help="JSONL to validate on; none: a part of the data.")
    validation_fraction: float = option(0.05, help="That part, when no file is given; 0: no validation.")
    targets: str = option(",".join(TARGETS), help="What LoRA is on, with commas between.")
    rank: int = option(16, help="LoRA's rank.")
    alpha: float = option(32.0, help="LoRA's alpha: the scale is alpha / rank.")
    rslora: bool = option(False, help="The scale is alpha / sqrt(rank) instead.")
    length: int = option(4096, help="Tokens of a packed sequence.")
    batch_size: int = option(1, help="Sequences computed at once.")
    accumulate: int = option(1, help="Such batches in one step of the optimizer.")
    epochs: float = option(1.0, help="Passes over the data.")
    steps: int | None = option(None, help="Steps of the optimizer, instead of epochs.")
    learning_rate: float = option(2e-4, help="AdamW's, at its highest.")
    schedule: Schedule = option("cosine", help="How it falls after the warm-up: cosine, linear or constant.")
    warmup: float = option(0.03, help="Part of the steps in which it rises.")
    weight_decay: float = option(0.0, help="AdamW's.")
    beta1: float = option(0.9, help="AdamW's.")
    beta2: float = option(0.999, help="AdamW's.")
    clip: float = option(1.0, help="Largest norm of a gradient; 0: any.")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", help="Of activations; adapters are float32.")
    remat: Remat = option("layers", help="Computed again in the backward pass: nothing, experts or layers.")
    loss_chunk: int = option(512, help="Tokens whose logits are held at once.")
    too_long: Literal["error", "skip", "truncate"] = option("skip", help="Rows longer than a sequence.")
    bad_rows: Literal["error", "skip"] = option("error", help="Rows that are none of the three forms.")
    validate_every: int = option(100, help="Steps between validations.")
    patience: int = option(0, help="Stop after so many validations without a lower loss; 0: never.")
    checkpoint_every: int = option(100, help="Steps between checkpoints.")
    keep: int = option(2, help="Checkpoints kept.")
    seed: int = option(0, help="Of adapters, order and split.")
    quantize: Literal["mxfp4"] | None = option(None, help="mxfp4: round dense experts to MXFP4 while they are loaded.")
    log_every: int | None = option(None, help="Steps between lines of figures; none: 20 lines, and one each 30 s.")
    quiet: bool = option(False, help="Print the last line and errors alone.")
    log_to: str | None = option(
        None, help="tensorboard, wandb (with commas between) or none; not given: TensorBoard's files where installed."
    )

    def __post_init__(self) -> None:
        """Raises ValueError for a value that no run can have."""
        for name in ("rank", "length", "batch_size", "accumulate", "loss_chunk", "validate_every", "checkpoint_every"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("weight_decay", "clip", "patience"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("learning_rate", "epochs", "alpha"):
            self._check(name, 0 < getattr(self, name) < math.inf, "positive and finite")
        for name in ("validation_fraction", "warmup", "beta1", "beta2"):
            self._check(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._check("length", self.length >= 2, "at least 2")
        self._check("seed", 0 <= self.seed < 2**32, "in [0, 2**32)")
        self._check("keep", self.keep >= 1, "at least 1")
        self._check("steps", self.steps is None or self.steps >= 1, "at least 1")
        self._check("log_every", self.log_every is None or self.log_every >= 1, "at least 1")
        named = len(self.trackers) > 0 or self.log_to in (None, "none")
        self._check(
            "log_to", named and set(self.trackers) <= {"tensorboard", "wandb"}, "tensorboard,wandb, one or none"
        )
        known = set(self.lora_targets) <= set(TARGETS) and len(self.lora_targets) > 0
        self._check("targets", known, f"some of {', '.join(TARGETS)}, with commas between")

    def _check(self, name: str, fits: bool, wanted: str) -> None:
        if not fits:
            raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """`targets`, one by one."""
        return tuple(name.strip() for name in self.targets.split(",") if name.strip())

    @property
    def trackers(self) -> tuple[str, ...]:
        """What `log_to` names, one by one."""
        names = "" if self.log_to in (None, "none") else str(self.log_to)
        return tuple(name.strip() for name in names.split(",") if name.strip())

    @property
    def scale(self) -> float:
        """What LoRA's product is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @classmethod
    def create(cls, entries: Mapping[str, Any]) -> Self:
        """The configuration of these entries.

        Raises:
          ValueError: a name that is none, a value of another type or out of range, or a missing one.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(set(entries) - set(fields)):
            raise ValueError(f"unknown options {', '.join(unknown)}; there are {', '.join(fields)}")
        needed = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
        if missing := sorted(needed - set(entries)):
            raise ValueError(f"options without a value: {', '.join(missing)}")
        hints = typing.get_type_hints(cls)
        return cls(**{name: convert(name, value, hints[name]) for name, value in entries.items()})


def convert(name: str, value: Any, hint: Any) -> Any:
    """The value in its field's type.

    Raises:
      ValueError: it is of another.
    """
    allowed = plain_types(hint)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    for kind in allowed:
        if value == kind if isinstance(kind, str) else type(value) is kind:
            return value
    wanted = ", ".join(repr(kind) if isinstance(kind, str) else kind.__name__ for kind in allowed)
    raise ValueError(f"{name} must be one of {wanted}, got {value!r}")


def plain_types(hint: Any) -> tuple[Any, ...]:
    """The classes of a hint, and of a Literal its values."""
    if isinstance(hint, typing.TypeAliasType):
        return plain_types(hint.__value__)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(kind for part in typing.get_args(hint) for kind in plain_types(part))
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return (hint,)


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The entries of a TOML or JSON file.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is neither, or holds no table.
    """
    file = Path(path)
    try:
        entries = json.loads(file.read_text()) if file.suffix == ".json" else tomllib.loads(file.read_text())
    except ValueError as error:
        kind = "JSON" if file.suffix == ".json" else "TOML"
        raise ValueError(f"{file} is no {kind}: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{file} must hold names and values, got {type(entries).__name__}")
    return entries

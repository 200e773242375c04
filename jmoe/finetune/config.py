"""What a fine-tuning run is told: one typed configuration, from a file and from flags."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from jmoe.adapters.settings import LoraBLayout
from jmoe.errors import in_short
from jmoe.gpt_oss.layer import Remat
from jmoe.gpt_oss.load import Quantize
from jmoe.gpt_oss.weights import ATTENTION, TARGETS

type Schedule = Literal["cosine", "linear", "constant"]

RANK, ALPHA = 16, 32.0
"""LoRA's where neither options nor an adapter say."""

COUNTS = (
    "rank", "length", "batch_size", "accumulate", "steps", "loss_chunk", "validate_every", "checkpoint_every", "keep",
    "log_every",
)  # fmt: skip
"""The options that are whole numbers from 1 on."""

LARGEST = 2**31 - 1
"""Of them: steps are counted in 32 bits."""


def option(default: Any = dataclasses.MISSING, *, help: str) -> Any:
    """A field with the help that the command line shows."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """One run. The same names are flags of `jmoe finetune` and keys of its file.

    Where one text stands for a list of one (data, validation), the field holds the list; where commas may stand between
    (targets, ranks), it holds the text. Without `adapter`, targets, rank and alpha that are not given have their
    defaults; with it they are None, and the adapter's.
    """

    model: str = option(help="A gpt-oss directory, or a repository on the Hugging Face Hub.")
    data: Sequence[str] = option(
        help="Rows to train on: a file (JSON lines, JSON, CSV, Parquet), a directory that datasets saved, or a data "
        "set of the Hub; given again, all are read."
    )
    out: str = option(help="Directory of the adapter, checkpoints and metrics; a run that stopped goes on there.")
    validation: Sequence[str] | None = option(
        None, help="Rows to validate on; may be given again; none: a part of the data."
    )
    validation_fraction: float = option(0.05, help="That part, when no file is given; 0: no validation.")
    adapter: str | None = option(
        None, help="A PEFT adapter to start from, whose targets, ranks and scales stay; none: a new one."
    )
    lora_b_layout: LoraBLayout | None = option(
        None, help="Order of the columns of its experts' lora_B, where its files do not say."
    )
    targets: str | None = option(None, help=f"What LoRA is on, with commas between (default: {','.join(TARGETS)}).")
    rank: int | None = option(None, help=f"LoRA's rank (default: {RANK}).")
    ranks: str | None = option(None, help="Ranks of single targets instead, as gate_up=8,q=16.")
    alpha: float | None = option(None, help=f"LoRA's alpha: a target's scale is alpha / its rank (default: {ALPHA:g}).")
    rslora: bool = option(False, help="The scale is alpha / sqrt(rank) instead.")
    lora_dropout: float = option(
        0.0, help="Chance that an input of LoRA on attention is left out of a step; experts' LoRA has none, as in PEFT."
    )
    length: int = option(4096, help="Tokens of a packed sequence.")
    batch_size: int = option(1, help="Sequences computed at once.")
    accumulate: int = option(1, help="Such batches in one step of the optimizer.")
    epochs: float = option(1.0, help="Passes over the data.")
    steps: int | None = option(None, help="Steps of the optimizer, instead of epochs.")
    learning_rate: float = option(2e-4, help="AdamW's, at its highest.")
    schedule: Schedule = option("cosine", help="How it falls after the warm-up.")
    warmup: float = option(0.03, help="Part of the steps in which it rises.")
    weight_decay: float = option(0.0, help="AdamW's.")
    beta1: float = option(0.9, help="AdamW's.")
    beta2: float = option(0.999, help="AdamW's.")
    clip: float = option(1.0, help="Largest norm of a gradient; 0: any.")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", help="Of activations; adapters are float32.")
    remat: Remat = option("layers", help="Computed again in the backward pass, which takes time and saves memory.")
    loss_chunk: int = option(512, help="Tokens whose logits are held at once.")
    too_long: Literal["error", "skip", "truncate"] = option("skip", help="Rows longer than a sequence.")
    bad_rows: Literal["error", "skip"] = option("error", help="Rows that cannot be read.")
    validate_every: int = option(100, help="Steps between validations.")
    patience: int = option(0, help="Stop after so many validations without a lower loss; 0: never.")
    checkpoint_every: int = option(100, help="Steps between checkpoints.")
    keep: int = option(2, help="Checkpoints kept.")
    seed: int = option(0, help="Of adapters, order, dropout and split.")
    quantize: Quantize | None = option(None, help="mxfp4: round dense experts to MXFP4 while they are loaded.")
    mesh: str | None = option(
        None, help="Devices by axes, as data=2,expert=4, -1 for the rest: data, expert, heads, model; none: one device."
    )
    fsdp: bool = option(
        False, help="Experts are split over the mesh's data axis too, and gathered layer by layer in four bits."
    )
    log_every: int | None = option(None, help="Steps between lines of figures; none: 20 lines, and one each 30 s.")
    quiet: bool = option(False, help="Print the last line and errors alone.")
    log_to: str | None = option(
        None, help="tensorboard, wandb (with commas between) or none; not given: TensorBoard's files where installed."
    )

    def __post_init__(self) -> None:
        """Raises ValueError for a value that no run can have."""
        for name in ("data", "validation", "targets", "ranks"):
            self._set(name, canonical(name, getattr(self, name)))
        for name in ("model", "out", "adapter"):
            self._check(name, getattr(self, name) is None or getattr(self, name).strip() != "", "a name, not empty")
        if self.adapter is None:
            for name, value in (("targets", ",".join(TARGETS)), ("rank", RANK), ("alpha", ALPHA)):
                if getattr(self, name) is None:
                    self._set(name, value)
        self._check_numbers()
        self._check_lora()
        self._check_trackers()
        if self.fsdp and self.mesh is None:
            raise ValueError("fsdp splits experts over a mesh's data axis, and no mesh is given")

    def _check_numbers(self) -> None:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in COUNTS:
            self._check(name, given[name] is None or given[name] >= 1, "at least 1")
        for name in (*COUNTS, "patience"):
            self._check(name, given[name] is None or given[name] <= LARGEST, f"at most {LARGEST}")
        self._check("length", self.length >= 2, "at least 2")
        self._check("seed", 0 <= self.seed < 2**32, "in [0, 2**32)")
        for name in ("weight_decay", "clip", "patience"):
            self._check(name, 0 <= given[name] < math.inf, "0 or more, and finite")
        for name in ("learning_rate", "epochs", "alpha"):
            self._check(name, given[name] is None or 0 < given[name] < math.inf, "positive and finite")
        for name in ("validation_fraction", "warmup", "beta1", "beta2", "lora_dropout"):
            self._check(name, 0 <= given[name] < 1, "in [0, 1)")

    def _check_lora(self) -> None:
        """Targets that there are, ranks of targets that LoRA is on, a dropout that acts on something."""
        if self.targets is not None:
            known = set(self.lora_targets) <= set(TARGETS) and len(self.lora_targets) > 0
            self._check("targets", known, f"some of {', '.join(TARGETS)}, with commas between")
        for name in parse_ranks(self.ranks):
            if name not in self.lora_targets:
                raise ValueError(f"ranks must be of targets, {', '.join(self.lora_targets)}, got {name!r}")
        if self.lora_dropout and not set(self.lora_targets) & set(ATTENTION):
            raise ValueError(
                f"lora_dropout acts on LoRA on attention ({', '.join(ATTENTION)}) alone, and targets are {self.targets}"
            )
        if self.lora_b_layout is not None and self.adapter is None:
            raise ValueError("lora_b_layout is of an adapter's files, and no adapter is given")

    def _check_trackers(self) -> None:
        named = len(self.trackers) > 0 or self.log_to in (None, "none")
        self._check(
            "log_to", named and set(self.trackers) <= {"tensorboard", "wandb"}, "tensorboard,wandb, one or none"
        )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check(self, name: str, fits: bool, wanted: str) -> None:
        if not fits:
            raise ValueError(f"{name} must be {wanted}, got {in_short(getattr(self, name))}")

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """`targets`, one by one; all there are where an adapter is to say."""
        return TARGETS if self.targets is None else split_words(self.targets)

    @property
    def lora_ranks(self) -> dict[str, int]:
        """Each target's rank, of a new adapter."""
        return dict.fromkeys(self.lora_targets, self.rank or RANK) | parse_ranks(self.ranks)

    @property
    def lora_scales(self) -> dict[str, float]:
        """What each target's product is multiplied by, of a new adapter."""
        return {target: self.scale_at(rank) for target, rank in self.lora_ranks.items()}

    @property
    def trackers(self) -> tuple[str, ...]:
        """What `log_to` names, one by one."""
        names = "" if self.log_to in (None, "none") else str(self.log_to)
        return split_words(names)

    @property
    def scale(self) -> float:
        """What LoRA's product is multiplied by, where a target has no rank of its own."""
        return self.scale_at(self.rank or RANK)

    def scale_at(self, rank: int) -> float:
        """What LoRA's product of this rank is multiplied by."""
        return (self.alpha or ALPHA) / (rank**0.5 if self.rslora else rank)

    @classmethod
    def create(cls, entries: Mapping[str, Any]) -> Self:
        """The configuration of these entries; None is a value that is not given.

        Raises:
          ValueError: an unknown name, a value of another type or out of range, or a missing one.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := [str(name) for name in entries if name not in fields]:
            raise ValueError(f"unknown options {', '.join(sorted(unknown))}; there are {', '.join(fields)}")
        needed = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
        if missing := sorted(name for name in needed if entries.get(name) is None):
            raise ValueError(f"options without a value: {', '.join(missing)}")
        hints = typing.get_type_hints(cls)
        return cls(
            **{
                name: convert(name, canonical(name, value), hints[name])
                for name, value in entries.items()
                if value is not None or fields[name].default is not None
            }
        )


def canonical(name: str, value: Any) -> Any:
    """The value as FinetuneConfig holds it, where a file or a flag may write it in several ways.

    Raises:
      ValueError: a list or table with anything else in it than texts and ranks, or with nothing.
    """
    if name in ("data", "validation") and value is not None:
        several = [value] if isinstance(value, str) else value
        if not isinstance(several, list | tuple) or not all(isinstance(one, str) for one in several):
            raise ValueError(f"{name} must be a text or a list of texts, got {in_short(value)}")
        if not several or not all(one.strip() for one in several):
            raise ValueError(f"{name} must be names, not empty, got {in_short(value)}")
        return tuple(several)
    if name == "targets" and isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
        return ",".join(value)
    if name == "ranks" and value is not None:
        return ",".join(f"{target}={rank}" for target, rank in parse_ranks(value).items()) or None
    return value


def parse_ranks(value: Any) -> dict[str, int]:
    """Target -> rank, from "gate_up=8,q=16", a list of such texts, or a table; nothing for None.

    Raises:
      ValueError: the value is not one of these, or has an unknown target, one twice, or a rank below 1.
    """
    wrong = f"ranks must be as gate_up=8,q=16, of {', '.join(TARGETS)}"
    if isinstance(value, Mapping):
        pairs = list(value.items())
    else:
        texts = [value] if isinstance(value, str) else value or []
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{wrong}, got {in_short(value)}")
        split = [word.partition("=") for text in texts for word in split_words(text)]
        pairs = [(name.strip(), number(rank.strip())) for name, _, rank in split]
    ranks: dict[str, int] = {}
    for name, rank in pairs:
        if name not in TARGETS or name in ranks or type(rank) is not int or not 1 <= rank <= LARGEST:
            why = "twice" if name in ranks else f"{in_short(name)} of rank {in_short(rank)}"
            raise ValueError(f"{wrong}, each once and at least 1, got {why} in {in_short(value)}")
        ranks[name] = rank
    return ranks


def number(text: str) -> int | str:
    """The whole number that the text is, or the text."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else text


def split_words(text: str) -> tuple[str, ...]:
    """What commas separate."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def convert(name: str, value: Any, hint: Any) -> Any:
    """The value in its field's type.

    Raises:
      ValueError: it is of another.
    """
    allowed = plain_types(hint)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name} must be below 1.8e308, got {in_short(value)}") from None
    for kind in allowed:
        if value == kind if isinstance(kind, str) else type(value) is kind:
            return value
    kinds = [kind for kind in allowed if kind is not types.NoneType]
    wanted = ", ".join(repr(kind) if isinstance(kind, str) else kind.__name__ for kind in kinds)
    raise ValueError(f"{name} must be one of {wanted}, got {in_short(value)}")


def plain_types(hint: Any) -> tuple[Any, ...]:
    """The classes of a hint, and of a Literal its values."""
    if isinstance(hint, typing.TypeAliasType):
        return plain_types(hint.__value__)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(kind for part in typing.get_args(hint) for kind in plain_types(part))
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    if typing.get_origin(hint) is not None:  # Sequence[str]
        return (tuple,)
    return (hint,)


def choices_of(name: str) -> tuple[str, ...]:
    """The values that an option is one of; none where it may have any of its type."""
    return tuple(kind for kind in plain_types(typing.get_type_hints(FinetuneConfig)[name]) if isinstance(kind, str))

"""What a run is before its model is loaded: its data, steps and adapter, and what is said of them."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from jmoe.checkpoint import Checkpoint
from jmoe.device_mesh import make_mesh, planned_mesh
from jmoe.finetune.batches import Batch, Batches, split
from jmoe.finetune.config import LARGEST, FinetuneConfig
from jmoe.finetune.examples import Example, read_examples
from jmoe.finetune.memory import Shares, device_limit, estimate, experts_in_mxfp4, new_adapter_shapes
from jmoe.finetune.on_mesh import check_batch_size
from jmoe.finetune.packing import pack
from jmoe.finetune.start_adapter import description, start_adapter
from jmoe.finetune.start_report import count_steps, devices, say, say_options, say_rows, say_start
from jmoe.gpt_oss.config import Config, warn_past_positions
from jmoe.gpt_oss.layout import AnyMesh, Layout
from jmoe.gpt_oss.load import local_directory
from jmoe.gpt_oss.weights import LoraWeights
from jmoe.text import check_vocabulary, load_tokenizer


class Prepared(NamedTuple):
    """What a run is, before the model is loaded.

    lora: the adapter that it starts from, if that is not a new one.
    mesh, layout: the devices, and how they share the model; None: one device.
    """

    directory: Path
    lora: LoraWeights | None
    batches: Batches
    held_out: list[Batch]
    steps: int
    mesh: Mesh | None = None
    layout: Layout | None = None


def prepare(config: FinetuneConfig, day: datetime.date, console: Console, *, whole_report: bool = False) -> Prepared:
    """Reads the data and the adapter to start from, and says what the run will be; errors as in finetune.

    whole_report: of a run that is not to begin, on a mesh of devices that need not be here.
    """
    say_options(console, config)
    directory = local_directory(config.model)
    model = Config.load(directory)
    mesh, layout = devices_of(config, model, planned=whole_report)
    lora = None if config.adapter is None else start_adapter(config, model)
    if lora is not None:
        say(console, f"starts from {config.adapter}: {description(lora)}")
    tokenizer = load_tokenizer(directory, day)
    training, validation = read_data(config, tokenizer, console, whole_report=whole_report)
    largest = max((int(example.tokens.max()) for example in (*training, *validation)), default=0)
    check_vocabulary(largest, model.vocab_size)
    longest = max((len(example.tokens) for example in (*training, *validation)), default=0)
    warn_past_positions(model, longest - 1)  # the last token is a target alone
    batches = Batches(pack(training, config.length), config.batch_size * config.accumulate, config.seed)
    steps = count_steps(config, batches, LARGEST)
    held_out = validation_batches(config, validation)
    shapes = new_adapter_shapes(config, model) if lora is None else lora
    mxfp4, shares = experts_in_mxfp4(Checkpoint(directory), config.quantize), Shares.of(layout, mesh)
    memory = estimate(config, model, shapes, mxfp4=mxfp4, shares=shares)
    if mesh is not None and layout is not None:
        say(console, devices(mesh, layout, model, config.batch_size))
    say_start(console, config, tokenizer, training, batches, steps, memory, device_limit(), whole=whole_report)
    return Prepared(directory, lora, batches, held_out, steps, mesh if isinstance(mesh, Mesh) else None, layout)


def devices_of(config: FinetuneConfig, model: Config, *, planned: bool) -> tuple[AnyMesh, Layout] | tuple[None, None]:
    """The options' mesh of all devices, and how it splits the model; (None, None) for one device.

    planned: the devices need not be here.

    Raises:
      ValueError: the mesh is not written as one, or does not fit the devices, the model or the batch.
    """
    if config.mesh is None:
        return None, None
    mesh = planned_mesh(config.mesh) if planned else make_mesh(config.mesh)
    layout = Layout.of(mesh, model, fsdp=config.fsdp)
    check_batch_size(config.batch_size, layout, mesh)
    return mesh, layout


def read_data(config: FinetuneConfig, tokenizer: Any, console: Console, *, whole_report: bool) -> tuple[Any, Any]:
    """(training examples, validation examples)."""

    def read(sources: Sequence[str]) -> tuple[Example, ...]:
        found = read_examples(
            sources,
            tokenizer,
            max_length=config.length + 1,  # the last token is a target alone
            too_long=config.too_long,
            bad_rows=config.bad_rows,
        )
        say_rows(console, sources, found, whole=whole_report)
        return found.examples

    training = read(config.data)
    if config.validation is not None:
        return training, read(config.validation)
    return split(training, config.validation_fraction, config.seed)


def validation_batches(config: FinetuneConfig, examples: Sequence[Example]) -> list[Batch]:
    """Every validation example once, in batches of one shape; what fills the last one has weight 0."""
    if not len(examples):
        return []
    packed = pack(examples, config.length)
    rows = packed.tokens.shape[0]
    padding = -rows % config.batch_size

    def padded(array: np.ndarray) -> np.ndarray:
        return np.pad(array, [(0, padding), (0, 0)]).reshape(-1, config.batch_size, config.length)

    parts = map(padded, (packed.tokens, packed.targets, packed.weights, packed.segment_ids))
    return [Batch(*arrays) for arrays in zip(*parts, strict=True)]

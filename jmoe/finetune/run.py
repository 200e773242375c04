"""A fine-tuning run from its configuration to an adapter."""

import dataclasses
import datetime
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jmoe.finetune.batches import Batch, Batches, digest, split
from jmoe.finetune.checkpoint import Checkpoints
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.display import Display
from jmoe.finetune.examples import Examples, read_examples
from jmoe.finetune.expert_check import ExpertCheck
from jmoe.finetune.loop import Ending, Run, run_steps
from jmoe.finetune.metrics import Metrics, check_plot, plot
from jmoe.finetune.packing import pack
from jmoe.finetune.step import Trainer, TrainState, make_optimizer
from jmoe.gpt_oss.config import Config, warn_past_positions
from jmoe.gpt_oss.load import load, local_directory
from jmoe.gpt_oss.model import GptOss
from jmoe.gpt_oss.new_adapter import new_adapter
from jmoe.gpt_oss.save import replace, save_adapter
from jmoe.nn.report import trainable_report
from jmoe.text import check_vocabulary, load_tokenizer


class Result(NamedTuple):
    """How a run ended.

    adapter: its directory, in PEFT's format: of the lowest validation loss, or the last without validation.
    best_loss: that validation loss, or None.
    """

    ending: Ending
    steps: int
    adapter: Path
    best_loss: float | None


def finetune(config: FinetuneConfig, console: Console | None = None) -> Result:
    """Trains LoRA on a gpt-oss checkpoint, or goes on with the run that config.out holds.

    Raises:
      FileNotFoundError: the model or a file is missing.
      ValueError: an option, a row of the data or the checkpoint does not fit, or config.out holds a run with others; a
        loss was not finite (NonFiniteLossError).
      OSError: the disk is full.
      ImportError: the extra "finetune" is not installed.
    """
    check_plot()
    console = Console(stderr=True) if console is None else console
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    for field in dataclasses.fields(config):
        console.print(f"{field.name:20} {getattr(config, field.name)}", markup=False, highlight=False, soft_wrap=True)
    directory = local_directory(config.model)
    day = day_begun(out)
    training, validation = read_data(config, load_tokenizer(directory, day), console)
    largest = max((int(example.tokens.max()) for example in (*training, *validation)), default=0)
    model_config = Config.load(directory)
    check_vocabulary(largest, model_config.vocab_size)
    longest = max((len(example.tokens) for example in (*training, *validation)), default=0)
    warn_past_positions(model_config, longest - 1)  # the last token is a target alone
    batches = Batches(pack(training, config.length), config.batch_size * config.accumulate, config.seed)
    steps = config.steps or max(1, math.ceil(config.epochs * batches.steps_per_epoch))
    held_out = validation_batches(config, validation)
    model = new_model(config, directory)
    console.print(str(trainable_report(model)).splitlines()[-1], highlight=False)
    trainer = Trainer(model, make_optimizer(config, steps), loss_chunk=config.loss_chunk)
    adapter = out / "adapter"

    def save(state: TrainState) -> None:
        lora = trainer.model(state).lora
        assert lora is not None
        save_adapter(adapter, lora, base_model=config.model)

    with Checkpoints(out / "checkpoints", config, digest(batches.packed, *held_out)) as checkpoints:
        state, standing = checkpoints.restore(trainer.start)
        if standing.step:
            console.print(f"going on after step {standing.step}", highlight=False)
        replace(out / "begun.txt", f"{day}\n".encode())
        (out / "finetune.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        with Metrics(out, standing.step) as metrics, Display(steps, standing.step, console) as display:
            experts = ExpertCheck(trainer, display)
            run = Run(
                config,
                trainer,
                lambda step: stacked(batches.batch(step), config.accumulate),
                held_out,
                steps,
                out,
                save,
                experts.before,
                experts.after,
            )
            state, standing, ending = run_steps(run, state, standing, checkpoints, metrics, display)
    gone = standing.best_loss is not None and not (adapter / "adapter_model.safetensors").is_file()
    if gone:
        console.print(f"the best adapter is gone from {adapter}: the last is saved", markup=False, soft_wrap=True)
    if gone or standing.best_loss is None:
        save(state)
    plot(out)
    console.print(
        f"{ending} after {standing.step} steps; adapter in {adapter}", markup=False, highlight=False, soft_wrap=True
    )
    return Result(ending, standing.step, adapter, standing.best_loss)


def day_begun(out: Path) -> datetime.date:
    """The day on which the run whose checkpoints `out` holds began; today if there are none.

    Chat templates may write the day, and the data of a run that goes on later must be the same.

    Raises:
      ValueError: begun.txt is no date.
    """
    file = out / "begun.txt"
    if not file.is_file() or not any((out / "checkpoints").glob("[0-9]*")):
        return datetime.date.today()
    try:
        return datetime.date.fromisoformat(file.read_text().strip())
    except ValueError as error:
        raise ValueError(f"{file} is no date: {error}") from error


def read_data(config: FinetuneConfig, tokenizer: Any, console: Console) -> tuple[Any, Any]:
    """(training examples, validation examples)."""

    def read(file: str) -> Examples:
        found = read_examples(
            file,
            tokenizer,
            max_length=config.length + 1,  # the last token is a target alone
            too_long=config.too_long,
            bad_rows=config.bad_rows,
        )
        console.print(f"{file}: {summary(found)}", markup=False, highlight=False, soft_wrap=True)
        for notice in (*found.notices, *(f"skipped: {refusal}" for refusal in found.refusals[:3])):
            console.print(notice, markup=False, highlight=False, soft_wrap=True)
        return found

    training = read(config.data).examples
    if config.validation is not None:
        return training, read(config.validation).examples
    return split(training, config.validation_fraction, config.seed)


def summary(found: Examples) -> str:
    """What became of a file's rows, in words."""
    tokens = sum(len(example.tokens) for example in found.examples)
    trained = sum(int(example.trained.sum()) for example in found.examples)
    counts = {
        "bad": found.skipped_bad,
        "too long": found.skipped_too_long,
        "without a trained token once cut": found.skipped_untrained,
    }
    skipped = "".join(f", {count} skipped as {reason}" for reason, count in counts.items() if count)
    cut = f", {found.truncated} cut" if found.truncated else ""
    return f"{found.rows:,} rows, {tokens:,} tokens of which {trained:,} are trained{skipped}{cut}"


def validation_batches(config: FinetuneConfig, examples: Any) -> list[Batch]:
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


def new_model(config: FinetuneConfig, directory: Path) -> GptOss:
    """The checkpoint with an adapter that changes nothing yet."""
    model = load(
        directory,
        dtype=jnp.dtype(config.dtype),
        recompute=config.remat == "experts",
        remat=config.remat == "layers",
        quantize=config.quantize,
    )
    lora = new_adapter(
        model.config, rank=config.rank, scale=config.scale, targets=config.lora_targets, seed=config.seed
    )
    return model.with_adapters(lora)


def stacked(batch: Batch, accumulate: int) -> Batch:
    """[accumulate * B, T] -> [accumulate, B, T] of each array."""
    return Batch(*(array.reshape(accumulate, -1, array.shape[-1]) for array in batch))

"""What a run says before it begins: the data, one row as it is trained, the steps and the memory."""

import dataclasses
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.text import Text

from jmoe.device_memory import byte_size
from jmoe.finetune.batches import Batches
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.examples import Example, Examples
from jmoe.finetune.memory import MemoryEstimate, warning
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.layout import AnyMesh, Layout

SHORTLY = 400
"""Characters of a row that every start shows; a dry run shows all of it."""

REFUSALS_AT_START, REFUSALS_OF_DRY_RUN = 3, 20
"""How many bad rows are named."""

TRAINED, CONTROL = "bold green", "cyan"
OPENS, CLOSES = "[[", "]]"
"""Around what is trained, where there are no colours."""


def say(console: Console, text: str | Text) -> None:
    """A line, as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def say_options(console: Console, config: FinetuneConfig) -> None:
    """Every option and its value."""
    for name, value in dataclasses.asdict(config).items():
        say(console, f"{name:20} {', '.join(value) if isinstance(value, tuple) else value}")


def say_rows(console: Console, sources: Sequence[str], found: Examples, *, whole: bool) -> None:
    """What was read, what became of the rows, and what there is to say of them; why the first bad ones are bad.

    whole: of more of them.
    """
    say(console, f"{', '.join(sources)}: {summary(found)}")
    for notice in found.notices:
        say(console, f"  {notice}")
    shown = found.refusals[: REFUSALS_OF_DRY_RUN if whole else REFUSALS_AT_START]
    for refusal in shown:
        say(console, f"  skipped: {printable(refusal)}")
    if found.skipped_bad > len(shown) > 0:
        say(console, f"  skipped: {found.skipped_bad - len(shown):,} more bad rows")


def summary(found: Examples) -> str:
    """How many rows and tokens there are, and what became of them, in words."""
    tokens = sum(len(example.tokens) for example in found.examples)
    trained = sum(int(example.trained.sum()) for example in found.examples)
    counts = {
        "bad": found.skipped_bad,
        "too long": found.skipped_too_long,
        "without a trained token once cut": found.skipped_untrained,
    }
    skipped = "".join(f", {count:,} skipped as {reason}" for reason, count in counts.items() if count)
    longest = f" (the longest has {found.lengths.max():,} tokens)" if found.skipped_too_long else ""
    cut = f", {found.truncated:,} cut" if found.truncated else ""
    return f"{found.rows:,} rows, {tokens:,} tokens of which {trained:,} are trained{skipped}{longest}{cut}"


def say_start(
    console: Console,
    config: FinetuneConfig,
    tokenizer: Any,
    examples: Sequence[Example],
    batches: Batches,
    steps: int,
    memory: MemoryEstimate,
    limit: int | None,
    *,
    whole: bool,
) -> None:
    """What the run will train on, for how long and in what memory.

    whole: all of the row, and what memory is for.
    """
    say(console, lengths(examples))
    say(console, course(config, batches, steps))
    row = marked(tokenizer, examples[0], colours=console.is_terminal and not console.no_color)
    how = f"{TRAINED} is trained" if row.spans else f"between {OPENS} and {CLOSES} is trained"
    cut = len(row) > SHORTLY and not whole
    say(console, f"the first row ({how}{', cut here' if cut else ''}):")
    say(console, row[:SHORTLY] if cut else row)
    say(console, f"memory of a step: {memory if whole else f'about {byte_size(memory.total)}'}{of_device(limit)}")
    if (warned := warning(memory.total, limit)) is not None:
        say(console, warned)


def devices(mesh: AnyMesh, layout: Layout, model: Config, batch_size: int) -> str:
    """The mesh, and each device's share, in words."""
    sizes = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
    processes = len({device.process_index for device in mesh.devices.flat}) if isinstance(mesh, Mesh) else 1
    where = f"{mesh.size} devices" + (f" of {processes} processes" if processes > 1 else "")
    stored, computed = (layout.size(mesh, *axes) for axes in (layout.of_experts, (layout.experts,)))
    experts = f"holds {model.num_local_experts // stored} of {model.num_local_experts} experts"
    if stored > computed:
        experts += f" (fsdp: {model.num_local_experts // computed} of a layer while it is computed)"
    heads = f"{model.num_attention_heads // layout.size(mesh, layout.heads)} of {model.num_attention_heads} heads"
    own = batch_size // layout.size(mesh, *layout.axes_of_batch)
    return f"mesh {sizes}: {where}; each computes {own} of {batch_size} sequences at once and {experts}, {heads}"


def of_device(limit: int | None) -> str:
    """What the device has, in words."""
    return "" if limit is None else f", of {byte_size(limit)} that JAX may take of the device"


def lengths(examples: Sequence[Example]) -> str:
    """How many examples and trained tokens there are, and how long the examples are."""
    sizes = np.array([len(example.tokens) for example in examples])
    trained = sum(int(example.trained.sum()) for example in examples)
    least, half, most, nearly_all, longest = np.percentile(sizes, [0, 50, 90, 99, 100], method="higher").tolist()
    return (
        f"to train on: {len(sizes):,} rows, {sizes.sum():,} tokens of which {trained:,} ({trained / sizes.sum():.0%}) "
        f"are trained; tokens of a row: least {least}, half {half}, 90 % {most}, 99 % {nearly_all}, longest {longest}"
    )


def course(config: FinetuneConfig, batches: Batches, steps: int) -> str:
    """An epoch and the run, in tokens and steps."""
    positions = batches.packed.tokens.size
    trained = int(np.count_nonzero(batches.packed.weights))
    a_step = batches.batch_size * config.length
    return (
        f"an epoch: {batches.rows:,} sequences of {config.length:,} tokens, {positions:,} tokens of which {trained:,} "
        f"are trained; {steps:,} steps of {a_step:,} tokens, {steps * batches.batch_size / batches.rows:.2f} epochs"
    )


def count_steps(config: FinetuneConfig, batches: Batches, most: int) -> int:
    """The run's steps. Raises ValueError where epochs come to more than may be counted."""
    if config.steps is not None:
        return config.steps
    if (steps := config.epochs * batches.steps_per_epoch) > most:
        raise ValueError(f"epochs must come to at most {most} steps, got {config.epochs:g}")
    return max(1, int(np.ceil(steps)))


def marked(tokenizer: Any, example: Example, *, colours: bool) -> Text:
    """The example's text, control tokens written out, with what is trained marked by colour or by brackets."""
    control = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    text = Text()
    tokens = zip(example.tokens.tolist(), example.trained.tolist(), strict=True)
    for trained, of_run in groupby(tokens, key=lambda token: token[1]):
        text.append(OPENS if trained and not colours else "")
        for special, part in groupby((token for token, _ in of_run), key=control.__contains__):
            style = (CONTROL if special else "") + (f" {TRAINED}" if trained else "") if colours else ""
            text.append(printable(tokenizer.decode(list(part), skip_special_tokens=False)), style=style.strip() or None)
        text.append(CLOSES if trained and not colours else "")
    return text


def printable(text: str) -> str:
    """The text with what would move a terminal's cursor or change its colours written as Python does."""
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)

"""`jmoe parity`: JAX and PyTorch on the same bytes."""

import dataclasses
import importlib.metadata
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import jax
import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from jmoe.bench.record import birth_certificate, write
from jmoe.commands.model_options import LoraBLayoutOption
from jmoe.commands.paths import output_path

if TYPE_CHECKING:
    from jmoe.adapters.settings import LoraBLayout
    from jmoe.interop.parity import Row
    from jmoe.ops.random_layer import Layer

console = Console(width=max(150, Console().width))


def parity(
    checkpoint: Annotated[Path | None, typer.Option(help="A gpt-oss directory: run one of its layers.")] = None,
    layer: Annotated[int, typer.Option(help="Which layer of the checkpoint.")] = 0,
    adapter: Annotated[Path | None, typer.Option(help="A PEFT adapter directory for the checkpoint.")] = None,
    lora_b_layout: LoraBLayoutOption = None,
    text: Annotated[
        Path | None, typer.Option(help="A text for the checkpoint's tokenizer; jmoe's README if none.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens of the text to run.", min=1)] = 64,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the table as JSON, with date, commit, GPU and versions.", parser=output_path, metavar="<path>"
        ),
    ] = None,
) -> None:
    """Runs a layer through JAX and PyTorch on the same bytes, and compares each result with float64.

    Random layers of several sizes, or a layer of a real checkpoint on a real text. Exits with 1 if anything disagrees.
    """
    if adapter is not None and checkpoint is None:
        raise typer.BadParameter("--adapter needs --checkpoint")
    gpu = jax.default_backend() == "gpu"
    if not gpu:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, which happens below
    from jmoe.interop import parity as check

    if checkpoint is None:
        shapes = check.real_shapes() if gpu else check.small_shapes()
        rows = [check.compare_random(shape) for shape in shapes]
    else:
        arrays, top_k = read_layer(checkpoint, layer, adapter, text, tokens, lora_b_layout)
        layers = {"": dataclasses.replace(arrays, lora=None)} | ({} if arrays.lora is None else {", adapter": arrays})
        shapes = [check.shape_of(each, top_k) for each in layers.values()]
        name = f"layer {layer}, {arrays.x.shape[0]} tokens"
        rows = [check.compare(name + suffix, each, top_k) for suffix, each in layers.items()]
    failures = [failure for row in rows for failure in row.failures]
    show(rows)
    if gpu:
        console.print(f"on {jax.devices()[0].device_kind}")
    else:
        error = check.lower_elsewhere(shapes)
        targets = ", ".join(check.TARGETS)
        if error is None:
            interpreted = any(isinstance(row.triton_torch, float) for row in rows)
            ran = "Triton ran in its interpreter" if interpreted else "Triton's interpreter would take too long"
            console.print(f"no GPU here: {ran}; every launch compiled for {targets}")
        else:
            failures.append(f"the launches do not compile for {targets}: {error}")
    for failure in failures:
        console.print(f"FAIL {failure}", markup=False)
    if out is not None:
        write(out, {**birth_certificate(), "rows": [dataclasses.asdict(row) for row in rows]})
    if failures:
        raise typer.Exit(1)


def show(rows: "list[Row]") -> None:
    """Prints the table of `parity`."""
    table = Table(title="relative error against float64", box=box.SIMPLE_HEAD)
    table.add_column("layer")
    for column in ("XLA", "Triton in JAX", "Triton in torch", "triton_kernels", "torch bf16", "same bits", ""):
        table.add_column(column, no_wrap=True)
    for row in rows:
        columns = (row.xla, row.triton_jax, row.triton_torch, row.triton_kernels, row.torch_bf16)
        errors = [f"{value:.1e}" if isinstance(value, float) else value for value in columns]
        same = row.same_bits if isinstance(row.same_bits, str) else ("yes" if row.same_bits else "NO")
        table.add_row(row.label, *errors, same, "FAIL" if row.failures else "pass")
    console.print(table)


def read_layer(
    directory: Path,
    index: int,
    adapter: Path | None,
    text: Path | None,
    tokens: int,
    lora_b_layout: "LoraBLayout | None" = None,
) -> "tuple[Layer, int]":
    """(one layer's arguments for the first tokens of a text, top_k); the checkpoint embeds, normalises and routes."""
    from tokenizers import Tokenizer

    from jmoe.adapters import load_lora
    from jmoe.checkpoint import Checkpoint, embed, load_moe_layer, router_logits
    from jmoe.checkpoint.config_file import why_no_tokenizer
    from jmoe.ops.norm import rms_norm
    from jmoe.ops.random_layer import Layer

    source = Checkpoint(directory)
    layer = load_moe_layer(source, index)
    words = text.read_text() if text is not None else readme_text()
    if not (file := directory / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{file} does not exist{why_no_tokenizer(directory)}")
    ids = np.array(Tokenizer.from_file(str(file)).encode(words).ids[:tokens])
    if not len(ids):
        raise ValueError(f"{text or 'the README'} must hold at least one token")
    x = rms_norm(embed(source, ids), layer.norm_weight, source.config.rms_norm_eps)
    lora = None if adapter is None else load_lora(adapter, source.config, index, lora_b_layout=lora_b_layout)
    console.print(
        f"{directory}: layer {index} of {source.config.num_hidden_layers}, {source.config.num_local_experts} experts, "
        f"top-{source.config.num_experts_per_tok}, {source.config.hidden_size}/{source.config.intermediate_size}; "
        f"{len(ids)} tokens of {text or 'the README'}" + ("" if adapter is None else f"; adapter {adapter}")
    )
    return Layer(x, router_logits(layer, x), layer.experts, lora, None), source.config.num_experts_per_tok


def readme_text() -> str:
    """jmoe's README, which is part of the installed package's metadata."""
    return importlib.metadata.metadata("jmoe").json["description"]  # type: ignore[return-value]

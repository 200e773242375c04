"""The `jmoe` command."""

import dataclasses
import importlib.metadata
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import jax
import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from jmoe.bench.record import birth_certificate, write
from jmoe.commands.adapter_options import LoraBLayoutOption
from jmoe.commands.bench_model import bench_model
from jmoe.commands.convert_adapter import convert_adapter
from jmoe.commands.doctor import doctor
from jmoe.commands.evaluate import evaluate
from jmoe.commands.finetune import finetune
from jmoe.commands.generate import generate
from jmoe.commands.merge import merge

if TYPE_CHECKING:
    from jmoe.adapters.settings import LoraBLayout
    from jmoe.interop.parity import Row
    from jmoe.ops.random_layer import Layer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(width=max(150, Console().width))


@app.callback()
def jmoe() -> None:
    """MXFP4 mixture-of-experts with LoRA for JAX."""


@app.command()
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
        Path | None, typer.Option(help="Write the table as JSON, with date, commit, GPU and versions.")
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


@app.command()
def bench(
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, with commas between.")] = "",
    experts: Annotated[str, typer.Option(help="Numbers of experts.")] = "",
    ranks: Annotated[str, typer.Option(help="LoRA ranks; 0 is without LoRA.")] = "",
    implementations: Annotated[str, typer.Option(help="Only these, by the names in the results.")] = "",
    skip: Annotated[str, typer.Option(help="All but these.")] = "",
    gradient: Annotated[bool, typer.Option("--gradient", help="Forward and backward pass, and memory.")] = False,
    marlin_library: Annotated[
        Path | None, typer.Option(help="vLLM's compiled library with Marlin, if vLLM is not installed; .xz or not.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the figures as JSON, with date, commit, GPU and versions, after each row; a file of the same "
            "commit, GPU and versions keeps its other figures."
        ),
    ] = None,
) -> None:
    """Times one layer of gpt-oss's size beside every peer that is installed: microseconds a call.

    On a machine without a GPU it times backend "xla" at a small size. Exits with 1 if jmoe itself fails.
    """
    from jmoe.bench import report, results
    from jmoe.bench.case import Matrix, default_matrix
    from jmoe.bench.gradient import IMPLEMENTATIONS as WITH_GRADIENT
    from jmoe.bench.gradient import gradient_matrix
    from jmoe.bench.run import implementations as forward_alone
    from jmoe.bench.run import run, select

    default = gradient_matrix() if gradient else default_matrix()
    matrix = Matrix(
        default.size,
        numbers("--tokens", tokens, least=1) or default.tokens,
        numbers("--experts", experts, least=default.size.top_k) or default.experts,
        numbers("--ranks", ranks, least=0) or default.ranks,
    )
    everyone = WITH_GRADIENT if gradient else forward_alone(marlin_library)
    chosen = select(everyone, words(implementations), words(skip))
    measured_passes = {"passes": "forward and backward" if gradient else "forward"}
    figures = results.start(birth_certificate() | measured_passes, matrix.size, out)
    failed = False
    for measured in run(matrix, chosen):
        results.add(figures, *measured)
        if out is not None:
            write(out, figures)
        console.print(report.line(figures["rows"], measured), markup=False, highlight=False, soft_wrap=True)
        failed |= report.jmoe_failed(measured)
    console.print(report.table(figures["rows"]))
    if failed:
        raise typer.Exit(1)


@app.command()
def tune(
    tokens: Annotated[str, typer.Option(help="Numbers of tokens to measure at, with commas between.")] = "",
    out: Annotated[Path | None, typer.Option(help="Write the table here instead of to the user's cache.")] = None,
) -> None:
    """Measures which launch parameters are best on this machine's GPU, and writes the table that jmoe then uses here.

    It takes some minutes. jmoe.moe and jmoe.interop.moe read the table from the user's cache; a jmoe.Target, which may
    be of another GPU, does not.
    """
    from jmoe.bench import tune as measuring

    if jax.default_backend() != "gpu":
        raise typer.BadParameter("jmoe tune measures on a GPU, and JAX sees none")
    chosen = []
    for choice in measuring.tune(numbers("--tokens", tokens, least=1) or measuring.TOKENS):
        console.print(str(choice), markup=False, highlight=False, soft_wrap=True)
        chosen.append(choice)
    from jmoe.triton_src.tile_tables import as_json, user_table

    file = user_table(jax.devices()[0].device_kind) if out is None else out
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, {**birth_certificate(), **as_json(measuring.tables_of(chosen))})
    console.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def profile(
    tokens: Annotated[int, typer.Option(help="Tokens in the call.", min=1)] = 16,
    experts: Annotated[int, typer.Option(help="Experts of the layer.", min=4)] = 32,
    rank: Annotated[int, typer.Option(help="LoRA rank; 0 is without LoRA.", min=0)] = 0,
) -> None:
    """Lists the kernels of one call of jmoe.moe on packed experts, from JAX's profiler, and how long each takes."""
    from jmoe.bench.case import Case, Size
    from jmoe.bench.ours import one_call
    from jmoe.bench.profile import kernels_of

    if jax.default_backend() != "gpu":
        raise typer.BadParameter("jmoe profile measures on a GPU, and JAX sees none")
    kernels = kernels_of(one_call(Case(experts, tokens, rank, min(rank, 1)), Size()))
    for kernel in kernels:
        console.print(f"{kernel.microseconds:9.1f} us  {kernel.name}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{sum(kernel.microseconds for kernel in kernels):9.1f} us  in all", highlight=False)


app.command()(bench_model)
app.command()(generate)
app.command()(doctor)
app.command()(finetune)
app.command("eval")(evaluate)
app.command()(merge)
app.command()(convert_adapter)


def words(listed: str) -> list[str]:
    """What commas separate."""
    return [word.strip() for word in listed.split(",") if word.strip()]


def numbers(option: str, listed: str, *, least: int) -> tuple[int, ...]:
    """The integers of an option, increasing.

    Raises:
      typer.BadParameter: one of them is none, or below the least.
    """
    for word in words(listed):
        if not (word.isascii() and word.isdigit() and int(word) >= least):
            raise typer.BadParameter(f"{option} takes integers from {least} on, with commas between, got {word!r}")
    return tuple(sorted({int(word) for word in words(listed)}))


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
    from jmoe.ops.norm import rms_norm
    from jmoe.ops.random_layer import Layer

    source = Checkpoint(directory)
    layer = load_moe_layer(source, index)
    words = text.read_text() if text is not None else readme_text()
    if not (file := directory / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{file} does not exist")
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


def main() -> None:
    """Entry point of the `jmoe` command: what is wrong with the input is one line, not a traceback."""
    try:
        app()
    except (OSError, ValueError, ImportError) as error:
        fail(str(error), error)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail(f"memory ran out; ask for fewer or shorter sequences at once: {str(error).splitlines()[0]}", error)


def fail(message: str, error: Exception) -> NoReturn:
    """Says what is wrong in a line, and ends with 1."""
    Console(stderr=True).print(f"jmoe: {message}", markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(1) from error


if __name__ == "__main__":
    main()

"""`jmoe doctor`: what is installed, what will run where, and what a model takes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import jax
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from jmoe.commands.adapter_tables import adapter_tables
from jmoe.commands.doctor_lines import loss_lines, text_lines
from jmoe.commands.finetune_memory import (
    FinetuneBatchOption,
    FinetuneLengthOption,
    FinetuneRankOption,
    finetune_table,
)
from jmoe.commands.model_options import LoraBLayoutOption, QuantizeOption
from jmoe.commands.paths import input_path
from jmoe.device_memory import allow_whole_gpu, byte_size
from jmoe.ops.launch.kernel_cache import kernel_directory

if TYPE_CHECKING:
    from jmoe.doctor.machine import Machine
    from jmoe.doctor.model import ModelReport


def doctor(
    model: Annotated[
        str | None, typer.Option(help="A gpt-oss directory or Hub repository: say what it will run by.")
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            help="A PEFT adapter directory: say what is in it. More may follow.", parser=input_path, metavar="<path>"
        ),
    ] = None,
    lora_b_layout: LoraBLayoutOption = None,
    batch: Annotated[int, typer.Option(help="Sequences decoded together.", min=1)] = 16,
    context: Annotated[int, typer.Option(help="Tokens of each, the prompt's among them.", min=1)] = 1024,
    quantize: QuantizeOption = None,
    loss: Annotated[
        bool,
        typer.Option("--loss", help="Load the model, and take its loss on an English paragraph: do the weights fit?"),
    ] = False,
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="AXES",
            help="Say what each device of this mesh holds, as of data=2,expert=4; they need not be here.",
        ),
    ] = None,
    finetune_length: FinetuneLengthOption = 4096,
    finetune_batch_size: FinetuneBatchOption = 1,
    finetune_rank: FinetuneRankOption = 16,
) -> None:
    """Says what is installed, whether the Triton backend runs here and, of a model, what runs each part and if it fits.

    Of an adapter it says what is in its files, how large its changes are and, with the model, how much of them is left
    where weights are summed in bfloat16. Of a model headers are read, and some weights that the adapter changes; of
    adapters all; with --loss everything. Exits with 1 if the model or an adapter cannot be loaded.
    """
    if loss and model is None:
        raise typer.BadParameter("--loss needs --model")
    if mesh is not None and model is None:
        raise typer.BadParameter("--mesh needs --model")
    allow_whole_gpu()
    from jmoe.device_mesh import planned_mesh
    from jmoe.doctor.machine import examine_machine
    from jmoe.doctor.model import examine_model
    from jmoe.gpt_oss.adapter import layouts_of
    from jmoe.gpt_oss.adapter_report import examine_adapter

    machine = examine_machine()
    tables = [machine_table(machine)]
    lines: list[str] = []
    if model is not None:
        lines += text_lines(model)
        report = examine_model(
            model,
            adapter or [],
            machine,
            batch=batch,
            context=context,
            lora_b_layout=lora_b_layout,
            quantize=quantize,
            mesh=None if mesh is None else planned_mesh(mesh),
        )
        tables += [parts_table(report, batch, batch * context), memory_table(report)]
        if mesh is None:  # the estimate is of one device
            tables.append(
                finetune_table(
                    model,
                    length=finetune_length,
                    batch_size=finetune_batch_size,
                    rank=finetune_rank,
                    quantize=quantize,
                )
            )
        reports = report.adapters
        lines += loss_lines(model, adapter or [], lora_b_layout, quantize) if loss else []
    else:
        layouts = layouts_of(adapter or [], lora_b_layout)
        reports = tuple(
            examine_adapter(path, lora_b_layout=layout) for path, layout in zip(adapter or [], layouts, strict=True)
        )
    tables += [table for of_adapter in reports for table in adapter_tables(of_adapter)]
    console = Console(width=max(120, Console().width))
    for table in tables:
        console.print(table)
    for line in [*lines, *(f"missing: {problem}" for problem in machine.missing)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def machine_table(machine: "Machine") -> Table:
    """Versions, devices, the Triton backend, and where what is compiled is kept."""
    table = Table(title="this machine", box=box.SIMPLE_HEAD, show_header=False)
    for package, version in machine.versions.items():
        table.add_row(package, version or "not installed")
    for device in machine.devices:
        memory = "" if device.memory is None else f", {byte_size(device.memory)}"
        table.add_row("device", f"{device.name}{memory}")
    table.add_row("GPU", "yes" if machine.gpu else "none that JAX sees: everything runs by XLA")
    table.add_row("Triton backend", "runs" if machine.no_triton is None else f"does not run: {machine.no_triton}")
    table.add_row("launch parameters", machine.tiles or "none")
    table.add_row("compiled kernels", str(kernel_directory()))
    table.add_row("compiled programs", jax.config.jax_compilation_cache_dir or "not kept")
    return table


def parts_table(report: "ModelReport", rows: int, prompt_tokens: int) -> Table:
    """What runs each part of the layers."""
    table = Table(title="layers, in bfloat16", box=box.SIMPLE_HEAD)
    for column in ("part", "layers", f"step of {rows} tokens", f"prompts of {prompt_tokens} tokens in all"):
        table.add_column(column)
    for part in report.parts:
        table.add_row(part.name, str(part.layers), part.decode, part.prefill)
    return table


def memory_table(report: "ModelReport") -> Table:
    """Bytes by what they are for, and whether the device has room for them, where JAX says how much it has."""
    of_each = f" of each of {report.devices} devices" if report.devices > 1 else ""
    table = Table(title=f"memory{of_each}", box=box.SIMPLE_HEAD, show_header=False)
    total = sum(report.resident.values())
    for kind, size in report.resident.items():
        table.add_row(kind, byte_size(size))
    table.add_row("in all, without activations", byte_size(total))
    if report.limit is not None:
        left = report.limit - total
        fit = f"fits, with {byte_size(left)} left" if left >= 0 else f"does not fit: {byte_size(-left)} too much"
        table.add_row(f"of {byte_size(report.limit)} that JAX may take of the device", fit)
    return table

"""`jmoe bench-model`: a whole gpt-oss generates, is fine-tuned and loaded."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from jmoe.commands.comma_lists import words
from jmoe.commands.model_options import MeshOption
from jmoe.commands.paths import output_path

if TYPE_CHECKING:
    from jmoe.bench.model.case import Figures


def bench_model(
    kinds: Annotated[
        str, typer.Option(help="Only these, with commas between: generate, parts, finetune, transformers, load.")
    ] = "",
    mesh: MeshOption = None,
    sizes: Annotated[str, typer.Option(help="Only these: 20b, 120b; tiny without a GPU.")] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the figures as JSON, with date, commit, GPU and versions, after each case; a file of the same "
            "commit, GPU and versions keeps its other cases.",
            parser=output_path,
            metavar="<path>",
        ),
    ] = None,
) -> None:
    """Times a whole gpt-oss with random weights: prefill, decoding, a step of fine-tuning beside transformers and PEFT.

    Each case runs in a process of its own; with --mesh those of prefill and decoding alone, over all GPUs. On a machine
    without a GPU a tiny model is measured. Exits with 1 if a case of jmoe's own fails.
    """
    import dataclasses
    import json

    from jmoe.bench.model.case import CPU_CASES, GPU_CASES
    from jmoe.bench.model.run import MODULES, add, run
    from jmoe.bench.record import certificate_elsewhere, start, write
    from jmoe.bench.source_hash import MODEL
    from jmoe.gpt_oss.layout import mesh_and_layout

    results = start(certificate_elsewhere(MODEL), out)
    every = CPU_CASES if results["device"] == "cpu" else GPU_CASES
    wanted_kinds = known_words("--kinds", kinds, MODULES)
    wanted_sizes = known_words("--sizes", sizes, ("20b", "120b", "tiny"))
    cases = [case for case in every if case.kind in wanted_kinds and case.size in wanted_sizes]
    if mesh is not None:
        cases = [dataclasses.replace(case, mesh=mesh) for case in cases if case.kind == "generate"]
        for case in cases:
            mesh_and_layout(mesh, case.config)  # an error now, not of each case
    if not cases:
        raise typer.BadParameter(f"there are no such cases on this machine, whose device is {results['device']}")
    console = Console(width=max(150, Console().width))
    failed = False
    for case, figures in run(cases):
        add(results, case, figures)
        console.print(f"{case}: {json.dumps(rounded(figures))}", markup=False, highlight=False, soft_wrap=True)
        failed |= "error" in figures and case.kind != "transformers"
        if out is not None:
            write(out, results)
    if failed:
        raise typer.Exit(1)


def known_words(option: str, listed: str, known: Any) -> list[str]:
    """What commas separate; all that is known if there is nothing.

    Raises:
      typer.BadParameter: one of them is not known.
    """
    found = words(listed)
    if unknown := [word for word in found if word not in known]:
        raise typer.BadParameter(f"{option} takes {', '.join(known)}, got {', '.join(unknown)}")
    return found or list(known)


def rounded(figures: "Figures") -> "Figures":
    """The figures with four digits that count."""
    return {
        name: rounded(value)
        if isinstance(value, dict)
        else float(f"{value:.4g}")
        if isinstance(value, float)
        else value
        for name, value in figures.items()
    }

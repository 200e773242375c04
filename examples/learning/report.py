"""What the runs say: the comparison, the table and the curves."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

KINDS = {"mxfp4": "MXFP4 experts", "bf16": "bf16 experts"}

STYLE: Any = {"svg.hashsalt": "jmoe", "svg.fonttype": "path", "font.size": 9}
"""Identifiers that do not change from one drawing to the next."""


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """For held-out loss and accuracy, each kind's base, mean of seeds and gain, and how far apart the kinds end.

    noise: twice the standard deviation of one run among the seeds, both kinds pooled; None of one seed. The kinds end
    within it if the means are no further apart.
    """
    found: dict[str, Any] = {}
    for name in ("loss", "accuracy"):
        ends = {kind: np.array([run[name] for run in results[kind]["runs"]]) for kind in KINDS}
        of_kinds: dict[str, Any] = {
            kind: {
                "base": results[kind]["base"][name],
                "after": float(ends[kind].mean()),
                "gain": float(abs(ends[kind].mean() - results[kind]["base"][name])),
            }
            for kind in KINDS
        }
        apart = float(abs(ends["mxfp4"].mean() - ends["bf16"].mean()))
        several = len(ends["mxfp4"]) > 1
        noise = 2 * float(np.sqrt(np.mean([of.var(ddof=1) for of in ends.values()]))) if several else None
        found[name] = {**of_kinds, "apart": apart, "noise": noise}
    return found


def table(results: dict[str, Any]) -> Table:
    """The summary for a reader."""
    shown = Table("held out", "loss, nats a byte", "accuracy", title=f"LoRA on Unicode's names, {results['device']}")
    loss, accuracy = (results["summary"][name] for name in ("loss", "accuracy"))
    for kind, words in KINDS.items():
        shown.add_row(f"{words}, base", f"{loss[kind]['base']:.4f}", f"{accuracy[kind]['base']:.4f}")
        shown.add_row(f"{words}, with LoRA", *(f"{found[kind]['after']:.4f}" for found in (loss, accuracy)))
    shown.add_row("apart, with LoRA", f"{loss['apart']:.4f}", f"{accuracy['apart']:.4f}")
    if loss["noise"] is not None:
        shown.add_row("noise: 2 deviations of a seed", f"{loss['noise']:.4f}", f"{accuracy['noise']:.4f}")
    shown.add_row("always the same category", "", f"{results['chance']:.4f}")
    return shown


def draw(results: dict[str, Any], file: Path) -> None:
    """Writes the curves as SVG: the whole model on source code, and LoRA's held-out loss for each kind and seed."""
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(9, 3.4), layout="constrained")
        before, after = canvas.subplots(1, 2)
        points = results["pretraining"]["curve"]
        before.plot([point["step"] for point in points], [point["loss"] for point in points], color="0.3")
        before.set(title="whole model, Python's source code", xlabel="step", ylabel="loss, nats a byte")
        for color, (kind, words) in zip(("tab:blue", "tab:orange"), KINDS.items(), strict=True):
            for number, run in enumerate(results[kind]["runs"]):
                curve = [(point["step"], point["held_out_loss"]) for point in run["curve"]]
                label = words if number == 0 else None
                after.plot(*zip(*curve, strict=True), color=color, alpha=0.8, linewidth=1, label=label)
        after.set(title="LoRA, Unicode's names, held out", xlabel="step", ylabel="loss, nats a byte", yscale="log")
        after.legend(frameon=False)
        for axes in (before, after):
            axes.spines[["top", "right"]].set_visible(False)
        canvas.savefig(file, metadata={"Date": None})

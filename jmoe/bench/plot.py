"""The plot in README: a layer's time against tokens, beside the least that the GPU allows."""

import hashlib
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jmoe.bench.case import Case, Size
from jmoe.bench.figures import figure, find, marlin_layer
from jmoe.bench.ours import PACKED
from jmoe.bench.ragged_dot import NAME as RAGGED_DOT
from jmoe.bench.results import Results
from jmoe.bench.roofline import ROOFS, roofline_microseconds
from jmoe.bench.torch_peers import TRITON_KERNELS

type Line = list[tuple[int, float]]
"""(tokens, microseconds), by tokens."""

STYLE: Any = {"svg.hashsalt": "jmoe", "svg.fonttype": "path", "font.size": 9}
"""Identifiers that do not change from one drawing to the next."""

LINES = {"jmoe, packed": "o-", "triton_kernels": "s-", "Marlin": "^-", "lax.ragged_dot, bf16": "v-"}


def lines(results: Results, experts: int) -> dict[str, Line]:
    """The lines of one number of experts, without LoRA, by label; none without points."""
    rows = results["rows"]
    counts = sorted({row["tokens"] for row in rows if row["experts"] == experts and not row["rank"]})
    drawn: dict[str, Line] = {label: [] for label in LINES}
    for tokens in counts:
        row = find(rows, Case(experts, tokens))
        times = (figure(row, PACKED), figure(row, TRITON_KERNELS), marlin_layer(row), figure(row, RAGGED_DOT))
        for line, time in zip(drawn.values(), times, strict=True):
            if time is not None:
                line.append((tokens, time))
    return {label: line for label, line in drawn.items() if line}


def panels(results: Results) -> dict[int, dict[str, Line]]:
    """The lines by number of experts, for each number that has any."""
    return {e: drawn for e in sorted({row["experts"] for row in results["rows"]}) if (drawn := lines(results, e))}


def digest(results: Results) -> str:
    """A fingerprint of what is drawn, which the file carries."""
    drawn = json.dumps([panels(results), results["layer"], results["device"]], sort_keys=True)
    return hashlib.sha256(drawn.encode()).hexdigest()


def draw(results: Results, file: Path) -> None:
    """Writes the plot as SVG: the same bytes for the same results and the same matplotlib."""
    shown = panels(results)
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(4.6 * len(shown), 3.6), layout="constrained")
        for place, (experts, drawn) in enumerate(shown.items(), start=1):
            axes = canvas.add_subplot(1, len(shown), place)
            for label, line in drawn.items():
                axes.plot(*zip(*line, strict=True), LINES[label], label=label, markersize=4, linewidth=1.2)
            draw_roofline(axes, results, experts, drawn)
            axes.set(title=f"{experts} experts, no LoRA", xlabel="tokens", ylabel="microseconds a layer")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            ticks = sorted({tokens for line in drawn.values() for tokens, _ in line})
            axes.set_xticks(ticks, [str(tokens) for tokens in ticks])
            axes.grid(alpha=0.3)
            axes.legend()
        canvas.savefig(file, format="svg", metadata={"Date": None, "Description": digest(results)})


def draw_roofline(axes: Axes, results: Results, experts: int, drawn: dict[str, Line]) -> None:
    """Adds the roofline of the results' GPU, if that is known."""
    roof = ROOFS.get(results["device"])
    if roof is None:
        return
    most = max(tokens for line in drawn.values() for tokens, _ in line)
    tokens = [2 ** (i / 4) for i in range(4 * (most.bit_length() - 1) + 1)]
    size = Size(**results["layer"])
    times = [roofline_microseconds(roof, size, experts, count) for count in tokens]
    axes.plot(tokens, times, "k--", label="roofline", linewidth=1)

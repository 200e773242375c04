"""README's tables and plot, generated from committed results.

python -m jmoe.bench.readme draws the plot and rewrites README.md in place.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jmoe.bench.case import Case
from jmoe.bench.figures import Row, figure, find, marlin_layer, peer_layer, ratio
from jmoe.bench.markdown import table
from jmoe.bench.model.tables import section as model_section
from jmoe.bench.ours import CHECKPOINT, PACKED
from jmoe.bench.ragged_dot import NAME as RAGGED_DOT
from jmoe.bench.torch_peers import TRITON_KERNELS

RESULTS = Path(__file__).parent / "results"
BENCH, PLOT = RESULTS / "bench_h100.json", RESULTS / "bench_h100.svg"
ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"

PARITY_COLUMNS = {
    "xla": "XLA",
    "triton_jax": "Triton in JAX",
    "triton_torch": "Triton in torch",
    "triton_kernels": "triton_kernels",
    "torch_bf16": "torch bf16",
}


def source(results: dict[str, Any], command: str) -> str:
    """The line under a table: the command, GPU, day, commit and versions it came from."""
    versions = ", ".join(f"{package} {version}" for package, version in results["versions"].items() if version)
    return f"`{command}` on {results['device']}, {results['date']}, commit {results['commit']}; {versions}."


def parity() -> str:
    """The parity table of the H100."""
    results = json.loads((RESULTS / "parity_h100.json").read_text())
    rows = []
    for row in results["rows"]:
        errors = [f"{v:.1e}" if isinstance(v := row[name], float) else v for name in PARITY_COLUMNS]
        rows.append([row["label"], *errors, "yes" if row["same_bits"] is True else str(row["same_bits"])])
    header = ["layer", *PARITY_COLUMNS.values(), "same bits"]
    return table(header, rows) + "\n\n" + source(results, "jmoe parity")


def cell(value: float | None, digits: int = 0) -> str:
    """A figure in a table."""
    return "" if value is None else f"{value:.{digits}f}"


def compact(names: tuple[str, list[str]], columns: Sequence[tuple[str, list[str]]]) -> str:
    """A table of (header, cells), `names` being what the rows are of, without the columns and rows that are empty."""
    filled = [(header, cells) for header, cells in columns if any(cells)]
    rows = [
        [name, *(cells[i] for _, cells in filled)]
        for i, name in enumerate(names[1])
        if any(cells[i] for _, cells in filled)
    ]
    return table([names[0], *(header for header, _ in filled)], rows)


def without_lora(rows: Sequence[Row], experts: int) -> str:
    """The times of a layer without LoRA, by implementation."""
    counts = token_counts(rows, experts)
    cases = [Case(experts, tokens) for tokens in counts]
    found = [find(rows, case) for case in cases]
    columns = [
        ("jmoe, packed", [cell(figure(row, PACKED)) for row in found]),
        ("jmoe", [cell(figure(row, CHECKPOINT)) for row in found]),
        ("triton_kernels", [cell(figure(row, TRITON_KERNELS)) for row in found]),
        ("Marlin", [cell(marlin_layer(row)) for row in found]),
        ("lax.ragged_dot, bf16", [cell(figure(row, RAGGED_DOT)) for row in found]),
        ("packed / peer", [cell(ratio(rows, case), 2) for case in cases]),
    ]
    return compact(("tokens", [str(tokens) for tokens in counts]), columns)


def with_ranks(rows: Sequence[Row], experts: int, ranks: Sequence[int]) -> str:
    """The times of jmoe on packed experts and of the peer at some ranks; 0 is without LoRA."""
    counts = token_counts(rows, experts)
    columns = []
    for rank in ranks:
        cases = [Case(experts, tokens, rank, min(rank, 1)) for tokens in counts]
        columns += [
            (
                f"r={rank}: jmoe" if rank else "no LoRA: jmoe",
                [cell(figure(find(rows, case), PACKED)) for case in cases],
            ),
            ("peer", [cell(peer_layer(rows, case)) for case in cases]),
            ("jmoe / peer", [cell(ratio(rows, case), 2) for case in cases]),
        ]
    return compact(("tokens", [str(tokens) for tokens in counts]), columns)


def mixed(rows: Sequence[Row]) -> str:
    """A sentence for each row of several adapters in one batch."""
    sentences = []
    for row in rows:
        time = figure(row, PACKED)
        if row["adapters"] > 1 and time is not None:
            size = f"{row['tokens']} tokens, {row['experts']} experts"
            sentences.append(f"{row['adapters']} adapters of rank {row['rank']} mixed in {size}: {time:.0f}.")
    return " ".join(sentences)


def token_counts(rows: Sequence[Row], experts: int) -> list[int]:
    """The numbers of tokens that were measured."""
    return sorted({row["tokens"] for row in rows if row["experts"] == experts})


def bench() -> str:
    """The plot and the time tables of the H100."""
    return bench_section(json.loads(BENCH.read_text()))


def bench_section(results: dict[str, Any]) -> str:
    """The plot and the time tables of these results; a table without figures is left out."""
    rows = results["rows"]
    tables = {
        "32 experts, no LoRA": without_lora(rows, 32),
        "32 experts, one LoRA adapter": with_ranks(rows, 32, (16, 64)),
        "128 experts": with_ranks(rows, 128, (0, 16, 64)),
    }
    image = f"![Time of a layer against tokens]({PLOT.relative_to(ROOT).as_posix()})"
    parts = [image, *(f"{title}:\n\n{text}" for title, text in tables.items() if text)]
    return "\n\n".join([*parts, *filter(None, [mixed(rows), unmeasured(rows)]), source(results, "jmoe bench")])


def unmeasured(rows: Sequence[Row]) -> str:
    """A sentence where a ratio is to one peer's time because the other has none."""
    times = [(marlin_layer(row), figure(row, TRITON_KERNELS)) for row in rows if not row["rank"]]
    missing = [name for i, name in enumerate(("Marlin", "triton_kernels")) if any(time[i] is None for time in times)]
    return f"Not measured at every size, and then not among the peers: {' and '.join(missing)}." if missing else ""


def model() -> str:
    """The tables of a whole model on the H100."""
    results = json.loads((RESULTS / "model_h100.json").read_text())
    return model_section(results) + "\n\n" + source(results, "jmoe bench-model")


SECTIONS = {"parity": parity, "bench": bench, "model": model}


def render(text: str) -> str:
    """The text with each generated section filled anew."""
    for name, section in SECTIONS.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"README.md must have one section between {begin.strip()} and {end.strip()}")
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = before + begin + section() + end + after
    return text


if __name__ == "__main__":
    from jmoe.bench.plot import draw

    draw(json.loads(BENCH.read_text()), PLOT)
    README.write_text(render(README.read_text()))

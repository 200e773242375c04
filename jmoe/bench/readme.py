"""Tables and plot of README and the docs, generated from committed results.

python -m jmoe.bench.readme draws the plot, where its figures are new, and fills each document's sections, which stand
between comments of their names, in place.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jmoe.bench.case import Case
from jmoe.bench.figures import Row, figure, find, marlin_layer, peer_layer, ratio
from jmoe.bench.gpu_tests import GPU_TESTS, summary
from jmoe.bench.gpu_tests import RECORD as GPU_TESTS_RECORD
from jmoe.bench.markdown import table
from jmoe.bench.model.tables import section as model_section
from jmoe.bench.ours import CHECKPOINT, PACKED
from jmoe.bench.ragged_dot import NAME as RAGGED_DOT
from jmoe.bench.source_hash import LAYER, MODEL, PARITY, source_hash
from jmoe.bench.torch_peers import TRITON_KERNELS

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]
BENCH, PLOT = RESULTS / "bench_h100.json", ROOT / "docs/images/bench_h100.svg"

DOCUMENTS = {
    "README.md": ("correctness", "gpu-tests", "speed"),
    "docs/correctness.md": ("parity",),
    "docs/speed.md": ("bench",),
    "docs/model.md": ("model",),
}
"""The sections of each document."""

SPEED_TOKENS = (1, 16, 64, 256, 1024, 4096)
"""Of the sizes that are measured, README's."""

PARITY_COLUMNS = {
    "xla": "XLA",
    "triton_jax": "Triton in JAX",
    "triton_torch": "Triton in torch",
    "triton_kernels": "triton_kernels",
    "torch_bf16": "torch bf16",
}


def correctness(results: dict[str, Any]) -> str:
    """One row for all layers of the parity table: the largest error of each implementation."""
    rows = results["rows"]
    errors = [[row[name] for row in rows if isinstance(row[name], float)] for name in PARITY_COLUMNS]
    same = sum(row["same_bits"] is True for row in rows)
    cells = [f"{max(column):.1e}" if column else "" for column in errors]
    header = [f"of {len(rows)} layers", *PARITY_COLUMNS.values(), "same bits"]
    return table(header, [["largest error", *cells, f"{same} of {len(rows)}"]])


def parity(results: dict[str, Any]) -> str:
    """The parity table."""
    rows = []
    for row in results["rows"]:
        errors = [f"{v:.1e}" if isinstance(v := row[name], float) else v for name in PARITY_COLUMNS]
        same_bits = "yes" if row["same_bits"] is True else str(row["same_bits"])
        rows.append([row["label"], row["layout"], *errors, same_bits])
    return table(["layer", "layout", *PARITY_COLUMNS.values(), "same bits"], rows)


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


def speed(results: dict[str, Any]) -> str:
    """The times of a few sizes, without LoRA and with."""
    return with_ranks([row for row in results["rows"] if row["tokens"] in SPEED_TOKENS], 32, (0, 16))


def bench(results: dict[str, Any]) -> str:
    """The plot and the time tables; a table without figures is left out."""
    rows = results["rows"]
    tables = {
        "32 experts, no LoRA": without_lora(rows, 32),
        "32 experts, one LoRA adapter": with_ranks(rows, 32, (16, 64)),
        "128 experts": with_ranks(rows, 128, (0, 16, 64)),
    }
    image = f"![Time of a layer against tokens]({PLOT.relative_to(ROOT / 'docs').as_posix()})"
    parts = [image, *(f"{title}:\n\n{text}" for title, text in tables.items() if text)]
    return "\n\n".join([*parts, *filter(None, [mixed(rows), unmeasured(rows)])])


def unmeasured(rows: Sequence[Row]) -> str:
    """A sentence where a ratio is to one peer's time because the other has none."""
    times = [(marlin_layer(row), figure(row, TRITON_KERNELS)) for row in rows if not row["rank"]]
    missing = [name for i, name in enumerate(("Marlin", "triton_kernels")) if any(time[i] is None for time in times)]
    return f"Not measured at every size, and then not among the peers: {' and '.join(missing)}." if missing else ""


class Section(NamedTuple):
    """A generated part of a document.

    file: the results that it shows, as JSON.
    command: what writes these.
    measured: the code that they are of; see jmoe.bench.source_hash.
    show: the text of the results.
    """

    file: Path
    command: str
    measured: tuple[str, ...]
    show: Callable[[dict[str, Any]], str]


SECTIONS = {
    "correctness": Section(RESULTS / "parity.json", "jmoe parity", PARITY, correctness),
    "parity": Section(RESULTS / "parity.json", "jmoe parity", PARITY, parity),
    "gpu-tests": Section(GPU_TESTS_RECORD, "make gpu-test", GPU_TESTS, summary),
    "speed": Section(BENCH, "jmoe bench", LAYER, speed),
    "bench": Section(BENCH, "jmoe bench", LAYER, bench),
    "model": Section(RESULTS / "model_h100.json", "jmoe bench-model", MODEL, model_section),
}


def text_of(section: Section, results: dict[str, Any]) -> str:
    """The section's text for these results: what they are, where they come from, and whether they are stale."""
    return f"{section.show(results)}\n\n{source(results, section.command)}{mark(results, section.measured)}"


def source(results: dict[str, Any], command: str) -> str:
    """The line under a table: the command, GPU, day, commit and versions it came from."""
    versions = ", ".join(f"{package} {version}" for package, version in results["versions"].items() if version)
    return f"`{command}` on {results['device']}, {results['date']}, {commit_of(results)}; {versions}."


def commit_of(results: dict[str, Any]) -> str:
    """The commit that results are of; outside a checkout nobody knows it, and the hash says which code it was."""
    return f"commit {results['commit']}" if results["commit"] else f"source {results['source_hash']}"


def mark(results: dict[str, Any], measured: Iterable[str]) -> str:
    """What says that results are stale; nothing where the code is still what was measured."""
    stale = results.get("source_hash") != source_hash(measured)
    return f" **Measured at {commit_of(results)}: the kernels have changed since.**" if stale else ""


def render(text: str, sections: Sequence[str]) -> str:
    """The text with these generated sections filled anew.

    Raises:
      ValueError: one of them is missing, or there twice.
    """
    for name in sections:
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"there must be one section between {begin.strip()} and {end.strip()}")
        before, rest = text.split(begin)
        _, after = rest.split(end)
        section = SECTIONS[name]
        filled = text_of(section, json.loads(section.file.read_text())) if section.file.exists() else "No record yet."
        text = before + begin + filled + end + after
    return text


if __name__ == "__main__":
    from jmoe.bench.plot import digest, draw

    figures = json.loads(BENCH.read_text())
    if digest(figures) not in PLOT.read_text():
        draw(figures, PLOT)
    for document, sections in DOCUMENTS.items():
        (ROOT / document).write_text(render((ROOT / document).read_text(), sections))

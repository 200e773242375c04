"""README's tables, generated from committed results: python -m jmoe.bench.readme rewrites README.md in place."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[2] / "README.md"

PARITY_COLUMNS = {
    "xla": "XLA",
    "triton_jax": "Triton in JAX",
    "triton_torch": "Triton in torch",
    "triton_kernels": "triton_kernels",
    "torch_bf16": "torch bf16",
}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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


def bench() -> str:
    """The time table of the H100."""
    results = json.loads((RESULTS / "bench_h100.json").read_text())
    implementations = list(results["rows"][0]["microseconds"])
    rows = []
    for row in results["rows"]:
        times = [f"{v:.0f}" if isinstance(v := row["microseconds"][name], float) else v for name in implementations]
        rows.append([str(row["shape"]["tokens"]), *times])
    header = ["tokens", *(f"{name}, us" for name in implementations)]
    return table(header, rows) + "\n\n" + source(results, "jmoe bench")


SECTIONS = {"parity": parity, "bench": bench}


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
    README.write_text(render(README.read_text()))

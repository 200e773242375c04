"""The tables of a whole model, from committed results of `jmoe bench-model`."""

from collections.abc import Sequence
from typing import Any

from jmoe.bench.markdown import table

type Row = dict[str, Any]


def section(results: dict[str, Any]) -> str:
    """The tables of generating, of where a step goes, of fine-tuning, and a sentence for loading; no empty ones."""
    rows = [row for row in results["rows"] if "error" not in row]
    parts = [generating(of(rows, "generate")), parts_of_a_step(of(rows, "parts"))]
    parts += [finetuning([*of(rows, "finetune"), *of(rows, "transformers")]), *map(loading, of(rows, "load"))]
    return "\n\n".join(filter(None, parts))


def of(rows: Sequence[Row], kind: str) -> list[Row]:
    """The rows of one kind, on one device."""
    return [row for row in rows if row["kind"] == kind and "mesh" not in row]


def lora(row: Row) -> str:
    """What LoRA a row has."""
    return f"r={row['rank']}" if row["rank"] else "none"


def generating(rows: Sequence[Row]) -> str:
    """Prefill and decode."""
    header = [
        "model",
        "sequences",
        "prompt",
        "LoRA",
        "prefill, tokens/s",
        "a step, ms",
        "decoded tokens/s",
        "peak, GiB",
    ]
    return table(
        header,
        [
            [
                row["size"],
                str(row["sequences"]),
                str(row["length"]),
                lora(row),
                f"{row['prefill_tokens_per_second']:,.0f}",
                f"{row['decode_step_ms']:.2f}",
                f"{1e3 * row['sequences'] / row['decode_step_ms']:,.0f}",
                f"{row['peak_gib']:.1f}",
            ]
            for row in rows
        ],
    )


def parts_of_a_step(rows: Sequence[Row]) -> str:
    """Microseconds of the kernels of one decode step."""
    names = list(rows[0]["microseconds"]) if rows else []
    header = ["kernels of a step, us", *names, "number of kernels"]
    cells = [
        [
            f"{row['size']}, {row['sequences']} sequence{'s' * (row['sequences'] > 1)}, LoRA {lora(row)}",
            *(f"{row['microseconds'][name]:,.0f}" for name in names),
            f"{row['kernels']:.0f}",
        ]
        for row in rows
    ]
    return table(header, cells)


def finetuning(rows: Sequence[Row]) -> str:
    """A step of the optimizer, forward and backward pass among it."""
    who = {"finetune": "jmoe, MXFP4 experts", "transformers": "transformers + PEFT, bf16 experts"}
    header = ["fine-tuning", "model", "tokens a step", "LoRA", "a step, ms", "tokens/s", "peak, GiB"]
    cells = [
        [
            who[row["kind"]],
            row["size"],
            f"{row['sequences'] * row['length']}",
            lora(row),
            f"{row['step_ms']:.0f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_gib']:.1f}",
        ]
        for row in rows
    ]
    return table(header, cells)


def loading(row: Row) -> str:
    """A sentence."""
    return (
        f"Loading {row['size']} from disk takes {row['load_seconds']:.0f} s, "
        f"{row['host_gib_above_start']:.2f} GiB of host memory beside the page cache, and at most "
        f"{row['device_peak_over_final']:.3f} times the {row['device_gib']:.1f} GiB that stay on the device."
    )

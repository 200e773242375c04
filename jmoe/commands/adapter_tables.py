"""What `jmoe doctor` prints of an adapter."""

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from jmoe.gpt_oss.adapter_report import AdapterReport


def adapter_tables(report: "AdapterReport") -> list[Table]:
    """What holds for the whole adapter, and a row for each of its targets."""
    facts = Table(title=f"adapter {report.path}", box=box.SIMPLE_HEAD, show_header=False)
    for name, value in report.facts.items():
        facts.add_row(name, value)
    facts.add_row("sums in bf16", report.sampled or "only with --model")
    caption = "D = scale * B A. PEFT computes with the experts' W + D in bf16, jmoe with all of D."
    targets = Table(title="what it changes", box=box.SIMPLE_HEAD, caption=caption)
    for column in ("target", "layers", "rank", "scale", "dtype", "norm of D"):
        targets.add_column(column)
    if report.sampled is not None:
        for column in ("norm of D / W", "left of D in bf16", "error / D"):
            targets.add_column(column)
    for row in report.targets:
        layers, of_all = row.layers
        cells = [
            row.target,
            f"{layers} of {of_all}",
            ", ".join(map(str, row.ranks)),
            ", ".join(f"{scale:.4g}" for scale in row.scales),
            ", ".join(row.dtypes),
            f"{row.norm:.3e}",
        ]
        if row.in_bfloat16 is not None and row.relative is not None:
            rounding = row.in_bfloat16.bfloat16
            cells += [f"{row.relative:.2e}", f"{rounding.survives:.3f}", f"{rounding.error:.3e}"]
        targets.add_row(*cells)
    return [facts, targets]

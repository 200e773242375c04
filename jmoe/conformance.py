"""`python -m jmoe.conformance`: tries functions of the MXFP4 mixture-of-experts contract on buffers in poison."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jax

import jmoe
from jmoe.extras import require

if __name__ == "__main__":
    try:
        require("jmoe.conformance", "cli", "typer", "rich")
        require("jmoe.conformance", "torch", "torch")
    except ImportError as error:
        raise SystemExit(f"jmoe.conformance: {error}") from None

import typer
from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from jmoe.interop.conformance import Contract


def layer(x: jax.Array, router_logits: jax.Array, *, top_k: int, **weights: Any) -> jax.Array:
    """jmoe.moe, by the backend of the platform."""
    return jmoe.moe(x, router_logits, experts_of(weights), top_k=top_k)


def packed_layer(x: jax.Array, router_logits: jax.Array, *, top_k: int, **weights: Any) -> jax.Array:
    """jmoe.moe on packed experts."""
    return jmoe.moe(x, router_logits, jmoe.pack(experts_of(weights)), top_k=top_k)


def torch_layer(x: Any, router_logits: Any, *, top_k: int, **weights: Any) -> Any:
    """jmoe.interop.moe: the kernels, on a CPU in Triton's interpreter."""
    from jmoe.interop import moe

    return moe(x, router_logits, experts_of(weights), top_k=top_k)


def experts_of(weights: dict[str, Any]) -> Any:
    """The contract's weights as jmoe has them: a jmoe.Experts, of torch tensors too."""
    gate_up, down = (jmoe.Mxfp4(weights[f"{name}_blocks"], weights[f"{name}_scales"]) for name in ("gate_up", "down"))
    return jmoe.Experts(gate_up, weights["gate_up_bias"], down, weights["down_bias"])


def main(
    functions: Annotated[
        list[str] | None,
        typer.Argument(help="Functions to try, as module:name or file.py:name; jmoe's own on JAX arrays if none."),
    ] = None,
    arrays: Annotated[Literal["torch", "jax"], typer.Option(help="What the functions take and return.")] = "jax",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")] = None,
    only: Annotated[str, typer.Option(help="Only cases whose name has this in it.")] = "",
) -> None:
    """Tries functions of the MXFP4 mixture-of-experts contract, and prints what is found; 1 if anything is.

    docs/conformance.md has the contract and the cases.
    """
    import torch

    from jmoe.interop.conformance import try_all

    names = functions or [f"jmoe.conformance:{own}" for own in ("layer", "packed_layer")]
    found = [(name, function_of(name)) for name in names]
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    console = Console(width=max(110, Console().width))
    failed = 0
    for name, function in found:
        table = Table("case", "", "relative error", "found", title=f"{name}, {where}", box=box.SIMPLE)
        for finding in try_all(function, arrays, where, lambda case: only in case):
            failed += not finding.passed
            table.add_row(finding.case, "ok" if finding.passed else "FAIL", f"{finding.error:.1e}", finding.said)
        if not table.row_count:
            raise typer.BadParameter(f"no case has {only!r} in its name", param_hint="--only")
        console.print(table)
    raise typer.Exit(int(failed > 0))


def function_of(name: str) -> "Contract":
    """The function that module:name or file.py:name says."""
    module, _, attribute = name.rpartition(":")
    if not module:
        raise typer.BadParameter(f"a function is given as module:name or file.py:name, got {name!r}")
    if module.endswith(".py"):
        sys.path.insert(0, str(Path(module).resolve().parent))
        module = Path(module).stem
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(f"{name}: {error}") from None


if __name__ == "__main__":
    typer.run(main)

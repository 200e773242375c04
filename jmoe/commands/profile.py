"""`jmoe profile`: the kernels of one call."""

from typing import Annotated

import jax
import typer
from rich.console import Console

console = Console(width=max(150, Console().width))


def profile(
    tokens: Annotated[int, typer.Option(help="Tokens in the call.", min=1)] = 16,
    experts: Annotated[int, typer.Option(help="Experts of the layer.", min=4)] = 32,
    rank: Annotated[int, typer.Option(help="LoRA rank; 0 is without LoRA.", min=0)] = 0,
) -> None:
    """Lists the kernels of one call of jmoe.moe on packed experts, from JAX's profiler, and how long each takes."""
    from jmoe.bench.case import Case, Size
    from jmoe.bench.ours import one_call
    from jmoe.bench.profile import kernels_of

    if jax.default_backend() != "gpu":
        raise typer.BadParameter("jmoe profile measures on a GPU, and JAX sees none")
    kernels = kernels_of(one_call(Case(experts, tokens, rank, min(rank, 1)), Size()))
    for kernel in kernels:
        console.print(f"{kernel.microseconds:9.1f} us  {kernel.name}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{sum(kernel.microseconds for kernel in kernels):9.1f} us  in all", highlight=False)

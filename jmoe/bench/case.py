"""What is measured: which sizes of layer, at how many tokens, with which adapters."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Size:
    """What all rows of a run have in common. Defaults are those of gpt-oss."""

    hidden: int = 2880
    intermediate: int = 2880
    top_k: int = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: so many tokens, through so many experts. Rank 0 and no adapters: without LoRA.

    With one adapter it is every token's; with more each token has a random one, or none.
    """

    experts: int
    tokens: int
    rank: int = 0
    adapters: int = 0

    def __str__(self) -> str:
        lora = "" if not self.rank else f", LoRA r={self.rank}" + (f" x{self.adapters}" if self.adapters > 1 else "")
        return f"{self.experts} experts, {self.tokens} token{'s' * (self.tokens > 1)}{lora}"


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A size of layer, and the numbers whose every combination is a case."""

    size: Size
    tokens: tuple[int, ...]
    experts: tuple[int, ...]
    ranks: tuple[int, ...]


FULL = Matrix(Size(), (1, 4, 16, 64, 256, 1024, 4096, 16384), (32, 128), (0, 16, 64))
SMALL = Matrix(Size(256, 256), (1, 16, 64), (32,), (0, 16))
"""For a CPU, to see that it runs."""

MIXED = {"tokens": 64, "rank": 16, "adapters": 8}
"""The row of several adapters in one batch, where its tokens and rank are among those asked for."""


def default_matrix() -> Matrix:
    """gpt-oss's layer on a GPU; elsewhere one small enough for a CPU."""
    return FULL if jax.default_backend() == "gpu" else SMALL


def cases(matrix: Matrix, experts: int) -> list[Case]:
    """The rows of one number of experts: without LoRA first, as what a peer's LoRA is added to."""
    ranks = sorted(matrix.ranks)
    rows = [Case(experts, tokens, rank, min(rank, 1)) for rank in ranks for tokens in matrix.tokens]
    if MIXED["tokens"] in matrix.tokens and MIXED["rank"] in ranks:
        rows.append(Case(experts, **MIXED))
    return rows


def calls_for(tokens: int) -> int:
    """Calls in one sample: enough that starting the sample does not show, and no more than the time allows."""
    if jax.default_backend() != "gpu":
        return 5
    return next(calls for most, calls in ((64, 200), (1024, 50), (4096, 10), (tokens, 4)) if tokens <= most)


def steps_for(tokens: int) -> int:
    """Steps of one sample of JAX, whose start, a tenth of a millisecond, is in its time."""
    if jax.default_backend() != "gpu":
        return 5
    return next(
        steps for most, steps in ((64, 400), (256, 200), (1024, 100), (4096, 40), (tokens, 16)) if tokens <= most
    )

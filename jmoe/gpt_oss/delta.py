"""How much an adapter changes, target by target and layer by layer, and which halves it leaves alone."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jmoe.gpt_oss.weights import EXPERTS, TARGETS, LoraWeights


class Finding(NamedTuple):
    """Something about one layer's LoRA on one target that an ordinary adapter does not have."""

    layer: int
    target: str
    what: str

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.target}: {self.what}"


class DeltaReport(NamedTuple):
    """Sizes of what one adapter adds to the weights. Printed, a table of layers and targets.

    norms: of each target the Frobenius norms of scale * B A, float32 [L], and [L, E] on experts.
    gate, up: those of gate_up's rows 0::2 and 1::2 alone, [L, E]; None without LoRA on gate_up.
    present: of each target the layers that have LoRA on it, bool [L].
    blank: of each target the layers whose A and B are both all zeros, bool [L]; training leaves no A so.
    """

    norms: dict[str, np.ndarray]
    gate: np.ndarray | None
    up: np.ndarray | None
    present: dict[str, np.ndarray]
    blank: dict[str, np.ndarray]

    @property
    def is_zero(self) -> bool:
        """Whether nothing changes."""
        return not any(norms.any() for norms in self.norms.values())

    def __str__(self) -> str:
        lines = ["  ".join(["layer", *(f"{target:>23}" for target in self.norms)])]
        for layer in range(len(next(iter(self.norms.values())))):
            cells = [cell(norms[layer], self.present[target][layer]) for target, norms in self.norms.items()]
            lines.append("  ".join([f"{layer:5}", *(f"{text:>23}" for text in cells)]))
        return "\n".join(lines)


def cell(norms: np.ndarray, present: np.bool_) -> str:
    """One target's size in one layer: a norm, or the least and the largest of the experts'."""
    if not present:
        return "-"
    return f"{norms:.3e}" if norms.ndim == 0 else f"{norms.min():.3e} to {norms.max():.3e}"


def delta_report(lora: LoraWeights, *, adapter: int = 0) -> DeltaReport:
    """How much one adapter changes each target of each layer; the changes themselves are never formed.

    adapter: which of those that stand side by side.

    Raises:
      ValueError: the adapter does not exist.
    """
    adapters = next(iter(lora.scale.values())).shape[1]
    if not 0 <= adapter < adapters:
        raise ValueError(f"adapter must be in [0, {adapters}), got {adapter}")
    own = jax.tree.map(lambda leaf: leaf[:, adapter], lora)
    targets = [target for target in TARGETS if target in own.a]
    norms = {target: np.asarray(delta_norms(own.a[target], own.b[target], own.scale[target])) for target in targets}
    gate, up = (
        np.asarray(delta_norms(own.a["gate_up"], own.b["gate_up"][..., half::2, :], own.scale["gate_up"]))
        if "gate_up" in own.a
        else None
        for half in (0, 1)
    )
    present = {target: np.asarray(scale) != 0 for target, scale in own.scale.items()}
    blank = {target: np.asarray(is_blank(own.a[target]) & is_blank(own.b[target])) for target in targets}
    return DeltaReport(norms, gate, up, present, blank)


@jax.jit
def is_blank(factors: Float[Array, "L ..."]) -> Array:
    """Whether a layer's are all zeros, bool [L]."""
    return jnp.all(factors == 0, axis=tuple(range(1, factors.ndim)))


@jax.jit
def delta_norms(a: Float[Array, "L *E R K"], b: Float[Array, "L *E N R"], scale: Float[Array, " L"]) -> Array:
    """Frobenius norms of scale * b a, float32 [L, *E].

    ||b a||² is the sum of the products of the entries of a a^T and b^T b, which are of the rank's size.
    """

    def one_layer(factors: tuple[Array, Array, Array]) -> Array:
        a, b, scale = factors
        (a, size_a), (b, size_b) = normalise(a), normalise(b)
        gram = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
        square = jnp.sum(gram(a, a.mT) * gram(b.mT, b), axis=(-2, -1))
        # Rounding may take a product that is nearly zero below it; NaN stays.
        return jnp.abs(scale) * size_a * size_b * jnp.sqrt(jnp.where(square < 0, 0, square))

    return lax.map(one_layer, (a, b, scale))


def normalise(matrices: Float[Array, "*E N K"]) -> tuple[Float[Array, "*E N K"], Float[Array, "*E"]]:
    """(float32 with 1 as the largest absolute value, what that was), so that no square of a small value is lost."""
    wide = matrices.astype(jnp.float32)
    size = jnp.max(jnp.abs(wide), axis=(-2, -1))
    return wide / jnp.where(size == 0, 1, size)[..., None, None], size


def findings(report: DeltaReport) -> list[Finding]:
    """What is odd about an adapter that changes something; none for an ordinary one.

    A layer that has no LoRA on a target is not odd, since PEFT can be told so; one that has and changes nothing is.
    """
    return sorted([*unchanged(report), *half_of_gate_up(report), *one_of_the_experts_two(report)])


def unchanged(report: DeltaReport) -> Iterator[Finding]:
    """Layers with LoRA that changes nothing, and experts of layers in which others change."""
    for target, norms in report.norms.items():
        for layer in np.flatnonzero(report.present[target]).tolist():
            if is_filler(report, target, layer):
                continue
            if not norms[layer].any():
                yield Finding(layer, target, "changes nothing, though other LoRA of this adapter does")
            elif zero := np.flatnonzero(norms[layer] == 0).tolist():
                yield Finding(layer, target, f"changes nothing in {listed(zero)} of {norms.shape[1]}")


def is_filler(report: DeltaReport, target: str, layer: int) -> bool:
    """Whether one of the experts' projections has zeros beside the other's LoRA, for programs that ask for both."""
    if target not in EXPERTS or not report.blank[target][layer]:
        return False
    other = EXPERTS[1 - EXPERTS.index(target)]
    return other in report.norms and bool(report.norms[other][layer].any())


def half_of_gate_up(report: DeltaReport) -> Iterator[Finding]:
    """Experts of which the gate's rows change and up's do not, or the other way round."""
    if report.gate is None or report.up is None:
        return
    for changed, other, name, rows in (
        (report.gate, report.up, "gate", "up, 1::2"),
        (report.up, report.gate, "up", "gate, 0::2"),
    ):
        halves = (changed != 0) & (other == 0)
        for layer in np.flatnonzero(halves.any(axis=1)).tolist():
            experts = listed(np.flatnonzero(halves[layer]).tolist())
            yield Finding(layer, "gate_up", f"changes {name} alone in {experts}: B's rows of {rows}, are zero")


def one_of_the_experts_two(report: DeltaReport) -> Iterator[Finding]:
    """Layers with LoRA on one of the experts' projections and none on the other, which vLLM does not load."""
    layers = len(next(iter(report.present.values())))
    none = np.zeros(layers, bool)
    for target, other in (EXPERTS, EXPERTS[::-1]):
        alone = report.present.get(target, none) & ~report.present.get(other, none)
        for layer in np.flatnonzero(alone).tolist():
            yield Finding(layer, target, f"has LoRA and {other} has none, which vLLM does not load")


def listed(experts: Sequence[int]) -> str:
    """expert 3; experts 3, 5, 8; many are cut short."""
    few = ", ".join(map(str, experts[:8])) + (f" and {len(experts) - 8} more" if len(experts) > 8 else "")
    return f"expert{'s' if len(experts) > 1 else ''} {few}"

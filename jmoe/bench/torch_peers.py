"""The peers, as CUDA graphs in torch. Calls of a graph have other logits, as our steps have."""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jmoe.bench.case import Case, Size, calls_for
from jmoe.bench.implementation import Figures, Implementation, Measure, UnavailableError, without_lora
from jmoe.bench.weights import Weights, random_input

TRITON_KERNELS, TRITON_KERNELS_ROUTING = "triton_kernels", "triton_kernels routing"
MARLIN, VLLM_LORA = "Marlin GEMMs", "vLLM LoRA"


def draws_for(tokens: int) -> int:
    """Different logits in a graph: of many tokens one draw is like another, and its buffers are large."""
    return 8 if tokens <= 256 else 1


def require(reason: Callable[[], str | None]) -> None:
    """Raises UnavailableError where a peer is missing; asks only where there is torch."""
    text = "no torch" if find_spec("torch") is None else reason()
    if text is not None:
        raise UnavailableError(text)


def torch_input(case: Case, size: Size) -> tuple[Any, list[Any]]:
    """x and several draws of router logits, as torch tensors."""
    from jmoe.interop.dlpack import to_torch

    x, logits = random_input(case, size, draws_for(case.tokens))
    return to_torch(x), list(to_torch(logits))


def routed(case: Case, size: Size) -> tuple[Any, list[tuple[Any, Any]]]:
    """x, and for each draw the experts and weights that the logits choose."""
    from jmoe.interop.reference import route

    x, draws = torch_input(case, size)
    return x, [route(logits.float(), size.top_k) for logits in draws]


def over_draws(calls: list[Callable[[], object]], case: Case) -> float:
    """Microseconds of a call, those given in turn."""
    from jmoe.bench.torch_timing import graph_microseconds

    return graph_microseconds(lambda i: calls[i % len(calls)](), calls_for(case.tokens))


def triton_kernels(weights: Weights) -> Measure:
    """OpenAI's fused block, the better of its two weight layouts, plus its routing, each timed alone."""

    def missing() -> str | None:
        from jmoe.bench.peers.triton_kernels import missing

        return missing()

    require(missing)
    from jmoe.bench.peers import triton_kernels as peer

    blocks = [peer.prepare(weights.torch_experts, num_warps=num_warps) for num_warps in (4, 8)]
    top_k = weights.size.top_k

    def measure(case: Case) -> Figures:
        x, draws = torch_input(case, weights.size)
        routing = over_draws([functools.partial(peer.route, logits, top_k) for logits in draws], case)
        data = [peer.route(logits, top_k) for logits in draws]
        best = min(over_draws([functools.partial(block, x, each) for each in data], case) for block in blocks)
        return {TRITON_KERNELS: best + routing, TRITON_KERNELS_ROUTING: routing}

    return measure


def marlin(weights: Weights, library: Path | None) -> Measure:
    """Marlin's two products, without routing, activation and sum."""

    def missing() -> str | None:
        from jmoe.bench.peers.marlin import missing

        return missing(library)

    require(missing)
    from jmoe.bench.peers import marlin as peer

    on = peer.prepare(weights.count, weights.size.hidden, weights.size.intermediate)

    def measure(case: Case) -> Figures:
        _, draws = routed(case, weights.size)
        return {MARLIN: over_draws([on(chosen, factors) for chosen, factors in draws], case)}

    return measure


def vllm_lora(weights: Weights) -> Measure:
    """vLLM's adapters of both projections, without the layer they are added to."""

    def missing() -> str | None:
        from jmoe.bench.peers.vllm_lora import missing

        return missing()

    require(missing)
    import jax

    from jmoe.bench.peers import vllm_lora as peer
    from jmoe.interop.dlpack import to_torch

    def measure(case: Case) -> Figures:
        on = peer.prepare(jax.tree.map(to_torch, weights.lora(case.rank, case.adapters)))
        x, draws = routed(case, weights.size)
        return {VLLM_LORA: over_draws([on(x, chosen, factors) for chosen, factors in draws], case)}

    return measure


def implementations(marlin_library: Path | None) -> tuple[Implementation, ...]:
    """The peers; Marlin from this library, or from vLLM if None."""
    return (
        Implementation((TRITON_KERNELS, TRITON_KERNELS_ROUTING), without_lora, triton_kernels),
        Implementation((MARLIN,), without_lora, functools.partial(marlin, library=marlin_library)),
        Implementation((VLLM_LORA,), lambda case: case.adapters == 1 and case.tokens <= 4096, vllm_lora),
    )

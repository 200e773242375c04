"""Where the time of a decode step goes, from JAX's profiler."""

import collections
import re
import tempfile
from collections.abc import Iterable, Mapping

import jax

from jmoe.bench.model.case import Figures, ModelCase
from jmoe.bench.model.generation import NO_STOP, prefill
from jmoe.bench.profile import Kernel, on_gpu_streams, read_trace
from jmoe.gpt_oss.generate import advance
from jmoe.gpt_oss.random_model import random_model
from jmoe.gpt_oss.sample import Sampling

STEPS = 4
"""In one call, so that what a call itself costs does not count much."""

PARTS = ("attention", "router", "experts", "head")
"""Scopes in the model's program; of a kernel in none of them the part is "other"."""


def measure(case: ModelCase) -> Figures:
    """Microseconds a step by part; command buffers, in which the profiler sees no kernels, must be off."""
    model = random_model(case.config, rank=case.rank)
    _, state = prefill(model, case)
    arguments = NO_STOP, Sampling(), STEPS
    program = advance.lower(model, state, *arguments).compile().as_text()  # type: ignore[attr-defined]
    *_, state = jax.block_until_ready(advance(model, state, *arguments))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(advance(model, state, *arguments))
        kernels = on_gpu_streams(read_trace(folder))
    return {
        "kernels": len(kernels) / STEPS,
        "microseconds": by_part(kernels, parts_of_operations(program), STEPS),
        "longest": longest(kernels, STEPS),
    }


def parts_of_operations(program: str) -> dict[str, str]:
    """The part of each operation that is in one, from the text of XLA's compiled program.

    An operation has the scope of its own metadata, or else the one that is commonest in the computation it calls.
    """
    votes: dict[str, collections.Counter[str]] = {}
    calls: dict[str, str] = {}
    parts: dict[str, str] = {}
    computation = ""
    for line in program.splitlines():
        if opening := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = opening[1]
        elif instruction := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line):
            name = instruction[1]
            if called := re.search(r"calls=%?([\w.\-]+)", line):
                calls[name] = called[1]
            if part := part_of(re.search(r'op_name="([^"]*)"', line)):
                parts[name] = part
                votes.setdefault(computation, collections.Counter())[part] += 1
    for name, callee in calls.items():
        if name not in parts and callee in votes:
            parts[name] = votes[callee].most_common(1)[0][0]
    return parts


def part_of(scopes: re.Match[str] | None) -> str | None:
    """The innermost of PARTS, or None."""
    found = [] if scopes is None else [part for part in scopes[1].split("/") if part in PARTS]
    return found[-1] if found else None


def by_part(kernels: Iterable[Kernel], parts: Mapping[str, str], steps: int) -> dict[str, float]:
    """Microseconds of each part in one of so many steps."""
    totals = dict.fromkeys((*PARTS, "other"), 0.0)
    for kernel in kernels:
        totals[parts.get(kernel.operation, "other")] += kernel.microseconds / steps
    return totals


def longest(kernels: Iterable[Kernel], steps: int, count: int = 12) -> dict[str, float]:
    """Microseconds a step of the kernels that take the most, by name."""
    totals: dict[str, float] = collections.defaultdict(float)
    for kernel in kernels:
        totals[kernel.name.split("(")[0][:60]] += kernel.microseconds / steps
    return dict(sorted(totals.items(), key=lambda item: -item[1])[:count])

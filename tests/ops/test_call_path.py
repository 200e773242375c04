"""The way of a call from jmoe.moe to the plan of its first kernel: how many of jmoe's functions it passes through."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import pytest

import jmoe
from jmoe.ops.launch import layer as launches
from jmoe.ops.random_layer import Layer, LayerShape, random_layer
from jmoe.triton_src.plan import Plan
from jmoe.triton_src.routing.few import plan_route_few

ROOT = Path(__file__).parents[2]
ROOMS = (ROOT / "jmoe", ROOT / "triton_src")
MOST_PASSED, MOST_PASSED_FILES = 12, 8
MOST_CALLED, MOST_CALLED_FILES = 35, 17
FIRST = "jmoe/ops/moe.py: moe"


@pytest.fixture(autouse=True)
def _one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are more, a rule for meshes comes between."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def functions_passed(call: Callable[[], object]) -> list[str]:
    """file: function of what the call's arrays pass through, in order, as sys.setprofile sees it.

    These are jmoe's functions that have not returned when the primitive is bound, while the call is traced, and when
    the first plan is made, while it is lowered; what they ask on the way (checks, sizes, tables) has returned.
    """
    passed: dict[str, None] = {}

    def record(frame: FrameType | None) -> None:
        open_: list[str] = []
        while frame is not None:
            file = Path(frame.f_code.co_filename).resolve()
            if any(file.is_relative_to(room) for room in ROOMS):
                open_.append(f"{file.relative_to(ROOT)}: {frame.f_code.co_qualname}")
            frame = frame.f_back
        passed.update(dict.fromkeys(reversed(open_)))

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        if frame.f_code is launches.result_avals.__code__:
            record(frame)
        elif frame.f_code is Plan.__init__.__code__:
            sys.setprofile(None)
            record(frame.f_back)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return list(passed)


def functions_called(call: Callable[[], object]) -> list[str]:
    """file: function of every function that is called from moe() on until the first kernel is planned, in order.

    The modules' own bodies are not among them, and a generator belongs to the function that it stands in.
    """
    called: dict[str, None] = {}

    def profile(frame: FrameType, event: str, _: Any) -> None:
        file = Path(frame.f_code.co_filename).resolve()
        if event != "call" or not any(file.is_relative_to(room) for room in ROOMS):
            return
        line = f"{file.relative_to(ROOT)}: {frame.f_code.co_qualname.split('.<locals>')[0]}"
        if called or line == FIRST:
            called[line] = None
        if frame.f_code is plan_route_few.__code__:
            sys.setprofile(None)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return [line for line in called if not line.endswith("<module>")]


def lower(tokens: int, packed: bool) -> None:
    """Lowers a layer with LoRA for Hopper."""
    shape = LayerShape(tokens, hidden=64, intermediate=64, experts=4, top_k=2, adapters=2, rank=4, mixed=True)
    layer = jax.eval_shape(functools.partial(random_layer, shape))
    if packed:
        layer = dataclasses.replace(layer, experts=jax.eval_shape(jmoe.pack, layer.experts))

    def call(layer: Layer) -> jax.Array:
        options = {"lora": layer.lora, "adapter_ids": layer.adapter_ids, "backend": jmoe.Target("sm_90")}
        return jmoe.moe(layer.x, layer.router_logits, layer.experts, top_k=2, **options)

    jax.jit(call).trace(layer).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("packed", [False, True])
def test_a_call_passes_through_few_functions_to_its_first_kernels_plan(packed: bool) -> None:
    passed = functions_passed(functools.partial(lower, 16, packed))
    files = {line.split(":")[0] for line in passed}
    assert passed[0] == FIRST
    assert passed[-1].endswith("plan_route_few")
    assert (len(passed) <= MOST_PASSED, len(files) <= MOST_PASSED_FILES) == (True, True), "\n".join(passed)


@pytest.mark.parametrize("packed", [False, True])
def test_a_call_asks_few_functions_on_its_way(packed: bool) -> None:
    lower(10, packed)  # what a process looks up once: versions, the GPU and its launch parameters
    called = functions_called(functools.partial(lower, 14, packed))  # a size that JAX has not seen
    files = {line.split(":")[0] for line in called}
    assert called[0] == FIRST
    assert called[-1].endswith("plan_route_few")
    assert (len(called) <= MOST_CALLED, len(files) <= MOST_CALLED_FILES) == (True, True), "\n".join(called)

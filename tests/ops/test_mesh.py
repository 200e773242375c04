"""Experts, tokens or both split over a mesh: each device computes its own experts, and no weight is sent."""

import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jmoe
from jmoe.ops import partition
from jmoe.ops.mxfp4 import Mxfp4
from jmoe.ops.random_layer import Layer, LayerShape, random_layer
from tests.ops.mesh_program import SHAPE, errors, place, sent
from tests.tolerances import BFLOAT16, GRADIENT

ROOT = Path(__file__).parents[2]
KINDS = [AxisType.Auto, AxisType.Explicit]

QUICK = (
    "Auto/opaque/-/e/gradient",
    "Explicit/opaque/-/e/gradient",
    "Auto/triton/d/e/forward",
    "Explicit/xla/e/e/forward",
)
SPLITS = ("-/e", "d/e", "e/e", "de/e", "d/-", "d/de")
FORMS = ("scan", "vmap", "gradient-vmap", "gradient-scan", "gradient-stack", "gradient-packed", "dense")


def cases(*parts: Iterable[str]) -> tuple[str, ...]:
    return tuple("/".join(each) for each in itertools.product(*parts))


ALL = (
    *cases(("Auto", "Explicit"), ("xla",), SPLITS, ("gradient",)),
    *cases(("Auto", "Explicit", "named"), ("triton",), ("d/e", "e/e", "de/e"), ("gradient",)),
    *cases(("Auto", "Explicit"), ("opaque",), ("d/e", "e/e"), ("gradient-packed",)),
    *cases(("Auto", "Explicit"), ("triton",), ("d/e",), FORMS),
    *cases(("Auto",), ("xla",), ("d/e",), FORMS),
)


def run_cases(cases: Iterable[str]) -> dict[str, Any]:
    """What tests.ops.mesh_program prints of these, in one process: the number of devices is fixed when JAX starts."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=flags, PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "tests.ops.mesh_program", *cases]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    return found


@pytest.fixture(scope="module")
def quick() -> dict[str, Any]:
    return run_cases(QUICK)


@pytest.fixture(scope="module")
def everything() -> dict[str, Any]:
    return run_cases(ALL)


def check(case: str, found: dict[str, Any]) -> None:
    """Nothing as large as a device's part of a weight is gathered or exchanged, results are those of one device."""
    kind, backend, tokens, experts, what = case.split("/")
    weight = SHAPE.experts * SHAPE.hidden * SHAPE.intermediate // 2 // 8  # bytes of down's blocks on one of 8 devices
    gathers = [one for one in found["sent"] if one[0] not in ("all-reduce", "reduce-scatter")]
    assert max((size for *_, size in gathers), default=0) < weight, gathers
    assert not [one for one in gathers if one[1] == "u8"]
    sums = [one for one in found["sent"] if one not in gathers]
    if experts == "-" and "gradient" not in what:
        assert not sums
    if backend == "opaque":
        assert found["calls"] == 2  # the forward pass and the backward pass
        return
    if kind != "Auto" and "gradient" not in what and "vmap" not in what:
        assert len(sums) == 1, sums
    limit = 2e-6 if backend == "xla" else (GRADIENT if "gradient" in what else BFLOAT16).relative
    assert found["error"] <= limit
    if kind == "Auto" and "gradient" in what:
        return  # XLA chooses where its gradients lie
    assert found["spec"].startswith({"-": "P(", "de": "P(('d', 'e')"}.get(tokens, f"P('{tokens}'"))


@pytest.mark.parametrize("case", QUICK)
def test_each_device_computes_its_own_experts(case: str, quick: dict[str, Any]) -> None:
    check(case, quick[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL)
def test_each_device_computes_its_own_experts_however_it_is_called(case: str, everything: dict[str, Any]) -> None:
    check(case, everything[case])


def two_devices(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2,), ("e",), devices=jax.devices("cpu")[:2], axis_types=(kind,))


def small_layer(kind: AxisType, *entries: str | None, **sizes: int) -> Layer:
    """Experts split so, and the rest on all devices."""
    layer = random_layer(dataclasses.replace(LayerShape(4, 64, 64, 4, 2), **sizes))
    mesh = two_devices(kind)
    whole = jax.device_put(layer, NamedSharding(mesh, P()))
    spec = P(*(entries or ("e",)))
    return dataclasses.replace(whole, experts=jax.device_put(layer.experts, NamedSharding(mesh, spec)))


def call(layer: Layer, **options: Any) -> jax.Array:
    return jmoe.moe(layer.x, layer.router_logits, layer.experts, top_k=2, lora=layer.lora, **options)


ALONG_ROWS = (
    r"gate_up.*\(4, 128, .* is split over mesh axis 'e' along axis 1; jmoe.moe takes weights that are split along"
)


def test_weights_split_along_rows_are_refused_by_their_types() -> None:
    with pytest.raises(ValueError, match=ALONG_ROWS):
        jax.jit(call)(small_layer(AxisType.Explicit, None, "e"))


def test_weights_split_along_rows_are_refused_when_they_are_compiled() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match=ALONG_ROWS):
        jax.jit(functools.partial(call, backend="xla"))(small_layer(AxisType.Auto, None, "e"))


def test_x_split_along_its_columns_is_refused() -> None:
    layer = small_layer(AxisType.Explicit)
    x = jax.device_put(layer.x, NamedSharding(two_devices(AxisType.Explicit), P(None, "e")))
    with pytest.raises(ValueError, match=r"x \(4, 64\) is split over mesh axis 'e' along its last axis, H"):
        jax.jit(call)(dataclasses.replace(layer, x=x))


def test_experts_that_the_axis_does_not_divide_are_refused_with_what_fits() -> None:
    mesh = jax.sharding.AbstractMesh((4,), ("e",), axis_types=(AxisType.Auto,))
    layer = jax.eval_shape(lambda: random_layer(LayerShape(4, 64, 64, 6, 2)))
    message = "6 experts cannot be split evenly over mesh axis 'e' of 4 devices; of up to 4 .* fit: 1, 2, 3"
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(call, mesh_axes=jmoe.MeshAxes(experts="e")), layer)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (jmoe.MeshAxes("tp"), "mesh_axes names 'tp', but the mesh has \\['e'\\]"),
        (jmoe.MeshAxes("e", P("e", "e2")), "mesh_axes names 'e2'"),
        (jmoe.MeshAxes("e", P(None, "e")), "has more entries than x has axes of tokens"),
    ],
)
def test_axes_that_are_not_there_are_refused(axes: jmoe.MeshAxes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jax.jit(functools.partial(call, mesh_axes=axes))(small_layer(AxisType.Auto))


def test_axes_without_a_mesh_are_refused() -> None:
    layer = random_layer(LayerShape(4, 64, 64, 4, 2))
    with pytest.raises(ValueError, match=r"mesh_axes names 'e', but no mesh is set: jax.set_mesh\(mesh\)"):
        call(layer, mesh_axes=jmoe.MeshAxes("e"))


def test_names_must_be_names() -> None:
    with pytest.raises(ValueError, match=r"mesh_axes.experts must be names of mesh axes, got \(3,\)"):
        jmoe.MeshAxes(experts=(3,))
    with pytest.raises(ValueError, match=r"mesh_axes.tokens must name each mesh axis once"):
        jmoe.MeshAxes(tokens=P("d", "d"))


def test_axes_that_types_contradict_are_refused() -> None:
    with pytest.raises(ValueError, match="mesh_axes must be what the arrays' types say on explicit axes"):
        jax.jit(functools.partial(call, mesh_axes=jmoe.MeshAxes(tokens="e")))(small_layer(AxisType.Explicit))


def test_an_axis_that_a_shard_map_has_split_is_refused() -> None:
    layer = small_layer(AxisType.Auto)
    inside = functools.partial(call, mesh_axes=jmoe.MeshAxes("e"))
    split = jax.shard_map(inside, mesh=two_devices(AxisType.Auto), in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match=r"over which a jax.shard_map around this call has split its arrays already"):
        jax.jit(split)(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_map_of_the_user_with_wrong_out_specs_is_refused(kind: AxisType) -> None:
    layer = small_layer(kind)
    specs = dataclasses.replace(
        jax.tree.map(lambda _: P(), layer), experts=jax.tree.map(lambda _: P("e"), layer.experts)
    )
    split = jax.shard_map(call, mesh=two_devices(kind), in_specs=(specs,), out_specs=P())
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(split).trace(layer)


@pytest.mark.parametrize(("kind", "axes"), [(AxisType.Explicit, None), (AxisType.Auto, jmoe.MeshAxes("e"))])
def test_gradients_inside_a_shard_map_over_other_axes(kind: AxisType, axes: jmoe.MeshAxes | None) -> None:
    mesh = jax.make_mesh((1, 2), ("d", "e"), devices=jax.devices("cpu")[:2], axis_types=(kind,) * 2)
    alone = random_layer(LayerShape(4, 64, 64, 4, 2, adapters=1, rank=3))
    layer = place(alone, mesh, jmoe.MeshAxes("e"), stacked=False)
    of_tokens = NamedSharding(mesh, P("d"))
    layer = dataclasses.replace(
        layer, **{name: jax.device_put(getattr(layer, name), of_tokens) for name in ("x", "router_logits")}
    )

    def gradients(layer: Layer, **options: Any) -> Any:
        def loss(x: jax.Array, lora: jmoe.Lora) -> jax.Array:
            return jnp.sum(call(dataclasses.replace(layer, x=x, lora=lora), **options).astype(jnp.float32) ** 2)

        return jax.grad(loss, (0, 1))(layer.x, layer.lora)

    specs = dataclasses.replace(jax.tree.map(lambda _: P(), layer), x=P("d"), router_logits=P("d"))
    inside = functools.partial(gradients, mesh_axes=axes)
    split = jax.shard_map(inside, mesh=mesh, in_specs=(specs,), out_specs=(P("d"), P()), axis_names={"d"})
    compiled = jax.jit(split).lower(layer).compile()
    assert {one[0] for one in sent(compiled.as_text())} <= {"all-reduce"}
    assert errors(compiled(layer), jax.jit(gradients)(alone)) <= GRADIENT.relative


def test_weights_split_over_different_auto_axes_are_refused() -> None:
    mesh = AbstractMesh((2, 2), ("d", "e"))

    def weight(axis: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((4, 64, 64), jnp.bfloat16, sharding=NamedSharding(mesh, P(axis)))

    by_expert = partition.Split(partition.EXPERTS, 0)
    splits: dict[str, partition.Split | None] = {"gate_up": by_expert, "down": by_expert}
    same = partition._split_axes(mesh, {"gate_up": weight("e"), "down": weight("e")}, splits)
    assert same.experts == ("e",)
    with pytest.raises(ValueError, match=r"over the same mesh axes, got down over \('d',\) and others over \('e',\)"):
        partition._split_axes(mesh, {"gate_up": weight("e"), "down": weight("d")}, splits)


def test_weights_that_an_auto_axis_splits_inside_a_shard_map_over_others_are_refused() -> None:
    mesh = jax.make_mesh((1, 2), ("d", "e"), devices=jax.devices("cpu")[:2], axis_types=(AxisType.Auto,) * 2)
    layer = random_layer(LayerShape(4, 64, 64, 4, 2))
    layer = dataclasses.replace(layer, experts=jax.device_put(layer.experts, NamedSharding(mesh, P("e"))))
    inside = functools.partial(call, backend="xla")
    split = jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={"d"}))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"is split over an Auto axis of the mesh inside a jax.shard_"):
        split(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_outside_jit_gather_nothing_either(kind: AxisType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    rule = partition._split_axes
    monkeypatch.setattr(partition, "_split_axes", lambda *arguments: asked.append("rule") or rule(*arguments))
    layer, alone = small_layer(kind), random_layer(LayerShape(4, 64, 64, 4, 2))
    run = lambda layer, x: call(dataclasses.replace(layer, x=x))  # noqa: E731
    y, pullback = jax.vjp(functools.partial(run, layer), layer.x)
    want, x_grad = jax.jit(lambda layer: (call(layer), jax.vjp(functools.partial(run, layer), layer.x)[1](layer.x)[0]))(
        alone
    )
    assert errors((y, call(layer), pullback(layer.x)[0]), (want, want, x_grad)) <= GRADIENT.relative
    assert len(asked) == (3 if kind == AxisType.Auto else 0)  # else a jax.shard_map has been compiled


@pytest.mark.parametrize(("kind", "axes"), [(AxisType.Explicit, None), (AxisType.Auto, jmoe.MeshAxes("e"))])
def test_export_for_several_gpus_and_back(kind: AxisType, axes: jmoe.MeshAxes | None) -> None:
    layer = small_layer(kind)
    run = jax.jit(lambda x, logits, experts, backend: jmoe.moe(
        x, logits, experts, top_k=2, mesh_axes=axes, backend=backend), static_argnums=3)  # fmt: skip
    arguments = layer.x, layer.router_logits, layer.experts
    exported = jax.export.export(run, platforms=["cuda"], disabled_checks=jmoe.allow_triton_call())
    again = jax.export.deserialize(exported(*arguments, jmoe.Target("sm_90")).serialize())
    assert again.nr_devices == 2
    assert re.search(r"@triton_kernel_call_ffi\(.*tensor<2x128x2x16xui8>", again.mlir_module())  # its own two experts
    here = jax.export.deserialize(jax.export.export(run)(*arguments, "xla").serialize())
    assert jnp.array_equal(jax.jit(here.call)(*arguments), run(*arguments, "xla"))


PROGRAM_IN_A_CACHE = """
import sys
import jax, jax.numpy as jnp
import jmoe
from tests.ops.test_mesh import AxisType, call, small_layer

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
layer = small_layer(getattr(AxisType, sys.argv[1]))
activation = jmoe.SwiGLU(alpha=float(sys.argv[2]))
lowered = jax.jit(lambda layer: call(layer, activation=activation)).lower(layer)
hits.clear()
compiled = lowered.compile()
print(len(hits), jnp.sum(jnp.abs(compiled(layer).astype(jnp.float32))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_another_process_finds_the_compiled_program(kind: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY": "true",
    }

    def run(alpha: str) -> list[str]:
        command = [sys.executable, "-c", PROGRAM_IN_A_CACHE, kind, alpha]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.split()

    first, second, other = run("1.702"), run("1.702"), run("1.5")
    assert (first[0], second[0], other[0]) == ("0", "1", "0")
    assert first[1] == second[1] != other[1]


def test_programs_that_differ_in_what_xla_asks_for_later_differ_in_their_text() -> None:
    layer = small_layer(AxisType.Auto)

    def text(alpha: float) -> str:
        lowered = jax.jit(lambda layer: call(layer, activation=jmoe.SwiGLU(alpha=alpha), backend="xla")).lower(layer)
        return re.sub(r'@CustomSPMDPartitioning(.*)backend_config = "[0-9]+"', r"\1", lowered.as_text())

    assert text(1.702) == text(1.702) != text(1.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("jitted", [False, True])
def test_packing_keeps_shardings_and_sends_nothing(kind: AxisType, jitted: bool) -> None:
    experts = random_layer(LayerShape(4, 64, 96, 4, 2)).experts
    split = jax.device_put(experts, NamedSharding(two_devices(kind), P("e")))
    want = jax.jit(jmoe.pack)(experts)
    pack, unpack = (jax.jit(f) if jitted else f for f in (jmoe.pack, jmoe.unpack))
    packed = pack(split)
    back = unpack(packed)
    for got, expected in ((packed, want), (back, experts)):
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert one.sharding.spec[0] == "e"
            assert np.array_equal(jax.device_get(one).view(np.uint8), jax.device_get(other).view(np.uint8))
    programs = [jax.jit(jmoe.pack).lower(split), jax.jit(jmoe.unpack).lower(packed)]
    assert not [one for program in programs for one in sent(program.compile().as_text())]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_of_one_device_is_one_device(kind: AxisType) -> None:
    layer = random_layer(LayerShape(4, 64, 64, 4, 2))
    mesh = jax.make_mesh((1,), ("e",), devices=jax.devices("cpu")[:1], axis_types=(kind,))
    split = dataclasses.replace(layer, experts=jax.device_put(layer.experts, NamedSharding(mesh, P("e"))))
    run = jax.jit(lambda layer: call(dataclasses.replace(layer, experts=jmoe.pack(layer.experts))))
    want = run(layer)
    assert jnp.array_equal(run(split), want)
    assert jnp.array_equal(call(dataclasses.replace(split, experts=jmoe.pack(split.experts))), want)


def test_packing_weights_that_are_split_along_rows_is_refused() -> None:
    weight = random_layer(LayerShape(4, 64, 64, 4, 2)).experts.gate_up
    assert isinstance(weight, Mxfp4)
    split = jax.device_put(weight, NamedSharding(two_devices(AxisType.Auto), P(None, "e")))
    with pytest.raises(ValueError, match=r"is split over mesh axis 'e' along axis 1"):
        jmoe.pack(jmoe.Experts(split, None, split, None))

"""Every launch plan compiled to PTX for the architectures it declares, on any machine."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jmoe
from jmoe.ops.launch.layer import route_and_sort
from jmoe.ops.launch.local_gpu import Trial, gpu_of
from jmoe.ops.random_layer import Layer, LayerShape, random_layer
from jmoe.triton_src.tile_tables import as_json, own_table, user_file
from tests.cuda_launches import kernel_names

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

SHAPES = [
    LayerShape(1),  # the tile for one row an expert
    LayerShape(16, adapters=1, rank=8),
    LayerShape(256, experts=128, adapters=8, rank=64, mixed=True),
    LayerShape(512, top_k=3, experts=17, mxfp4=False, bias=False),
    LayerShape(1024, adapters=2, rank=256, mixed=True),
    LayerShape(4096),
    LayerShape(131072),
    LayerShape(5, hidden=96, intermediate=33, experts=1, top_k=1, mxfp4=False, adapters=1, rank=1),
    LayerShape(9, experts=256, top_k=8),
]


def lowered(shape: LayerShape, architecture: str, packed: bool = False, **options: object) -> jax.stages.Lowered:
    """The layer's program for CUDA."""
    layer = jax.eval_shape(functools.partial(random_layer, shape))
    if packed:
        layer = dataclasses.replace(layer, experts=jax.eval_shape(jmoe.pack, layer.experts))

    def call(layer: Layer) -> jax.Array:
        return jmoe.moe(
            layer.x,
            layer.router_logits,
            layer.experts,
            top_k=shape.top_k,
            lora=layer.lora,
            adapter_ids=layer.adapter_ids,
            backend=jmoe.Target(architecture),
            **options,
        )

    return jax.jit(call).trace(layer).lower(lowering_platforms=("cuda",))


def lower(shape: LayerShape, architecture: str, packed: bool = False, **options: object) -> str:
    """The layer's program for CUDA, as text."""
    return lowered(shape, architecture, packed, **options).as_text()


def launches(program: str) -> int:
    """How many kernels a program launches."""
    return program.count("@triton_kernel_call_ffi")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_plan_compiles(shape: LayerShape, architecture: str) -> None:
    routing = 1 if shape.tokens <= 16 else 2
    shrinks = 2 if shape.adapters else 0
    assert launches(lower(shape, architecture)) == routing + 3 + shrinks


def lower_gradient(shape: LayerShape, architecture: str, packed: bool = False, **options: object) -> str:
    """The program for CUDA of the gradient in everything that has one, as text."""
    layer = jax.eval_shape(functools.partial(random_layer, shape))
    if packed:
        layer = dataclasses.replace(layer, experts=jax.eval_shape(jmoe.pack, layer.experts))

    def loss(x: jax.Array, logits: jax.Array, lora: jmoe.Lora | None, biases: list, layer: Layer) -> jax.Array:
        experts = dataclasses.replace(layer.experts, gate_up_bias=biases[0], down_bias=biases[1])
        options_ = {"adapter_ids": layer.adapter_ids, "backend": jmoe.Target(architecture)} | options
        return jmoe.moe(x, logits, experts, top_k=shape.top_k, lora=lora, **options_).astype(jnp.float32).sum()

    biases = [layer.experts.gate_up_bias, layer.experts.down_bias]
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    traced = gradient.trace(layer.x, layer.router_logits, layer.lora, biases, layer)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[4], SHAPES[7]], ids=str)
def test_every_gradient_compiles(shape: LayerShape, architecture: str) -> None:
    routing = 2 * (1 if shape.tokens <= 16 else 2)
    biases = 2 if shape.bias else 0
    # Forward: shrink, two products, sum. Backward: two dgrads, SwiGLU, router, sum; of LoRA two shrinks through B, two
    # through A again, and four gradients.
    lora = 2 + 8 if shape.adapters else 0
    assert launches(lower_gradient(shape, architecture)) == routing + 3 + 5 + biases + lora


@pytest.mark.parametrize("lora", [{}, {"adapters": 2, "rank": 5, "mixed": True}])
def test_a_single_pair_compiles_for_hopper(lora: dict[str, int]) -> None:
    shape = LayerShape(1, top_k=1, **lora)
    assert launches(lower(shape, "sm_90", packed=True)) == 3
    assert launches(lower_gradient(shape, "sm_90", packed=True)) > 3


def test_symbolic_numbers_of_tokens_are_refused() -> None:
    (tokens,) = jax.export.symbolic_shape("tokens")
    layer = jax.eval_shape(
        functools.partial(random_layer, LayerShape(8, hidden=64, intermediate=64, experts=4, top_k=2))
    )
    x = jax.ShapeDtypeStruct((tokens, 64), jnp.bfloat16)
    logits = jax.ShapeDtypeStruct((tokens, 4), jnp.float32)
    call = jax.jit(lambda *a: jmoe.moe(*a, top_k=2, backend=jmoe.Target("sm_90")))
    with pytest.raises(NotImplementedError, match="takes numbers of tokens, got tokens: export one program for each"):
        jax.export.export(call, platforms=["cuda"])(x, logits, layer.experts)


@pytest.mark.parametrize("lora", [{}, {"adapters": 2, "rank": 5, "mixed": True}])
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_gradients_compile_for_hopper(recompute: bool, lora: dict[str, int]) -> None:
    program = lower_gradient(LayerShape(4096, **lora), "sm_90", packed=True, recompute=recompute)
    # Without LoRA both products are one launch.
    assert launches(program) == 4 + 2 + 5 + 2 + (11 if lora else 0) + recompute * (2 if lora else 1)


@pytest.mark.parametrize("lora", [{}, {"adapters": 2, "rank": 5, "mixed": True}])
@pytest.mark.parametrize(("tokens", "expected", "more"), [(1, 3, 0), (64, 3, 0), (256, 4, 3), (4096, 4, 3)])
def test_packed_plans_compile_for_hopper(tokens: int, expected: int, more: int, lora: dict[str, int]) -> None:
    program = lower(LayerShape(tokens, **lora), "sm_90", packed=True)
    # LoRA's are two shrinks, the second between the products, which are one launch otherwise.
    assert launches(program) == expected + (more if lora else 0)


def test_few_rows_of_many_experts_are_routed_in_two_launches() -> None:
    assert launches(lower(LayerShape(100, experts=128), "sm_90", packed=True)) == 4


@pytest.mark.parametrize("shape", [LayerShape(16), LayerShape(9, adapters=2, rank=5, mixed=True)], ids=str)
def test_packed_weights_are_unpacked_where_no_kernel_reads_them(shape: LayerShape) -> None:
    assert launches(lower(shape, "sm_80", packed=True)) == 4 + (2 if shape.adapters else 0)


def test_a_replayed_routing_needs_no_choice() -> None:
    layer = random_layer(LayerShape(4, hidden=64, intermediate=64, experts=4, top_k=2))
    routing = jmoe.route(layer.router_logits, 2)
    call = jax.jit(
        lambda routing: jmoe.moe(layer.x, None, layer.experts, top_k=2, routing=routing, backend=jmoe.Target("sm_90"))
    )
    assert launches(call.trace(routing).lower(lowering_platforms=("cuda",)).as_text()) == 4


def test_no_tokens_need_no_launch() -> None:
    assert launches(lower(LayerShape(0, hidden=64, intermediate=64), "sm_90")) == 0


def test_a_traced_expert_offset_compiles() -> None:
    layer = random_layer(LayerShape(4, hidden=64, intermediate=64, experts=4, top_k=2))
    call = jax.jit(
        lambda offset: jmoe.moe(
            layer.x, layer.router_logits, layer.experts, top_k=2, expert_offset=offset, backend=jmoe.Target("sm_90")
        )
    )
    assert launches(call.trace(jnp.int32(0)).lower(lowering_platforms=("cuda",)).as_text()) == 4


def test_vmap_over_tokens_is_one_longer_batch() -> None:
    layer = random_layer(LayerShape(12, hidden=64, intermediate=64, experts=4, top_k=2))
    call = lambda x, logits: jmoe.moe(x, logits, layer.experts, top_k=2, backend=jmoe.Target("sm_90"))  # noqa: E731
    x, logits = layer.x.reshape(3, 4, 64), layer.router_logits.reshape(3, 4, 4)
    program = jax.jit(jax.vmap(call)).trace(x, logits).lower(lowering_platforms=("cuda",)).as_text()
    assert launches(program) == 4


def test_vmap_over_experts_is_a_loop_over_launches() -> None:
    layers = [random_layer(LayerShape(4, hidden=64, intermediate=64, experts=4, top_k=2), seed) for seed in (1, 2)]
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), *layers)
    call = lambda layer: jmoe.moe(  # noqa: E731
        layer.x, layer.router_logits, layer.experts, top_k=2, backend=jmoe.Target("sm_90")
    )
    program = jax.jit(jax.vmap(call)).trace(both).lower(lowering_platforms=("cuda",)).as_text()
    assert launches(program) == 4
    assert "stablehlo.while" in program


def test_scan_and_checkpoint_hold_one_copy_of_the_launches() -> None:
    layer = random_layer(LayerShape(4, hidden=64, intermediate=64, experts=4, top_k=2))

    def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        call = lambda x: jmoe.moe(  # noqa: E731
            x, layer.router_logits, layer.experts, top_k=2, backend=jmoe.Target("sm_90")
        )
        return jax.checkpoint(call)(x), None

    program = jax.jit(lambda x: jax.lax.scan(step, x, None, length=8)[0])
    assert launches(program.trace(layer.x).lower(lowering_platforms=("cuda",)).as_text()) == 4


def test_export_without_a_gpu() -> None:
    layer = random_layer(LayerShape(4, hidden=64, intermediate=64, experts=4, top_k=2, adapters=1, rank=4))
    call = jax.jit(
        lambda x, logits, experts, lora: jmoe.moe(x, logits, experts, top_k=2, lora=lora, backend=jmoe.Target("sm_90"))
    )
    arguments = (layer.x, layer.router_logits, layer.experts, layer.lora)
    with pytest.raises(ValueError, match="Cannot serialize code with custom calls whose targets have no compatibility"):
        jax.export.export(call, platforms=["cuda"])(*arguments)
    exported = jax.export.export(call, platforms=["cuda"], disabled_checks=jmoe.allow_triton_call())(*arguments)
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == ("cuda",)
    assert again.in_tree == jax.tree.structure((arguments, {}))


LOAD = """
import sys, jax.export
import jmoe
experts = jmoe.Experts
print(jax.export.deserialize(open(sys.argv[1], "rb").read()).in_avals)
"""


def test_an_exported_layer_is_read_by_a_process_that_has_named_the_containers_alone(tmp_path: Path) -> None:
    layer = random_layer(LayerShape(4, hidden=64, intermediate=64, experts=4, top_k=2))
    call = jax.jit(lambda x, logits, experts: jmoe.moe(x, logits, experts, top_k=2, backend="xla"))
    file = tmp_path / "layer.bin"
    exported = jax.export.export(call)(layer.x, layer.router_logits, layer.experts)
    file.write_bytes(exported.serialize())
    read = subprocess.run([sys.executable, "-c", LOAD, file], capture_output=True, text=True, check=True).stdout
    assert read.strip() == str(exported.in_avals)


def test_sharded_experts_lower_for_cuda() -> None:
    layer = random_layer(LayerShape(4, hidden=64, intermediate=64, experts=4, top_k=2))
    mesh = jax.make_mesh((2,), ("experts",), devices=jax.devices("cpu")[:2], axis_types=(jax.sharding.AxisType.Auto,))

    def shard(x: jax.Array, logits: jax.Array, experts: jmoe.Experts) -> jax.Array:
        offset = jax.lax.axis_index("experts") * 2
        y = jmoe.moe(x, logits, experts, top_k=2, expert_offset=offset, backend=jmoe.Target("sm_90"))
        return jax.lax.psum(y, "experts")

    specs = (jax.P(), jax.P(), jax.P("experts"))
    call = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=jax.P()))
    traced = call.trace(layer.x, layer.router_logits, layer.experts)
    assert launches(traced.lower(lowering_platforms=("cuda",)).as_text()) == 4


def test_widths_and_sizes_are_compiled_in_but_the_number_of_tokens_is_not() -> None:
    def kernels(tokens: int) -> set[str]:
        from jmoe.triton_src.portable.grouped_matmul import grouped_matmul_kernel

        lower(LayerShape(tokens, hidden=64, intermediate=64, experts=4, top_k=2), "sm_90")
        return set(map(str, grouped_matmul_kernel._jT_kernel_cache))

    assert kernels(101) == kernels(103)


def test_ptx_names_the_kernels() -> None:
    program = lowered(LayerShape(1, hidden=64, intermediate=64), "sm_90")
    products = ["grouped_matmul_kernel", "grouped_matmul_kernel"]
    assert kernel_names(program) == ["route_few_kernel", *products, "combine_kernel"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("tokens", "experts"), [(1, 32), (4096, 128)])
def test_routing_alone_is_what_precedes_a_layers_products(tokens: int, experts: int, architecture: str) -> None:
    route = functools.partial(route_and_sort, top_k=4, target=jmoe.Target(architecture))
    logits = jax.ShapeDtypeStruct((tokens, experts), jnp.bfloat16)
    zeros = jax.ShapeDtypeStruct((1,), jnp.int32)
    written = jax.eval_shape(route, logits, zeros)
    assert written["weights"].shape == (tokens, 4)
    assert written["order"].shape == (4 * tokens,)
    assert written["ready_counters"].shape == (written["tiles"].shape[0] + 1,)

    def twice(logits: jax.Array, zeros: jax.Array) -> dict[str, jax.Array]:
        return route(logits, route(logits, zeros)["ready_counters"])

    program = jax.jit(twice).trace(logits, zeros).lower(lowering_platforms=("cuda",)).as_text()
    assert launches(program) == (2 if tokens == 1 else 4)


def test_the_users_tiles_are_for_the_gpu_at_hand_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = types.SimpleNamespace(device_kind="Some GPU", compute_capability="9.0")
    monkeypatch.setattr(jax, "local_devices", lambda backend: [device])
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # programs for more name what they are made for
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    layer = jax.eval_shape(functools.partial(random_layer, LayerShape(16, 64, 64, 4, 2)))

    def program(backend: jmoe.Target | str) -> str:
        """As lowered in a process that starts now."""
        gpu_of.cache_clear()

        def call(layer: Layer) -> jax.Array:
            return jmoe.moe(layer.x, layer.router_logits, layer.experts, top_k=2, backend=backend)

        return jax.jit(call).trace(layer).lower(lowering_platforms=("cuda",)).as_text()

    own = program("triton")
    assert own == program(jmoe.Target("sm_90"))
    tile = dataclasses.replace(own_table(90).grouped_matmul[0], rows=math.inf, block_m=64)
    file = user_file("Some GPU")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(as_json({"grouped_matmul": (tile,)})))
    users = program("triton")
    assert users != own
    assert program(jmoe.Target("sm_90")) == program(jmoe.Target("sm_90", device="Some GPU")) == own
    assert program(Trial("sm_90", table=own_table(90).over({"grouped_matmul": (tile,)}))) == users
    old, invalid = '{"portable": []}', "[]"
    for content, message in ((invalid, r"must be an object, got \[\]"), (old, "version must be 2, .* got None")):
        file.write_text(content)
        with pytest.raises(ValueError, match=rf"some_gpu.json: {message}; remove it or run `jmoe tune` again"):
            program("triton")
    assert program(jmoe.Target("sm_90")) == own

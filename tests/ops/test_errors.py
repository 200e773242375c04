"""Bad arguments of jmoe.moe: what was wrong, what was wanted, what came."""

import dataclasses
import functools
import importlib.metadata
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe.ops.launch import installed
from jmoe.ops.random_layer import Layer, LayerShape, random_layer

LAYER = random_layer(LayerShape(6, hidden=64, intermediate=96, experts=5, top_k=2, adapters=2, rank=4, mixed=True))


def run(layer: Layer = LAYER, top_k: int = 2, **options: object) -> jax.Array:
    """The layer through jmoe.moe."""
    given = {"lora": layer.lora, "adapter_ids": layer.adapter_ids} | options
    return jmoe.moe(layer.x, layer.router_logits, layer.experts, top_k=top_k, **given)


def layer(**changes: object) -> Layer:
    """The layer with some arguments replaced."""
    return dataclasses.replace(LAYER, **changes)


def experts(**changes: object) -> Layer:
    """The layer with some of its weights replaced."""
    return layer(experts=dataclasses.replace(LAYER.experts, **changes))


def lora(**changes: object) -> Layer:
    """The layer with some of its adapters' arrays replaced."""
    return layer(lora=dataclasses.replace(LAYER.lora, **changes))


def zeros(*shape: int, dtype: jnp.dtype = jnp.bfloat16) -> jax.Array:
    return jnp.zeros(shape, dtype)


U8 = jnp.uint8
CASES = {
    "x must have rank 1 or more [..., H], got shape ()": layer(x=zeros()),
    "x must have inner size 64 like the experts' H, got shape (6, 65)": layer(x=zeros(6, 65)),
    "x must be bfloat16 or float32, got float16": layer(x=zeros(6, 64, dtype=jnp.float16)),
    "router_logits must be bfloat16 or float32, got int32": layer(router_logits=zeros(6, 5, dtype=jnp.int32)),
    "router_logits must be (6, 'E') to match x (6, 64), got (7, 5)": layer(router_logits=zeros(7, 5)),
    "router_logits must be (6, 'E') to match x (6, 64), got (6,)": layer(router_logits=zeros(6)),
    "router_logits must have a column for each of the 5 experts, got shape (6, 4)": layer(router_logits=zeros(6, 4)),
    "router_logits may be None only when routing is given": layer(router_logits=None),
    "x must be an array, got list": layer(x=[1.0]),
    "experts.gate_up must hold at least one expert, got shape (0, 192, 64)": experts(
        gate_up=zeros(0, 192, 64), down=zeros(0, 64, 96)
    ),
    "experts.gate_up must have rank 3 [E, N, K], got shape (5, 192)": experts(gate_up=zeros(5, 192)),
    "experts.gate_up must be bfloat16 or float32, got int32": experts(gate_up=zeros(5, 192, 64, dtype=jnp.int32)),
    "experts.gate_up must have an even number of rows 2I, got shape (5, 191, 64)": experts(gate_up=zeros(5, 191, 64)),
    "experts.gate_up.scales must be uint8, got int32": experts(
        gate_up=jmoe.Mxfp4(LAYER.experts.gate_up.blocks, zeros(5, 192, 2, dtype=jnp.int32))
    ),
    "experts.gate_up.scales must have rank 3 [E, N, K/32], got shape (5, 384)": experts(
        gate_up=jmoe.Mxfp4(LAYER.experts.gate_up.blocks, zeros(5, 384, dtype=U8))
    ),
    "experts.gate_up.blocks must have shape (5, 192, 2, 16), got (5, 192, 32)": experts(
        gate_up=jmoe.Mxfp4(zeros(5, 192, 32, dtype=U8), LAYER.experts.gate_up.scales)
    ),
    "experts.down must have shape (5, 64, 96) to match experts.gate_up (5, 192, 64), got (5, 64, 64)": experts(
        down=zeros(5, 64, 64)
    ),
    "experts.down_bias must have shape (5, 64), got (5, 65)": experts(down_bias=zeros(5, 65)),
    "experts.gate_up_bias must be bfloat16 or float32, got int8": experts(gate_up_bias=zeros(5, 192, dtype=jnp.int8)),
    "lora.down_a, _b and _scale must be given together or not at all": lora(down_b=None),
    "lora.gate_up_a and _b must have one rank, got 4 (A (2, 5, 4, 64)) and 8 (B (2, 5, 192, 8))": lora(
        gate_up_b=zeros(2, 5, 192, 8)
    ),
    "lora.gate_up_a and _b must have rank 4 [A, E, r, 64] and [A, E, 192, r], "
    "got shapes (5, 4, 64) and (2, 5, 192, 4)": lora(gate_up_a=zeros(5, 4, 64)),
    "lora.gate_up_a must have shape (2, 5, 4, 64), got (2, 4, 4, 64)": lora(gate_up_a=zeros(2, 4, 4, 64)),
    "lora.down_b must have shape (2, 5, 64, 4), got (3, 5, 64, 4)": lora(down_b=zeros(3, 5, 64, 4)),
    "lora.down_a must be bfloat16 or float32, got int32": lora(down_a=zeros(2, 5, 4, 96, dtype=jnp.int32)),
    "lora.gate_up_scale must have rank 1 [A], got shape ()": lora(gate_up_scale=1.0),
    "lora.gate_up_scale must be float32, got bfloat16": lora(gate_up_scale=zeros(2)),
    "lora.down_scale must have rank 1 [A], got shape ()": lora(down_scale=zeros(dtype=jnp.float32)),
    "lora.gate_up_a must hold at least one adapter of rank 1 or more, got shape (2, 5, 0, 64)": lora(
        gate_up_a=zeros(2, 5, 0, 64), gate_up_b=zeros(2, 5, 192, 0)
    ),
    "adapter_ids must be given with a Lora of 2 adapters, got None": layer(adapter_ids=None),
    "adapter_ids were given without lora: there is no adapter they could name": layer(lora=None),
    "adapter_ids must have shape (6,), got (5,)": layer(adapter_ids=zeros(5, dtype=jnp.int32)),
    "adapter_ids must be int32, got uint8": layer(adapter_ids=zeros(6, dtype=U8)),
    "adapter_ids must be between -1 (no adapter) and 1, got values from -1 to 2": layer(
        adapter_ids=jnp.array([0, 1, -1, 2, 0, 0], jnp.int32)
    ),
    "adapter_ids must be between -1 (no adapter) and 1, got values from -2 to 0": layer(
        adapter_ids=jnp.array([0, 0, -2, -1, 0, 0], jnp.int32)
    ),
}


@pytest.mark.parametrize(("message", "bad"), CASES.items(), ids=range(len(CASES)))
def test_bad_arrays(message: str, bad: Layer) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run(bad)


@pytest.mark.parametrize("top_k", [0, 6])
def test_top_k_out_of_range(top_k: int) -> None:
    with pytest.raises(ValueError, match=rf"^top_k must be between 1 and the number of experts \(5\), got {top_k}$"):
        run(top_k=top_k)


@pytest.mark.parametrize(
    ("message", "routing"),
    [
        ("routing.experts must have shape (6, 2), got (6, 3)", jmoe.Routing(zeros(6, 3, dtype=jnp.int32), zeros(6, 3))),
        ("routing.experts must be int32, got bfloat16", jmoe.Routing(zeros(6, 2), zeros(6, 2))),
        ("routing.weights must be float32, got bfloat16", jmoe.Routing(zeros(6, 2, dtype=jnp.int32), zeros(6, 2))),
    ],
)
def test_bad_routing(message: str, routing: jmoe.Routing) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run(routing=routing)


def test_a_routing_of_no_experts() -> None:
    routing = jmoe.Routing(zeros(6, 0, dtype=jnp.int32), zeros(6, 0, dtype=jnp.float32))
    with pytest.raises(ValueError, match=r"^top_k must be at least 1, got 0$"):
        run(top_k=0, routing=routing)


@pytest.mark.parametrize("top_k", [2.0, True, None])
def test_top_k_that_is_no_integer(top_k: object) -> None:
    for call in (lambda: run(top_k=top_k), lambda: jmoe.route(LAYER.router_logits, top_k)):
        with pytest.raises(ValueError, match=f"^top_k must be an integer, got {top_k}$"):
            call()


def test_top_k_may_be_any_integer() -> None:
    for top_k in (np.int64(2), jnp.int32(2)):
        assert jnp.array_equal(run(top_k=top_k), run(top_k=2))
        call = jax.jit(functools.partial(run, top_k=top_k, backend=jmoe.Target("sm_90")))
        assert call.trace(LAYER).lower(lowering_platforms=("cuda",)) is not None


def test_an_expert_offset_may_have_an_axis_as_shards_do() -> None:
    assert jnp.array_equal(run(expert_offset=jnp.ones(1, jnp.int32)), run(expert_offset=1))


@pytest.mark.parametrize("offset", [1.5, jnp.zeros(2, jnp.int32)])
def test_an_expert_offset_that_is_no_integer_scalar(offset: object) -> None:
    with pytest.raises(ValueError, match=r"^expert_offset must be an integer scalar, got "):
        run(expert_offset=offset)


def test_route_needs_an_axis_of_experts() -> None:
    with pytest.raises(ValueError, match=r"^router_logits must be an array of rank 1 or more \[\.\.\., E\], got "):
        jmoe.route(zeros(), 1)
    with pytest.raises(ValueError, match=r"must be an array of rank 1 or more .*, got \[\[1.0, 2.0\]\]"):
        jmoe.route([[1.0, 2.0]], 1)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r'^backend must be "triton", "xla", a jmoe.Target or None, got \'cuda\'$'):
        run(backend="cuda")


@pytest.mark.parametrize("device", ["", " ", 3])
def test_unknown_device(device: object) -> None:
    message = f'device must be a name, as in "NVIDIA H200", or None, got {device!r}'
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        jmoe.Target("sm_90", device=device)


def test_a_device_of_another_architecture_is_an_error() -> None:
    call = jax.jit(lambda x: run(layer(x=x), backend=jmoe.Target("sm_80", device="NVIDIA H200")))
    with pytest.raises(ValueError, match=r"^NVIDIA H200 is sm_90, got sm_80$"):
        call.trace(LAYER.x).lower(lowering_platforms=("cuda",))


def test_sm_90a_is_hopper_too() -> None:
    assert jmoe.Target("sm_90a").capability == jmoe.Target("sm_90").capability == 90
    assert jmoe.Target("sm_120a", device="A card").capability == 120


@pytest.mark.parametrize("architecture", ["sm_75", "90", "sm_9", "sm_90b", "gfx942", 90])
def test_unknown_target(architecture: object) -> None:
    message = f'architecture must be "sm_80" or later, as in "sm_90", got {architecture!r}'
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        jmoe.Target(architecture)


def test_triton_takes_bfloat16_alone() -> None:
    with pytest.raises(
        NotImplementedError, match=r'^the Triton backend takes bfloat16 x, got float32; use backend="xla"$'
    ):
        run(layer(x=LAYER.x.astype(jnp.float32)), backend="triton")
    with pytest.raises(NotImplementedError, match=r"^the Triton backend takes bfloat16 down, got float32"):
        run(experts(down=zeros(5, 64, 96, dtype=jnp.float32)), backend=jmoe.Target("sm_90"))


def test_triton_elsewhere_than_on_cuda() -> None:
    message = "the Triton backend runs on CUDA GPUs, but was lowered for cpu; use backend="
    with pytest.raises(NotImplementedError, match=f"^{message}"):
        jax.jit(lambda x: run(layer(x=x), backend="triton")).trace(LAYER.x).lower(lowering_platforms=("cpu",))
    with pytest.raises(NotImplementedError, match="but was lowered for tpu"):
        jax.jit(lambda x: run(layer(x=x), backend="triton")).trace(LAYER.x).lower(lowering_platforms=("tpu",))


def lower_for_cuda() -> None:
    """Lowers the Triton backend for a GPU."""
    traced = jax.jit(lambda x: run(layer(x=x), backend=jmoe.Target("sm_90"))).trace(LAYER.x)
    traced.lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    ("package", "found", "message"),
    [
        ("jax-triton", "0.3.1", "the Triton backend needs jax-triton >= 0.4.1, got 0.3.1: pip install"),
        ("triton", "3.6.0", "the Triton backend needs triton >= 3.7, got 3.6.0: pip install"),
        ("triton", None, "the Triton backend needs triton >= 3.7, which is not installed: pip install"),
    ],
)
def test_too_old_or_missing_packages(
    monkeypatch: pytest.MonkeyPatch, package: str, found: str | None, message: str
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name != package:
            return real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=f"^{re.escape(message)}"):
        lower_for_cuda()


def test_versions_are_compared_by_number() -> None:
    assert installed.release("3.10.0") > installed.release("3.7")
    assert installed.release("3.8.0+git1234") == (3, 8, 0)
    assert installed.release("0.4.1.dev3") == (0, 4, 1)


def test_no_gpu_to_compile_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_devices(**_: object) -> list:
        raise RuntimeError("no such backend")

    monkeypatch.setattr(jax, "local_devices", no_devices)
    with pytest.raises(
        NotImplementedError, match=r'name the GPU to compile for, as in backend=jmoe.Target\("sm_90"\)$'
    ):
        jax.jit(lambda x: run(layer(x=x))).trace(LAYER.x).lower(lowering_platforms=("cuda",))

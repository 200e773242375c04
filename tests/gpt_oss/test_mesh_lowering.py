"""The model's programs for several GPUs, lowered where there are none."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe.bench.model.case import sizes
from jmoe.device_mesh import make_mesh
from jmoe.gpt_oss import GptOss, Layout
from jmoe.gpt_oss.cache import empty_cache
from jmoe.gpt_oss.decode import DecodeState, decode
from jmoe.gpt_oss.random_model import random_model

LAUNCH = "@triton_kernel_call_ffi"
TOKENS = np.zeros((2, 16), np.int32)


@pytest.fixture(autouse=True)
def _a_hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jmoe.ops.launch.local_gpu.local_gpu", lambda: (90, "some Hopper GPU"))


def model_on(axes: str, *, fsdp: bool = False) -> GptOss:
    mesh = make_mesh(axes, jax.devices("cpu"))
    return random_model(sizes()["tiny"], rank=16, packed=True).on_mesh(mesh, Layout.of(mesh, fsdp=fsdp))


def collectives(program: str) -> set[str]:
    return set(re.findall(r"stablehlo\.(all_gather|all_reduce|reduce_scatter|all_to_all)", program))


@pytest.mark.parametrize(
    ("axes", "sent"),
    [
        pytest.param("data=2", set(), marks=pytest.mark.slow),
        ("model=2", {"all_reduce"}),
        pytest.param("expert=2", {"all_gather", "reduce_scatter"}, marks=pytest.mark.slow),
    ],
)
def test_a_step_is_the_launches_of_one_gpu_and_reads_in_place(axes: str, sent: set[str]) -> None:
    model = model_on(axes)
    cache = empty_cache(model.config, model.period, 2, 1088, model.dtype)
    state = DecodeState(cache, jnp.full(2, 1024, jnp.int32), None, model.attention_lora())
    program = jax.jit(decode).trace(model, TOKENS[:, 0], state).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count(LAUNCH) == 9 + 10 + 1
    assert program.count("output_operand_alias<") == 2 + 2
    assert collectives(program) == sent
    weights = re.findall(r"stablehlo\.dynamic_(?:update_)?slice .*: \(tensor<([^>]*)>", program)
    assert not [operand for operand in weights if operand.count("x") > 3]


@pytest.mark.slow
@pytest.mark.parametrize(("axes", "fsdp"), [("data=2", True), ("expert=2", False)])
def test_gradients_are_the_launches_of_one_gpu(axes: str, fsdp: bool) -> None:
    def loss(model: GptOss) -> jax.Array:
        return jnp.sum(model(TOKENS))

    def program(model: GptOss) -> str:
        gradient = jax.jit(lambda model: nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model))
        return gradient.trace(model).lower(lowering_platforms=("cuda",)).as_text()

    alone = program(random_model(sizes()["tiny"], rank=16, packed=True))
    split = program(model_on(axes, fsdp=fsdp))
    assert split.count(LAUNCH) == alone.count(LAUNCH) > 0
    assert "all_gather" in collectives(split)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["nothing", "experts", "layers"])
def test_gathered_experts_are_not_kept_for_the_gradient(remat: str) -> None:
    """Of four layers in two groups: what a scan keeps of a layer with all four experts would begin with 2, 4."""
    tiny = sizes()["tiny"]
    config = dataclasses.replace(tiny, num_hidden_layers=4, layer_types=2 * tiny.layer_types)
    mesh = make_mesh("data=2", jax.devices("cpu"))
    model = random_model(config, rank=2, packed=True, remat=remat).on_mesh(mesh, Layout.of(mesh, fsdp=True))

    def loss(model: GptOss) -> jax.Array:
        return jnp.sum(model(TOKENS))

    program = str(jax.make_jaxpr(lambda model: nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model))(model))
    gathered = re.findall(r"i32\[4,\d+,\d+,512\] = all_gather", program)
    assert len(gathered) >= 4  # of both projections, forward and for the gradient
    assert not re.search(r"i32\[2,4,\d+,\d+,512\]", program)
    assert not re.search(r"i32\[2,2,\d+,\d+,512\]", program)  # nor a device's part once more

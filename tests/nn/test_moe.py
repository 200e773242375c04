"""The Flax layer: what it computes, what is trained, and under which transformations."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import flax.linen
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jmoe
from jmoe.checkpoint import Checkpoint, load_moe_layer, router_logits
from jmoe.nn import Frozen, LoraConfig, MoE, linen_moe, trainable_report

HIDDEN, INTERMEDIATE, EXPERTS = 64, 96, 4
TINY = Path(__file__).parents[2] / "examples/tiny_gpt_oss"


def new_layer(seed: int = 0, **options: object) -> MoE:
    options = {"lora": LoraConfig(3)} | options
    return MoE(HIDDEN, INTERMEDIATE, EXPERTS, top_k=2, rngs=nnx.Rngs(seed), **options)


def tokens(count: int = 6, seed: int = 1, dtype: object = jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (count, HIDDEN), dtype)


def squares(layer: MoE, x: jax.Array) -> jax.Array:
    return jnp.mean((layer(x).astype(jnp.float32) - 1) ** 2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("mxfp4", [True, False])
def test_it_is_the_function_of_its_variables(mxfp4: bool, dtype: object) -> None:
    layer, x = new_layer(mxfp4=mxfp4), tokens(dtype=dtype)
    kernel, bias = layer.router_kernel[...], layer.router_bias[...]
    logits = (x.astype(jnp.float32) @ kernel.astype(jnp.float32) + bias.astype(jnp.float32)).astype(dtype)
    wanted = jmoe.moe(x, logits, layer.experts, top_k=2, lora=layer.lora)
    np.testing.assert_allclose(layer(x).astype(jnp.float32), wanted.astype(jnp.float32), rtol=1e-2, atol=1e-2)
    assert layer(x).dtype == dtype
    assert layer(x[None]).shape == (1, *x.shape)


def test_new_adapters_change_nothing() -> None:
    layer, x = new_layer(), tokens()
    assert layer.lora is not None
    assert jnp.array_equal(layer(x), new_layer(lora=None)(x))


def test_packed_decode_are_those_unpacked() -> None:
    layer, x = new_layer(), tokens()
    packed = MoE.from_weights(
        jmoe.pack(layer.experts), layer.router_kernel[...], layer.router_bias[...], top_k=2, lora=layer.lora
    )
    assert jnp.array_equal(layer(x), packed(x))


def test_a_recorded_choice_is_followed() -> None:
    layer, x = new_layer(), tokens()
    routing = layer.route(x)
    assert jnp.array_equal(layer(x, routing=routing), layer(x))
    other = new_layer(seed=5).route(x)
    assert not jnp.array_equal(layer(x, routing=other), layer(x))


def test_adapters_are_mixed_by_token() -> None:
    layer, x = new_layer(lora=LoraConfig(3, adapters=2)), tokens()
    layer.down_b[...] = layer.down_b[...].at[1].set(1)
    plain = new_layer(lora=None)(x)
    y = layer(x, adapter_ids=jnp.array([0, 1, -1, 0, 1, -1], jnp.int32))
    changed = (y != plain).any(axis=1)
    assert changed.tolist() == [False, True, False, False, True, False]


@pytest.mark.parametrize("wrt", [nnx.LoRAParam, nnx.Param])
def test_an_optimizer_trains_lora_and_no_byte_else(wrt: type) -> None:
    layer, x = new_layer(), tokens(16)
    before = jax.tree.map(np.array, nnx.state(layer, Frozen))
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=wrt)

    @nnx.jit
    def step(layer: MoE, optimizer: nnx.Optimizer) -> jax.Array:
        loss, gradient = nnx.value_and_grad(squares, argnums=nnx.DiffState(0, wrt))(layer, x)
        with jax.numpy_dtype_promotion("standard"):  # as optax needs it
            optimizer.update(layer, gradient)
        return loss

    losses = [float(step(layer, optimizer)) for _ in range(10)]
    assert losses[-1] < 0.95 * losses[0]
    after = jax.tree.map(np.array, nnx.state(layer, Frozen))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))


def test_a_router_is_trained_when_asked_to() -> None:
    x = tokens()
    for train_router in (True, False):
        layer = new_layer(train_router=train_router)
        gradient = nnx.grad(squares, argnums=nnx.DiffState(0, nnx.Param))(layer, x)
        assert ("router_kernel" in gradient) == train_router
    assert float(jnp.abs(new_layer(train_router=True).router_kernel[...]).sum()) > 0


def test_bf16_experts_are_trained_when_asked_to() -> None:
    layer = new_layer(mxfp4=False, lora=None, train_experts=True)
    gradient = nnx.grad(squares, argnums=nnx.DiffState(0, nnx.Param))(layer, tokens())
    assert set(gradient) == {"gate_up", "gate_up_bias", "down", "down_bias"}
    assert float(jnp.linalg.norm(gradient["gate_up"][...])) > 0
    with pytest.raises(ValueError, match="train_experts must be False with MXFP4 experts"):
        new_layer(train_experts=True)


@pytest.mark.slow
def test_layers_stack_under_scan_and_remat() -> None:
    x = tokens()

    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(key: jax.Array) -> MoE:
        return MoE(HIDDEN, INTERMEDIATE, EXPERTS, top_k=2, rngs=nnx.Rngs(key), lora=LoraConfig(3))

    stacked = stack(jax.random.split(jax.random.key(0), 2))

    def run(stacked: MoE, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def through(layer: MoE, x: jax.Array) -> jax.Array:
            return x + nnx.remat(lambda layer, x: layer(x))(layer, x)

        return through(stacked, x)

    y = nnx.jit(run)(stacked, x)
    for i in range(2):
        graph, state = nnx.split(stacked)
        layer = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))
        x = x + layer(x)
    np.testing.assert_allclose(y.astype(jnp.float32), x.astype(jnp.float32), rtol=2e-2, atol=2e-2)
    loss = lambda stacked: jnp.sum(run(stacked, tokens()).astype(jnp.float32) ** 2)  # noqa: E731
    gradient = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam)))(stacked)
    assert gradient["down_b"][...].shape == (2, 1, EXPERTS, HIDDEN, 3)
    assert gradient["down_b"][...].any()


def test_orbax_keeps_adapters(tmp_path: object) -> None:
    layer = new_layer()
    layer.down_b[...] = layer.down_b[...] + 1
    state = nnx.state(layer, nnx.LoRAParam)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "adapter", nnx.to_pure_dict(state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "adapter", nnx.to_pure_dict(state))
    other = new_layer()
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(other, state)
    assert jnp.array_equal(other(tokens()), layer(tokens()))


def test_statistics_are_of_the_choice() -> None:
    layer, x = new_layer(), tokens(50)
    y, statistics = layer(x, statistics=True)
    assert jnp.array_equal(y, layer(x))
    assert jnp.array_equal(statistics.routing.experts, layer.route(x).experts)
    assert float(statistics.tokens_per_expert.sum()) == 50 * 2
    assert float(statistics.largest_share) == pytest.approx(float(statistics.tokens_per_expert.max()) / 100)
    assert 0 < float(statistics.entropy) <= np.log(EXPERTS)
    assert float(statistics.load_balancing_loss) >= 0.9
    layer = new_layer(train_router=True)
    layer.router_bias[...] = jnp.array([9, 9, -9, -9], jnp.bfloat16)
    assert float(layer(x, statistics=True)[1].load_balancing_loss) == pytest.approx(2, rel=0.05)
    loss = lambda layer: layer(x, statistics=True)[1].load_balancing_loss  # noqa: E731
    gradient = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Param))(layer)
    assert gradient["router_bias"][...].astype(jnp.float32)[:2].sum() > 0


def test_the_report_tells_trained_from_frozen() -> None:
    layer = new_layer()
    report = trainable_report(layer)
    trainable = {tensor.path: tensor for tensor in report.tensors if tensor.trainable}
    assert set(trainable) == {"gate_up_a", "gate_up_b", "down_a", "down_b"}
    assert trainable["gate_up_a"].shape == (1, EXPERTS, 3, HIDDEN)
    frozen = {tensor.path for tensor in report.tensors if not tensor.trainable}
    assert {"gate_up.blocks", "gate_up.scales", "router_kernel", "down_scale"} <= frozen
    assert report.trainable_bytes == sum(tensor.bytes for tensor in trainable.values())
    assert f"{report.frozen_bytes:,} bytes frozen" in str(report)
    assert "gate_up.blocks" in str(report)
    with pytest.raises(ValueError, match=r"nothing of the model is trainable: none of its \d+ tensors"):
        trainable_report(new_layer(lora=None))


def test_a_report_counts_plain_numbers() -> None:
    layer = new_layer()
    layer.calls = nnx.Variable(0)
    assert ("calls", ()) in [tensor[:2] for tensor in trainable_report(layer).tensors]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["q_proj"]}, "LoRA targets must match an expert tensor .* got 'q_proj'"),
        ({"targets": ["mlp.experts.gate"]}, "LoRA targets must match an expert tensor"),
        ({"targets": ["self_attn.down_proj"]}, "LoRA targets must match an expert tensor"),
        ({"alpha": 0}, "alpha must be positive and finite, got 0"),
        ({"targets": []}, "targets must name one of the experts' tensors"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": 2.5}, "rank must be an integer, got 2.5"),
        ({"adapters": 0}, "adapters must be at least 1, got 0"),
    ],
)
def test_lora_that_would_train_nothing_is_an_error(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**({"rank": 4} | options))


def test_peft_names_are_targets() -> None:
    config = LoraConfig(4, targets=["mlp.experts.gate_up_proj"], alpha=8, rank_stabilized=True)
    layer = new_layer(lora=config)
    assert layer.down_a is None
    assert layer.gate_up_a[...].shape == (1, EXPERTS, 4, HIDDEN)
    assert float(layer.gate_up_scale[...][0]) == 4.0


def test_a_target_may_stand_alone() -> None:
    assert LoraConfig(4, targets="down").projections == ("down",)
    assert LoraConfig(4, targets="model.layers.3.mlp.experts.gate_up_proj").projections == ("gate_up",)


def test_the_report_of_an_abstract_model_is_that_of_the_model() -> None:
    assert trainable_report(nnx.eval_shape(new_layer)) == trainable_report(new_layer())


def test_a_checkpoints_layer_keeps_its_constants() -> None:
    read = load_moe_layer(Checkpoint(TINY), 0)
    config = dataclasses.replace(read.config, swiglu_limit=0.5, swiglu_alpha=1.0)
    read = dataclasses.replace(read, config=config)
    layer = MoE.from_checkpoint_layer(read)
    x = jax.random.normal(jax.random.key(0), (20, config.hidden_size), jnp.bfloat16)
    options = {"top_k": config.num_experts_per_tok, "activation": jmoe.SwiGLU(alpha=1.0, limit=0.5)}
    assert jnp.array_equal(layer(x), jmoe.moe(x, router_logits(read, x), read.experts, **options))
    assert not jnp.array_equal(
        layer(x), MoE.from_weights(read.experts, read.router_weight.T, read.router_bias, top_k=options["top_k"])(x)
    )


def test_new_adapters_on_given_weights_need_rngs() -> None:
    layer = new_layer(lora=None)
    with pytest.raises(ValueError, match="rngs must be given with lora=LoraConfig"):
        MoE.from_weights(layer.experts, layer.router_kernel[...], top_k=2, lora=LoraConfig(3))


def test_the_layer_is_found_by_its_name() -> None:
    program = "import sys, jmoe; assert 'jmoe.nn' not in sys.modules; print(jmoe.nn.MoE.__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "MoE\n"


def test_weights_of_other_sizes_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"top_k must be between 1 and the number of experts \(4\), got 9"):
        MoE(HIDDEN, INTERMEDIATE, EXPERTS, top_k=9, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"router_bias must be \[E\] = \(4,\), got \(1,\)"):
        new_layer(router_bias=jnp.zeros(1))
    with pytest.raises(ValueError, match=r"lora.gate_up_a must have shape \(1, 4, 3, 64\), got \(1, 4, 3, 32\)"):
        new_layer(lora=MoE(32, 32, EXPERTS, top_k=2, rngs=nnx.Rngs(0), lora=LoraConfig(3)).lora)
    layer = new_layer()
    with pytest.raises(ValueError, match=r"experts.gate_up must stand for \(4, 192, 32\), got \(4, 192, 64\)"):
        MoE(32, INTERMEDIATE, EXPERTS, top_k=2, rngs=nnx.Rngs(0), experts=layer.experts)
    with pytest.raises(ValueError, match=r"experts.down_bias must have shape \(4, 64\), got \(4, 1\)"):
        new_layer(experts=dataclasses.replace(layer.experts, down_bias=jnp.zeros((4, 1))))
    with pytest.raises(ValueError, match=r"x must have inner size 64 like the router's H, got shape \(2, 32\)"):
        layer(jnp.zeros((2, 32), jnp.bfloat16))
    with pytest.raises(ValueError, match=r'backend must be "triton", "xla", a jmoe.Target or None'):
        new_layer(backend="cuda")
    with pytest.raises(ValueError, match=r"router_kernel must be \[H, E\] = \(64, 4\), got \(4, 64\)"):
        MoE.from_weights(layer.experts, layer.router_kernel[...].T, top_k=2)


def test_the_linen_module_has_the_same_gradient() -> None:
    module = linen_moe(HIDDEN, INTERMEDIATE, EXPERTS, top_k=2, lora=LoraConfig(3))
    assert isinstance(module, flax.linen.Module)
    x = tokens()
    variables = module.init(jax.random.key(0), x)
    adapters, rest = variables["LoRAParam"], {k: v for k, v in variables.items() if k != "LoRAParam"}
    assert set(adapters) == {"gate_up_a", "gate_up_b", "down_a", "down_b"}

    def loss(adapters: dict) -> jax.Array:
        return jnp.sum(module.apply({"LoRAParam": adapters, **rest}, x).astype(jnp.float32) ** 2)

    gradient = jax.jit(jax.grad(loss))(adapters)
    assert jax.tree.leaves(gradient["down_b"])[0].any()


@pytest.mark.parametrize("packed", [False, True])
def test_linen_variables_are_saved_by_flax_serialization(packed: bool) -> None:
    module = linen_moe(HIDDEN, INTERMEDIATE, EXPERTS, top_k=2, lora=LoraConfig(3))
    variables, other = (module.init(jax.random.key(seed), tokens()) for seed in (0, 1))
    saved = flax.serialization.to_bytes(variables)
    restored = flax.serialization.from_bytes(other, saved)
    assert jax.tree.structure(restored) == jax.tree.structure(variables)
    assert jnp.array_equal(module.apply(restored, tokens()), module.apply(variables, tokens()))
    experts = new_layer().experts
    experts = jmoe.pack(experts) if packed else experts
    state = flax.serialization.to_state_dict(experts)
    again = flax.serialization.from_state_dict(jax.tree.map(jnp.zeros_like, experts), state)
    assert all(map(jnp.array_equal, jax.tree.leaves(again), jax.tree.leaves(experts)))


def test_a_step_is_compiled_once() -> None:
    layer = new_layer()
    traces = []

    @functools.partial(nnx.jit)
    def step(layer: MoE, x: jax.Array) -> jax.Array:
        traces.append(1)
        return layer(x)

    for seed in range(3):
        step(layer, tokens(seed=seed))
    assert len(traces) == 1

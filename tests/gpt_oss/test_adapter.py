"""Adapters on the whole model, beside what transformers and PEFT computed with them."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jmoe import gpt_oss

CASE = Path(__file__).parents[1] / "data" / "tiny_case"
PREFIX = "base_model.model.model.layers."


@pytest.fixture(scope="module")
def model() -> gpt_oss.GptOss:
    return gpt_oss.load(CASE / "model", adapter=CASE / "adapter", dtype=jnp.float32, progress=False)


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(CASE / "expected.npz") as arrays:
        return dict(arrays)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want))


def test_logits_are_those_of_transformers_and_peft(model: gpt_oss.GptOss, expected: dict[str, np.ndarray]) -> None:
    tokens = expected["input_ids"]
    call = nnx.jit(lambda model, ids: model(tokens, adapter_ids=ids))
    assert relative(call(model, None), expected["adapter_logits"]) <= 1e-3
    assert relative(call(model, jnp.array([-1, -1])), expected["base_logits"]) <= 1e-3
    mixed = np.asarray(call(model, jnp.array([0, -1])))
    assert relative(mixed[0], expected["adapter_logits"][0]) <= 1e-3
    assert relative(mixed[1], expected["base_logits"][1]) <= 1e-3


@pytest.mark.slow
def test_gradients_are_those_of_transformers_and_peft(model: gpt_oss.GptOss, expected: dict[str, np.ndarray]) -> None:
    tokens = expected["input_ids"]

    def loss(model: gpt_oss.GptOss) -> jax.Array:
        logits = model(tokens)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, gradient = nnx.jit(nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam)))(model)
    assert float(value) == pytest.approx(float(expected["adapter_loss"]), rel=1e-4)
    a, b = (nnx.to_pure_dict(gradient[name]) for name in ("lora_a", "lora_b"))
    for layer in range(2):
        for name in "qkvo":
            for part, of in (("A", a), ("B", b)):
                want = expected[f"adapter_grad/{PREFIX}{layer}.self_attn.{name}_proj.lora_{part}.weight"]
                assert relative(of[name][layer, 0], want) <= 1e-3
        for name, module in (("gate_up", "experts.base_layer"), ("down", "experts")):
            want_a = expected[f"adapter_grad/{PREFIX}{layer}.mlp.{module}.lora_A.weight"]
            want_b = expected[f"adapter_grad/{PREFIX}{layer}.mlp.{module}.lora_B.weight"]
            assert relative(a[name][layer, 0].reshape(want_a.shape), want_a) <= 1e-3
            # PEFT's columns count (rank, expert).
            assert relative(b[name][layer, 0].transpose(1, 2, 0).reshape(want_b.shape), want_b) <= 1e-3


def copy_of_adapter(folder: Path, change: object) -> Path:
    """The adapter with its tensors changed."""
    shutil.copytree(CASE / "adapter", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": np.zeros((2, 64), np.float32)}),
            r"has base_model.model.lm_head.lora_A.weight, but jmoe has no LoRA there: only on attention's",
        ),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((2, 64), np.float32)}),
            r"has base_model.model.model.embed_tokens.lora_embedding_A, but jmoe has no LoRA there",
        ),
        (
            lambda t: t.update({f"{PREFIX}0.mlp.router.lora_A.weight": np.zeros((2, 64), np.float32)}),
            r"has .*layers.0.mlp.router.lora_A.weight, but jmoe has no LoRA there",
        ),
        (
            lambda t: t.pop(f"{PREFIX}0.self_attn.q_proj.lora_B.weight"),
            r"has no tensor .*layers.0.self_attn.q_proj.lora_B",
        ),
        (
            lambda t: t.pop(f"{PREFIX}1.self_attn.o_proj.lora_A.weight"),
            r"has no tensor .*layers.1.self_attn.o_proj.lora_A",
        ),
        (
            lambda t: t.update({f"{PREFIX}0.self_attn.k_proj.lora_A.weight": np.zeros((3, 64), np.float32)}),
            r"layers.0.self_attn.k_proj.lora_A.weight: wanted \(2, 64\), got \(3, 64\)",
        ),
        (
            lambda t: t.update({f"{PREFIX}7.self_attn.k_proj.lora_A.weight": np.zeros((2, 64), np.float32)}),
            r"layers.7.self_attn.k_proj.lora_A.weight is of a layer past the model's 2",
        ),
        (
            lambda t: t.update({k.replace(".1.mlp", ".5.mlp"): t[k] for k in list(t) if ".1.mlp" in k}),
            "adapter_model.safetensors has LoRA on experts of layer 5, past the model's 2",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: object, message: str, tmp_path: Path) -> None:
    folder = copy_of_adapter(tmp_path / "adapter", change)
    with pytest.raises(ValueError, match=message):
        gpt_oss.load_adapter(folder, gpt_oss.Config.load(CASE / "model"))


def set_options(folder: Path, **options: object) -> None:
    """Changes adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))


def test_a_layer_without_lora_is_left_as_it_was(tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for key in [key for key in tensors if ".layers.1." in key]:
            del tensors[key]

    folder = copy_of_adapter(tmp_path / "adapter", change)
    # PEFT looks at layers_to_transform for target_modules alone.
    experts = [f"layers.0.mlp.experts.{name}_proj" for name in ("gate_up", "down")]
    set_options(folder, layers_to_transform=[0], target_parameters=experts)
    lora = gpt_oss.load_adapter(folder, gpt_oss.Config.load(CASE / "model"))
    assert lora.a["q"].shape == (2, 1, 2, 64)
    assert lora.b["down"].shape == (2, 1, 4, 64, 2)
    assert not any(leaf[1].any() for leaf in jax.tree.leaves(lora))
    assert all(leaf[0].any() for leaf in jax.tree.leaves(lora))


def test_an_adapter_of_nothing_is_an_error(tmp_path: Path) -> None:
    folder = copy_of_adapter(tmp_path / "adapter", lambda tensors: tensors.clear())
    set_options(folder, target_parameters=None, target_modules=None)
    with pytest.raises(
        ValueError, match=r"adapter/adapter_model.safetensors has LoRA on nothing .*: it would change nothing"
    ):
        gpt_oss.load_adapter(folder, gpt_oss.Config.load(CASE / "model"))


def test_adapters_of_different_targets_and_ranks_stand_side_by_side(
    tmp_path: Path, expected: dict[str, np.ndarray]
) -> None:
    """A batch of three: without, with the whole adapter, and with one that has other ranks and no LoRA on attention."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        for key in [key for key in tensors if "self_attn" in key]:
            del tensors[key]

    part = copy_of_adapter(tmp_path / "adapter", change)
    set_options(part, target_modules=[])
    model = gpt_oss.load(CASE / "model", adapter=[CASE / "adapter", part], dtype=jnp.float32, progress=False)
    alone = gpt_oss.load(CASE / "model", adapter=part, dtype=jnp.float32, progress=False)
    tokens = np.repeat(expected["input_ids"][:1], 3, axis=0)
    logits = np.asarray(nnx.jit(lambda model: model(tokens, adapter_ids=jnp.array([-1, 0, 1])))(model))
    assert relative(logits[0], expected["base_logits"][0]) <= 1e-3
    assert relative(logits[1], expected["adapter_logits"][0]) <= 1e-3
    assert relative(logits[2], np.asarray(alone(tokens[:1]))[0]) <= 1e-4
    with pytest.raises(ValueError, match="adapter_ids must be given with 2 adapters"):
        model(tokens)


def test_smaller_ranks_are_padded() -> None:
    config = gpt_oss.Config.load(CASE / "model")
    adapter = gpt_oss.load_adapter(CASE / "adapter", config)
    first = {name: leaf[..., :1, :] for name, leaf in adapter.a.items()}
    last = {name: leaf[..., :1] for name, leaf in adapter.b.items()}
    both = gpt_oss.stack_adapters([gpt_oss.LoraWeights(first, last, adapter.scale), adapter])
    assert both.a["q"].shape == (2, 2, 2, 64)
    assert not both.a["down"][:, 0, :, 1].any()
    assert np.array_equal(both.b["o"][:, 1], adapter.b["o"][:, 0])
    with pytest.raises(ValueError, match="at least one adapter, got none"):
        gpt_oss.stack_adapters([])
    shorter = jax.tree.map(lambda leaf: leaf[:1], adapter)
    with pytest.raises(ValueError, match="must be for models of one size"):
        gpt_oss.stack_adapters([adapter, shorter])
    on_q, on_down = (
        gpt_oss.LoraWeights(*({target: field[target]} for field in (one.a, one.b, one.scale)))
        for one, target in ((adapter, "q"), (shorter, "down"))
    )
    with pytest.raises(ValueError, match=r"one size, got \(layers, hidden\) \[\(1, 64\), \(2, 64\)\]"):
        gpt_oss.stack_adapters([on_q, on_down])

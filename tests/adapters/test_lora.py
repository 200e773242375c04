"""Adapters: the factors against PEFT's definition and PEFT itself, and each way in which an adapter can be refused."""

import json
import math
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

from jmoe.adapters import load_lora, stack_loras
from jmoe.adapters.settings import AdapterWarning
from jmoe.checkpoint import Config
from jmoe.ops.experts import Lora
from tests.trees import tree_equal

CASE = Path(__file__).parents[1] / "data" / "tiny_case"
CONFIG = Config.load(CASE / "model")
EXPERTS = CONFIG.num_local_experts
MLP = "base_model.model.model.layers.0.mlp."
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
SHAPES = {"gate_up": (64, 192), "down": (96, 64)}  # of the tiny case, (in, out)

pytestmark = [
    # transformers 5.23 asks torch modules for an attribute that it has deprecated itself.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT 0.21.2 looks for the patterns' keys among target_modules alone; they do apply to target_parameters.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]


@pytest.fixture
def directory(tmp_path):
    """A copy of the tiny adapter, to be damaged."""
    return Path(shutil.copytree(CASE / "adapter", tmp_path / "adapter"))


def edit_settings(directory, **entries):
    """Sets entries of adapter_config.json, in their order."""
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def edit_tensors(directory, tensors):
    """Replaces tensors; those set to None are removed."""
    file = directory / "adapter_model.safetensors"
    value = load_file(file) | tensors
    save_file({name: tensor for name, tensor in value.items() if tensor is not None}, file)


def delta(lora, projection):
    """What a Lora of one adapter adds to the weights, float64 [E, in, out] as transformers stores them."""
    a, b, scale = (np.asarray(getattr(lora, f"{projection}_{part}"), np.float64)[0] for part in ("a", "b", "scale"))
    return scale * np.einsum("eor,eri->eio", b, a)


@pytest.mark.parametrize("layer", [0, 1])
def test_factors_follow_pefts_definition(layer):
    """Expert e has rows e*r ... e*r + r - 1 of A, and every E-th column of B from e on; s = alpha / r."""
    tensors = load_file(CASE / "adapter" / "adapter_model.safetensors")
    lora = load_lora(CASE / "adapter", CONFIG, layer)
    prefix = f"base_model.model.model.layers.{layer}.mlp.experts."
    for projection, module in (("gate_up", "base_layer."), ("down", "")):
        a, b = (tensors[f"{prefix}{module}lora_{part}.weight"].astype(np.float64) for part in "AB")
        want = np.stack([3.5 * (b[:, e::EXPERTS] @ a[2 * e : 2 * e + 2]).T for e in range(EXPERTS)])
        assert want.shape == (EXPERTS, *SHAPES[projection])
        np.testing.assert_allclose(delta(lora, projection), want, rtol=1e-12)
        assert getattr(lora, f"{projection}_a").dtype == jnp.float32
        assert getattr(lora, f"{projection}_scale").dtype == jnp.float32


def test_factors_keep_the_dtype_of_the_file(directory):
    tensors = load_file(directory / "adapter_model.safetensors")
    edit_tensors(directory, {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()})
    got, want = load_lora(directory, CONFIG, 1), load_lora(CASE / "adapter", CONFIG, 1)
    for name in ("gate_up_a", "gate_up_b", "down_a", "down_b"):
        assert getattr(got, name).dtype == jnp.bfloat16
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name).astype(jnp.bfloat16))


def peft_model(hidden, inner, *, swapped):
    """A small gpt-oss of two layers and three experts; PEFT reads the weights' axis order from an attribute."""
    config = GptOssConfig(
        num_hidden_layers=2,
        hidden_size=hidden,
        intermediate_size=inner,
        num_local_experts=3,
        num_experts_per_tok=2,
        vocab_size=16,
        head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = GptOssForCausalLM(config)
    for block in model.model.layers:
        assert block.mlp.experts.is_transposed
        block.mlp.experts.is_transposed = not swapped
    return model


def peft_deltas(model):
    """What PEFT adds to each expert weight, (layer, projection) -> [E, in, out]."""
    deltas = {}
    for i, block in enumerate(model.base_model.model.model.layers):
        wrapper = block.mlp.experts
        while hasattr(wrapper, "parameter_name"):
            projection = wrapper.parameter_name.removesuffix("_proj")
            deltas[i, projection] = wrapper.get_delta_weight("default").detach().numpy()
            wrapper = wrapper.base_layer
    return deltas


def save_with_peft(directory, settings, *, hidden=32, inner=24, swapped=False):
    """An adapter with random factors as PEFT saves it, and what PEFT adds after loading it again."""
    torch.manual_seed(0)
    model = get_peft_model(
        peft_model(hidden, inner, swapped=swapped), LoraConfig(**{"r": 4, "target_modules": []} | settings)
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(directory)
    return reload_with_peft(directory, hidden=hidden, inner=inner, swapped=swapped)


def reload_with_peft(directory, *, hidden=32, inner=24, swapped=False):
    return peft_deltas(PeftModel.from_pretrained(peft_model(hidden, inner, swapped=swapped), directory))


def small_config(hidden=32, inner=24):
    return Config(2, hidden, inner, num_local_experts=3, num_experts_per_tok=2, vocab_size=16, rms_norm_eps=1e-5)


def check_against(directory, want, config):
    """That each layer's Lora adds what PEFT adds, and that projections without LoRA are None."""
    assert want
    for layer in range(config.num_hidden_layers):
        projections = [projection for i, projection in want if i == layer]
        if not projections:
            continue
        lora = load_lora(directory, config, layer)
        for projection in projections:
            np.testing.assert_allclose(delta(lora, projection), want[layer, projection], rtol=1e-5, atol=1e-5)
        for projection in {"gate_up", "down"} - set(projections):
            assert getattr(lora, f"{projection}_a") is getattr(lora, f"{projection}_scale") is None


@pytest.mark.parametrize(
    "settings",
    [
        {"target_parameters": [GATE_UP, DOWN], "target_modules": ["q_proj", "v_proj"], "lora_alpha": 7},
        {"target_parameters": [DOWN, GATE_UP], "use_rslora": True, "lora_alpha": 3},
        {"target_parameters": [GATE_UP]},
        {"target_parameters": ["experts.down_proj"]},
        {"target_parameters": ["layers.0.mlp.experts.down_proj", f"model.layers.1.{GATE_UP}"]},
        {
            "target_parameters": [GATE_UP, DOWN],
            "rank_pattern": {"gate_up_proj": 2, r".*\.1\.mlp\.experts\.down_proj": 6},
            "alpha_pattern": {r"layers\.1\.mlp\.experts\..*": 5, "down_proj": 9},
        },
    ],
    ids=["both", "reversed-rslora", "gate_up", "down", "one-each", "patterns"],
)
@pytest.mark.parametrize("swapped", [False, True], ids=["usual", "swapped"])
def test_agrees_with_peft(tmp_path, settings, swapped):
    want = save_with_peft(tmp_path, settings, swapped=swapped)
    check_against(tmp_path, want, small_config())


@pytest.mark.parametrize("inner", [32, 16], ids=["hidden=inner", "hidden=2*inner"])
@pytest.mark.parametrize(
    "targets",
    [[GATE_UP, DOWN], ["layers.0.mlp.experts.down_proj", "layers.1.mlp.experts.gate_up_proj"]],
    ids=["in-one-layer", "across-layers"],
)
def test_swapped_layout_is_told_by_all_pairs_together(tmp_path, inner, targets):
    """With these sizes one of the projections has the same shapes in either layout."""
    want = save_with_peft(tmp_path, {"target_parameters": targets}, inner=inner, swapped=True)
    check_against(tmp_path, want, small_config(inner=inner))


def test_shapes_that_fit_both_layouts_are_read_as_peft_does(tmp_path):
    want = save_with_peft(tmp_path, {"target_parameters": [DOWN]}, inner=32)
    with pytest.warns(AdapterWarning, match=r"is of PEFT 0\.\d+\.\d+, .*one projection whose shapes fit both ways"):
        check_against(tmp_path, want, small_config(inner=32))
    for version in ("0.18.1", None):  # before PEFT wrote the other layout, or not PEFT's at all
        edit_settings(tmp_path, peft_version=version)
        check_against(tmp_path, want, small_config(inner=32))


@pytest.mark.parametrize("first", ["experts.gate_up_proj", "layers.0.mlp.experts.gate_up_proj"])
def test_overlapping_patterns_resolve_in_the_order_of_the_file(tmp_path, first):
    save_with_peft(tmp_path, {"target_parameters": [GATE_UP]})
    alphas = {"experts.gate_up_proj": 2.0, "layers.0.mlp.experts.gate_up_proj": 40.0}
    edit_settings(tmp_path, alpha_pattern={first: alphas.pop(first)} | alphas)
    want = reload_with_peft(tmp_path)
    check_against(tmp_path, want, small_config())
    scale = load_lora(tmp_path, small_config(), 0).gate_up_scale
    assert scale.tolist() == [0.5 if first == "experts.gate_up_proj" else 10.0]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
        ({"use_rslora": "false"}, "use_rslora must be true, false or null, got 'false'"),
        ({"use_dora": True}, "not supported: use_dora = True"),
        ({"lora_bias": True}, "not supported: lora_bias = True"),
        ({"bias": "all"}, "bias must be 'none' (trained biases are not supported), got 'all'"),
        ({"modules_to_save": ["lm_head"]}, "not supported: modules_to_save = ['lm_head']"),
        ({"fan_in_fan_out": True}, "not supported: fan_in_fan_out = True"),
        ({"alora_invocation_tokens": [1]}, "not supported: alora_invocation_tokens = [1]"),
        ({"layer_replication": [[0, 1]]}, "not supported: layer_replication = [[0, 1]]"),
        ({"trainable_token_indices": [1], "use_new": 2}, "not supported: trainable_token_indices = [1], use_new = 2"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights 'pissa_niter_4' may have changed the base model's weights; supported are True, False, "
            "'gaussian', 'eva', 'orthogonal'",
        ),
        ({"r": 0}, "r must be a positive int, got 0"),
        ({"r": None}, "r must be a positive int, got None"),
        ({"lora_alpha": "8"}, "lora_alpha must be a positive float, got '8'"),
        ({"rank_pattern": {"down_proj": 1.5}}, "rank_pattern['down_proj'] must be a positive int, got 1.5"),
        ({"alpha_pattern": ["down_proj"]}, "alpha_pattern must be a JSON object or null, got ['down_proj']"),
        (
            {"alpha_pattern": {"*": 2}},
            "alpha_pattern has a key that is not a regular expression, '*': nothing to repeat at position 8",
        ),
        (
            {"rank_pattern": {"(?i)down_proj": 2}},
            "rank_pattern has a key that is not a regular expression, '(?i)down_proj': global flags not at the start "
            "of the expression at position 8",
        ),
        (
            {"target_modules": "*.q_proj"},
            "target_modules is not a regular expression, '*.q_proj': nothing to repeat at position 0",
        ),
        (
            {"exclude_modules": "("},
            "exclude_modules is not a regular expression, '(': missing ), unterminated subpattern at position 0",
        ),
        ({"exclude_modules": [1]}, "exclude_modules must be a list of names, an expression or null, got [1]"),
        (
            {"layers_to_transform": ["1"]},
            "layers_to_transform must be a layer, a list of layers or null, got ['1']",
        ),
        ({"target_parameters": DOWN}, f"target_parameters must be a list of names or null, got '{DOWN}'"),
    ],
)
def test_settings_errors(directory, entries, message):
    edit_settings(directory, **entries)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{directory}/adapter_config.json: {message}')}$"):
        load_lora(directory, CONFIG, 0)


def test_settings_that_are_off_or_do_no_harm_are_accepted(directory):
    before = load_lora(directory, CONFIG, 0)
    edit_settings(
        directory, use_new=False, new_config=None, new_list=[], lora_dropout=0.1, init_lora_weights="gaussian"
    )
    assert tree_equal(load_lora(directory, CONFIG, 0), before)


OUTER_A, OUTER_B = f"{MLP}experts.lora_A.weight", f"{MLP}experts.lora_B.weight"
INNER_A = f"{MLP}experts.base_layer.lora_A.weight"


@pytest.mark.parametrize(
    ("entries", "tensors", "message"),
    [
        (
            {"target_parameters": [DOWN]},
            {},
            f"target_parameters ['{DOWN}'] call for ['experts.lora_A.weight', 'experts.lora_B.weight'] in "
            "layers.0.mlp; missing [], not understood "
            "['experts.base_layer.lora_A.weight', 'experts.base_layer.lora_B.weight']",
        ),
        (
            {"target_parameters": None},
            {INNER_A: None},
            "target_parameters [] call for nothing in layers.0.mlp; missing [], not understood "
            "['experts.base_layer.lora_B.weight', 'experts.lora_A.weight', 'experts.lora_B.weight']",
        ),
    ],
    ids=["gate_up-not-targeted", "no-targets"],
)
def test_keys_must_be_what_target_parameters_call_for(directory, entries, tensors, message):
    edit_settings(directory, **entries)
    edit_tensors(directory, tensors)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{directory}/adapter_model.safetensors: {message}')}$"):
        load_lora(directory, CONFIG, 0)


def test_every_wrong_shape_is_listed(directory):
    """The rank is that of the settings, so a tensor of another rank is wrong; so are two layouts in one file."""
    tensors = load_file(directory / "adapter_model.safetensors")
    edit_tensors(directory, {INNER_A: tensors[INNER_A][:4], OUTER_A: np.zeros((8, 64), np.float32)})
    message = [
        f"{directory}/adapter_model.safetensors does not match the model and its adapter_config.json:",
        f"  {INNER_A}: wanted (8, 64), or (8, 192) if all are swapped, got (4, 64)",
        f"  {OUTER_A}: wanted (8, 96), or (8, 64) if all are swapped, got (8, 64)",
    ]
    with pytest.raises(ValueError, match=f"^{re.escape(chr(10).join(message))}$"):
        load_lora(directory, CONFIG, 1)


def test_dtypes_that_kernels_do_not_take(directory):
    edit_tensors(directory, {OUTER_A: np.zeros((8, 96), np.float64)})
    message = f"unsupported dtypes:\n  {OUTER_A}: wanted F32, BF16 or F16, got F64 (8, 96)"
    with pytest.raises(ValueError, match=f"{re.escape(message)}$"):
        load_lora(directory, CONFIG, 0)


def test_layer_without_lora(directory):
    edit_tensors(directory, dict.fromkeys(k for k in load_file(directory / "adapter_model.safetensors") if MLP in k))
    message = (
        f"{directory}/adapter_model.safetensors has no LoRA on the experts of layer 0 "
        "(no base_model.model.model.layers.0.mlp.*); layers that have: [1]"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_lora(directory, CONFIG, 0)
    load_lora(directory, CONFIG, 1)


def test_layer_out_of_range_and_missing_files(directory):
    with pytest.raises(ValueError, match=re.escape("layer must be in [0, 2), got 2")):
        load_lora(directory, CONFIG, 2)
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=re.escape(f"{weights} is not a whole safetensors file: ")):
        load_lora(directory, CONFIG, 0)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (directory / name).unlink()
        with pytest.raises(FileNotFoundError, match=re.escape(f"{directory / name} does not exist")):
            load_lora(directory, CONFIG, 0)


def random_lora(rank, dtype=jnp.float32, *, hidden=8, down=True, scale=1.0):
    rng = np.random.default_rng(rank)
    shapes = {"gate_up_a": (1, 3, rank, hidden), "gate_up_b": (1, 3, 12, rank)}
    if down:
        shapes |= {"down_a": (1, 3, rank + 1, 6), "down_b": (1, 3, hidden, rank + 1)}
    fields = {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}
    scales = ("gate_up_scale", "down_scale") if down else ("gate_up_scale",)
    return Lora(**fields, **{name: jnp.array([scale], jnp.float32) for name in scales})


def test_stacked_adapters_keep_their_order_and_their_effect():
    loras = [random_lora(2, scale=0.5), random_lora(5, scale=math.sqrt(2)), random_lora(1)]
    stacked = stack_loras([stack_loras(loras[:2]), loras[2]])
    assert stacked.gate_up_a.shape == (3, 3, 5, 8)
    assert stacked.down_b.shape == (3, 3, 8, 6)
    for i, lora in enumerate(loras):
        one = Lora(**{name: value[i : i + 1] for name, value in vars(stacked).items()})
        for projection in ("gate_up", "down"):
            np.testing.assert_allclose(delta(one, projection), delta(lora, projection), rtol=1e-12, atol=1e-12)


def test_stacked_adapters_without_a_projection_and_of_two_dtypes():
    stacked = stack_loras([random_lora(2, jnp.bfloat16, down=False), random_lora(2, down=False)])
    assert (stacked.down_a, stacked.down_b, stacked.down_scale) == (None, None, None)
    assert stacked.gate_up_a.dtype == jnp.float32
    assert stack_loras([random_lora(1, jnp.bfloat16)] * 2).down_b.dtype == jnp.bfloat16


def test_stack_errors():
    with pytest.raises(ValueError, match=re.escape("stack_loras needs at least one Lora, got none")):
        stack_loras([])
    with pytest.raises(ValueError, match=re.escape("all Loras or none must adapt down; numbers [1] of 2 do not")):
        stack_loras([random_lora(2), random_lora(2, down=False)])
    message = "all Loras must have the same (experts, inputs, outputs) for gate_up, got [(3, 8, 12), (3, 9, 12)]"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        stack_loras([random_lora(2), random_lora(2, hidden=9)])

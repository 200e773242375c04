"""Checkpoints beside transformers: both read the same directories, and jmoe reads what transformers writes."""

import json
import re
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from transformers import GptOssForCausalLM, Mxfp4Config

from jmoe import gpt_oss
from jmoe.adapters import load_lora
from jmoe.checkpoint import Checkpoint, load_moe_layer, router_logits
from jmoe.checkpoint.config_file import CheckpointWarning
from jmoe.ops.mxfp4 import Mxfp4, dequantize
from jmoe.ops.norm import rms_norm

ROOT = Path(__file__).parents[2]
CASE = Path(__file__).parents[1] / "data" / "tiny_case"
EXAMPLE = ROOT / "examples" / "tiny_gpt_oss"
PROJECTIONS = ("gate_up", "down")

# transformers 5.23 asks torch modules for an attribute that it has deprecated itself.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def load(directory, dtype):
    """A checkpoint in transformers, its experts dequantised on every machine (by default: where there is no GPU)."""
    return GptOssForCausalLM.from_pretrained(
        directory, dtype=dtype, quantization_config=Mxfp4Config(dequantize=True), device_map="cpu"
    )


def dense_bits(weight):
    """Expert weights as bf16 bits, [E, out, in]."""
    dense = dequantize(weight) if isinstance(weight, Mxfp4) else weight
    return np.asarray(dense).view(np.uint16)


def transformers_bits(parameter):
    """The same for a parameter of transformers, which is [E, in, out]."""
    return parameter.detach().bfloat16().transpose(1, 2).contiguous().view(torch.uint16).numpy()


def test_norm_and_router_agree_with_transformers():
    """On the activations that really reach them, and with the choice of experts that was recorded."""
    with np.load(CASE / "expected.npz") as arrays:
        tokens = torch.from_numpy(arrays["input_ids"]).long()
        chosen = [arrays[f"base_router_topk/{i}"].reshape(-1, 2) for i in range(2)]
    model = load(CASE / "model", torch.float32)
    seen = []
    for block in model.model.layers:
        block.post_attention_layernorm.register_forward_hook(lambda _, given, normal: seen.append((given[0], normal)))
    with torch.no_grad():
        model(tokens)
    checkpoint = Checkpoint(CASE / "model")
    for i, block in enumerate(model.model.layers):
        layer = load_moe_layer(checkpoint, i)
        x, want_normal = (tensor.reshape(-1, 64) for tensor in seen[i])
        normal = rms_norm(jnp.asarray(x.numpy()), layer.norm_weight, checkpoint.config.rms_norm_eps)
        np.testing.assert_allclose(normal, want_normal, rtol=2e-6, atol=1e-6)
        router = block.mlp.router
        want = torch.nn.functional.linear(want_normal, router.weight, router.bias)
        logits = np.asarray(router_logits(layer, normal))
        np.testing.assert_allclose(logits, want.detach(), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(np.argsort(-logits, axis=-1)[:, :2], chosen[i])


def test_reads_what_transformers_saves_of_a_dequantised_model(tmp_path):
    """In transformers 5's own spelling of config.json."""
    load(CASE / "model", torch.bfloat16).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    check_dense(tmp_path)


def test_reads_dense_weights_under_the_packed_names(tmp_path):
    """As transformers 5.23 writes them, which cannot read them again."""
    load(CASE / "model", torch.bfloat16).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    renamed = {re.sub(r"(experts\.\w+_proj)(_blocks)?$", r"\1_blocks", name): t for name, t in load_file(file).items()}
    assert renamed["model.layers.1.mlp.experts.down_proj_blocks"].shape == (4, 96, 64)
    save_file(renamed, file)
    check_dense(tmp_path)


def test_reads_the_unquantised_form(tmp_path):
    """As a model that was never quantised is saved: dense weights under their own names."""
    model = load(CASE / "model", torch.bfloat16)
    fresh = GptOssForCausalLM(model.config).bfloat16()
    fresh.load_state_dict(model.state_dict())
    fresh.save_pretrained(tmp_path)
    name = "model.layers.1.mlp.experts.down_proj"
    assert load_file(tmp_path / "model.safetensors")[name].shape == (4, 96, 64)
    check_dense(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "suffix"), [(torch.bfloat16, "_blocks"), (torch.float32, ""), (torch.float16, "_blocks")]
)
def test_logits_of_what_transformers_saves_in_any_dtype(dtype, suffix, tmp_path):
    """A new model, so values between bfloat16's: jmoe rounds them to bfloat16 as transformers does when asked to."""
    config = load(CASE / "model", torch.float32).config
    torch.manual_seed(0)
    GptOssForCausalLM(config).to(dtype).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert {tensor.dtype.name for tensor in tensors.values()} == {str(dtype).removeprefix("torch.")}
    theirs = GptOssForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager").float()
    # As transformers 5 up to 5.23 named dense experts, which it could not read again.
    save_file({re.sub(r"(experts\.\w+_proj)$", rf"\1{suffix}", name): t for name, t in tensors.items()}, file)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 21)).astype(np.int32)
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if dtype != torch.bfloat16 else "error", CheckpointWarning)
        got = np.asarray(gpt_oss.load(tmp_path, dtype=jnp.float32, progress=False)(tokens))
    assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want)


@pytest.mark.filterwarnings("ignore:.*float(16|32) weights are rounded:jmoe.checkpoint.config_file.CheckpointWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_reads_what_transformers_saves_of_a_model_dequantised_in_another_dtype(dtype, tmp_path):
    """MXFP4's values are exact in either, so nothing is lost on the way."""
    load(CASE / "model", dtype).save_pretrained(tmp_path)
    check_dense(tmp_path)


def check_dense(directory):
    """That a dense copy of the tiny case holds the same weights as the packed original."""
    packed, dense = Checkpoint(CASE / "model"), Checkpoint(directory)
    assert dense.config == packed.config
    for i in range(2):
        want, got = load_moe_layer(packed, i), load_moe_layer(dense, i)
        for projection in PROJECTIONS:
            weight = getattr(got.experts, projection)
            assert not isinstance(weight, Mxfp4)
            np.testing.assert_array_equal(dense_bits(weight), dense_bits(getattr(want.experts, projection)))
        np.testing.assert_array_equal(got.experts.gate_up_bias, want.experts.gate_up_bias)


@pytest.fixture(scope="module")
def example():
    """The shipped example in transformers."""
    return load(EXAMPLE, torch.float32)


def test_example_experts_agree_bit_for_bit(example):
    checkpoint = Checkpoint(EXAMPLE)
    for i, block in enumerate(example.model.layers):
        experts = load_moe_layer(checkpoint, i).experts
        for projection in PROJECTIONS:
            want = transformers_bits(getattr(block.mlp.experts, f"{projection}_proj"))
            np.testing.assert_array_equal(dense_bits(getattr(experts, projection)), want)


def test_example_has_the_released_layout():
    config = json.loads((EXAMPLE / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    index = json.loads((EXAMPLE / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00002.safetensors" for i in range(3)}
    tensors = {}
    for shard in set(index["weight_map"].values()):
        tensors |= {name: (tensor, shard) for name, tensor in load_file(EXAMPLE / shard).items()}
    assert {name: shard for name, (_, shard) in tensors.items()} == index["weight_map"]
    assert sum(tensor.nbytes for tensor, _ in tensors.values()) == index["metadata"]["total_size"]
    for name, (tensor, _) in tensors.items():
        packed = name.endswith(("_blocks", "_scales"))
        assert tensor.dtype.name == ("uint8" if packed else "bfloat16"), name
    assert len([name for name in tensors if name.endswith("_blocks")]) == 4
    assert sum(file.stat().st_size for file in EXAMPLE.rglob("*") if file.is_file()) < 2_000_000


def test_example_tokenizer_covers_the_license():
    tokenizer = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == Checkpoint(EXAMPLE).config.vocab_size
    text = (ROOT / "LICENSE").read_text()
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text) / 2  # it has learnt merges


def test_example_adapter_loads_for_every_layer():
    config = Checkpoint(EXAMPLE).config
    for layer in range(config.num_hidden_layers):
        lora = load_lora(EXAMPLE / "adapter", config, layer)
        assert lora.gate_up_a.shape == (1, 8, 8, 128)
        assert lora.down_b.shape == (1, 8, 128, 8)
        assert lora.gate_up_scale.tolist() == lora.down_scale.tolist() == [2.0]
        assert float(jnp.abs(lora.gate_up_b).max()) > 0


def test_example_activations_are_of_order_one_and_all_experts_work(example):
    tokens = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json")).encode((ROOT / "LICENSE").read_text()).ids[:256]
    checkpoint = Checkpoint(EXAMPLE)
    with torch.no_grad():
        hidden = example(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    for i in range(checkpoint.config.num_hidden_layers):
        layer = load_moe_layer(checkpoint, i)
        x = jnp.asarray(hidden[i][0].numpy())
        assert 0.5 < float(jnp.std(x)) < 4
        logits = np.asarray(router_logits(layer, rms_norm(x, layer.norm_weight, checkpoint.config.rms_norm_eps)))
        best = np.argsort(-logits, axis=-1)[:, : checkpoint.config.num_experts_per_tok]
        assert np.bincount(best.ravel(), minlength=8).min() > 0.05 * best.size

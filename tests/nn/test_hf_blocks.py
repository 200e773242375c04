"""Blocks of Qwen3-MoE and Mixtral beside transformers' own, in float32: results, gradients, LoRA, files."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import save_file

import jmoe
from jmoe.checkpoint import read_hf_block
from jmoe.nn import LoraConfig, MoE
from tests.backends import in_jax, in_torch
from tests.tolerances import FLOAT32
from tests.torch_layers import relative_error

TOKENS, RANK = 24, 4


@functools.cache
def block_of(family: str) -> torch.nn.Module:
    """A block with random weights: Qwen3-30B-A3B's sizes (2048/768, 128 experts, top-8) by 16, Mixtral-8x7B's
    (4096/14336, 8 experts, top-2) by 64."""
    torch.manual_seed(0)
    if family == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

        sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 224, "num_local_experts": 8}
        block: Any = MixtralSparseMoeBlock(MixtralConfig(num_experts_per_tok=2, **sizes))
    else:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

        sizes = {"hidden_size": 128, "moe_intermediate_size": 48, "num_experts": 128, "num_experts_per_tok": 8}
        block = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(norm_topk_prob=family == "qwen3_moe", **sizes))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return block


FAMILIES = [
    pytest.param("qwen3_moe", marks=pytest.mark.slow),
    pytest.param("qwen3_moe, not renormalised", marks=pytest.mark.slow),
    "mixtral",
]


def inputs(block: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, the gradient of y), [1, T, H]."""
    generator = torch.Generator().manual_seed(1)
    shape = 1, TOKENS, block.gate.weight.shape[1]
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def halves(rows: jax.Array, axis: int) -> torch.Tensor:
    """Alternating rows of gate and up as transformers has them: all of gate, then all of up."""
    parts = [jax.lax.slice_in_dim(rows, first, None, 2, axis) for first in (0, 1)]
    return in_torch(jnp.concatenate(parts, axis))


@pytest.mark.parametrize("family", FAMILIES)
def test_y_and_gradients_are_transformers(family: str) -> None:
    block = block_of(family)
    x, dy = inputs(block)
    x.requires_grad_()
    want = block(x)
    names = ("x", "router_kernel", "gate_up", "down")
    tensors = (x, block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    gradients = dict(zip(names, torch.autograd.grad(want, tensors, dy), strict=True))

    options: dict[str, Any] = {"mxfp4": False, "train_router": True, "train_experts": True}
    layer = MoE.from_hf(block, family=family.split(",")[0], **options)
    graph, state = nnx.split(layer)
    y, pullback = jax.jit(lambda state, x: jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, x))(
        state, in_jax(x.detach())
    )
    assert relative_error(in_torch(y), want.detach()) <= FLOAT32.relative
    of_state, of_x = pullback(in_jax(dy))
    found = {"x": in_torch(of_x), "router_kernel": in_torch(of_state["router_kernel"][...]).T}
    found |= {"gate_up": halves(of_state["gate_up"][...], 1), "down": in_torch(of_state["down"][...])}
    for name, gradient in gradients.items():
        assert relative_error(found[name], gradient) <= FLOAT32.relative, name


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_lora_is_that_of_weights_with_the_delta_added(family: str) -> None:
    block = block_of(family)
    x, dy = inputs(block)
    layer = MoE.from_hf(block, family=family, mxfp4=False, lora=LoraConfig(RANK, alpha=8), rngs=nnx.Rngs(0))
    lora = layer.lora
    b = {name: jax.random.normal(jax.random.key(3), getattr(lora, name).shape) / 8 for name in ("gate_up_b", "down_b")}
    lora = dataclasses.replace(lora, **b)
    call = lambda lora: jmoe.moe(  # noqa: E731
        in_jax(x), layer.router_logits(in_jax(x)), layer.experts, top_k=layer.top_k, lora=lora,
        activation=layer.activation,
    )  # fmt: skip
    y, gradients = jax.jit(lambda lora: (call(lora), jax.vjp(call, lora)[1](in_jax(dy))[0]))(lora)

    parts = {f"{p}_{f}": getattr(lora, f"{p}_{f}") for p in ("gate_up", "down") for f in "ab"}
    there = {n: halves(part, 2) if n == "gate_up_b" else in_torch(part) for n, part in parts.items()}
    for part in there.values():
        part.requires_grad_()
    merged = {
        f"experts.{p}_proj": getattr(block.experts, f"{p}_proj").detach() + 2 * (there[f"{p}_b"] @ there[f"{p}_a"])[0]
        for p in ("gate_up", "down")
    }
    want = torch.func.functional_call(block, merged, (x,))
    assert relative_error(in_torch(y), want.detach()) <= FLOAT32.relative
    for name, gradient in zip(there, torch.autograd.grad(want, list(there.values()), dy), strict=True):
        of_jax = getattr(gradients, name)
        got = halves(of_jax, 2) if name == "gate_up_b" else in_torch(of_jax)
        assert relative_error(got, gradient) <= FLOAT32.relative, name


def save_checkpoint(folder: Path, family: str) -> torch.nn.Module:
    """A checkpoint whose layers 0 and 1 have the block, in the files' own names, bfloat16."""
    block = block_of(family)
    names = {"qwen3_moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}[family]
    tensors = {"model.norm.weight": torch.ones(4)}
    for layer in (0, 1):
        prefix = f"model.layers.{layer}.{'mlp' if family == 'qwen3_moe' else 'block_sparse_moe'}."
        tensors[f"{prefix}gate.weight"] = block.gate.weight + layer
        for expert, (gate_up, down) in enumerate(zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True)):
            matrices = (*gate_up.chunk(2), down)
            tensors |= {f"{prefix}experts.{expert}.{n}.weight": m for n, m in zip(names, matrices, strict=True)}
    save_file({n: t.detach().bfloat16().contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    config = {"model_type": family, "num_experts_per_tok": 3, "norm_topk_prob": True, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(config))
    return block


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_files_are_read_in_bf16_or_rounded_to_mxfp4(family: str, tmp_path: Path) -> None:
    block = save_checkpoint(tmp_path, family)
    whole = read_hf_block(tmp_path, family=family, layer=1, mxfp4=False)
    assert (whole.top_k, whole.scoring) == (3, jmoe.Scoring())
    assert torch.equal(halves(whole.experts.gate_up, 1), block.experts.gate_up_proj.detach().bfloat16())
    assert torch.equal(in_torch(whole.experts.down), block.experts.down_proj.detach().bfloat16())
    assert torch.equal(in_torch(whole.router_weight), (block.gate.weight + 1).detach().bfloat16())
    if family == "mixtral":
        layer = MoE.from_hf(tmp_path, family=family, layer=0, pack=True)
        want = jmoe.pack(jax.tree.map(jmoe.quantize, whole.experts))
        assert all(map(np.array_equal, jax.tree.leaves(layer.experts), jax.tree.leaves(want)))


@pytest.mark.parametrize(
    "other",
    ["mlp.gate.e_score_correction_bias", "mlp.shared_expert.gate_proj.weight", "mlp.experts.0.gate_proj.bias"],
)
def test_a_block_of_another_family_is_told_by_its_tensors(other: str) -> None:
    tensors = {"mlp.gate.weight": np.zeros((2, 32), np.float32), "norm.weight": np.ones(32), other: np.zeros(2)}
    with pytest.raises(ValueError, match=f"the block has a tensor that this family has not: {other}"):
        read_hf_block(tensors, family="qwen3_moe", top_k=1, scoring=jmoe.Scoring())


@pytest.mark.parametrize(("entry", "renormalize"), [(True, True), (False, False), (None, False)])
def test_whether_weights_are_divided_is_what_the_config_says(
    entry: bool | None, renormalize: bool, tmp_path: Path
) -> None:
    """transformers takes false where it says nothing."""
    save_checkpoint(tmp_path, "qwen3_moe")
    file = tmp_path / "config.json"
    entries = json.loads(file.read_text()) | {"norm_topk_prob": entry}
    file.write_text(json.dumps({name: value for name, value in entries.items() if value is not None}))
    read = read_hf_block(tmp_path, family="qwen3_moe", layer=0, mxfp4=False)
    assert read.scoring == jmoe.Scoring(renormalize=renormalize)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    block = save_checkpoint(tmp_path, "mixtral")
    with pytest.raises(ValueError, match=r"config\.json: model_type must be \"qwen3_moe\", got \"mixtral\""):
        read_hf_block(tmp_path, family="qwen3_moe", layer=0)
    with pytest.raises(ValueError, match=r"one tensor gate\.weight, got 2: layer says which"):
        read_hf_block(tmp_path, family="mixtral")
    with pytest.raises(ValueError, match=r"one tensor gate\.weight in layer 7, got 0"):
        read_hf_block(tmp_path, family="mixtral", layer=7)
    with pytest.raises(ValueError, match="top_k must be given with tensors"):
        read_hf_block(block.state_dict(), family="mixtral")
    tensors = {"gate.weight": np.zeros((2, 32), np.float32)}
    with pytest.raises(ValueError, match="scoring must be given with tensors of qwen3_moe, which do not say"):
        read_hf_block(tensors, family="qwen3_moe", top_k=1)
    read = functools.partial(read_hf_block, family="qwen3_moe", top_k=1, scoring=jmoe.Scoring())
    with pytest.raises(ValueError, match=r"the block has no tensor experts\.0\.gate_proj\.weight"):
        read(tensors)
    tensors["experts.0.gate_proj.weight"] = np.zeros((32, 32), np.int8)
    with pytest.raises(ValueError, match="must be bfloat16, float16 or float32, got int8"):
        read(tensors)
    with pytest.raises(
        ValueError, match="block must be a directory, tensors by name or a block with a gate, got Linear"
    ):
        read(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="pack=True packs experts in MXFP4"):
        MoE.from_hf(block, family="mixtral", mxfp4=False, pack=True)
    with pytest.raises(ValueError, match="family must be one of qwen3_moe, mixtral, got 'dbrx'"):
        read_hf_block(tensors, family="dbrx")

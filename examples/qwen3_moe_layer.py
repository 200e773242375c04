"""Puts a block of a Qwen3-MoE checkpoint into a small Flax model and trains LoRA on its experts in four bits.

    python examples/qwen3_moe_layer.py
    python examples/qwen3_moe_layer.py --checkpoint Qwen3-30B-A3B --layer 3

Without a checkpoint it writes a small one of random weights, with the names of a Qwen3-MoE checkpoint's tensors. The
model reads bytes of Python's manual: its embedding and head are random and frozen as the block is, so that what is
learnt is in LoRA alone. Takes half a minute on two cores.
"""

import json
import math
import pydoc_data.topics
import tempfile
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import typer
from flax import nnx
from safetensors.numpy import save_file

from jmoe.nn import LoraConfig, MoE, trainable_report

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, LENGTH, BATCH = 64, 32, 16, 4, 32, 16


class Model(nnx.Module):
    """The next byte's logits from a byte, by a feed-forward block."""

    def __init__(self, hidden: int, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(256, hidden, rngs=rngs)
        self.norm = nnx.RMSNorm(hidden, rngs=rngs)
        self.feed_forward = nnx.Linear(hidden, hidden, rngs=rngs)
        self.head = nnx.Linear(hidden, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits [B, T, 256] of bytes [B, T]."""
        x = self.embed(tokens)
        return self.head(x + self.feed_forward(self.norm(x).astype(jnp.bfloat16)))


def write_checkpoint(folder: Path, rng: np.random.Generator) -> None:
    """A layer of random weights as a Qwen3-MoE checkpoint has it."""

    def matrix(n: int, k: int) -> np.ndarray:
        return (rng.standard_normal((n, k)) / math.sqrt(k)).astype(ml_dtypes.bfloat16)

    prefix = "model.layers.0.mlp."
    tensors = {f"{prefix}gate.weight": matrix(EXPERTS, HIDDEN)}
    for expert in range(EXPERTS):
        for name in ("gate_proj", "up_proj"):
            tensors[f"{prefix}experts.{expert}.{name}.weight"] = matrix(INTERMEDIATE, HIDDEN)
        tensors[f"{prefix}experts.{expert}.down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE)
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "qwen3_moe", "num_experts_per_tok": TOP_K, "norm_topk_prob": True}
    (folder / "config.json").write_text(json.dumps(config))


def loss_of(model: Model, batch: jax.Array) -> jax.Array:
    """Mean nats a byte, of bytes [B, T + 1]."""
    logits = model(batch[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:].astype(jnp.int32)).mean()


@nnx.jit
def step(model: Model, optimizer: nnx.Optimizer, batch: jax.Array) -> jax.Array:
    loss, gradient = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, batch)
    optimizer.update(model, gradient)
    return loss


def main(
    checkpoint: Annotated[Path | None, typer.Option(help="A Qwen3-MoE checkpoint; none: a small random one.")] = None,
    layer: Annotated[int, typer.Option(help="Which layer's block.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps of training.", min=1)] = 100,
    rank: Annotated[int, typer.Option(help="LoRA's rank.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
) -> None:
    """Trains LoRA on a Qwen3-MoE block within a small model."""
    rng, rngs = np.random.default_rng(seed), nnx.Rngs(seed)
    with tempfile.TemporaryDirectory() as folder:
        if checkpoint is None:
            checkpoint = Path(folder)
            write_checkpoint(checkpoint, rng)
        moe = MoE.from_hf(checkpoint, family="qwen3_moe", layer=layer, lora=LoraConfig(rank), rngs=rngs)
    model = Model(moe.router_kernel.shape[0], rngs)
    model.feed_forward = moe
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    print(trainable_report(model, nnx.LoRAParam))
    text = np.frombuffer("\n".join(pydoc_data.topics.topics.values()).encode(), np.uint8)
    starts = rng.integers(0, len(text) - LENGTH - 1, (steps, BATCH))
    losses = [float(step(model, optimizer, batch)) for batch in text[starts[..., None] + np.arange(LENGTH + 1)]]
    print(f"loss {losses[0]:.3f} before, {np.mean(losses[-5:]):.3f} after {steps} steps")


if __name__ == "__main__":
    typer.run(main)

"""Trains LoRA on 4-bit experts: a small mixture-of-experts transformer learns Python, then Python's manual.

    python examples/finetune_layer.py

First the whole model is trained on source code of Python's standard library. Then its experts are rounded to MXFP4 and
everything is frozen but LoRA on the experts, which is trained on the manual. Takes two minutes on two cores.
"""

import functools
import hashlib
import pydoc_data.topics
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import jmoe
from jmoe.nn import LoraConfig, MoE, trainable_report

WIDTH, HEADS, LAYERS, EXPERTS, TOP_K, LENGTH, BATCH = 64, 4, 2, 8, 2, 64, 16
BALANCE = 0.01
"""Weight of the loss that spreads tokens over experts."""


class Block(nnx.Module):
    """Attention, then experts, each added to its input."""

    def __init__(self, moe: MoE, rngs: nnx.Rngs) -> None:
        self.attention_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.query_key_value = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.moe_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.moe = moe

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(x after the block, the load-balancing loss); x [B, T, WIDTH]."""
        parts = self.query_key_value(self.attention_norm(x)).reshape(*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        attended = jax.nn.dot_product_attention(parts[:, :, 0], parts[:, :, 1], parts[:, :, 2], is_causal=True)
        x = x + self.out(attended.reshape(x.shape))
        y, statistics = self.moe(self.moe_norm(x), statistics=True)
        return x + y, statistics.load_balancing_loss


class Model(nnx.Module):
    """The next byte's logits from the bytes before it."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(256, WIDTH, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (LENGTH, WIDTH)))
        experts = {"mxfp4": False, "train_experts": True, "train_router": True}
        moe = functools.partial(MoE, WIDTH, WIDTH, EXPERTS, top_k=TOP_K, rngs=rngs, **experts)
        self.blocks = nnx.List([Block(moe(), rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(logits [B, T, 256], the load-balancing loss) of bytes [B, T]."""
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        balance = jnp.float32(0)
        for block in self.blocks:
            x, loss = block(x)
            balance += loss / LAYERS
        return self.head(self.norm(x)), balance


def freeze_in_four_bits(model: Model, lora: LoraConfig, rngs: nnx.Rngs) -> None:
    """Rounds the experts to MXFP4 and puts new adapters on them."""
    for block in model.blocks:
        moe, e = block.moe, block.moe.experts
        experts = jmoe.Experts(jmoe.quantize(e.gate_up), e.gate_up_bias, jmoe.quantize(e.down), e.down_bias)
        kernel, bias = moe.router_kernel[...], moe.router_bias[...]
        block.moe = MoE.from_weights(experts, kernel, bias, top_k=TOP_K, lora=lora, rngs=rngs)


def next_byte_loss(model: Model, batch: jax.Array) -> jax.Array:
    """Mean nats a byte, of bytes [B, T + 1], plus what spreads tokens over experts."""
    logits, balance = model(batch[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:].astype(jnp.int32))
    return losses.mean() + BALANCE * balance


def batches(text: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """Random pieces of the text [count, BATCH, LENGTH + 1]."""
    starts = rng.integers(0, len(text) - LENGTH - 1, (count, BATCH))
    return text[starts[..., None] + np.arange(LENGTH + 1)]


def train(
    model: Model, text: np.ndarray, steps: int, rate: float, wrt: type, rng: np.random.Generator, show: Callable
) -> None:
    """Takes `steps` steps of Adam on the variables of type `wrt`."""
    schedule = optax.warmup_cosine_decay_schedule(0, rate, max(1, steps // 10), max(2, steps))
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=wrt)

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer, batch: jax.Array) -> jax.Array:
        loss, gradient = nnx.value_and_grad(next_byte_loss, argnums=nnx.DiffState(0, wrt))(model, batch)
        optimizer.update(model, gradient)
        return loss

    for batch in batches(text, rng, steps):
        show(float(step(model, optimizer, batch)))


def evaluate(model: Model, held_out: np.ndarray) -> float:
    """Mean loss over batches [N, B, T + 1]."""
    loss = nnx.jit(next_byte_loss)
    return float(np.mean([float(loss(model, batch)) for batch in held_out]))


def fingerprint(model: Model) -> str:
    """A hash of every byte that is not LoRA's."""
    _, _, frozen = nnx.split(model, nnx.LoRAParam, ...)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(frozen):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def texts() -> tuple[np.ndarray, np.ndarray]:
    """(source code, manual) as bytes: files that come with Python."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    source = b"".join((folder / f"{name}.py").read_bytes() for name in ("argparse", "ast", "datetime", "inspect"))
    manual = "\n".join(pydoc_data.topics.topics.values()).encode()
    return np.frombuffer(source, np.uint8), np.frombuffer(manual, np.uint8)


def main(
    pretrain_steps: Annotated[int, typer.Option(help="Steps of the whole model on source code.", min=1)] = 300,
    steps: Annotated[int, typer.Option(help="Steps of LoRA on the manual.", min=1)] = 300,
    rank: Annotated[int, typer.Option(help="LoRA's rank.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
) -> None:
    """Trains LoRA on a small model's 4-bit experts, and shows what that changes."""
    console, rng, rngs = Console(), np.random.default_rng(seed), nnx.Rngs(seed)
    source, manual = texts()
    held_out = batches(manual[-len(manual) // 10 :], rng, 8)
    manual = manual[: -len(manual) // 10]
    model = Model(rngs)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:

        def bar(description: str, total: int) -> Callable[[float], None]:
            task = progress.add_task(description, total=total, loss="")
            return lambda loss: progress.update(task, advance=1, loss=f"loss {loss:.3f}")

        train(model, source, pretrain_steps, 3e-3, nnx.Param, rng, bar("whole model, source code", pretrain_steps))
        whole = evaluate(model, held_out)
        freeze_in_four_bits(model, LoraConfig(rank), rngs)
        rounded, before = evaluate(model, held_out), fingerprint(model)
        train(model, manual, steps, 1e-2, nnx.LoRAParam, rng, bar("LoRA on 4-bit experts, manual", steps))
    tuned, after = evaluate(model, held_out), fingerprint(model)

    table = Table("on the manual's held-out pages", "nats a byte")
    table.add_row("trained on source code, bf16 experts", f"{whole:.3f}")
    table.add_row("its experts rounded to MXFP4", f"{rounded:.3f}")
    table.add_row("with LoRA trained on the manual", f"{tuned:.3f}")
    console.print(table)
    report = trainable_report(model, nnx.LoRAParam)
    console.print(f"{report.trainable_bytes:,} bytes trained; the others, {before} before, are {after} after")
    if after != before:
        raise SystemExit("frozen weights changed")


if __name__ == "__main__":
    typer.run(main)

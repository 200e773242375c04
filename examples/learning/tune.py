"""LoRA on a model's experts and attention by jmoe.finetune, and what it changes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import UInt8
from learning.data import Question
from learning.pretrain import Weights
from learning.sizes import Size

from jmoe import Experts, quantize
from jmoe.evaluate.score import Span, score
from jmoe.finetune.batches import Batch, Batches
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.loop import validation_loss
from jmoe.finetune.packing import pack
from jmoe.finetune.prepare import validation_batches
from jmoe.finetune.step import Trainer, TrainState, make_optimizer
from jmoe.gpt_oss.model import GptOss
from jmoe.gpt_oss.new_adapter import new_adapter
from jmoe.ops.launch.local_gpu import reads_packed_here
from jmoe.ops.packed import pack as pack_experts

ROWS = 32
"""Questions asked at once."""


def model_of(weights: Weights, size: Size, dtype: jnp.dtype, *, mxfp4: bool) -> GptOss:
    """The trained model in bfloat16, its experts rounded to MXFP4 or not."""
    embedding, layers, norm, head = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights)
    if mxfp4:
        each = [in_four_bits(jax.tree.map(lambda leaf, i=i: leaf[i], layers.experts)) for i in range(size.layers)]
        layers = dataclasses.replace(layers, experts=jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))
    return GptOss(size.config, embedding=embedding, layers=layers, norm=norm, head=head, dtype=dtype)


def in_four_bits(experts: Experts) -> Experts:
    """One layer's experts in MXFP4, as this device reads them best."""
    rounded = Experts(quantize(experts.gate_up), experts.gate_up_bias, quantize(experts.down), experts.down_bias)
    return pack_experts(rounded) if reads_packed_here() else rounded


class Tuning:
    """Runs of one model on one task that differ in their seed; compiled once."""

    def __init__(self, model: GptOss, size: Size, train: Sequence[Question], held_out: Sequence[Question]) -> None:
        self.config = FinetuneConfig(
            model="of this experiment",
            data="Unicode's names",
            out="none",
            rank=size.rank,
            alpha=2.0 * size.rank,
            length=size.length,
            batch_size=size.batch,
            steps=size.steps,
            learning_rate=size.rate,
        )
        self.base = model
        self.held_out = held_out
        self.packed = pack([question.example for question in train], size.length)
        self.validation = validation_batches(self.config, [question.example for question in held_out])
        self.optimizer = make_optimizer(self.config, size.steps)
        self.trainer = Trainer(self.adapted(0), self.optimizer, loss_chunk=self.config.loss_chunk)

    def adapted(self, seed: int) -> GptOss:
        """The model with an adapter that changes nothing yet."""
        lora = new_adapter(self.base.config, rank=self.config.rank, scale=self.config.scale, seed=seed)
        return self.base.with_adapters(lora)

    def state(self, seed: int) -> TrainState:
        """Where a run begins."""
        factors = nnx.split(self.adapted(seed), nnx.LoRAParam, ...)[1]  # type: ignore[misc]
        return TrainState(factors, self.optimizer.init(factors))

    def figures(self, state: TrainState) -> dict[str, float]:
        """What the model with this adapter does on held-out questions."""
        return {
            "loss": validation_loss(self.trainer, state, self.validation),
            "accuracy": accuracy(self.trainer.model(state), self.held_out),
        }

    def run(self, seed: int, every: int, show: Callable[[int, float, float], None]) -> dict[str, Any]:
        """Trains; the curve has a step's loss and the held-out loss after it. show is called with each of its points.

        Raises:
          FloatingPointError: a loss or a gradient is not finite.
        """
        batches = Batches(self.packed, self.config.batch_size, seed)
        state, curve, unread = self.state(seed), [], []
        curve.append({"step": 0, "loss": None, "held_out_loss": validation_loss(self.trainer, state, self.validation)})
        steps = self.config.steps
        assert steps is not None
        for step in range(1, steps + 1):
            batch = Batch(*(array[None] for array in batches.batch(step - 1)))
            state, outcome = self.trainer.step(state, batch)
            unread.append((outcome.loss, outcome.finite))
            if step % every == 0 or step == steps:
                if not all(bool(finite) for _, finite in unread):
                    raise FloatingPointError(f"a loss or gradient before step {step} is not finite")
                mean = float(np.mean([float(loss) for loss, _ in unread]))
                unread.clear()
                held = validation_loss(self.trainer, state, self.validation)
                curve.append({"step": step, "loss": mean, "held_out_loss": held})
                show(step, mean, held)
        return {"seed": seed, **self.figures(state), "curve": curve}


def accuracy(model: GptOss, questions: Sequence[Question]) -> float:
    """The share of questions whose whole answer greedy generation would write."""
    right = 0
    for begin in range(0, len(questions), ROWS):
        asked = questions[begin : begin + ROWS]
        spans = [Span((question.prompt + question.answer)[:-1], question.answer) for question in asked]
        right += sum(found.greedy for found in score(model, spans, None, ROWS))
    return right / len(questions)


def source_batches(text: UInt8[np.ndarray, "N length+1"], batch: int) -> list[Batch]:
    """Source code to tell the next byte of, in batches of one shape; N is a multiple of batch."""
    tokens = text.astype(np.int32).reshape(-1, batch, text.shape[1])
    ones = np.ones_like(tokens[:, :, 1:])
    parts = tokens[:, :, :-1], tokens[:, :, 1:], ones.astype(np.float32), ones
    return [Batch(*arrays) for arrays in zip(*parts, strict=True)]

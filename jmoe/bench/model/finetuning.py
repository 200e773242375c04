"""One step of the optimizer on a model with random weights, as `jmoe finetune` takes it."""

import statistics
import time

import jax
import numpy as np

from jmoe.bench.model.case import Figures, ModelCase
from jmoe.bench.model.memory import peak_gib
from jmoe.finetune.batches import Batch
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.flops import PEAK, flops_per_token
from jmoe.finetune.step import Trainer, make_optimizer
from jmoe.gpt_oss.new_adapter import new_adapter
from jmoe.gpt_oss.random_model import random_model

STEPS = 6
"""Of which the first compiles and is not counted."""


def measure(case: ModelCase) -> Figures:
    """The median step, its result read on the host, and the most memory held."""
    trainer = make_trainer(case)
    state, times = trainer.start, []
    for index in range(STEPS):
        batch = random_batch(case, index)
        began = time.perf_counter()
        state, outcome = trainer.step(state, batch)
        finite = bool(outcome.finite)
        times.append(time.perf_counter() - began)
        if not finite:
            raise FloatingPointError(f"{case}: the loss of step {index + 1} is {float(outcome.loss)}")
    step = statistics.median(times[1:])
    rate = case.sequences * case.length / step
    figures = {"step_ms": 1e3 * step, "tokens_per_second": rate, "peak_gib": peak_gib(), "compile_seconds": times[0]}
    if (peak := PEAK.get(jax.devices()[0].device_kind)) is not None:
        figures["mfu"] = rate * flops_per_token(case.config, case.length) / peak
    return figures


def make_trainer(case: ModelCase) -> Trainer:
    """With the defaults of `jmoe finetune`."""
    options = FinetuneConfig(
        model="none", data="none", out="none", rank=case.rank, length=case.length, batch_size=case.sequences
    )
    model = random_model(case.config, remat=options.remat)
    model = model.with_adapters(new_adapter(case.config, rank=case.rank, scale=options.scale))
    return Trainer(model, make_optimizer(options, steps=100), loss_chunk=options.loss_chunk)


def random_batch(case: ModelCase, seed: int) -> Batch:
    """One batch of whole sequences, every token trained."""
    shape = (1, case.sequences, case.length)
    tokens = np.random.default_rng(seed).integers(0, case.config.vocab_size, (*shape[:2], shape[2] + 1), np.int32)
    return Batch(tokens[..., :-1], tokens[..., 1:], np.ones(shape, np.float32), np.zeros(shape, np.int32))

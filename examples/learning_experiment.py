"""LoRA learns on 4-bit experts what it learns on 16-bit ones.

    python examples/learning_experiment.py --size small --out DIR

A small gpt-oss is trained on the source code of Python's library, bytes as tokens. Its experts are rounded to MXFP4,
and LoRA on experts and attention is trained by jmoe.finetune to tell the general category of Unicode's characters from
their names; then the same, by the same seeds and batches, on a copy with bf16 experts. DIR gets results.json, written
as results come, and curves.svg. On a CPU `ci` takes half a minute and `small` some minutes; `medium` is for a GPU.
"""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import typer
from learning.data import CATEGORIES, pieces, questions, source_code
from learning.pretrain import Weights, train
from learning.report import KINDS, draw, summary, table
from learning.sizes import SIZES, Size
from learning.tune import Tuning, model_of, source_batches
from rich.console import Console

from jmoe.bench.record import birth_certificate, version, write
from jmoe.bench.source_hash import MODEL
from jmoe.finetune.loop import validation_loss

BEGAN = time.perf_counter()


def say(text: str) -> None:
    """A line with the seconds so far."""
    print(f"[{time.perf_counter() - BEGAN:6.1f} s] {text}", flush=True)


def pretrain(size: Size, text: np.ndarray, dtype: jnp.dtype) -> tuple[Weights, dict[str, Any]]:
    """(the weights, what the training was), on random pieces of the text."""
    rng = np.random.default_rng(0)
    drawn = (pieces(text, rng, size.source_batch, size.source_length + 1) for _ in range(size.source_steps))
    every = max(1, size.source_steps // 50)
    unread: list[jax.Array] = []
    curve: list[dict[str, float]] = []

    def show(step: int, loss: jax.Array) -> None:
        unread.append(loss)
        if step == 1 or step % every == 0 or step == size.source_steps:
            curve.append({"step": step, "loss": float(np.mean([float(one) for one in unread]))})
            unread.clear()
            if step == 1 or len(curve) % 5 == 0 or step == size.source_steps:
                say(f"whole model, source code: step {step} of {size.source_steps}, loss {curve[-1]['loss']:.4f}")

    began = time.perf_counter()
    weights = train(size.config, drawn, size.source_steps, size.source_rate, dtype, show)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(weights))
    seconds = time.perf_counter() - began
    return weights, {"parameters": parameters, "text_bytes": len(text), "seconds": seconds, "curve": curve}


def main(
    out: Annotated[Path, typer.Option(help="Directory of results.json and curves.svg.")],
    size: Annotated[Literal["ci", "small", "medium"], typer.Option(help="Of model, data and runs.")] = "small",
) -> None:
    """Trains, rounds, tunes both copies, and says how they compare."""
    chosen = SIZES[size]
    out.mkdir(parents=True, exist_ok=True)
    dtype = jnp.dtype(jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32)
    text, held_text = source_code()
    train_questions, held_out = questions(chosen.per_category)
    results: dict[str, Any] = birth_certificate(MODEL) | {
        "size": size,
        "settings": dataclasses.asdict(chosen) | {"dtype": dtype.name},
        "rows": {"train": len(train_questions), "held_out": len(held_out)},
        "chance": 1 / len(CATEGORIES),
    }
    results["versions"] |= {name: version(name) for name in ("flax", "optax")}
    say(f"{size} on {results['device']}, {dtype.name}: {len(text):,} bytes of source, {len(train_questions)} questions")
    weights, results["pretraining"] = pretrain(chosen, text, dtype)
    write(out / "results.json", results)
    held_pieces = pieces(held_text, np.random.default_rng(1), 8 * chosen.batch, chosen.length + 1)
    held_source = source_batches(held_pieces, chosen.batch)
    for kind in KINDS:
        model = model_of(weights, chosen, dtype, mxfp4=kind == "mxfp4")
        tuning = Tuning(model, chosen, train_questions, held_out)
        start = tuning.state(0)
        base = tuning.figures(start) | {"source_loss": validation_loss(tuning.trainer, start, held_source)}
        results[kind] = {"base": base, "runs": []}
        say(f"{kind}, base: " + ", ".join(f"{name} {value:.4f}" for name, value in base.items()))
        for seed in chosen.seeds:

            def show(step: int, loss: float, held: float, run: str = f"{kind}, seed {seed}") -> None:
                say(f"{run}: step {step} of {chosen.steps}, loss {loss:.4f}, held out {held:.4f}")

            began = time.perf_counter()
            run = tuning.run(seed, max(1, chosen.steps // 10), show)
            results[kind]["runs"].append(run | {"seconds": time.perf_counter() - began})
            say(f"{kind}, seed {seed}: held-out loss {run['loss']:.4f}, accuracy {run['accuracy']:.4f}")
            write(out / "results.json", results)
    results["summary"] = summary(results)
    results["seconds"] = time.perf_counter() - BEGAN
    write(out / "results.json", results)
    draw(results, out / "curves.svg")
    Console().print(table(results))


if __name__ == "__main__":
    typer.run(main)

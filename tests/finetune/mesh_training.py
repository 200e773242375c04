"""Trains the tiny model on meshes, and looks for all-reduces in the compiled step."""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

import jax

if __name__ == "__main__":  # else tests/conftest.py says it
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_dtype_promotion", "strict")

from jmoe.device_mesh import make_mesh, parse_mesh_sizes
from jmoe.finetune.batches import Batch
from jmoe.finetune.step import Trainer, make_optimizer
from jmoe.gpt_oss.layout import Layout
from tests.finetune.test_step import CONFIG, model, random_batch

STEPS = 20


def trainer_on(
    sizes: Mapping[str, int], *, fsdp: bool = False, remat: Any = "nothing", dropout: float = 0.0
) -> Trainer:
    """Of the tiny model on a mesh of the first devices; on one device, and no mesh, if there are no sizes."""
    base = model()
    base.remat = remat
    if sizes:
        text = ",".join(f"{name}={size}" for name, size in sizes.items())
        mesh = make_mesh(text, jax.devices()[: math.prod(sizes.values())])
        base = base.on_mesh(mesh, Layout.of(mesh, base.config, fsdp=fsdp))
    config = dataclasses.replace(CONFIG, learning_rate=1e-3)
    return Trainer(base, make_optimizer(config, STEPS), loss_chunk=16, dropout=dropout, seed=1)


def losses(trainer: Trainer, steps: int = STEPS) -> list[float]:
    """Of steps on two batches of eight sequences each, and of a validation batch."""
    state, found = trainer.start, []
    for step in range(steps):
        state, outcome = trainer.step(state, random_batch(2, rows=8, seed=step))
        found.append(float(outcome.loss))
    validation = Batch(*(array[0] for array in random_batch(1, rows=8, seed=steps)))
    return [*found, float(trainer.loss(state, validation))]


def all_reduces(program: str) -> tuple[int, int]:
    """(how many all-reduces are within loops of compiled HLO, how many are not)."""
    bodies: dict[str, str] = {}
    for match in re.finditer(r"^(?:ENTRY )?%([\w.\-]+) \(.*?^}", program, re.MULTILINE | re.DOTALL):
        bodies[match[1]] = match[0]
    waiting = re.findall(r"body=%([\w.\-]+)", program)
    looped: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in looped:
            looped.add(name)
            waiting += re.findall(r"(?:body|calls|to_apply|condition|_computation)=%([\w.\-]+)", bodies[name])
            for branches in re.findall(r"branch_computations=\{(.*?)\}", bodies[name]):
                waiting += re.findall(r"%([\w.\-]+)", branches)
    counts = {name: len(re.findall(r" all-reduce(?:-start)?\(", body)) for name, body in bodies.items()}
    assert looped
    assert sum(counts.values()) == len(re.findall(r" all-reduce(?:-start)?\(", program))
    return sum(counts[name] for name in looped), sum(count for name, count in counts.items() if name not in looped)


if __name__ == "__main__":
    found = {}
    for case in sys.argv[1:]:
        sizes, _, more = case.partition(":")
        options = json.loads(more or "{}")
        devices = math.prod(int(part.split("=")[1]) for part in sizes.split(",") if part)
        one = trainer_on(parse_mesh_sizes(sizes, devices) if sizes else {}, **options)
        program = one.compile(one.start, random_batch(2, rows=8)).as_text()
        assert program is not None
        found[case] = {"losses": losses(one), "all_reduces": all_reduces(program)}
    print(json.dumps(found))

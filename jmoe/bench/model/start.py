"""How long a first start of `jmoe generate` makes programs, and a second: tracing, Triton and XLA, loading left out.

    python -m jmoe.bench.model.start 20b

starts two processes, one after the other, that share a cache which is empty at first.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

import jax

from jmoe.bench.model.case import sizes
from jmoe.compilation_cache import keep_compiled_programs
from jmoe.device_memory import allow_whole_gpu
from jmoe.gpt_oss.generate import generate
from jmoe.gpt_oss.random_model import random_model

PROMPT, NEW = 64, 32
"""Tokens. The new ones are two chunks, of which the first has its program made."""

CACHES = ("JAX_COMPILATION_CACHE_DIR", "TRITON_CACHE_DIR")


def seconds_of_start(size: str) -> float:
    """What the first reply of a process takes more than the second, on a random model with LoRA of this size."""
    model = jax.block_until_ready(random_model(sizes()[size], rank=16))
    prompt = [list(range(1, PROMPT + 1))]
    spent = []
    for _ in range(2):
        began = time.perf_counter()
        generate(model, prompt, max_new_tokens=NEW, stop_tokens=[])
        spent.append(time.perf_counter() - began)
    return spent[0] - spent[1]


def in_a_process(size: str, environment: Mapping[str, str]) -> float:
    """seconds_of_start in a process of its own."""
    command = [sys.executable, "-m", "jmoe.bench.model.start", size, "--once"]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(run.stdout))


def main() -> None:
    """Prints the two starts' seconds and their ratio, as JSON."""
    size = sys.argv[1]
    if "--once" in sys.argv:
        keep_compiled_programs()
        allow_whole_gpu()
        print(json.dumps(seconds_of_start(size)))
        return
    with tempfile.TemporaryDirectory() as cache:
        environment = {name: value for name, value in os.environ.items() if name not in CACHES}
        first, second = (in_a_process(size, environment | {"XDG_CACHE_HOME": cache}) for _ in range(2))
    device = jax.local_devices()[0].device_kind
    print(json.dumps({"size": size, "device": device, "first": first, "second": second, "ratio": second / first}))


if __name__ == "__main__":
    main()

"""Each case in a process of its own, so that its memory and its compiled programs are its own.

python -m jmoe.bench.model.run CASE prints the figures of one case, which is JSON, as JSON.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from jmoe.bench.model.case import Figures, ModelCase
from jmoe.device_memory import allow_whole_gpu

MODULES = {
    "generate": "generation",
    "finetune": "finetuning",
    "parts": "parts",
    "load": "loading",
    "transformers": "transformers_peer",
}
"""Where the `measure` of each kind is."""


def run(cases: Iterable[ModelCase], timeout: float = 600) -> Iterator[tuple[ModelCase, Figures]]:
    """Each case and its figures, or {"error": why there are none}."""
    for case in cases:
        yield case, run_one(case, timeout)


def run_one(case: ModelCase, timeout: float) -> Figures:
    """The figures of one case, from a process of its own that has at most so many seconds."""
    allow_whole_gpu()
    environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="true")  # in one piece, as a command has it
    if case.kind == "parts":
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer=".strip()
    command = [sys.executable, "-m", "jmoe.bench.model.run", json.dumps(case.row)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout:.0f} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(("---", "For simp"))]
        return {"error": lines[-1][:300] if lines else f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def add(results: dict[str, Any], case: ModelCase, figures: Figures) -> None:
    """Puts a case's row into results (see jmoe.bench.record), in the place of an earlier one of the same case."""
    own = case.row
    row = {**own, **figures}
    for index, earlier in enumerate(results["rows"]):
        if own.items() <= earlier.items() and own.get("mesh") == earlier.get("mesh"):
            results["rows"][index] = row
            return
    results["rows"].append(row)


def measure(case: ModelCase) -> Figures:
    """The figures of one case, in this process."""
    module = importlib.import_module(f"jmoe.bench.model.{MODULES[case.kind]}")
    return module.measure(case)  # type: ignore[no-any-return]


if __name__ == "__main__":
    print(json.dumps(measure(ModelCase(**json.loads(sys.argv[1])))))

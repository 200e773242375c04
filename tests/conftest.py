"""What every test runs under: two CPU devices for sharding, and reasons for what cannot run here."""

import os

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)

# Compilation makes the first example slow and no later one. The examples are the same each time, so that CI fails for a
# reason and not by chance.
hypothesis.settings.register_profile("jmoe", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("jmoe")


INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"


def has_gpu() -> bool:
    """Whether JAX and torch both see an NVIDIA GPU."""
    import torch

    return torch.cuda.is_available() and jax.default_backend() == "gpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none, and keeps the interpreter's tests and the others apart.

    Triton chooses its interpreter when a kernel is decorated, so one process has either.
    """
    gpu = None
    for item in items:
        if item.get_closest_marker("interpret"):
            if not INTERPRETER:
                item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1, which `make test` sets"))
        elif INTERPRETER:
            item.add_marker(pytest.mark.skip(reason="runs without TRITON_INTERPRET=1"))
        elif item.get_closest_marker("gpu"):
            gpu = has_gpu() if gpu is None else gpu
            if not gpu:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))

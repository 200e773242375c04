"""What every test runs under: two CPU devices for sharding, reasons for what cannot run here, gpt-oss's tokenizer."""

import datetime
import os
import signal
import threading
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import compiled_programs

compiled_programs.spare_the_compiler()  # before JAX is imported, which reads the environment then

import jax  # noqa: E402

from tests import array_annotations  # noqa: E402

array_annotations.install()  # before anything of jmoe is imported

from tests import harmony  # noqa: E402

jax.config.update("jax_num_cpu_devices", 2)
# A product's dtype is written down: JAX otherwise makes float32 of bfloat16 times float32 without a word.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# A shell's background jobs inherit a Ctrl-C that is ignored, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Compilation makes the first example slow and no later one. The examples are the same each time, so that CI fails for a
# reason and not by chance.
hypothesis.settings.register_profile("jmoe", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("jmoe")


@pytest.fixture(autouse=True, scope="module")
def _few_programs() -> None:
    compiled_programs.forget_if_many()


@pytest.fixture(autouse=True)
def _gpu_looked_up_anew() -> None:
    """Each test may pretend another GPU, table or version to be there: what the process found before is forgotten."""
    from jmoe.ops.launch.local_gpu import gpu_of

    gpu_of.cache_clear()


INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"


def has_gpu() -> bool:
    """Whether JAX and torch both see an NVIDIA GPU."""
    import torch

    return torch.cuda.is_available() and jax.default_backend() == "gpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--registry-required",
        action="store_true",
        help="fail tests that need a package registry where none answers; they are skipped otherwise",
    )


@pytest.fixture(scope="session")
def harmony_directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with gpt-oss's own tokenizer and chat template, and no model. Tests leave it as it is."""
    try:
        return harmony.make_directory(tmp_path_factory.mktemp("harmony"))
    except harmony.NoRegistryError as error:
        (pytest.fail if request.config.getoption("--registry-required") else pytest.skip)(
            f"gpt-oss's tokenizer needs a package registry: {error}"
        )


@pytest.fixture(scope="session")
def harmony_tokenizer(harmony_directory: Path) -> Any:
    """gpt-oss's own tokenizer and chat template, on 2025-08-05. Tests leave it as it is."""
    from jmoe.text import load_tokenizer

    return load_tokenizer(harmony_directory, datetime.date(2025, 8, 5))


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

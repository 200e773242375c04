"""What GPU tests that run side by side owe each other."""

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _free_torch_memory() -> Iterator[None]:
    """Gives back what torch keeps for later, up to 15 GiB after a reference in float64, which other tests may need."""
    yield
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()

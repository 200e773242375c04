"""Cases of attention to pages, run by the kernels in Triton's interpreter."""

import numpy as np
import torch

from jmoe.interop.interpreter import bfloat16_arithmetic
from jmoe.interop.launch import launch
from jmoe.triton_src.paged.plans import plan_paged
from jmoe.triton_src.plan import Plan
from jmoe.triton_src.tiles import LaunchTable
from tests.paged_cases import Case
from tests.tolerances import BFLOAT16

NARROW = ("heads", "cache", "sinks")


def plans_of(operation: str, case: Case, table: LaunchTable, window: int | None) -> list[Plan]:
    operands = case.operands
    sizes = {"rows": len(operands["heads"]), "heads": operands["sinks"].shape[1], "window": window}
    if operation == "paged_prefill_attention":
        sizes["sequences"] = len(operands["pages"])
    return plan_paged(operation, table, operands["cache"].shape, operands["pages"].shape[1], **sizes)


def tensors(case: Case) -> dict[str, torch.Tensor]:
    """The case's operands as the kernels take them."""
    buffers = {name: torch.from_numpy(np.array(array)) for name, array in case.operands.items()}
    buffers |= {name: buffers[name].bfloat16() for name in NARROW}
    return buffers | {name: buffers[name].reshape(1) for name in ("layer", "sinks_layer")}


def run(operation: str, case: Case, table: LaunchTable, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(attended, the cache) after launches whose results are NaN before."""
    plans = plans_of(operation, case, table, window)
    for plan in plans:
        plan.check_names()
    with bfloat16_arithmetic():
        got = launch(plans, tensors(case))
    return got["attended"].float().numpy(), got["cache"].float().numpy()


def check(operation: str, case: Case, table: LaunchTable, window: int | None) -> None:
    """The kernels' results are the case's, to a rounding of weights and one of results."""
    got, cache = run(operation, case, table, window)
    assert np.linalg.norm(got - case.wanted) <= BFLOAT16.relative * np.linalg.norm(case.wanted)
    np.testing.assert_allclose(cache, case.written, rtol=2**-7, atol=1e-3)

"""Kernels read from a profile."""

import pytest

from jmoe.bench.case import Case, Size
from jmoe.bench.ours import one_call
from jmoe.bench.profile import Kernel, median_of_calls, on_gpu_streams


def metadata(kind: str, name: str, pid: int, tid: int = 0) -> dict:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


EVENTS = [
    metadata("process_name", "/device:GPU:0", 1),
    {"ph": "M", "name": "process_sort_index", "pid": 1, "args": {"sort_index": 1}},
    metadata("process_name", "/host:CPU", 2),
    metadata("thread_name", "Stream #13(Compute)", 1, 7),
    metadata("thread_name", "XLA Modules", 1, 8),
    metadata("thread_name", "Stream of the host", 2, 7),
    {"ph": "X", "name": "down", "pid": 1, "tid": 7, "ts": 5.0, "dur": 2.0},
    {"ph": "X", "name": "gate_up", "pid": 1, "tid": 7, "ts": 1.0, "dur": 3.0},
    {"ph": "X", "name": "jit_call", "pid": 1, "tid": 8, "ts": 1.0, "dur": 6.0},
    {"ph": "X", "name": "python", "pid": 2, "tid": 7, "ts": 0.0, "dur": 9.0},
]


def test_what_ran_on_a_gpus_stream_counts_in_the_order_it_began() -> None:
    assert on_gpu_streams(EVENTS) == [Kernel("gate_up", 3.0), Kernel("down", 2.0)]


def test_a_kernels_time_is_the_median_over_calls() -> None:
    ran = [Kernel("a", t) if i % 2 == 0 else Kernel("b", 10 * t) for t in (1.0, 9.0, 2.0) for i in range(2)]
    assert median_of_calls(ran, 3) == [Kernel("a", 2.0), Kernel("b", 20.0)]


@pytest.mark.parametrize("ran", [[], [Kernel("a", 1.0)], [Kernel("a", 1.0), Kernel("b", 1.0)]])
def test_calls_that_differ_are_an_error(ran: list[Kernel]) -> None:
    with pytest.raises(RuntimeError, match=f"2 calls alike ran {len(ran)} kernels"):
        median_of_calls(ran, 2)


def test_the_profiled_call_is_the_layer() -> None:
    size = Size(64, 64, 2)
    assert one_call(Case(4, 3, 2, 1), size)().shape == (3, 64)

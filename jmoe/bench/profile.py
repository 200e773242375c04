"""Which kernels one call runs, and how long each takes, from JAX's profiler."""

import gzip
import json
import statistics
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Kernel(NamedTuple):
    """One of a call's kernels: the median of its durations, and the operation of XLA's program that it belongs to."""

    name: str
    microseconds: float
    operation: str = ""


def kernels_of(call: Callable[[], jax.Array], calls: int = 20) -> list[Kernel]:
    """The kernels of one call on a GPU, in order; copies and fills of the driver count as kernels.

    call must run the same kernels each time, without CUDA graphs, in which the profiler sees one launch.

    Raises:
      RuntimeError: the profiler saw no kernels, or not as many in each call.
    """
    call().block_until_ready()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                call().block_until_ready()
        events = read_trace(folder)
    return median_of_calls(on_gpu_streams(events), calls)


def read_trace(folder: str) -> list[dict[str, Any]]:
    """The events of the one trace that the profiler wrote there."""
    (file,) = Path(folder).rglob("*.trace.json.gz")
    return json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]  # type: ignore[no-any-return]


def on_gpu_streams(events: Iterable[dict[str, Any]]) -> list[Kernel]:
    """What ran on a GPU's streams, by the time it began, from the events of a Chrome trace."""
    events = list(events)
    named = [
        (event["args"]["name"], event) for event in events if event.get("ph") == "M" and "name" in event.get("args", {})
    ]
    gpus = {event["pid"] for name, event in named if event["name"] == "process_name" and "GPU" in name}
    streams = {
        (event["pid"], event["tid"])
        for name, event in named
        if event["name"] == "thread_name" and name.startswith("Stream")
    }
    ran = [
        event
        for event in events
        if event.get("ph") == "X" and event["pid"] in gpus and (event["pid"], event["tid"]) in streams
    ]
    return [
        Kernel(event["name"], event["dur"], event.get("args", {}).get("hlo_op", ""))
        for event in sorted(ran, key=lambda event: event["ts"])
    ]


def median_of_calls(ran: list[Kernel], calls: int) -> list[Kernel]:
    """One call's kernels from those of so many alike.

    Raises:
      RuntimeError: there are none, or the calls differ.
    """
    each = len(ran) // calls
    rounds = [ran[i * each : (i + 1) * each] for i in range(calls)]
    names = [kernel.name for kernel in rounds[0]]
    if not ran or each * calls != len(ran) or any([kernel.name for kernel in one] != names for one in rounds):
        raise RuntimeError(f"{calls} calls alike ran {len(ran)} kernels: {sorted({kernel.name for kernel in ran})}")
    return [
        Kernel(name, statistics.median(one[i].microseconds for one in rounds), rounds[0][i].operation)
        for i, name in enumerate(names)
    ]

"""Times torch calls as CUDA graphs. Imported where torch is."""

import statistics
from collections.abc import Callable

SAMPLES = 7


def graph_microseconds(call: Callable[[int], object], calls: int) -> float:
    """Median time of one call over replays of a CUDA graph of call(0), ..., call(calls - 1).

    Each runs once before: one whose routing asks for a kernel of its own would load it while the graph is captured.
    """
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(max(3, calls)):
            call(i % calls)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # JAX has threads of its own
        for i in range(calls):
            call(i)
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(SAMPLES):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / calls * 1e3)
    return statistics.median(times)

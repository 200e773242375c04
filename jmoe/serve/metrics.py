"""What /metrics says, in Prometheus's form."""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jmoe.serve.engine import EngineStats, Event, Failed, Finished, Token

TTFT_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TPOT_SECONDS = (0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
ANSWER_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0)


class RequestTimes:
    """When one of the engine's requests was given to it, and when its tokens came; seconds of a clock."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.first: float | None = None
        self.last = self.begun
        self.tokens = 0

    def note(self, event: Event) -> None:
        """Notes a token."""
        if isinstance(event, Token):
            self.last = time.perf_counter()
            self.first = self.last if self.first is None else self.first
            self.tokens += 1


class Metrics:
    """Counts of a server.

    Attributes:
      answers: requests of HTTP that are being answered by the engine now.
    """

    def __init__(self) -> None:
        """Nothing counted yet."""
        self.answers = 0
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "jmoe_requests", "Requests that the engine had, by how they ended.", ["ended"], registry=self._registry
        )
        self._first = self._histogram("jmoe_time_to_first_token_seconds", "From submission to token.", TTFT_SECONDS)
        self._each = self._histogram(
            "jmoe_time_per_output_token_seconds",
            "Between first and last token, by those after the first.",
            TPOT_SECONDS,
        )
        self._whole = self._histogram("jmoe_request_seconds", "From submission to the last token.", ANSWER_SECONDS)

    def _histogram(self, name: str, says: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, says, buckets=buckets, registry=self._registry)

    def watch(self, stats: Callable[[], EngineStats]) -> None:
        """Has /metrics say what the engine counts."""
        self._registry.register(_EngineCollector(stats))

    def begin(self) -> RequestTimes:
        """A request that is submitted now."""
        return RequestTimes()

    def end(self, times: RequestTimes, event: Finished | Failed | None) -> None:
        """Counts a request that has ended by itself; by a string of its own, if there is no event."""
        if isinstance(event, Failed):
            self._requests.labels("failed").inc()
            return
        self._requests.labels("stop" if event is None else event.reason).inc()
        if times.first is not None:
            self._first.observe(times.first - times.begun)
            self._whole.observe(times.last - times.begun)
            if times.tokens > 1:
                self._each.observe((times.last - times.first) / (times.tokens - 1))

    def cancelled(self, times: RequestTimes) -> None:
        """Counts a request whose client has gone."""
        self._requests.labels("cancelled").inc()

    def text(self) -> bytes:
        """The answer of /metrics."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """The engine's own counts, as they are when /metrics is asked."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """The counts."""
        found = self._stats()
        for name, says, value in (
            ("jmoe_requests_waiting", "Requests in the queue.", found.queued),
            ("jmoe_requests_running", "Requests in the running batch.", found.running),
            ("jmoe_pages", "Pages of the KV cache.", found.pages_total),
            ("jmoe_pages_free", "Pages that no request holds, those cached among them.", found.pages_free),
            (
                "jmoe_pages_cached",
                "Of the free pages, those whose content a prompt may still share.",
                found.cached_pages,
            ),
            ("jmoe_compiled_programs", "Programs compiled.", found.compiled_programs),
        ):
            yield GaugeMetricFamily(name, says, value=value)
        for name, says, value in (
            ("jmoe_prompt_tokens", "Tokens of prompts computed.", found.prompt_tokens),
            ("jmoe_generation_tokens", "Tokens generated.", found.new_tokens),
            ("jmoe_preemptions", "Requests put back for want of pages.", found.preemptions),
        ):
            yield CounterMetricFamily(name, says, value=value)

    def describe(self) -> list[Metric]:
        """Nothing, so that the engine isn't asked when it is registered."""
        return []

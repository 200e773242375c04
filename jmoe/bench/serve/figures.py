"""From when chunks came to figures, by the definitions of `vllm bench serve`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jmoe.bench.serve.client import Outcome


def figures(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """The figures of requests that took so many seconds in all; those that failed count in `failed` alone.

    output_tokens_per_second: all tokens of answers by all seconds. In milliseconds, of each request: ttft until its
    first chunk, tpot from the first chunk to the last by the tokens after the first, e2e until its last chunk; itl
    between two chunks, of all requests together.
    """
    good = [outcome for outcome in outcomes if outcome.error is None]
    new = sum(outcome.output_tokens for outcome in good)
    prompt = sum(outcome.prompt_tokens for outcome in good)
    return {
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "seconds": seconds,
        "prompt_tokens": prompt,
        "output_tokens": new,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": new / seconds,
        "total_tokens_per_second": (prompt + new) / seconds,
        "ttft_ms": spread([outcome.came[0] - outcome.begun for outcome in good]),
        "tpot_ms": spread(
            [
                (outcome.came[-1] - outcome.came[0]) / (outcome.output_tokens - 1)
                for outcome in good
                if outcome.output_tokens > 1
            ]
        ),
        "itl_ms": spread([gap for outcome in good for gap in np.diff(outcome.came)]),
        "e2e_ms": spread([outcome.came[-1] - outcome.begun for outcome in good]),
    }


def spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean, median and 99th percentile, in milliseconds; None of nothing."""
    if not seconds:
        return None
    values = np.asarray(seconds) * 1e3
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p99": float(np.percentile(values, 99)),
    }

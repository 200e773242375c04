"""`jmoe bench-serve` against a server whose tokens are scripted."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from jmoe.bench.serve.client import Outcome
from jmoe.bench.serve.figures import figures
from jmoe.bench.serve.load import LONGEST, SHORTEST, Load, lengths, words, works
from jmoe.cli import app
from tests.serve.fake_engine import FakeEngine
from tests.serve.serving import TINY, Serving, service_of, serving

STEP = 0.004


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    fake = FakeEngine(
        lambda request: [7] * request.sampling.max_tokens, queue_limit=100, max_model_len=2000, step_seconds=STEP
    )
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture(scope="module")
def server(engine: FakeEngine) -> Iterator[Serving]:
    with serving(service_of(engine, TINY, stop_tokens=(0,), vocab_size=512)) as running:
        yield running


def run(server: Serving, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["bench-serve", "--url", server.url, *arguments])
    return done.exit_code, done.output


def test_figures_of_a_server(server: Serving, engine: FakeEngine, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    sizes = [
        "--num-prompts",
        "12",
        "--num-warmups",
        "2",
        "--concurrency",
        "4",
        "--input-len",
        "30",
        "--output-len",
        "10",
    ]
    status, said = run(server, *sizes, "--models", "base,tuned", "--out", str(out))
    assert status == 0, said
    assert "output tokens/s" in said
    found = json.loads(out.read_text())
    assert (found["completed"], found["failed"]) == (12, 0)
    assert (found["prompt_tokens"], found["output_tokens"]) == (12 * 30, 12 * 10)
    assert found["load"]["models"] == ["base", "tuned"]
    assert STEP * 1e3 <= found["tpot_ms"]["median"] < 100 * STEP * 1e3
    measured = engine.requests[2:]
    assert [request.adapter for request in measured] == [None, "tuned"] * 6
    assert len({tuple(request.prompt) for request in measured}) == 12
    assert all(request.sampling.ignore_eos for request in measured)


def test_a_request_that_fails_is_told(server: Serving) -> None:
    status, said = run(server, "--num-prompts", "3", "--num-warmups", "0", "--input-len", "5000")
    assert status == 1
    assert "3 of 3 requests failed, the first: 400" in said


def test_figures_are_those_of_vllms_definitions() -> None:
    outcomes = [
        Outcome(begun=1.0, came=[1.5, 1.75, 2.0], prompt_tokens=5, output_tokens=3),
        Outcome(begun=1.0, came=[2.0, 3.0], prompt_tokens=7, output_tokens=5),
        Outcome(begun=1.0, came=[1.25], prompt_tokens=7, output_tokens=1),
        Outcome(begun=1.0, error="500"),
    ]
    found = figures(outcomes, seconds=2.0)
    assert (found["completed"], found["failed"]) == (3, 1)
    assert found["output_tokens_per_second"] == 4.5
    assert found["ttft_ms"] == pytest.approx({"mean": 1750 / 3, "median": 500, "p99": 990})
    assert found["tpot_ms"]["mean"] == pytest.approx((250 + 250) / 2)
    assert found["itl_ms"]["mean"] == pytest.approx((250 + 250 + 1000) / 3)
    assert found["e2e_ms"]["median"] == pytest.approx(1000)


def test_lognormal_lengths_have_their_mean() -> None:
    found = lengths(np.random.default_rng(0), 512, 215, 1.2)
    assert np.mean(found) == pytest.approx(215, abs=1)
    assert min(found) >= SHORTEST
    assert max(found) == LONGEST
    assert np.median(found) < 215


def test_a_seed_draws_the_same_prompts() -> None:
    load = Load(input_len=20, output_len=3)
    assert works(load, range(100), ["a"], 3, 1) == works(load, range(100), ["a"], 3, 1)
    assert works(load, range(100), ["a"], 3, 1) != works(load, range(100), ["a"], 3, 2)
    assert words(5, 0) == words(5, 0)


def test_a_load_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="requests must be at least 1, got 0"):
        Load(requests=0)

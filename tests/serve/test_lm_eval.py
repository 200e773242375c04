"""lm-eval's local-completions and local-chat-completions give the scores of `jmoe eval`."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.evaluate.tasks import write_tasks
from tests.serve.lm_eval_clients import by_server, in_process, write_gsm8k
from tests.serve.real_engine import real_server
from tests.serve.serving import TINY, Serving

pytestmark = pytest.mark.slow

ADAPTERS = {"tiny": None, "tuned": TINY / "adapter"}


@pytest.fixture(scope="module")
def real() -> Iterator[Serving]:
    with real_server(max_sequences=16, cache_bytes=2**23) as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(autouse=True)
def _cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


@pytest.mark.parametrize("name", ADAPTERS)
def test_scores_and_text_of_completions(real: Serving, folder: Path, name: str) -> None:
    tasks = write_tasks(folder)
    found = by_server(real, "local-completions", name, folder, tasks)
    expected = in_process(ADAPTERS[name], folder, tasks)
    assert found.metrics.keys() == expected.metrics.keys() == set(tasks)
    for task, metrics in expected.metrics.items():
        assert found.metrics[task] == pytest.approx(metrics, rel=1e-5), task
    assert found.answers["tiny_generation"] == expected.answers["tiny_generation"]
    scored = [np.array(jax.tree.leaves(each.answers["tiny_choice"]), float) for each in (found, expected)]
    np.testing.assert_allclose(*scored, rtol=1e-5)  # (log-probability, whether greedy) of each choice


@pytest.mark.parametrize("name", ADAPTERS)
def test_text_of_conversations(real: Serving, folder: Path, name: str) -> None:
    write_tasks(folder)
    options = {"apply_chat_template": True}
    found = by_server(real, "local-chat-completions", name, folder, ["tiny_generation"], **options)
    assert found == in_process(ADAPTERS[name], folder, ["tiny_generation"], **options)
    assert any(found.answers["tiny_generation"])


@pytest.mark.parametrize("name", ADAPTERS)
def test_gsm8k_of_the_harness_16_at_a_time(real: Serving, folder: Path, name: str) -> None:
    task = write_gsm8k(folder)
    options = {"gen_kwargs": {"max_gen_toks": 24}}
    found = by_server(real, "local-completions", name, folder, [task], **options)
    assert found == in_process(ADAPTERS[name], folder, [task], **options)
    assert {metric.split(",")[1] for metric in found.metrics[task]} == {"strict-match", "flexible-extract"}
    assert len({str(answer) for answer in found.answers[task]}) > 1

"""`jmoe serve`: its options, and the process with its signals."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner

from jmoe.cli import app
from jmoe.commands.serve import engine_settings, memory, named_adapters, places, read_keys

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.9", {"cache_fraction": 0.9}),
        ("20G", {"cache_bytes": 20 * 2**30}),
        ("1.5gib", {"cache_bytes": 3 * 2**29}),
        ("64MiB", {"cache_bytes": 2**26}),
        ("1000000", {"cache_bytes": 10**6}),
    ],
)
def test_memory_is_bytes_or_a_fraction(text: str, expected: dict[str, float]) -> None:
    assert memory(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-1", "20T", "90%", "1e9"])
def test_other_memory_is_an_error(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="--cache-memory takes bytes"):
        memory(text)


def test_settings_that_the_engine_refuses_are_an_error() -> None:
    with pytest.raises(typer.BadParameter, match="cache_fraction must be between 0 and 1"):
        engine_settings(cache_memory="0.0")
    assert engine_settings(cache_memory="0.5", queue_limit=3).queue_limit == 3


def test_adapters_have_names_and_directories(tmp_path: Path) -> None:
    assert named_adapters([f"a={tmp_path}", f"b={tmp_path}"]) == {"a": tmp_path, "b": tmp_path}
    for wrong in ("a", "=x", "a=", f"a={tmp_path}/nothing"):
        with pytest.raises(typer.BadParameter, match="--lora"):
            named_adapters([wrong])
    with pytest.raises(typer.BadParameter, match="given twice"):
        named_adapters([f"a={tmp_path}"] * 2)


def test_places_for_adapters() -> None:
    assert places(None, 2, False) == 2
    assert places(None, 2, True) == 6
    assert places(3, 2, False) == 3
    with pytest.raises(typer.BadParameter, match="at least 2"):
        places(1, 2, False)


def test_keys_come_from_options_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    monkeypatch.setenv("JMOE_API_KEY", "three")
    assert read_keys(["zero"], file) == ("zero", "one", "two", "three")
    monkeypatch.delenv("JMOE_API_KEY")
    assert read_keys([], None) == ()


@pytest.mark.parametrize(("given", "file", "variable"), [([""], None, None), ([], "\n", None), ([], None, " ")])
def test_an_empty_key_lets_nobody_in(
    given: list[str], file: str | None, variable: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = None if file is None else tmp_path / "keys"
    if path is not None:
        path.write_text(file or "")
    if variable is not None:
        monkeypatch.setenv("JMOE_API_KEY", variable)
    with pytest.raises(typer.BadParameter, match="is empty"):
        read_keys(given, path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--lora", f"x={TINY}", "--served-model-name", "x"], "has the name of the model"),
        (["--adapter-directory", "nowhere"], "is not a directory"),
        (["--max-num-seqs", "1000"], "128"),
        (["--lora", "x"], "--lora takes NAME=DIR, got 'x'"),
        (["--lora", "x=/nowhere"], "--lora x: /nowhere is not a directory"),
        (["--cache-memory", "much"], "--cache-memory takes bytes, as 20G, or a fraction, as 0.9, got 'much'"),
        (["--cache-memory"], "--cache-memory"),
    ],
)
def test_options_that_do_not_fit_are_errors_in_a_line(options: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["serve", "--model", str(TINY), *options])
    assert done.exit_code == 2
    (line,) = done.output.splitlines()
    assert line.startswith("jmoe: ")
    assert says in line


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """(a server's process, its address, what it said)."""
    command = [sys.executable, "-m", "jmoe", "serve", "--model", str(TINY), "--lora", f"tuned={TINY / 'adapter'}"]
    command += ["--served-model-name", "tiny", "--port", "0", "--cache-memory", "32M", "--max-num-seqs", "1"]
    command += ["--max-model-len", "4000", "--prefill-tokens", "64"]
    environment = os.environ | {"JMOE_API_KEY": "secret", "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as running:
        assert running.stderr is not None
        said = [running.stderr.readline()]
        found = re.search(r"listening on (http://127\.0\.0\.1:\d+), loading", said[0])
        assert found is not None, said + running.stderr.readlines()
        try:
            assert httpx.get(f"{found[1]}/health").status_code == 503
            said.append(running.stderr.readline())
            yield running, found[1], said
        finally:
            running.kill()


@pytest.mark.slow
def test_a_process_serves_until_sigterm_and_answers_what_it_has(process: Any) -> None:
    running, url, said = process
    assert said[1] == "jmoe: ready: tiny, tuned, 4000 tokens at most\n"
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.get(f"{url}/v1/models").status_code == 401
    body = {"prompt": "You may", "model": "tuned", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(base_url=url, headers={"Authorization": "Bearer secret"}, timeout=300) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        chunks = [next(lines)]
        running.send_signal(signal.SIGTERM)
        chunks += lines
    assert sum(chunk.startswith("data: {") for chunk in chunks) == 1000
    assert chunks[-2:] == ["data: [DONE]", ""] or chunks[-1] == "data: [DONE]"
    assert running.wait(60) == 0
    assert running.stderr.read() == "jmoe: SIGTERM: answering what there is; once more to end at once\n"

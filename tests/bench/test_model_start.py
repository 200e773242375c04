"""What a start of generation takes to make programs."""

import json
import sys

import pytest

from jmoe.bench.model import start


def test_two_processes_share_a_cache_that_is_empty_at_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    caches = []

    def in_a_process(size: str, environment: dict[str, str]) -> float:
        assert not {"JAX_COMPILATION_CACHE_DIR", "TRITON_CACHE_DIR"} & environment.keys()
        caches.append(environment["XDG_CACHE_HOME"])
        return {1: 30.0, 2: 6.0}[len(caches)]

    monkeypatch.setenv("TRITON_CACHE_DIR", "/of/the/user")
    monkeypatch.setattr(start, "in_a_process", in_a_process)
    monkeypatch.setattr(sys, "argv", ["start", "tiny"])
    start.main()
    assert len(set(caches)) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed == printed | {"size": "tiny", "first": 30.0, "second": 6.0, "ratio": 0.2}

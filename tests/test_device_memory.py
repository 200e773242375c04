"""What JAX is told of the GPU's memory."""

import os

import pytest

from jmoe.device_memory import NAMES, allow_whole_gpu


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def test_nearly_all_unless_the_user_says_otherwise() -> None:
    allow_whole_gpu()
    assert [os.environ.get(name) for name in NAMES] == ["0.95", None]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_has_set_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0.5")
    allow_whole_gpu()
    assert [os.environ.get(other) for other in NAMES] == ["0.5" if other == name else None for other in NAMES]

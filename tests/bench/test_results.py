"""The results file, and what is derived from it."""

import json
from pathlib import Path

import pytest

from jmoe.bench.case import Case, Size
from jmoe.bench.figures import Row, marlin_layer, peer_layer, ratio
from jmoe.bench.record import birth_certificate, write
from jmoe.bench.results import add, start
from jmoe.bench.source_hash import LAYER

CERTIFICATE = {"date": "2000-01-01", "commit": "abc", "source_hash": "abc", "device": "GPU", "versions": {"jax": "1"}}


def row(case: Case, **microseconds: float | str) -> Row:
    """A row with figures whose names have _ for spaces."""
    names = {"triton_kernels", "triton_kernels routing"}
    figures = {name if name in names else name.replace("_", " "): value for name, value in microseconds.items()}
    routing = figures.pop("routing", None)
    figures |= {} if routing is None else {"triton_kernels routing": routing}
    keys = ("experts", "tokens", "rank", "adapters")
    return {**{key: getattr(case, key) for key in keys}, "microseconds": figures}


def test_the_peer_is_the_faster_with_routing() -> None:
    base = row(Case(32, 4), jmoe_packed=60.0, triton_kernels=100.0, routing=20.0, Marlin_GEMMs=70.0)
    assert marlin_layer(base) == 90
    assert peer_layer([base], Case(32, 4)) == 90
    assert ratio([base], Case(32, 4)) == pytest.approx(2 / 3)
    base["microseconds"]["Marlin GEMMs"] = 85.0
    assert peer_layer([base], Case(32, 4)) == 100


def test_a_peer_that_failed_is_no_peer() -> None:
    case = Case(32, 4)
    assert peer_layer([row(case, triton_kernels=100.0, routing=20.0, Marlin_GEMMs="OOM")], case) == 100
    assert peer_layer([row(case, triton_kernels="no", routing="no", Marlin_GEMMs=10.0)], case) is None
    assert ratio([row(case, jmoe_packed="failed", triton_kernels=100.0)], case) is None
    assert peer_layer([], case) is None


def test_the_peer_with_lora_is_the_layer_without_and_vllms_adapters() -> None:
    base, lora = Case(32, 4), Case(32, 4, 16, 1)
    rows = [row(base, triton_kernels=100.0), row(lora, jmoe_packed=75.0, vLLM_LoRA=50.0)]
    assert peer_layer(rows, lora) == 150
    assert ratio(rows, lora) == 0.5
    assert peer_layer(rows[1:], lora) is None
    rows[1]["microseconds"]["vLLM LoRA"] = "not installed"
    assert peer_layer(rows, lora) is None
    other_size = [row(Case(128, 4), triton_kernels=100.0), row(lora, jmoe_packed=75.0, vLLM_LoRA=50.0)]
    assert ratio(other_size, lora) is None


def test_mixed_adapters_have_no_peer() -> None:
    mixed = Case(32, 64, 16, 8)
    rows = [row(Case(32, 64), triton_kernels=100.0), row(mixed, jmoe_packed=75.0, vLLM_LoRA=50.0)]
    assert ratio(rows, mixed) is None


def test_a_second_run_adds_and_replaces(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    first = start(CERTIFICATE, Size(), out)
    add(first, Case(32, 64), {"jmoe packed": 3.0, "Marlin GEMMs": "not installed", "triton_kernels": 5.0})
    add(first, Case(32, 1), {"jmoe packed": 1.0})
    write(out, first)
    second = start({**CERTIFICATE, "date": "2000-01-02"}, Size(), out)
    add(second, Case(32, 64), {"jmoe packed": 2.0, "Marlin GEMMs": 4.0, "triton_kernels": "no GPU"})
    add(second, Case(32, 4, 16, 1), {"jmoe packed": 7.0})
    write(out, second)
    assert json.loads(out.read_text()) == {
        **CERTIFICATE,
        "date": "2000-01-02",
        "layer": {"hidden": 2880, "intermediate": 2880, "top_k": 4},
        "rows": [
            row(Case(32, 1), jmoe_packed=1.0),
            row(Case(32, 64), jmoe_packed=2.0, Marlin_GEMMs=4.0, triton_kernels=5.0),
            row(Case(32, 4, 16, 1), jmoe_packed=7.0),
        ],
    }
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]


@pytest.mark.parametrize(
    ("key", "value"), [("commit", "def"), ("source_hash", "def"), ("device", "TPU"), ("versions", {"jax": "2"})]
)
def test_figures_of_different_things_do_not_mix(tmp_path: Path, key: str, value: object) -> None:
    out = tmp_path / "bench.json"
    write(out, start(CERTIFICATE, Size(), out))
    with pytest.raises(ValueError, match=rf"bench.json holds figures of {key} .*, this run is of .*: remove"):
        start({**CERTIFICATE, key: value}, Size(), out)
    with pytest.raises(ValueError, match="holds figures of layer"):
        start(CERTIFICATE, Size(256, 256), out)


def test_a_certificate_can_be_read_back_as_it_was(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    certificate = birth_certificate(LAYER)
    write(out, start(certificate, Size(), out))
    assert start(certificate, Size(), out)["rows"] == []

"""The generated parts of README and the docs: tables, roofline and plot."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmoe.bench import plot, readme
from jmoe.bench.case import FULL, Case, Size, cases
from jmoe.bench.results import add, start
from jmoe.bench.roofline import ROOFS, active_experts, roofline_microseconds
from jmoe.bench.run import implementations
from jmoe.bench.source_hash import LAYER, source_hash

H100 = "NVIDIA H100 80GB HBM3"


def full_results() -> dict[str, Any]:
    """Figures for the whole matrix, each different."""
    certificate = {
        "date": "2000-01-01",
        "commit": "abc",
        "source_hash": source_hash(LAYER),
        "device": H100,
        "versions": {"jax": "1", "vllm": None},
    }
    results = start(certificate, Size(), None)
    for experts in FULL.experts:
        for number, case in enumerate(cases(FULL, experts)):
            wanted = [name for each in implementations() if each.wants(case) for name in each.names]
            add(results, case, {name: 10.0 * experts + number + i / 8 for i, name in enumerate(wanted)})
    return results


def test_the_whole_matrix_makes_three_tables() -> None:
    text = readme.text_of(readme.SECTIONS["bench"], full_results())
    titles = re.findall(r"^(.*):$", text, re.MULTILINE)
    assert titles == ["32 experts, no LoRA", "32 experts, one LoRA adapter", "128 experts"]
    assert text.count("| --- ") == 7 + 7 + 10
    first = re.findall(r"^\| 16384 .*$", text, re.MULTILINE)
    assert len(first) == 3
    # jmoe 327 + 1/8, triton_kernels + 2/8, Marlin + 4/8 and routing + 3/8; no ragged_dot of 16384 tokens
    assert first[0] == f"| 16384 | 327 | 327 | 327 | 655 |  | {327 / 327.25:.2f} |"
    assert text.startswith("![Time of a layer against tokens](images/bench_h100.svg)\n\n")
    assert "8 adapters of rank 16 mixed in 64 tokens, 32 experts: 344." in text
    assert "Not measured" not in text
    assert text.endswith(f"`jmoe bench` on {H100}, 2000-01-01, commit abc; jax 1.")


def test_tables_columns_and_rows_without_figures_are_left_out() -> None:
    results = start({"date": "d", "commit": "c", "device": "GPU", "versions": {}}, Size(), None)
    add(results, Case(32, 1), {"jmoe packed": 50.0, "triton_kernels": 100.0, "Marlin GEMMs": "not installed"})
    add(results, Case(32, 4), {"Marlin GEMMs": "not installed"})
    text = readme.bench(results)
    assert "| tokens | jmoe, packed | triton_kernels | packed / peer |\n| --- | --- | --- | --- |\n" in text
    assert "| 1 | 50 | 100 | 0.50 |" in text
    assert "| 4 |" not in text
    assert "LoRA adapter" not in text
    assert "128 experts" not in text
    assert "not among the peers: Marlin and triton_kernels." in text


def test_every_expert_is_used_by_many_tokens_and_top_k_by_one() -> None:
    assert active_experts(32, 4, 1) == pytest.approx(4)
    assert active_experts(32, 4, 10_000) == pytest.approx(32)
    assert active_experts(4, 4, 1) == 4


@given(st.integers(4, 256), st.integers(1, 1 << 17))
def test_the_roofline_is_the_slower_of_reading_and_computing(experts: int, tokens: int) -> None:
    roof, size = ROOFS[H100], Size()
    time = roofline_microseconds(roof, size, experts, tokens)
    weights = 3 * 2880 * 2880
    computing = 2 * 4 * tokens * weights / 794e12 * 1e6
    reading_all = experts * weights * 17 / 32 / 3.10e12 * 1e6
    assert computing <= time <= max(computing, reading_all) * (1 + 1e-9)
    assert time <= roofline_microseconds(roof, size, experts, tokens + 1)


def test_one_token_reads_four_experts() -> None:
    time = roofline_microseconds(ROOFS[H100], Size(), 32, 1)
    assert math.isclose(time, 4 * 3 * 2880 * 2880 * 17 / 32 / 3.10e12 * 1e6)


def test_the_plot_is_the_same_each_time_and_shows_every_line(tmp_path: Path) -> None:
    results = full_results()
    drawn = plot.panels(results)
    assert {experts: list(lines) for experts, lines in drawn.items()} == {
        32: ["jmoe, packed", "triton_kernels", "Marlin", "lax.ragged_dot, bf16"],
        128: ["jmoe, packed", "triton_kernels", "Marlin"],
    }
    assert [tokens for tokens, _ in drawn[32]["jmoe, packed"]] == list(FULL.tokens)
    for name in ("a", "b"):
        plot.draw(results, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    results["rows"][0]["microseconds"]["jmoe packed"] += 100
    plot.draw(results, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


def test_a_gpu_without_a_known_roof_is_drawn_without(tmp_path: Path) -> None:
    results = {**full_results(), "device": "another"}
    plot.draw(results, tmp_path / "a.svg")
    assert "roofline" not in (tmp_path / "a.svg").read_text()
    plot.draw(full_results(), tmp_path / "a.svg")
    assert "roofline" in (tmp_path / "a.svg").read_text()


def test_the_committed_plot_is_of_the_committed_figures(tmp_path: Path) -> None:
    results = json.loads(readme.BENCH.read_text())
    committed = readme.PLOT.read_text()
    assert f"<dc:description>{plot.digest(results)}</dc:description>" in committed
    if f"Matplotlib v{matplotlib.__version__}," in committed:  # another release may draw the same differently
        plot.draw(results, tmp_path / "plot.svg")
        assert fingerprint(tmp_path / "plot.svg") == fingerprint(readme.PLOT)


def fingerprint(file: Path) -> str:
    """Of a file's bytes: short where a comparison fails."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("text", ["", "<!-- speed -->\nx\n<!-- /speed -->\n<!-- speed -->\ny\n<!-- /speed -->"])
def test_a_section_that_is_missing_or_there_twice_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="one section between <!-- speed --> and <!-- /speed -->"):
        readme.render(text, ["speed"])


def test_readme_sums_up_what_the_docs_list() -> None:
    results = json.loads(readme.SECTIONS["parity"].file.read_text())
    listed = readme.parity(results)
    first, *cells = readme.correctness(results).splitlines()[2].strip("| ").split(" | ")
    assert first == "largest error"
    for column, cell in enumerate(cells[:-1], start=2):
        rows = [line.strip("| ").split(" | ") for line in listed.splitlines()[2:] if line.startswith("|")]
        assert max(float(row[column]) for row in rows if row[column][0].isdigit()) == float(cell)
    assert readme.speed(json.loads(readme.BENCH.read_text())).count("\n| ") == 1 + len(readme.SPEED_TOKENS)

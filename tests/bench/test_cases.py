"""Which rows a run has."""

import pytest

from jmoe.bench.case import FULL, MIXED, Case, Matrix, Size, cases
from jmoe.bench.run import implementations, select


def test_rows_without_lora_come_first() -> None:
    ranks = [case.rank for case in cases(FULL, 32)]
    assert ranks == [0] * 8 + [16] * 8 + [64] * 8 + [16]


def test_the_mixed_row_is_there_where_its_tokens_and_rank_are_asked_for() -> None:
    mixed = Case(32, **MIXED)
    for tokens, ranks, present in [((64,), (16,), True), ((1, 64), (0, 64), False), ((16,), (0, 16), False)]:
        assert (mixed in cases(Matrix(Size(), tokens, (32,), ranks), 32)) is present


def test_one_adapter_where_there_is_a_rank() -> None:
    assert {(case.rank, case.adapters) for case in cases(FULL, 128)} == {(0, 0), (16, 1), (64, 1), (16, 8)}


def test_what_is_measured_where() -> None:
    def figures(case: Case) -> set[str]:
        return {name for each in implementations() if each.wants(case) for name in each.names}

    peers = {"triton_kernels", "triton_kernels routing", "Marlin GEMMs"}
    bf16 = {"jmoe bf16", "torch._grouped_mm bf16"}
    assert figures(Case(32, 64)) == {"jmoe packed", "jmoe", "jmoe routing", "lax.ragged_dot"} | bf16 | peers
    assert figures(Case(32, 16384)) == {"jmoe packed", "jmoe"} | bf16 | peers
    assert figures(Case(128, 64)) == {"jmoe packed", "jmoe routing"} | peers
    assert figures(Case(128, 64, 16, 1)) == {"jmoe packed", "vLLM LoRA"}
    assert figures(Case(32, 16384, 64, 1)) == {"jmoe packed"}
    assert figures(Case(32, 64, 16, 8)) == {"jmoe packed"}


def test_implementations_are_selected_by_the_names_of_their_figures() -> None:
    everything = implementations()
    assert select(everything, [], []) == list(everything)
    only = select(everything, ["triton_kernels routing", "jmoe"], [])
    assert [each.names[0] for each in only] == ["jmoe", "triton_kernels"]
    assert len(select(everything, [], ["lax.ragged_dot"])) == len(everything) - 1
    with pytest.raises(ValueError, match=r"implementations are jmoe packed, .*; got 'marlin'"):
        select(everything, ["marlin"], [])


def test_labels() -> None:
    assert str(Case(32, 1)) == "32 experts, 1 token"
    assert str(Case(128, 64, 16, 1)) == "128 experts, 64 tokens, LoRA r=16"
    assert str(Case(32, 64, 16, 8)) == "32 experts, 64 tokens, LoRA r=16 x8"

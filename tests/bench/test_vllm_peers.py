"""What the vLLM peers are given, as far as it can be checked without a GPU."""

import lzma
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jmoe.bench.peers import marlin, vllm_lora
from jmoe.bench.peers.vllm_blocks import in_blocks


@given(st.integers(1, 70), st.sampled_from([4, 32]), st.sampled_from([8, 16, 48]), st.integers(0, 99))
def test_blocks_hold_each_pair_once_and_one_expert_each(tokens: int, experts: int, block: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, experts, generator=generator).topk(4).indices
    blocks = in_blocks(chosen, experts, block)
    pairs, used = tokens * 4, int(blocks.used)
    assert blocks.slots.numel() == blocks.experts.numel() * block
    assert used % block == 0
    assert (blocks.slots[used:] == pairs).all()
    assert (blocks.experts[used // block :] == -1).all()
    places = blocks.slots[:used].view(-1, block)
    assert sorted(places[places < pairs].tolist()) == list(range(pairs))
    for expert, row in zip(blocks.experts[: used // block].tolist(), places, strict=True):
        held = row[row < pairs].long()
        assert held.numel() > 0
        assert (chosen.flatten()[held] == expert).all()
        assert (held.diff() > 0).all()


def test_blocks_never_outgrow_their_room() -> None:
    # The worst case: every expert has one pair more than its blocks hold.
    chosen = torch.arange(32).repeat(9).view(-1, 4)
    blocks = in_blocks(chosen, 32, 8)
    assert int(blocks.used) == 32 * 16
    assert blocks.slots.numel() >= 32 * 16


def test_without_a_gpu_the_peers_say_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert marlin.missing() == vllm_lora.missing() == "no GPU"


def test_the_number_of_the_weights_type() -> None:
    # exponent 2, mantissa 1, signed, finite values only
    assert float4_bits(marlin.float4_e2m1f()) == (2, 1, 1, 0, 1, 0)
    assert marlin.float4_e2m1f() == 562949953487106


def float4_bits(number: int) -> tuple[int, ...]:
    """The fields of vLLM's scalar types, from the lowest bit."""
    fields = []
    for width in (8, 8, 1, 32, 1, 8):
        fields.append(number & ((1 << width) - 1))
        number >>= width
    assert number == 0
    return tuple(fields)


def test_marlins_sizes_are_padded() -> None:
    assert marlin.padded(2880, 2880) == (3072, 2944)
    assert marlin.padded(256, 128) == (256, 128)


@pytest.mark.parametrize("name", ["library.so", "library.so.xz"])
def test_a_library_may_be_compressed(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", lambda path: loaded.append(Path(path).read_bytes()))
    content = b"\x7fELF"
    (tmp_path / name).write_bytes(lzma.compress(content) if name.endswith(".xz") else content)
    marlin.load(tmp_path / name)
    assert loaded == [content]

"""How vLLM's kernels want pairs grouped: runs of one expert, each run padded to whole blocks."""

from typing import NamedTuple

import torch


class Blocks(NamedTuple):
    """Pairs in blocks of one expert each, as int32 tensors of a size that no choice of experts exceeds.

    slots [S]: the pair in each place; the number of pairs, which is none of them, where a place is empty.
    experts [S / block]: the expert of each block; -1 where unused.
    used [1]: places in the blocks that are used.
    """

    slots: torch.Tensor
    experts: torch.Tensor
    used: torch.Tensor


def in_blocks(chosen: torch.Tensor, experts: int, block: int) -> Blocks:
    """The blocks of `block` places of the experts chosen [T, k]; pair i is the choice i % k of token i // k."""
    flat = chosen.flatten().long()
    pairs, device = flat.numel(), flat.device
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts)
    blocks = (counts + block - 1) // block
    first_pair, first_block = counts.cumsum(0) - counts, blocks.cumsum(0) - blocks
    place_in_run = torch.arange(pairs, device=device) - first_pair[flat[order]]
    room = (pairs + experts * (block - 1) + block - 1) // block
    slots = torch.full((room * block,), pairs, dtype=torch.int32, device=device)
    slots[first_block[flat[order]] * block + place_in_run] = order.int()
    owners = torch.full((room,), -1, dtype=torch.int32, device=device)
    used = int(blocks.sum())
    owners[:used] = torch.repeat_interleave(torch.arange(experts, device=device), blocks).int()
    return Blocks(slots, owners, torch.tensor([used * block], dtype=torch.int32, device=device))

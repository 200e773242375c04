"""Small layers as the packed kernels are given them, and what their products come to, in numpy."""

import dataclasses

import ml_dtypes
import numpy as np

from jmoe.ops.mxfp4 import Mxfp4
from jmoe.ops.packed import pack_weight
from jmoe.triton_src.problem import MoeProblem

BF16 = ml_dtypes.bfloat16
LAYER = 1
"""The layer that is read of those that are stacked."""
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


@dataclasses.dataclass
class PackedLayer:
    """Arrays by the names that plans have for them, and the weights that are packed in them."""

    problem: MoeProblem
    buffers: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]  # "gate_up" [E, 2I, H] and "down" [E, H, I], float64
    expert: np.ndarray  # [P] by position
    pair: np.ndarray  # [P] by position

    @property
    def token(self) -> np.ndarray:
        """[P] by position."""
        return self.pair // self.problem.top_k

    @property
    def x(self) -> np.ndarray:
        """[P, H] by position."""
        return self.buffers["x"][self.token]

    def shrunk(self, rows: np.ndarray, projection: str, factor: str) -> np.ndarray:
        """[P, rank]: rows [P, .] by position through one of a projection's factors, "a" or "b", and its scale."""
        matrix = self.one_layer(f"{projection}_{factor}").astype(np.float64)
        if factor == "b":
            matrix = matrix.swapaxes(2, 3)
        adapter = self.adapter
        own = np.einsum("pk,prk->pr", rows.astype(np.float64), matrix[np.maximum(adapter, 0), self.expert])
        scale = self.one_layer(f"{projection}_scale")[np.maximum(adapter, 0)]
        return np.where(adapter >= 0, own.T * scale, 0).T

    @property
    def adapter(self) -> np.ndarray:
        """[P] by position, -1 for none."""
        ids = self.buffers.get("adapter_ids")
        return np.zeros_like(self.token) if ids is None else ids[self.token]

    def one_layer(self, name: str) -> np.ndarray:
        """A buffer, or the layer of it that the kernels shall read."""
        stacked = self.problem.stacked
        of_layers = stacked.lora if name.split("_")[-1] in ("a", "b", "scale") else stacked.weights
        return self.buffers[name][LAYER] if of_layers else self.buffers[name]

    def product(self, rows: np.ndarray, projection: str) -> np.ndarray:
        """[P, N] float64: rows [P, K] by position times the weights, with bias and LoRA."""
        out = np.einsum("pk,pnk->pn", rows.astype(np.float64), self.weights[projection][self.expert])
        if f"{projection}_bias" in self.buffers:
            out += self.one_layer(f"{projection}_bias").astype(np.float64)[self.expert]
        if getattr(self.problem, projection).rank:
            out += np.einsum("pr,pnr->pn", self.rounded(rows, projection, "a"), self.own(projection, "b"))
        return out

    def input_gradient(self, rows: np.ndarray, projection: str) -> np.ndarray:
        """[P, K] float64: rows [P, N] by position times the weights the other way, with LoRA."""
        out = np.einsum("pn,pnk->pk", rows.astype(np.float64), self.weights[projection][self.expert])
        if getattr(self.problem, projection).rank:
            out += np.einsum("pr,prk->pk", self.rounded(rows, projection, "b"), self.own(projection, "a"))
        return out

    def own(self, projection: str, factor: str) -> np.ndarray:
        """A factor of each position's adapter."""
        return self.one_layer(f"{projection}_{factor}").astype(np.float64)[np.maximum(self.adapter, 0), self.expert]

    def rounded(self, rows: np.ndarray, projection: str, factor: str) -> np.ndarray:
        """shrunk as the products take it."""
        return self.shrunk(rows, projection, factor).astype(np.float32).astype(BF16).astype(np.float64)


def packed_layer(
    problem: MoeProblem, block_m: int, slots: int, held: float = 0.9, seed: int = 0, scales_from: int = 122
) -> PackedLayer:
    """A layer whose pairs lie in tiles of block_m rows; a part of them, 1 - held, is of experts that are not here.

    scales_from: the least of the three scales' bytes.
    """
    p, rng = problem, np.random.default_rng(seed)
    weights, buffers = {}, {}
    for product in (p.gate_up, p.down):
        projection, n, k = product.name, product.n, product.k
        blocks = rng.integers(0, 256, (p.experts, n, k // 32, 16), np.uint8)
        scales = rng.integers(scales_from, scales_from + 3, (p.experts, n, k // 32), np.uint8)
        # NaN for 32 weights of the last expert: a whole column of its rows.
        scales[-1, n // 2 + 1, -1] = 255
        weights[projection] = dequantize(blocks, scales)
        packed = pack_weight(Mxfp4(blocks, scales))
        buffers |= {projection: np.asarray(packed.words), f"{projection}_scales": np.asarray(packed.scales)}
        if product.bias:
            buffers[f"{projection}_bias"] = rng.standard_normal((p.experts, n)).astype(BF16)
        if rank := product.rank:
            buffers[f"{projection}_a"] = (rng.standard_normal((p.adapters, p.experts, rank, k)) / k**0.5).astype(BF16)
            buffers[f"{projection}_b"] = rng.standard_normal((p.adapters, p.experts, n, rank)).astype(BF16)
            buffers[f"{projection}_scale"] = rng.uniform(0.5, 1.5, p.adapters).astype(np.float32)
    if p.adapter_ids:
        buffers["adapter_ids"] = rng.integers(-1, p.adapters, p.tokens, np.int32)
    buffers["x"] = rng.standard_normal((p.tokens, p.hidden)).astype(BF16)
    buffers["weights"] = rng.uniform(0.1, 1, p.pairs).astype(np.float32)
    # One expert has more pairs than the others.
    expert = np.where(rng.random(p.pairs) < 0.4, 0, rng.integers(0, p.experts, p.pairs))
    expert = np.where(rng.random(p.pairs) < held, expert, p.experts)
    pair = np.argsort(expert, kind="stable")[: (expert < p.experts).sum()]
    order = np.full(p.pairs, -(2**31), np.int32)
    order[: len(pair)] = pair
    tiles = np.tile(np.array([-1, 0, 0], np.int32), (slots, 1))
    used = 0
    for e in range(p.experts):
        positions = np.flatnonzero(expert[pair] == e)
        for start in range(0, len(positions), block_m):
            tiles[used] = e, positions[0] + start, positions[-1] + 1
            used += 1
    buffers |= {"order": order, "tiles": tiles, "ready_counters": np.zeros(slots + 1, np.int32)}
    for name in ("gate_up", "down"):
        if p.stacked.weights:
            stack(buffers, (name, f"{name}_scales", f"{name}_bias"))
        if p.stacked.lora:
            stack(buffers, (f"{name}_a", f"{name}_b", f"{name}_scale"))
    if p.stacked.weights or p.stacked.lora:
        buffers["layer"] = np.array([LAYER], np.int32)
    return PackedLayer(problem, buffers, weights, expert[pair], pair)


def stack(buffers: dict[str, np.ndarray], names: tuple[str, ...]) -> None:
    """Puts a layer of other values before those that there are."""
    for name in names:
        if name in buffers:
            buffers[name] = np.stack(
                [buffers[name][::-1] ^ 1 if buffers[name].dtype == np.int32 else -buffers[name], buffers[name]]
            )


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[E, N, K] float64."""
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*scales.shape, 32)
    factors = np.where(scales == 255, np.nan, 2.0 ** (scales.astype(int) - 127))
    return (_E2M1[codes] * factors[..., None]).reshape(*scales.shape[:2], -1)


def swiglu(z: np.ndarray, alpha: float = 1.702, limit: float = 7.0) -> np.ndarray:
    """[P, 2I], gate and up side by side, -> [P, I]."""
    gate, up = np.minimum(z[:, 0::2], limit), np.clip(z[:, 1::2], -limit, limit)
    return gate / (1 + np.exp(-alpha * gate)) * (up + 1)


def assert_same(got: np.ndarray, want: np.ndarray) -> None:
    """Each element within the rounding of bfloat16 operands and result."""
    spread = np.sqrt(np.nanmean(np.square(want)))
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=2**-7, atol=2**-7 * spread)

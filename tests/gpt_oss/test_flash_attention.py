"""When attention goes to FlashAttention, and what is handed to it; a stub stands for the package."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.gpt_oss import attend, flash_attention
from jmoe.gpt_oss.attention import attend_by_xla

HEADS, KEY_HEADS, DIM = 4, 2, 8


def whole(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array, seen: jax.Array) -> jax.Array:
    """[T, H, D] attention with the keys that are seen, all scores at once."""
    k, v = (jnp.repeat(array, q.shape[1] // k.shape[1], axis=1).astype(jnp.float32) for array in (k, v))
    scores = jnp.where(seen, jnp.einsum("qnd,snd->nqs", q.astype(jnp.float32), k) / DIM**0.5, -jnp.inf)
    sink = jnp.broadcast_to(sinks[:, None, None].astype(jnp.float32), (*scores.shape[:2], 1))
    weights = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("nqs,snd->qnd", weights, v).astype(q.dtype)


def causal(length: int, window_size: tuple[int, int]) -> jax.Array:
    """As FlashAttention counts: `left` keys before a query's own; -1 is all."""
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    left, right = window_size
    assert right in (-1, 0)
    return (distance >= 0) & ((distance <= left) if left >= 0 else True)


def flash_mha(q, k, v, softmax_scale=None, is_causal=False, window_size=(-1, -1), sinks=None):
    """The package's function of that name."""
    assert is_causal
    assert softmax_scale is None
    seen = causal(q.shape[1], window_size)
    return jax.vmap(functools.partial(whole, sinks=sinks, seen=seen))(q, k, v)


def flash_mha_varlen(q, k, v, cu_seqlens, max_seqlen, softmax_scale=None, is_causal=False, window_size=(-1, -1), sinks=None):  # noqa: E501  # fmt: skip
    """The package's function of that name."""
    assert is_causal
    assert softmax_scale is None
    assert isinstance(max_seqlen, int)
    assert cu_seqlens.dtype == jnp.int32
    sequence = jnp.searchsorted(cu_seqlens, jnp.arange(q.shape[0]), side="right")
    seen = causal(q.shape[0], window_size) & (sequence[:, None] == sequence[None, :])
    return whole(q, k, v, sinks, seen)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package and a Hopper GPU, as far as jmoe sees."""
    stub = types.ModuleType("dew_flash_attn")
    stub.flash_mha, stub.flash_mha_varlen = flash_mha, flash_mha_varlen
    monkeypatch.setitem(sys.modules, "dew_flash_attn", stub)
    monkeypatch.setattr(flash_attention, "capabilities", lambda: ["9.0", "9.0"])


def inputs(length: int, dtype: jnp.dtype = jnp.bfloat16) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    q, k, v = (jax.random.normal(key, (2, length, n, DIM), dtype) for key, n in zip(keys, heads, strict=False))
    return q, k, v, 2 * jax.random.normal(keys[3], (HEADS,), dtype)


def close(got: jax.Array, want: jax.Array) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_windows_sinks_and_segments_mean_the_same(window: int | None) -> None:
    arrays = inputs(40)
    segments = jnp.stack([jnp.repeat(jnp.array([4, 1, 9]), jnp.array([3, 30, 7])), jnp.zeros(40, jnp.int32)])
    for ids in (None, segments, jnp.zeros((2, 40), jnp.int32)):
        want = attend_by_xla(*arrays, window=window, segment_ids=ids)
        got = jax.jit(functools.partial(attend, window=window, implementation="flash"))(*arrays, segment_ids=ids)
        assert got.dtype == jnp.bfloat16
        close(got, want)


def test_offsets_are_those_of_the_segments() -> None:
    segments = jnp.array([[3, 3, 7, 7], [7, 1, 1, 1]])
    assert flash_attention.segment_offsets(segments, 32).tolist() == [0, 2, 4, 5, 8, 8, 8, 8, 8]


@pytest.mark.usefixtures("package")
def test_segments_that_do_not_fit_are_nan() -> None:
    arrays, segments = inputs(8), jnp.stack([jnp.arange(8), jnp.zeros(8, jnp.int32)])
    call = functools.partial(attend, *arrays, window=4, implementation="flash", most_segments=3)
    assert jnp.isnan(call(segment_ids=segments)).all()
    assert not jnp.isnan(call(segment_ids=segments.at[0].min(4))).any()


def lowered(*arrays: jax.Array, platform: str, **options: object) -> str:
    """The program for a platform."""
    call = functools.partial(attend, window=None, **options)
    return jax.jit(call).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


def marked(q: jax.Array, *_: jax.Array, **__: object) -> jax.Array:
    """An operation that XLA's attention has not."""
    return jnp.cbrt(q.astype(jnp.float32)).astype(q.dtype)


@pytest.mark.usefixtures("package")
def test_none_is_flash_for_cuda_and_xla_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["dew_flash_attn"], "flash_mha", marked)
    monkeypatch.setattr(sys.modules["dew_flash_attn"], "flash_mha_varlen", marked)
    arrays = inputs(16)
    assert "cbrt" in lowered(*arrays, platform="cuda")
    assert "cbrt" not in lowered(*arrays, platform="cpu")
    assert "cbrt" not in lowered(*arrays, platform="cuda", implementation="xla")
    assert "cbrt" not in lowered(*inputs(16, jnp.float32), platform="cuda")
    wide = [jnp.zeros((1, 4, 1, 264), jnp.bfloat16)] * 3
    assert "cbrt" not in lowered(*wide, jnp.zeros(1), platform="cuda")
    segments = jnp.zeros((2, 16), jnp.int32)
    packed = lowered(*arrays, platform="cuda", segment_ids=segments)
    assert "cbrt" in packed
    assert "stablehlo.case" in packed or "stablehlo.if" in packed


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("implementation", [None, "flash"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_xla(packed: bool, implementation: str | None) -> None:
    arrays = inputs(12)
    ids = jnp.stack([jnp.arange(12) // 7, jnp.zeros(12, jnp.int32)]) if packed else None

    def total(*arrays: jax.Array, implementation: str | None) -> jax.Array:
        out = attend(*arrays, window=4, segment_ids=ids, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    got, want = (
        jax.jit(jax.grad(functools.partial(total, implementation=of), (0, 1, 2, 3)))(*arrays)
        for of in (implementation, "xla")
    )
    for name, one, other in zip(("q", "k", "v", "sinks"), got, want, strict=True):
        assert jnp.any(other != 0), name
        close(one, other)


def test_without_the_package_xla_runs_and_flash_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dew_flash_attn", None)  # an import of it fails
    arrays = inputs(8)
    close(attend(*arrays, window=None), attend_by_xla(*arrays, window=None))
    with pytest.raises(NotImplementedError, match=r'pip install "jmoe\[flash\]"'):
        attend(*arrays, window=None, implementation="flash")


@pytest.mark.usefixtures("package")
def test_flash_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = functools.partial(attend, window=None, implementation="flash")
    with pytest.raises(NotImplementedError, match="takes bfloat16 alone, got float32"):
        flash(*inputs(8, jnp.float32))
    with pytest.raises(NotImplementedError, match="heads of at most 256 wide, got 264"):
        flash(*[jnp.zeros((1, 4, 1, 264), jnp.bfloat16)] * 3, jnp.zeros(1))
    monkeypatch.setattr(flash_attention, "capabilities", lambda: ["8.0", "9.0"])
    with pytest.raises(NotImplementedError, match=r"compute capability 9.0, and JAX sees 8.0, 9.0"):
        flash(*inputs(8))
    monkeypatch.setattr(flash_attention, "capabilities", lambda: [])
    with pytest.raises(NotImplementedError, match="JAX sees no CUDA GPU"):
        flash(*inputs(8))
    with pytest.raises(ValueError, match=r'implementation must be "xla", "flash" or None, got \'cudnn\''):
        attend(*inputs(8), window=None, implementation="cudnn")

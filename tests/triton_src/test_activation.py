"""The activation as a value: what it may be, and which values are equal."""

import math

import pytest

import jmoe
from jmoe.triton_src.activation import check_activation


def test_the_default_is_gpt_oss() -> None:
    assert jmoe.SwiGLU() == jmoe.SwiGLU(alpha=1.702, limit=7.0, offset=1.0, interleaved=True)


def test_silu_and_mul_has_neither_clamp_nor_offset() -> None:
    assert jmoe.SiluAndMul() == jmoe.SwiGLU(alpha=1.0, limit=None, offset=0.0)
    assert not jmoe.SiluAndMul(interleaved=False).interleaved


def test_equal_activations_are_one_program() -> None:
    assert len({jmoe.SwiGLU(limit=None), jmoe.SwiGLU(limit=math.inf)}) == 1
    assert repr(jmoe.SwiGLU(alpha=1, offset=0)) == repr(jmoe.SwiGLU(alpha=1.0, offset=0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": math.nan}, "alpha must be finite, got nan"),
        ({"offset": math.inf}, "offset must be finite, got inf"),
        ({"limit": math.nan}, "limit must be at least 0, or None, got nan"),
        ({"limit": -1.0}, r"limit must be at least 0, or None, got -1\.0"),
    ],
)
def test_other_numbers_are_an_error(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jmoe.SwiGLU(**options)


def test_packed_weights_are_interleaved() -> None:
    check_activation(jmoe.SiluAndMul(), packed=True)
    check_activation(jmoe.SiluAndMul(interleaved=False), packed=False)
    with pytest.raises(ValueError, match="activation must have interleaved=True with packed experts"):
        check_activation(jmoe.SiluAndMul(interleaved=False), packed=True)
    with pytest.raises(ValueError, match=r"activation must be a jmoe\.SwiGLU, got 'silu'"):
        check_activation("silu", packed=False)

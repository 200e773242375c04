"""Plans of decoding's launches, by the operation that they are."""

from collections.abc import Callable

from jmoe.triton_src.decode.cached_attention import plan_cached_attention
from jmoe.triton_src.decode.linear import plan_decode_linear
from jmoe.triton_src.decode.norm_linear import plan_norm_linear
from jmoe.triton_src.plan import Plan

PLANS: dict[str, Callable[..., list[Plan]]] = {
    "cached_attention": plan_cached_attention,
    "decode_linear": plan_decode_linear,
    "norm_linear": plan_norm_linear,
}

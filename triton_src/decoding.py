"""Plans of decoding's launches, by the operation that they are."""

from collections.abc import Callable

from jmoe.triton_src.cached_attention import plan_cached_attention
from jmoe.triton_src.few_rows_linear import plan_few_rows_linear
from jmoe.triton_src.norm_linear import plan_norm_linear
from jmoe.triton_src.plan import Plan

PLANS: dict[str, Callable[..., list[Plan]]] = {
    "cached_attention": plan_cached_attention,
    "few_rows_linear": plan_few_rows_linear,
    "norm_linear": plan_norm_linear,
}

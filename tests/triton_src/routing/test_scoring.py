"""Routers of other models than gpt-oss by routing's kernels, in Triton's interpreter, beside torch's in float64."""

import pytest
import torch

from jmoe.interop.interpreter import bfloat16_arithmetic
from jmoe.interop.launch import launch
from jmoe.interop.reference import route
from jmoe.triton_src.scoring import Scoring
from tests.triton_src.routing.test_routing import PLANS, problem

pytestmark = pytest.mark.interpret

SCORINGS = [Scoring(renormalize=False), Scoring(scale=2.0), Scoring("sigmoid", scale=2.5), Scoring("sigmoid", False)]


@pytest.mark.parametrize("plan", ["one launch", "two launches"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS, ids=str)
def test_choice_and_weights(scoring: Scoring, biased: bool, dtype: torch.dtype, plan: str) -> None:
    tokens, experts, top_k = 37, 21, 6
    generator = torch.Generator().manual_seed(0)
    # Of few distinct values, so that ties abound; the bias tells scores apart by more than they are rounded.
    logits = (torch.randn(tokens, experts, generator=generator) * 2).round().to(dtype)
    bias = torch.randperm(experts, generator=generator) * 0.37 if biased else None
    with bfloat16_arithmetic():
        buffers = {"router_logits": logits} | ({} if bias is None else {"choice_bias": bias})
        done = launch(PLANS[plan](problem(tokens, top_k, experts, scoring=scoring, choice_bias=biased)), buffers)
    chosen, weights = route(logits.double(), top_k, scoring, bias)
    assert torch.equal(done["experts"].long(), chosen)
    torch.testing.assert_close(done["weights"].double(), weights, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_nan_is_chosen_and_shows(function: str, biased: bool) -> None:
    given = problem(1, 2, 3, scoring=Scoring(function, renormalize=False), choice_bias=biased)
    buffers = {"router_logits": torch.tensor([[5.0, torch.nan, 7.0]])}
    if biased:
        buffers["choice_bias"] = torch.zeros(3)
    done = launch(PLANS["one launch"](given), buffers)
    assert done["weights"].isnan().any()
    # Of a softmax every score is NaN, and the lower experts are taken.
    assert done["experts"].tolist() == [[0, 1] if biased and function == "softmax" else [1, 2]]

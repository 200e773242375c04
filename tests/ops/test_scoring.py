"""Routers of other models than gpt-oss: weights, gradients, meshes, programs for CUDA, and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jmoe
from jmoe.nn import MoE
from jmoe.nn.statistics import router_statistics
from jmoe.ops.random_layer import LayerShape, random_layer
from tests.ops.test_lowering import launches, lower, lower_gradient

LOGITS = jnp.array([[0.5, 2.0, -1.0, 1.5], [3.0, -3.0, 0.25, 0.0]])
DEEPSEEK = jmoe.Scoring("sigmoid", scale=2.5)
BIAS = jnp.array([0.0, -1.0, 1.0, 0.0])


def test_of_a_softmax_over_all_not_renormalised_weights_are_the_probabilities() -> None:
    routing = jmoe.route(LOGITS, 2, scoring=jmoe.Scoring(renormalize=False))
    probabilities = jax.nn.softmax(LOGITS, axis=-1)
    assert routing.experts.tolist() == [[1, 3], [0, 2]]
    assert jnp.array_equal(routing.weights, jnp.take_along_axis(probabilities, routing.experts, 1))


def test_renormalised_a_softmax_over_all_is_one_over_the_chosen() -> None:
    probabilities, default = jax.nn.softmax(LOGITS, axis=-1), jmoe.route(LOGITS, 2)
    weights = jnp.take_along_axis(probabilities, default.experts, 1)
    np.testing.assert_allclose(default.weights, weights / weights.sum(-1, keepdims=True), rtol=1e-6)
    scaled = jmoe.route(LOGITS, 2, scoring=jmoe.Scoring(scale=0.5))
    np.testing.assert_allclose(scaled.weights, default.weights / 2, rtol=1e-6)


def test_a_bias_is_for_the_choice_alone() -> None:
    routing = jmoe.route(LOGITS, 2, scoring=DEEPSEEK, choice_bias=BIAS)
    assert routing.experts.tolist() == [[2, 3], [2, 0]]
    scores = jnp.take_along_axis(jax.nn.sigmoid(LOGITS), routing.experts, 1)
    np.testing.assert_allclose(routing.weights, 2.5 * scores / scores.sum(-1, keepdims=True), rtol=1e-6)
    bare = jmoe.route(LOGITS, 2, scoring=jmoe.Scoring("sigmoid", renormalize=False), choice_bias=BIAS)
    np.testing.assert_allclose(bare.weights, scores, rtol=1e-6)
    of_bias = jax.grad(lambda bias: jmoe.route(LOGITS, 2, scoring=DEEPSEEK, choice_bias=bias).weights[0, 0])(BIAS)
    assert not of_bias.any()


def test_scores_that_all_vanish_have_weights_of_zero_and_nan_shows() -> None:
    assert not jmoe.route(jnp.full((1, 4), -200.0), 2, scoring=DEEPSEEK).weights.any()
    nan = jmoe.route(jnp.array([[1.0, jnp.nan, 2.0]]), 2, scoring=jmoe.Scoring("sigmoid"), choice_bias=jnp.zeros(3))
    assert nan.experts.tolist() == [[1, 2]]
    assert jnp.isnan(nan.weights).all()


@pytest.mark.parametrize(
    ("logits", "scoring", "bias"),
    [
        *(([at, at + 1, at - 1, at], DEEPSEEK, None) for at in (-20.0, -45.0, -50.0, -90.0, -200.0)),
        ([48.0, 0.0, 1.0, 2.0], jmoe.Scoring(), [-5.0, 1.0, 2.0, 0.0]),
    ],
)
def test_gradients_of_small_scores_are_those_of_float64(
    logits: list[float], scoring: jmoe.Scoring, bias: list[float] | None
) -> None:
    given = None if bias is None else jnp.array(bias)

    def first(logits: jax.Array) -> jax.Array:
        return jmoe.route(logits, 2, scoring=scoring, choice_bias=given).weights[0]

    chosen = np.asarray(jmoe.route(jnp.array(logits), 2, scoring=scoring, choice_bias=given).experts)
    exact = np.array(logits)
    score = 1 / (1 + np.exp(-exact)) if scoring.function == "sigmoid" else np.exp(exact) / np.exp(exact).sum()
    weights = scoring.scale * score[chosen] / (score[chosen].sum() + 1e-20)
    # d score_j / d logit_i = score_j (1 - score_j) for i = j alone, or score_j ([i = j] - score_i).
    slope = np.diag(score) - (np.diag(score**2) if scoring.function == "sigmoid" else np.outer(score, score))
    of_score = np.zeros(4)
    of_score[chosen] = -weights[0] / (score[chosen].sum() + 1e-20)
    of_score[chosen[0]] += scoring.scale / (score[chosen].sum() + 1e-20)
    np.testing.assert_allclose(jax.grad(first)(jnp.array(logits)), slope @ of_score, rtol=2e-4, atol=1e-30)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind: AxisType) -> None:
    layer = random_layer(LayerShape(4, 64, 64, 4, 2))
    mesh = jax.make_mesh((2,), ("e",), devices=jax.devices("cpu")[:2], axis_types=(kind,))
    whole = jax.device_put((layer, BIAS), NamedSharding(mesh, P()))
    split = jax.device_put(layer.experts, NamedSharding(mesh, P("e")))

    @jax.jit
    def of_x(x: jax.Array, logits: jax.Array, experts: jmoe.Experts, bias: jax.Array) -> jax.Array:
        return jmoe.moe(x, logits, experts, top_k=2, scoring=DEEPSEEK, choice_bias=bias)

    want = of_x(layer.x, layer.router_logits, layer.experts, BIAS).astype(jnp.float32)
    got = of_x(whole[0].x, whole[0].router_logits, split, whole[1]).astype(jnp.float32)
    assert float(jnp.linalg.norm(got - want)) <= 5e-3 * float(jnp.linalg.norm(want))


def test_under_vmap_of_the_bias() -> None:
    layer = random_layer(LayerShape(4, 64, 64, 4, 2))
    call = lambda bias: jmoe.moe(  # noqa: E731
        layer.x, layer.router_logits, layer.experts, top_k=2, scoring=DEEPSEEK, choice_bias=bias
    )
    biases = jnp.stack([BIAS, -BIAS])
    assert jnp.array_equal(jax.vmap(call)(biases), jnp.stack([call(bias) for bias in biases]))


@pytest.mark.parametrize(
    ("scoring", "architecture", "packed"),
    [(jmoe.Scoring(renormalize=False), "sm_80", False), (DEEPSEEK, "sm_90", True)],
    ids=["softmax", "sigmoid"],
)
def test_kernels_compile(scoring: jmoe.Scoring, architecture: str, packed: bool) -> None:
    shape = LayerShape(5, hidden=128, intermediate=128, experts=4, top_k=2)
    options = {"scoring": scoring, "choice_bias": BIAS}
    # No launch more than gpt-oss's router takes.
    assert launches(lower(shape, architecture, packed=packed, **options)) == (3 if packed else 4)
    many = dataclasses.replace(shape, tokens=700)
    assert launches(lower_gradient(many, architecture, packed=packed, **options)) == (13 if packed else 14)


def test_a_module_has_a_scoring() -> None:
    layer = random_layer(LayerShape(5, 64, 64, 4, 2))
    kernel = jax.random.normal(jax.random.key(0), (64, 4), jnp.bfloat16)
    module = MoE.from_weights(layer.experts, kernel, top_k=2, scoring=DEEPSEEK, choice_bias=BIAS)
    logits = module.router_logits(layer.x)
    options = {"scoring": DEEPSEEK, "choice_bias": BIAS}
    assert jnp.array_equal(module(layer.x), jmoe.moe(layer.x, logits, layer.experts, top_k=2, **options))
    y, statistics = module(layer.x, statistics=True)
    assert jnp.array_equal(statistics.routing.weights, jmoe.route(logits, 2, **options).weights)
    assert jnp.array_equal(module(layer.x, routing=statistics.routing), y)


def test_statistics_of_sigmoids_are_of_scores_that_sum_to_one() -> None:
    uniform = jnp.full((6, 4), -2.0)
    routing = jmoe.Routing(jnp.tile(jnp.array([[0, 1], [2, 3]]), (3, 1)), jnp.full((6, 2), 0.5))
    assert float(router_statistics(uniform, routing, DEEPSEEK).load_balancing_loss) == pytest.approx(1)


def test_what_is_no_scoring_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale must be positive and finite, got 0\.0"):
        jmoe.Scoring(scale=0)
    with pytest.raises(ValueError, match='function must be "softmax" or "sigmoid", got \'tanh\''):
        jmoe.Scoring("tanh")
    with pytest.raises(ValueError, match=r"scoring must be a jmoe\.Scoring, got 'sigmoid'"):
        jmoe.route(LOGITS, 2, scoring="sigmoid")
    layer = random_layer(LayerShape(4, 64, 64, 4, 2))
    with pytest.raises(ValueError, match=r"choice_bias must have shape \(4,\), got \(3,\)"):
        jmoe.moe(layer.x, layer.router_logits, layer.experts, top_k=2, choice_bias=BIAS[:3])

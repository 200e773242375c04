"""The engine on a mesh: pages split by heads, the texts those of one device."""

import jax
import pytest

from jmoe import gpt_oss
from jmoe.device_mesh import make_mesh
from jmoe.gpt_oss import Layout
from jmoe.serve.engine.runner import Runner
from tests.serve.engine.engines import ADAPTERS, NEW, PROMPTS, SETTINGS, ask, name_of, running


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["model=2", "expert=2"])
def test_texts_on_a_mesh_are_those_of_one_device(
    model: gpt_oss.GptOss, adapter: gpt_oss.LoraWeights, texts: list[list[int]], axes: str
) -> None:
    mesh = make_mesh(axes, jax.devices("cpu"))
    split = model.on_mesh(mesh, Layout.of(mesh))
    runner = Runner(split, SETTINGS)
    assert runner.places is not None
    parts = {leaf.sharding.shard_shape(leaf.shape)[2] for leaf in runner._state.pages.cache}
    assert parts == {model.config.num_key_value_heads // (2 if axes == "model=2" else 1)}
    with running(runner, split) as engine:
        engine.load_adapter("tiny", adapter)
        for _ in range(2):
            answers = [
                ask(engine, prompt, name_of(own), max_tokens=NEW) for prompt, own in zip(PROMPTS, ADAPTERS, strict=True)
            ]
            assert [answer.tokens for answer in answers] == texts
        drawn = ask(engine, PROMPTS[0], "tiny", temperature=1.0, presence_penalty=0.5, logprobs=2, prompt_logprobs=1)
        assert len(drawn.tokens) == 12


def test_batches_are_not_split(model: gpt_oss.GptOss) -> None:
    mesh = make_mesh("data=2", jax.devices("cpu"))
    with pytest.raises(ValueError, match=r"and no batches: .* instead of a data axis, got data=2"):
        Runner(model.on_mesh(mesh, Layout.of(mesh)), SETTINGS)

"""The loss on a fixed paragraph tells weights that fit together from those that do not."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from jmoe import gpt_oss
from jmoe.cli import app
from jmoe.device_memory import NAMES
from jmoe.doctor.loss import PARAGRAPH, bound, examine_loss, paragraph_tokens
from jmoe.text import chat_text, encode, load_tokenizer

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"
WIDTH = 64


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer, hidden = intermediate, whose head has learnt which word follows which in the paragraph.

    Its attention adds nothing: what the head reads is a word's embedding and, larger, what an expert makes of it.
    """
    folder = tmp_path_factory.mktemp("trained")
    words = sorted(set(PARAGRAPH.split()))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    entries = json.loads((TINY / "config.json").read_text())
    del entries["quantization_config"]
    entries |= {"vocab_size": len(words), "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1}
    entries |= {"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["full_attention"]}
    entries |= {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 0, "pad_token_id": 0}
    del entries["experts_per_token"]
    (folder / "config.json").write_text(json.dumps(entries))
    shapes = {
        "self_attn.q_proj": (2 * 32, WIDTH), "self_attn.k_proj": (32, WIDTH), "self_attn.v_proj": (32, WIDTH),
        "self_attn.o_proj": (WIDTH, 2 * 32), "mlp.router": (2, WIDTH),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    layer: dict[str, np.ndarray] = {f"{name}.weight": np.zeros(shape) for name, shape in shapes.items()}
    layer |= {f"{name}.bias": np.zeros(shape[0]) for name, shape in shapes.items()}
    layer |= {f"{name}_layernorm.weight": np.ones(WIDTH) for name in ("input", "post_attention")}
    layer |= {"self_attn.sinks": np.zeros(2)}
    layer |= {
        "mlp.experts.gate_up_proj_bias": np.zeros((2, 2 * WIDTH)),
        "mlp.experts.down_proj_bias": np.zeros((2, WIDTH)),
    }
    layer["mlp.experts.gate_up_proj"] = rng.standard_normal((2, WIDTH, 2 * WIDTH)) / 8
    layer["mlp.experts.down_proj"] = rng.standard_normal((2, WIDTH, WIDTH))
    tensors = {f"model.layers.0.{name}": array for name, array in layer.items()} | {
        "model.embed_tokens.weight": rng.standard_normal((len(words), WIDTH)),
        "model.norm.weight": np.ones(WIDTH),
        "lm_head.weight": np.zeros((len(words), WIDTH)),
    }
    write(folder, tensors)
    tokens = jnp.array([tokenizer.encode(PARAGRAPH).ids], jnp.int32)
    features = gpt_oss.load(folder, progress=False).hidden(tokens)[0, :-1]
    write(folder, tensors | {"lm_head.weight": train(features, tokens[0, 1:], len(words))})
    return folder


def write(folder: Path, tensors: dict[str, Any]) -> None:
    save_file(
        {name: np.asarray(array).astype(ml_dtypes.bfloat16) for name, array in tensors.items()},
        folder / "model.safetensors",
    )


def train(features: jax.Array, targets: jax.Array, vocabulary: int) -> jax.Array:
    """Logistic regression: a head [V, H] by 300 steps of Adam."""
    features, optimizer = features.astype(jnp.float32), optax.adam(0.05)

    def loss(head: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(features @ head.T, targets).mean()

    def step(carry: Any, _: None) -> tuple[Any, None]:
        head, state = carry
        with jax.numpy_dtype_promotion("standard"):  # as optax needs it
            updates, state = optimizer.update(jax.grad(loss)(head), state)
        return (head + updates, state), None

    head = jnp.zeros((vocabulary, features.shape[1]))
    return jax.lax.scan(step, (head, optimizer.init(head)), length=300)[0][0]


def swapped(model: Path, folder: Path) -> Path:
    """The same with the last two axes of its square down-projection the other way round, which no shape tells."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    write(folder, tensors | {name: np.ascontiguousarray(tensors[name].swapaxes(1, 2))})
    return folder


@pytest.mark.slow
def test_a_swapped_square_down_projection_of_a_trained_model_is_caught(trained: Path, tmp_path: Path) -> None:
    runs = [
        CliRunner().invoke(app, ["doctor", "--model", str(folder), "--loss"])
        for folder in (trained, swapped(trained, tmp_path / "swapped"))
    ]
    assert [run.exit_code for run in runs] == [0, 0]
    right, wrong = (run.output for run in runs)
    assert "loss of model: " in right
    assert "as bare text" in right
    assert "warning: the loss" not in right
    assert "warning: the loss of model is not below" in wrong
    assert "a square down_proj whose last two axes are swapped" in wrong


def test_the_loss_is_the_mean_over_the_paragraphs_tokens(trained: Path) -> None:
    report = examine_loss(trained)
    tokens = jnp.array([encode(load_tokenizer(trained), PARAGRAPH)], jnp.int32)
    logits = gpt_oss.load(trained, progress=False)(tokens)[:, :-1]
    want = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    assert report.losses == {"model": pytest.approx(float(want), rel=1e-4)}
    assert report.losses["model"] < 1 < bound(report.vocabulary)
    assert report.tokens == len(PARAGRAPH.split()) - 1
    assert not report.too_high


def test_an_untrained_model_and_its_adapter_are_above_the_bound() -> None:
    report = examine_loss(TINY, [TINY / "adapter"])
    assert report.in_template
    assert report.too_high == ("model", str(TINY / "adapter"))
    assert all(5 < loss < 8 for loss in report.losses.values())  # ln(512) is 6.2
    assert len(set(report.losses.values())) == 2


def test_in_a_template_the_answer_alone_is_scored() -> None:
    tokenizer = load_tokenizer(TINY)
    before, paragraph, in_template = paragraph_tokens(tokenizer)
    assert in_template
    assert tokenizer.decode(paragraph) == PARAGRAPH
    asked = [{"role": "user", "content": tokenizer.decode(before).split("<|message|>")[1].split("<|end|>")[0]}]
    assert tokenizer.decode(before) == chat_text(tokenizer, asked, reply=True)


@pytest.mark.parametrize("template", ["{{ broken", "{{ messages[0].content | upper }}", None])
def test_without_a_template_that_works_the_text_is_bare(template: str | None) -> None:
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = template
    before, paragraph, in_template = paragraph_tokens(tokenizer)
    assert not in_template
    assert before + paragraph == encode(tokenizer, PARAGRAPH)
    tokenizer.bos_token = "<|start|>"
    before, paragraph, _ = paragraph_tokens(tokenizer)
    assert before == [tokenizer.bos_token_id]
    assert paragraph == encode(tokenizer, PARAGRAPH)


def test_gpt_oss_own_template_takes_the_paragraph_for_its_final_answer(harmony_tokenizer: Any) -> None:
    before, paragraph, in_template = paragraph_tokens(harmony_tokenizer)
    assert in_template
    assert harmony_tokenizer.decode(before).endswith("<|start|>assistant<|channel|>final<|message|>")
    assert harmony_tokenizer.decode(paragraph) == PARAGRAPH
    assert 150 <= len(paragraph) <= 220  # about a token a word


def test_the_bound_lies_between_nothing_and_what_frequencies_tell() -> None:
    shannon_word, shannon_letter = (bits * math.log(2) for bits in (11.82, 4.03))
    assert bound(201088) == pytest.approx(6.106, abs=1e-3)
    assert bound(201088) < shannon_word < math.log(201088)
    assert bound(256) == pytest.approx(shannon_letter, abs=0.03)


def test_a_loss_that_is_no_number_is_too_high(tmp_path: Path) -> None:
    broken = shutil.copytree(TINY, tmp_path / "broken")
    for file in broken.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.norm.weight" in tensors:
            save_file(tensors | {"model.norm.weight": np.full_like(tensors["model.norm.weight"], np.nan)}, file)
    run = CliRunner().invoke(app, ["doctor", "--model", str(broken), "--loss"])
    assert run.exit_code == 0
    assert "loss of model: nan nats" in run.output
    assert "warning: the loss of model is not below 3.12" in run.output


def test_loss_needs_a_model() -> None:
    run = CliRunner().invoke(app, ["doctor", "--loss"])
    assert run.exit_code == 2
    assert "--loss needs --model" in run.output

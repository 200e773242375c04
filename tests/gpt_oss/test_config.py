"""config.json: what is read, in either spelling, and what is refused."""

import dataclasses
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import GptOssConfig

from jmoe import gpt_oss
from jmoe.gpt_oss import Config, Rope
from jmoe.gpt_oss.config import PositionsWarning, stop_tokens, warn_past_positions
from jmoe.gpt_oss.rope import inverse_frequencies, scale

CASE = Path(__file__).parents[1] / "data" / "tiny_case" / "model"
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"


def written(folder: Path, **changes: object) -> Path:
    """A directory with the tiny case's config.json, changed; None removes an entry."""
    entries = json.loads((CASE / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: v for name, v in entries.items() if v is not None}))
    return folder


def test_the_released_models() -> None:
    small, large = Config.gpt_oss_20b(), Config.gpt_oss_120b()
    assert (small.num_hidden_layers, small.num_local_experts) == (24, 32)
    assert (large.num_hidden_layers, large.num_local_experts) == (36, 128)
    assert small.windows[:3] == (128, None, 128)
    assert large.rope == Rope()


def test_rotary_frequencies_of_the_released_models() -> None:
    rope = Config.gpt_oss_20b().rope
    got = inverse_frequencies(rope, 64)[[0, 8, 9, 12, 17, 18, 31]]
    want = [1, 5.0813273e-2, 3.1705696e-2, 6.7949593e-3, 1.2931869e-4, 3.8308812e-5, 3.0235114e-7]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert scale(rope) == pytest.approx(1.3465735903)


def test_rotary_positions_that_are_not_stretched(tmp_path: Path) -> None:
    config = Config.load(written(tmp_path, rope_scaling={"rope_type": "default"}))
    assert scale(config.rope) == 1
    np.testing.assert_allclose(inverse_frequencies(config.rope, 8), [1, 150000**-0.25, 150000**-0.5, 150000**-0.75])


@pytest.mark.parametrize("theta", [150000, 10000])
def test_without_rope_settings_they_are_those_of_transformers(theta: int, tmp_path: Path) -> None:
    config = Config.load(written(tmp_path, rope_scaling=None, rope_theta=theta))
    theirs = GptOssConfig.from_pretrained(tmp_path).rope_parameters
    assert dataclasses.asdict(config.rope) | {"rope_type": "yarn"} == theirs


def test_both_spellings_of_rope(tmp_path: Path) -> None:
    entries = json.loads((CASE / "config.json").read_text())
    both = {**entries["rope_scaling"], "rope_theta": entries["rope_theta"]}
    config = Config.load(written(tmp_path, rope_scaling=None, rope_theta=None, rope_parameters=both))
    assert config == Config.load(CASE)


def test_without_layer_types_even_layers_slide(tmp_path: Path) -> None:
    assert Config.load(written(tmp_path, layer_types=None)).windows == (8, None)


YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}
FULL = YARN | {"original_max_position_embeddings": 4096, "truncate": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "llama3"}}, 'rope_type must be "yarn" or "default", got "llama3"'),
        ({"rope_scaling": {**YARN, "mscale": 2}}, r"got also \['mscale'\]"),
        ({"rope_scaling": YARN}, "original_max_position_embeddings must be a positive int, got null"),
        ({"rope_scaling": [1]}, r"rope settings must be an object, got \[1\]"),
        ({"eos_token_id": "</s>"}, 'eos_token_id must be a token id or a list of them, got "</s>"'),
        ({"quantization_config": {"quant_method": "fp8"}}, 'quant_method must be "mxfp4", got "fp8"'),
        ({"layer_types": ["full_attention"]}, "layer_types must list num_hidden_layers = 2 kinds"),
        ({"layer_types": ["full_attention", "chunked"]}, 'or "full_attention", got "chunked"'),
        ({"hidden_act": "gelu"}, 'hidden_act must be "silu", got "gelu"'),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be false, got true"),
        ({"head_dim": 0}, "head_dim must be a positive int, got 0"),
        ({"head_dim": 31}, "head_dim must be even, got 31"),
        ({"rope_theta": 1}, r"rope_theta must be between 1 and 1e\+30, got 1"),
        ({"rope_theta": 0.5}, "rope_theta must be between 1 and"),
        ({"rope_theta": 0}, "rope_theta must be a positive float, got 0"),
        ({"rope_theta": -10000}, "rope_theta must be a positive float, got -10000"),
        ({"rope_theta": 10**400}, r"rope_theta must be a positive float, got 10{199}\.\.\.$"),
        ({"rope_theta": 1e300}, "rope_theta must be between 1 and"),
        ({"rope_scaling": FULL | {"beta_fast": 1e308}}, "beta_fast must be between"),
        ({"rope_scaling": FULL | {"beta_slow": 1e-320}}, "beta_slow must be between"),
        ({"rope_scaling": FULL | {"factor": float("inf")}}, "factor must be a positive float, got Infinity"),
        ({"rope_scaling": FULL | {"original_max_position_embeddings": 4096.5}}, "must be a positive int, got 4096.5"),
        (
            {"rope_scaling": FULL | {"attention_factor": 1.2}},
            r"got also \['attention_factor'\] \(attention_factor 1.2\)",
        ),
        ({"rope_scaling": FULL | {"mscale": 1, "mscale_all_dim": 1}}, r"got also \['mscale', 'mscale_all_dim'\]"),
        ({"rope_scaling": FULL | {"attention_factor": "1"}}, r"got also \['attention_factor'\]"),
        ({"rope_scaling": FULL | {"partial_rotary_factor": 0.5}}, r"got also \['partial_rotary_factor'\]"),
        ({"rope_parameters": FULL | {"factor": 8.0}}, "factor of rope must be one, got 8.0 and 32.0"),
        ({"rope_parameters": FULL | {"rope_theta": 10000.0}}, "rope_theta of rope must be one, got 10000.0 and 150000"),
        ({"partial_rotary_factor": 0.5}, r"got also \['partial_rotary_factor'\]"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10000, got 1000000000"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers must be a positive int, got 1000"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive float, got 1000"),
        ({"sliding_window": 2**31}, "sliding_window must be a positive int, got 2147483648"),
        ({"max_position_embeddings": "long"}, 'max_position_embeddings must be a positive int, got "long"'),
        ({"pad_token_id": 10**400}, "pad_token_id must be a token id, got 1000"),
        ({"eos_token_id": 10**400}, "eos_token_id must be a token id or a list of them, got 1000"),
        ({"quantization_config": {"quant_method": "quark"}}, 'quant_method must be "mxfp4", got "quark"'),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, 'got "compressed-tensors"'),
        ({"quantization_config": {"quant_method": ["deep"] * 99}}, r'got \["deep", .{,199}\.\.\.;'),
        ({"compression_config": {"format": "pack-quantized"}}, "compression_config.quant_method must be"),
        ({"sliding_window": None}, "sliding_window must be a positive int, got null"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads = 3"),
    ],
)
def test_what_this_model_is_not(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Config.load(written(tmp_path, **changes))


def test_truncation_is_the_default_without_the_key(tmp_path: Path) -> None:
    entries = json.loads((CASE / "config.json").read_text())
    rope = {name: v for name, v in entries["rope_scaling"].items() if name != "truncate"}
    config = Config.load(written(tmp_path, rope_scaling=rope))
    assert config.rope.truncate
    assert not math.isclose(inverse_frequencies(config.rope, 64)[12], inverse_frequencies(Rope(), 64)[12])


def test_yarn_never_shrinks_attention() -> None:
    assert scale(dataclasses.replace(Rope(), factor=0.5)) == 1
    assert scale(dataclasses.replace(Rope(), factor=32.0)) == 0.1 * math.log(32) + 1


@pytest.mark.parametrize(("written", "want"), [("[0, 5]", (0, 5)), ("7", (7,)), ("null", None)])
def test_stop_tokens_are_those_of_the_generation_config(written: str, want: tuple | None, tmp_path: Path) -> None:
    config = Config.load(CASE)
    assert stop_tokens(tmp_path, config) == (config.eos_token_id,)
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {written}}}')
    assert stop_tokens(tmp_path, config) == (want or (config.eos_token_id,))


def test_stop_tokens_may_be_several_in_the_configuration(tmp_path: Path) -> None:
    directory = written(tmp_path, eos_token_id=[0, 5])
    assert Config.load(directory).eos_token_id == 0
    assert stop_tokens(directory, Config.load(directory)) == (0, 5)


def test_a_loaded_configuration_has_the_stop_tokens_of_the_command(tmp_path: Path) -> None:
    directory = written(tmp_path)
    (directory / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert Config.load(directory).stop_tokens == (3, 5)
    assert Config.load(CASE).stop_tokens == (127,)


def test_return_alone_stands_for_what_ends_a_text_of_the_released_models(tmp_path: Path) -> None:
    released = (200002, 199999, 200012)
    assert Config.gpt_oss_20b().stop_tokens == released
    assert Config.load(written(tmp_path, vocab_size=201088, eos_token_id=200002)).stop_tokens == released
    assert Config.load(written(tmp_path, vocab_size=201088, eos_token_id=None)).stop_tokens == released
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 200002}')
    assert Config.load(tmp_path).stop_tokens == (200002,)


def test_a_configuration_by_hand_stops_at_its_own_end_of_text() -> None:
    assert dataclasses.replace(Config.gpt_oss_20b(), eos_token_id=7, stop_tokens=()).stop_tokens == (7,)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ('"</s>"', "must be a token id or a list of them"),
        ("[0, true]", "must be a token id or a list of them"),
        ("[128]", "must be below the vocabulary's 128, got 128"),
    ],
)
def test_stop_tokens_that_are_none(written: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {written}}}')
    with pytest.raises(ValueError, match=message):
        stop_tokens(tmp_path, Config.load(CASE))


@pytest.mark.parametrize(
    "same",
    [
        {"attention_factor": 0.1 * math.log(32) + 1},
        {"attention_factor": 1.3465735903},
        {"attention_factor": None},
        {"mscale": 1},
        {"mscale": 1.0, "mscale_all_dim": 0},
        {"mscale": 0.1 * math.log(32) + 1},
        {"partial_rotary_factor": 1.0},
        {"original_max_position_embeddings": 4096.0, "factor": 32, "beta_fast": 32, "beta_slow": 1},
    ],
)
def test_rope_settings_that_change_nothing(same: dict, tmp_path: Path) -> None:
    rope = FULL | same
    config = Config.load(written(tmp_path, rope_scaling=rope))
    assert config == Config.load(CASE)
    assert isinstance(config.rope.original_max_position_embeddings, int)
    both = rope | {"rope_theta": 150000.0}
    assert Config.load(written(tmp_path, rope_scaling=None, rope_theta=None, rope_parameters=both)) == config


@pytest.mark.parametrize("factor", [1e-29, 1.0, 1e29])
@pytest.mark.parametrize("theta", [1 + 1e-9, 1e29])
@pytest.mark.parametrize("beta", [1e-29, 1e29])
@pytest.mark.parametrize("length", [1, 2**31 - 1])
def test_whatever_is_accepted_gives_finite_frequencies(
    factor: float, theta: float, beta: float, length: int, tmp_path: Path
) -> None:
    for fast, slow in ((beta, 1.0), (32.0, beta), (beta, beta)):
        rope = FULL | {"factor": factor, "beta_fast": fast, "beta_slow": slow}
        rope |= {"original_max_position_embeddings": length}
        config = Config.load(written(tmp_path, rope_scaling=rope, rope_theta=theta))
        assert np.isfinite(inverse_frequencies(config.rope, 64).astype(np.float32)).all()


def test_whole_floats_are_integers(tmp_path: Path) -> None:
    changes = {
        "hidden_size": 64.0,
        "sliding_window": 8.0,
        "num_hidden_layers": 2.0,
        "max_position_embeddings": 131072.0,
    }
    assert Config.load(written(tmp_path, **changes)) == Config.load(CASE)


NESTED = "[" * 100000 + "]" * 100000


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (NESTED, "is nested too deeply"),
        (f'{{"a": {NESTED}}}', "is nested too deeply"),
        ('{"a": ' * 5000 + "1" + "}" * 5000, "is nested too deeply"),
        (f'{{"a": {"9" * 5000}}}', "is not valid JSON: Exceeds the limit"),
        ('{"a": {"b": 1, "b": 2}}', 'is not valid JSON: "b" has two values, 1 and 2'),
        ("\xff\xfe{", "is not valid JSON: "),
    ],
)
def test_json_that_cannot_be_read_is_one_line(name: str, content: str, message: str, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(CASE, tmp_path / "model"))
    (directory / name).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=f"^{re.escape(str(directory / name))} {message}.{{,200}}$"):
        gpt_oss.load(directory, progress=False)


def test_a_name_that_is_there_twice_with_one_value_is_read(tmp_path: Path) -> None:
    text = (written(tmp_path) / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("{", '{"hidden_size": 64, ', 1))
    assert Config.load(tmp_path) == Config.load(CASE)


def test_the_longest_text_that_the_model_was_made_for(tmp_path: Path) -> None:
    assert Config.gpt_oss_20b().max_position_embeddings == 131072
    config = Config.load(written(tmp_path, max_position_embeddings=40))
    assert config.max_position_embeddings == 40
    with pytest.warns(PositionsWarning, match="a text of 41 tokens is longer than the 40 that the model was made for"):
        warn_past_positions(config, 41)
    warn_past_positions(config, 40)
    unknown = Config.load(written(tmp_path, max_position_embeddings=None))
    assert unknown.max_position_embeddings is None
    warn_past_positions(unknown, 10**6)


def test_generation_past_it_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object) -> None:
        raise ValueError("enough")

    monkeypatch.setattr(sys.modules["jmoe.gpt_oss.generate"], "start", start)
    directory = Path(shutil.copytree(CASE, tmp_path / "model"))
    model = gpt_oss.load(written(directory, max_position_embeddings=4), progress=False)
    with pytest.warns(PositionsWarning, match="a text of 5 tokens"), pytest.raises(ValueError, match="enough"):
        gpt_oss.generate(model, [[1, 2, 3]], max_new_tokens=2)


def test_fine_tuning_past_it_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jmoe.finetune.config import FinetuneConfig
    from jmoe.finetune.run import finetune

    def load(*_: object, **__: object) -> None:
        raise ValueError("enough")

    monkeypatch.setattr("jmoe.finetune.run.load", load)
    directory = Path(shutil.copytree(EXAMPLE, tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text()) | {"max_position_embeddings": 4}
    (directory / "config.json").write_text(json.dumps(config))
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "permission of the licensor"}))
    options = {"model": str(directory), "data": str(tmp_path / "data.jsonl"), "out": str(tmp_path / "out")}
    options |= {"validation_fraction": 0.0}
    with pytest.warns(PositionsWarning, match="longer than the 4 that"), pytest.raises(ValueError, match="enough"):
        finetune(FinetuneConfig.create(options))


def test_evaluation_past_it_is_warned_of(tmp_path: Path) -> None:
    from jmoe.evaluate.harness import HarnessModel
    from jmoe.text import load_tokenizer

    tokenizer = load_tokenizer(EXAMPLE)
    directory = Path(shutil.copytree(CASE, tmp_path / "model"))
    model = gpt_oss.load(written(directory, max_position_embeddings=40), progress=False)
    with pytest.warns(PositionsWarning, match="a text of 41 tokens"):
        HarnessModel(model, tokenizer, max_length=41)
    HarnessModel(model, tokenizer, max_length=40)

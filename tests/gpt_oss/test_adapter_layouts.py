"""One adapter in every layout that trainers write gives the logits of PEFT; damaged ones are refused by name."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe import gpt_oss
from jmoe.checkpoint.directory import open_safetensors
from tests import adapter_layouts as layouts
from tests.adapter_layouts import PREFIX, Tensors

CASE = Path(__file__).parents[1] / "data" / "tiny_case"
CONFIG = gpt_oss.Config.load(CASE / "model")
TENSORS, SETTINGS = layouts.read(CASE / "adapter")
BY_LAYER = dict(layouts.experts_of(TENSORS, CONFIG.num_local_experts))
ATTENTION = {key: value for key, value in TENSORS.items() if ".self_attn." in key}
GROUPED = "grouped_by_expert"


def of_all_layers(form: Callable[..., Tensors], *arguments: object) -> Tensors:
    """Attention as it was, experts in another form."""
    tensors = dict(ATTENTION)
    for layer, factors in BY_LAYER.items():
        tensors |= form(layer, factors, *arguments)
    return tensors


def renamed(old: str, new: str, tensors: Tensors = TENSORS) -> Tensors:
    return {key.replace(old, new): value for key, value in tensors.items()}


MODULES = {"target_parameters": None, "target_modules": [*SETTINGS["target_modules"], "gate_up_proj", "down_proj"]}
PAIRS = of_all_layers(layouts.as_pairs, "{expert}.{target}_proj")

CASES: dict[str, tuple[Tensors, dict[str, Any]]] = {
    "rank_major": (TENSORS, {"lora_B_layout": "rank_major"}),
    GROUPED: (of_all_layers(layouts.as_parameters, GROUPED), {"lora_B_layout": GROUPED}),
    "rank_major-beside-unsloths-mark": (
        TENSORS,
        {"lora_B_layout": "rank_major", "auto_mapping": {"unsloth_fixed": True}},
    ),
    "stacked": (of_all_layers(layouts.as_stacked), {}),
    "stacked-beside-unsloths-mark": (of_all_layers(layouts.as_stacked), {"auto_mapping": {"unsloth_fixed": True}}),
    "stacked-named-as-modules": (of_all_layers(layouts.as_stacked), MODULES),
    "stacked-without-weight": (renamed(".weight", "", of_all_layers(layouts.as_stacked)), {}),
    "pairs": (PAIRS, MODULES),
    "pairs-of-all-linear": (PAIRS, {"target_parameters": None, "target_modules": "all-linear"}),
    "pairs-by-expression": (PAIRS, {"target_parameters": None, "target_modules": r".*(self_attn|experts).*_proj"}),
    "pairs-of-default": (renamed(".weight", ".default.weight", PAIRS), MODULES),
    "lists": (
        of_all_layers(layouts.as_pairs, "{target}_projs.{expert}"),
        {"target_parameters": None, "target_modules": r".*_projs\.\d+|.*[qkvo]_proj"},
    ),
    "halves": (
        of_all_layers(layouts.as_halves),
        {"target_parameters": None, "target_modules": [*SETTINGS["target_modules"], "w1", "w2", "w3"]},
    ),
    "all-linear": (TENSORS, {"target_modules": "all-linear"}),
    "parameters-as-modules": (TENSORS, MODULES),
    "default-in-keys": (renamed("lora_A.", "lora_A.default.", renamed("lora_B.", "lora_B.default.")), {}),
    "no-prefix": (renamed("base_model.model.", ""), {}),
    "no-prefix-at-all": (renamed("base_model.model.model.", ""), {}),
    "prefix-twice": (renamed("base_model.model.", "base_model.model.base_model.model."), {}),
    "compiled": (renamed("base_model.model.model.", "base_model.model._orig_mod.model."), {}),
    "float16": ({key: value.astype(np.float16) for key, value in TENSORS.items()}, {}),
    "stacked-float16": (
        {key: value.astype(np.float16) for key, value in of_all_layers(layouts.as_stacked).items()},
        {},
    ),
    "settings-that-are-off": (
        TENSORS,
        {
            "some_new_setting": None, "another": False, "a_third": {}, "a_fourth": "", "a_fifth": [], "a_sixth": 0,
            "bias": None, "init_lora_weights": None, "layers_to_transform": False, "lora_B_layout": None,
            "exclude_modules": "", "rank_pattern": None, "use_rslora": None, "modules_to_save": [], "use_dora": None,
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(CASE / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def logits(expected: dict[str, np.ndarray]) -> Callable[[gpt_oss.LoraWeights], np.ndarray]:
    base = gpt_oss.load(CASE / "model", dtype=jnp.float32, progress=False)
    call = nnx.jit(lambda model: model(expected["input_ids"]))
    return lambda lora: np.asarray(call(base.with_adapters(lora)))


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("name", CASES)
def test_every_layout_gives_pefts_logits(
    name: str, tmp_path: Path, logits: Callable[..., np.ndarray], expected: dict[str, np.ndarray]
) -> None:
    """Without a warning, too: those are errors here."""
    tensors, changed = CASES[name]
    lora = gpt_oss.load_adapter(layouts.write(tmp_path / "adapter", tensors, SETTINGS | changed), CONFIG)
    assert relative(logits(lora), expected["adapter_logits"]) <= 1e-3
    assert {leaf.dtype for leaf in jax.tree.leaves(lora)} == {jnp.dtype(jnp.float32)}


def unsloths(folder: Path) -> Path:
    """As Unsloth saved experts before it wrote the order down."""
    mark = {"auto_mapping": {"unsloth_fixed": True}}
    return layouts.write(folder, of_all_layers(layouts.as_parameters, GROUPED), SETTINGS | mark)


def test_an_order_that_nothing_tells_is_warned_of_and_asked_for(
    tmp_path: Path, logits: Callable[..., np.ndarray], expected: dict[str, np.ndarray]
) -> None:
    folder = unsloths(tmp_path / "adapter")
    with pytest.warns(gpt_oss.AdapterWarning, match=r"unsloth_fixed and no lora_B_layout.*--lora-b-layout"):
        as_peft = gpt_oss.load_adapter(folder, CONFIG)
    assert relative(logits(as_peft), expected["adapter_logits"]) > 0.1
    lora = gpt_oss.load_adapter(folder, CONFIG, lora_b_layout=GROUPED)
    assert relative(logits(lora), expected["adapter_logits"]) <= 1e-3
    same = gpt_oss.load_adapter(folder, CONFIG, lora_b_layout="rank_major")
    for one, other in zip(jax.tree.leaves(same), jax.tree.leaves(as_peft), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_order_that_rank_one_has_not_is_not_warned_of(tmp_path: Path) -> None:
    tensors = {key: value[:1] if "lora_A" in key else value[:, :1] for key, value in ATTENTION.items()}
    for layer, factors in BY_LAYER.items():
        one = {target: (a[:, :1], b[:, :, :1]) for target, (a, b) in factors.items()}
        tensors |= layouts.as_parameters(layer, one, "rank_major")
    settings = SETTINGS | {"r": 1, "auto_mapping": {"unsloth_fixed": True}}
    gpt_oss.load_adapter(layouts.write(tmp_path, tensors, settings), CONFIG)  # warnings are errors here


def test_what_contradicts_the_file_or_is_no_order_is_refused(tmp_path: Path) -> None:
    folder = layouts.write(tmp_path / "one", TENSORS, SETTINGS | {"lora_B_layout": "rank_major"})
    with pytest.raises(ValueError, match=r"says lora_B_layout 'rank_major', and lora_b_layout 'grouped_by_expert'"):
        gpt_oss.load_adapter(folder, CONFIG, lora_b_layout=GROUPED)
    with pytest.raises(ValueError, match=r"lora_b_layout must be one of .* or None, got 'x'"):
        gpt_oss.load_adapter(folder, CONFIG, lora_b_layout="x")  # type: ignore[arg-type]
    folder = layouts.write(tmp_path / "two", TENSORS, SETTINGS | {"lora_B_layout": "by_moon"})
    with pytest.raises(ValueError, match=r"lora_B_layout must be one of rank_major, grouped_by_expert, got 'by_moon'"):
        gpt_oss.load_adapter(folder, CONFIG)


def test_of_several_adapters_the_order_is_for_those_that_do_not_say(tmp_path: Path) -> None:
    says = layouts.write(tmp_path / "says", TENSORS, SETTINGS | {"lora_B_layout": "rank_major"})
    silent = unsloths(tmp_path / "silent")
    model = gpt_oss.load(CASE / "model", adapter=[says, silent], lora_b_layout=GROUPED, progress=False)
    assert model.lora is not None
    for leaf in jax.tree.leaves(model.lora):
        np.testing.assert_array_equal(leaf[:, 0], leaf[:, 1])
    with pytest.raises(ValueError, match="adapters with and without Unsloth's mark"):
        gpt_oss.load(CASE / "model", adapter=[CASE / "adapter", silent], lora_b_layout=GROUPED, progress=False)


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_factor_that_all_experts_share_is_repeated(side: str, tmp_path: Path) -> None:
    shared, repeated = dict(ATTENTION), dict(ATTENTION)
    for layer, factors in BY_LAYER.items():
        for target, (a, b) in factors.items():
            pair = (a[:1], b) if side == "A" else (a, b[:1])
            shared |= layouts.as_stacked(layer, {target: pair})
            whole = tuple(np.repeat(factor, 4 // len(factor), axis=0) for factor in pair)
            repeated |= layouts.as_stacked(layer, {target: whole})  # type: ignore[dict-item]
    one, other = (
        gpt_oss.load_adapter(layouts.write(tmp_path / name, tensors, SETTINGS), CONFIG)
        for name, tensors in (("shared", shared), ("repeated", repeated))
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def without(tensors: Tensors, *parts: str) -> Tensors:
    return {key: value for key, value in tensors.items() if not all(part in key for part in parts)}


def test_a_rank_that_is_wrong_everywhere_is_one_line_a_kind(tmp_path: Path) -> None:
    folder = layouts.write(tmp_path, PAIRS, SETTINGS | MODULES | {"r": 5})
    with pytest.raises(ValueError, match="does not match the model") as raised:
        gpt_oss.load_adapter(folder, CONFIG)
    lines = str(raised.value).splitlines()
    assert len(lines) == 1 + 2 * 6
    kind = f"  {PREFIX}{{0..1}}.mlp.experts.{{0..3}}.down_proj.lora_A.weight: wanted (5, 96), or "
    assert any(line.startswith(kind) for line in lines)


E3 = "0.mlp.experts.3.down_proj"
Q_A = f"{PREFIX}0.self_attn.q_proj.lora_A"


@pytest.mark.parametrize(
    ("tensors", "changed", "message"),
    [
        (without(PAIRS, E3), MODULES, rf"has no tensor {PREFIX}{E3}.lora_A.weight, though it has .*experts\.0\.down"),
        (without(PAIRS, E3, "lora_B"), MODULES, rf"has no tensor {PREFIX}{E3}.lora_B.weight, though it has"),
        (renamed("experts.3.", "experts.4.", PAIRS), MODULES, r"experts\.4\..*lora_A.weight is of an expert past the"),
        (PAIRS | {f"{PREFIX}{E3}.lora_A.weight": np.ones((2, 7), np.float32)}, MODULES, rf"{E3}.*got \(2, 7\)"),
        (
            without(of_all_layers(layouts.as_pairs, "{target}_projs.{expert}"), "1.mlp.experts.gate_up_projs.2"),
            MODULES,
            r"has no tensor .*1.mlp.experts.gate_up_projs.2.lora_A.weight",
        ),
        (
            PAIRS | layouts.as_halves(0, BY_LAYER[0]),
            MODULES,
            r"experts.0.down_proj.lora_A.weight and .*experts.0.w2.lora_A.weight, which mean the same tensor",
        ),
        (
            without(PAIRS | layouts.as_halves(0, BY_LAYER[0]), ".w2."),
            MODULES,
            r"has .*experts.0.gate_up_proj.lora_A.weight and a half of it, .*experts.0.w1.lora_A.weight",
        ),
        (
            TENSORS | layouts.as_stacked(0, BY_LAYER[0]),
            {},
            r"names experts in several ways, .*0.mlp.experts.base_layer.lora_A.*0.mlp.experts.down_proj.lora_A",
        ),
        (
            {key: value[:3] if value.ndim == 3 else value for key, value in of_all_layers(layouts.as_stacked).items()},
            {},
            r"experts.gate_up_proj.lora_A.weight: wanted \(4, 2, 64\), or \(4, 2, 192\) if all .*got \(3, 2, 64\)",
        ),
        (
            TENSORS | {f"{Q_A}.weight".removeprefix("base_model.model."): TENSORS[f"{Q_A}.weight"]},
            {},
            r"layers.0.self_attn.q_proj.lora_A.weight, which mean the same tensor",
        ),
        (
            without(TENSORS, "q_proj") | {
                key.replace(".weight", ".other.weight" if "0.self" in key else ".default.weight"): value
                for key, value in TENSORS.items() if "q_proj" in key
            },
            {},
            r"must hold one adapter, but its keys have the names of 3: default \(.*\), no name \(.*\), other \(",
        ),
        (
            TENSORS | {f"{PREFIX}0.self_attn.q_proj.lora_magnitude_vector": np.ones(128, np.float32)},
            {},
            r"has .*q_proj.lora_magnitude_vector: DoRA is not supported",
        ),
        (
            TENSORS | {"base_model.model.model.embed_tokens.weight": np.ones((128, 64), np.float32)},
            {},
            r"has .*embed_tokens.weight: weights that were trained whole, by modules_to_save or as embeddings",
        ),
        (
            TENSORS | {"base_model.model.lm_head.modules_to_save.default.weight": np.ones((128, 64), np.float32)},
            {},
            r"has .*lm_head.modules_to_save.default.weight: weights that were trained whole",
        ),
        ({key: value.astype(np.float64) for key, value in TENSORS.items()}, {}, r"wanted F32, BF16 or F16, got F64"),
    ],
    ids=[
        "expert-missing", "half-a-pair", "expert-too-many", "one-shape", "list-missing", "same-meaning",
        "half-and-whole", "mixed", "stacked-shape", "collision", "several-adapters", "dora", "embedding",
        "modules-to-save", "float64",
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tensors: Tensors, changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = layouts.write(tmp_path / "adapter", tensors, SETTINGS | changed)
    with pytest.raises(ValueError, match=message):
        gpt_oss.load_adapter(folder, CONFIG)


@pytest.mark.parametrize("key", ["use_dora", "modules_to_save", "trainable_token_indices"])
def test_what_is_not_supported_is_refused_by_name(key: str, tmp_path: Path) -> None:
    folder = layouts.write(tmp_path / "adapter", TENSORS, SETTINGS | {key: ["lm_head"]})
    with pytest.raises(ValueError, match=f"not supported: {key} = "):
        gpt_oss.load_adapter(folder, CONFIG)


@pytest.mark.parametrize("name", ["pairs", "lists", "stacked-named-as-modules", "parameters-as-modules"])
def test_a_layer_that_modules_list_and_the_file_has_not_is_warned_of(name: str, tmp_path: Path) -> None:
    tensors, changed = CASES[name]
    folder = layouts.write(tmp_path / "adapter", without(tensors, "layers.1.mlp"), SETTINGS | changed)
    with pytest.warns(gpt_oss.AdapterWarning, match=r"no tensors of model.layers.1.mlp.experts.gate_up_proj, .*down"):
        gpt_oss.load_adapter(folder, CONFIG)


def test_names_of_other_models_modules_are_not_missed(tmp_path: Path) -> None:
    """PEFT finds no module of such names in gpt-oss."""
    names = [*SETTINGS["target_modules"], "gate_proj", "up_proj", "down_proj"]
    settings = SETTINGS | {"target_modules": names, "target_parameters": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpt_oss.load_adapter(layouts.write(tmp_path, ATTENTION, settings), CONFIG)


def test_what_peft_leaves_out_is_warned_of(tmp_path: Path) -> None:
    settings = SETTINGS | {"target_modules": ["q_proj", "k_proj", "v_proj"], "exclude_modules": ["1.self_attn.k_proj"]}
    with pytest.warns(gpt_oss.AdapterWarning, match="PEFT does not") as caught:
        gpt_oss.load_adapter(layouts.write(tmp_path, TENSORS, settings), CONFIG)
    names = ["1.self_attn.k_proj", "0.self_attn.o_proj", "1.self_attn.o_proj"]
    listed = ", ".join(f"model.layers.{name}" for name in names)
    assert f"has LoRA on {listed}, which adapter_config.json does not target" in str(caught[0].message)


def test_a_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def counted(file: Path) -> Any:
        opened.append(file)
        return open_safetensors(file)

    monkeypatch.setattr("jmoe.adapters.file.open_safetensors", counted)
    gpt_oss.load_adapter(layouts.write(tmp_path, PAIRS, SETTINGS | MODULES), CONFIG)
    assert opened == [tmp_path / "adapter_model.safetensors"]


@pytest.mark.parametrize("portable", [False, True], ids=["as-it-was", "portable"])
@pytest.mark.parametrize("name", ["pairs", "halves", "stacked-float16", GROUPED])
def test_what_was_read_is_saved_as_peft_writes_it(name: str, portable: bool, tmp_path: Path) -> None:
    tensors, changed = CASES[name]
    lora = gpt_oss.load_adapter(layouts.write(tmp_path / "theirs", tensors, SETTINGS | changed), CONFIG)
    gpt_oss.save_adapter(tmp_path / "ours", lora, portable=portable)
    saved, _ = layouts.read(tmp_path / "ours")
    assert saved.keys() == TENSORS.keys()
    for key, value in TENSORS.items():
        scale = 3.5 if portable and "lora_B" in key else 1
        np.testing.assert_allclose(saved[key], scale * value, rtol=1e-3 if "float16" in name else 1e-6, atol=1e-6)

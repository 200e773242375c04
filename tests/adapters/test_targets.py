"""What adapter_config.json puts LoRA on, beside what PEFT puts it on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GptOssConfig, GptOssForCausalLM

from jmoe.adapters import Settings

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def two_layers() -> GptOssForCausalLM:
    """A gpt-oss without weights."""
    config = GptOssConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=24,
        num_local_experts=3,
        num_experts_per_tok=2,
        vocab_size=16,
        head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.device("meta"):
        return GptOssForCausalLM(config)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks transformers
@pytest.mark.parametrize(
    "entries",
    [
        {"target_modules": ["q_proj", "self_attn.o_proj", "lm_head", "embed_tokens"]},
        {"target_modules": "all-linear", "exclude_modules": ["o_proj", "1.self_attn.k_proj"]},
        {"target_modules": r".*\.[qk]_proj|lm_head", "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["q_proj"], "exclude_modules": ["experts"], "target_parameters": EXPERTS},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "target_parameters": [*EXPERTS, "mlp.router.weight"]},
        {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [0]},
        {"target_modules": ["model.layers.1.self_attn.q_proj", "lm_head"], "layers_to_transform": [0]},
        {"target_modules": ["v_proj"], "layers_to_transform": [], "exclude_modules": []},
    ],
    ids=["list", "all-linear", "expression", "parameters", "one-layer", "layers", "whole-names", "nothing-left-out"],
)
def test_targets_are_those_of_peft(entries: dict[str, Any], tmp_path: Path) -> None:
    base = two_layers()
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    modules = [name for name, module in base.named_modules() if isinstance(module, kinds)]
    parameters = [name for name, _ in base.named_parameters()]
    theirs = get_peft_model(base, LoraConfig(**entries)).base_model
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8, **entries}))
    settings = Settings.load(file)
    assert set(filter(settings.lists_module, modules)) == set(theirs.targeted_module_names)
    assert set(filter(settings.lists_parameter, parameters)) == set(theirs.targeted_parameter_names)

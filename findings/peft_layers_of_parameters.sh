#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0: layers_to_transform and exclude_modules hold for target_modules alone. With
# target_parameters on gpt-oss's experts, layers_to_transform=[0] gives the q_proj of layer 0 LoRA and the experts of every layer,
# and exclude_modules=["mlp.experts"] leaves no expert out; nothing is said. To train some layers' experts, name them:
# target_parameters=["layers.0.mlp.experts.gate_up_proj"].
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip --quiet --disable-pip-version-check install peft==0.21.2 transformers==5.24.0 torch==2.14.1
"$dir/venv/bin/python" - <<'PY'
import re
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import GptOssConfig, GptOssForCausalLM

MODEL = GptOssConfig(
    num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], hidden_size=32, intermediate_size=32,
    num_local_experts=2, num_experts_per_tok=1, vocab_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    pad_token_id=0, eos_token_id=1,
)


def adapted(parameters, **options):
    """What has LoRA, and what PEFT warned of."""
    settings = LoraConfig(
        r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], target_parameters=parameters, **options
    )
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = get_peft_model(GptOssForCausalLM(MODEL), settings)
    names = {re.search(r"layers\.\d+\.[^.]+\.(q_proj|experts)", name)[0] for name, _ in model.named_parameters() if "lora_A" in name}
    of_peft = [str(warning.message) for warning in said if "peft" in warning.filename]
    print(options or parameters, sorted(names), of_peft)
    return names, of_peft


experts = {"layers.0.mlp.experts", "layers.1.mlp.experts"}
down = ["mlp.experts.down_proj"]
assert adapted(down, layers_to_transform=[0]) == ({"layers.0.self_attn.q_proj", *experts}, [])
names, said = adapted(down, exclude_modules=["mlp.experts"])
assert experts <= names and said == []
assert experts & adapted(["layers.0.mlp.experts.down_proj"])[0] == {"layers.0.mlp.experts"}
PY

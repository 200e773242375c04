#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0 and a file as newer Unsloth writes it: adapter_config.json says
# "lora_B_layout": "grouped_by_expert", which means that column j of an expert parameter's lora_B belongs to rank j % r of expert
# j // r. PEFT has rank j // E of expert j % E, does not know the setting, says "Unexpected keyword arguments ['lora_B_layout']
# ..., these are ignored", and computes with other experts' columns: logits here are off by 0.77 of what the adapter changes,
# where the same adapter with its columns in PEFT's order, and "rank_major" in the file, gives the same bits.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip --quiet --disable-pip-version-check install peft==0.21.2 transformers==5.24.0 torch==2.14.1 safetensors==0.8.0
"$dir/venv/bin/python" - "$dir" <<'PY'
import json
import shutil
import sys
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

here, EXPERTS, RANK = Path(sys.argv[1]), 4, 2
TOKENS = torch.arange(2, 14)[None]


def model():
    torch.manual_seed(0)
    return GptOssForCausalLM(
        GptOssConfig(
            num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], hidden_size=32,
            intermediate_size=32, num_local_experts=EXPERTS, num_experts_per_tok=2, vocab_size=32,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, pad_token_id=0, eos_token_id=1,
        )
    )


def logits(folder):
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        of_model = (model() if folder is None else PeftModel.from_pretrained(model(), folder)).eval()
        found = of_model(TOKENS).logits.double()
    ignored = [str(warning.message) for warning in said if "lora_B_layout" in str(warning.message)]
    return found, ignored


def variant(layout, columns):
    folder = here / layout
    shutil.copytree(here / "plain", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {name: columns(t).contiguous() if "experts" in name and "lora_B" in name else t for name, t in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "adapter_config.json").read_text()) | {"lora_B_layout": layout}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


settings = LoraConfig(r=RANK, lora_alpha=8, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
adapted = get_peft_model(model(), settings)
generator = torch.Generator().manual_seed(1)
for name, parameter in adapted.named_parameters():
    if "lora_" in name:
        parameter.data.normal_(std=0.3, generator=generator)
adapted.save_pretrained(here / "plain")

base, _ = logits(None)
plain, nothing = logits(here / "plain")
assert nothing == []
same, ignored = logits(variant("rank_major", lambda b: b))
other, _ = logits(variant("grouped_by_expert", lambda b: b.reshape(-1, RANK, EXPERTS).transpose(1, 2).reshape(b.shape)))
change = (plain - base).norm()
off = float((other - plain).norm() / change)
print(f"PEFT says: {ignored[0][:90]}...")
print(f"rank_major: off by {float((same - plain).norm() / change)}; grouped_by_expert: off by {off:.2f} of what the adapter changes")
assert ignored and ignored[0].startswith("Unexpected keyword arguments ['lora_B_layout']")
assert torch.equal(same, plain) and off > 0.1
PY

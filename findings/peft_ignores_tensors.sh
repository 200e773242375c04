#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0: PeftModel.from_pretrained warns of tensors that it expects and does not find, but says
# nothing of tensors in the file that it has no place for: LoRA on a layer past the model's last, as of a deeper model, or on a
# module that adapter_config.json does not target. They are left out, and the model answers without that part of the adapter.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip --quiet --disable-pip-version-check install peft==0.21.2 transformers==5.24.0 torch==2.14.1 safetensors==0.8.0
"$dir/venv/bin/python" - "$dir" <<'PY'
import shutil
import sys
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

here = Path(sys.argv[1])


def model():
    torch.manual_seed(0)
    return GptOssForCausalLM(
        GptOssConfig(
            num_hidden_layers=1, layer_types=["full_attention"], hidden_size=32, intermediate_size=32,
            num_local_experts=2, num_experts_per_tok=1, vocab_size=32, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, pad_token_id=0, eos_token_id=1,
        )
    )


def warned(folder):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(model(), folder)
    found = [str(warning.message).split(":")[0] for warning in said if "adapter keys" in str(warning.message)]
    print(f"{folder.name}: {found}")
    return found


def changed(name, change):
    folder = here / name
    shutil.copytree(here / "whole", folder)
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


get_peft_model(model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(here / "whole")
assert warned(here / "whole") == []
missing = changed("one_tensor_missing", lambda tensors: dict(list(tensors.items())[1:]))
assert warned(missing) == ["Found missing adapter keys while loading the checkpoint"]
deeper = changed(
    "a_layer_more", lambda tensors: tensors | {k.replace("layers.0", "layers.7"): v.clone() for k, v in tensors.items()}
)
assert warned(deeper) == []
wider = changed("k_proj_too", lambda tensors: tensors | {k.replace("q_proj", "k_proj"): v.clone() for k, v in tensors.items()})
assert warned(wider) == []
PY

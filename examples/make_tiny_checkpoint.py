"""Makes examples/tiny_gpt_oss: a small random gpt-oss in the released file layout, a tokenizer and a PEFT adapter.

    python examples/make_tiny_checkpoint.py [directory]

Needs torch, transformers, peft and tokenizers (jmoe's extra `dev`). The same versions give the same bytes every time:
written with torch 2.14.1, transformers 5.23.0, peft 0.21.2, tokenizers 0.23.3.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GptOssConfig, GptOssForCausalLM

from jmoe.ops.mxfp4 import quantize

ROOT = Path(__file__).parent.parent
END, PAD = "<|endoftext|>", "<|pad|>"
CHAT = ["<|start|>", "<|message|>", "<|end|>", "<|return|>"]
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|start|>{{ message.role }}<|message|>{{ message.content }}
{%- if message.role == "assistant" and loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant<|message|>{%- endif -%}
"""
"""The released models' form of a conversation, without its channels and tools."""
PROJECTIONS = ("gate_up_proj", "down_proj")

# The released models' config.json with smaller sizes.
CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 0,
    "experts_per_token": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 160,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "pad_token_id": 1,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 32,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 512,
}


def main() -> None:
    """Writes everything into the directory given, or into examples/tiny_gpt_oss."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "examples" / "tiny_gpt_oss"
    (directory / "adapter").mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", CONFIG)
    train_tokenizer(ROOT / "LICENSE").save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {"eos_token": END, "pad_token": PAD})
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    write_json(directory / "generation_config.json", {"eos_token_id": [0, 5], "pad_token_id": 1})
    model = random_model()
    save_model(model, directory)
    save_adapter(model, directory / "adapter")


def random_model() -> GptOssForCausalLM:
    """A model with the weights' sizes chosen so that activations stay near 1 and every expert gets tokens."""
    config = GptOssConfig(**{key: value for key, value in CONFIG.items() if key != "quantization_config"})
    model = GptOssForCausalLM(config).bfloat16()
    rng = np.random.default_rng(0)  # numpy keeps its streams between versions
    for name, parameter in sorted(model.named_parameters()):
        values = rng.standard_normal(parameter.shape, dtype=np.float32) * deviation(name, parameter)
        if name.endswith("norm.weight"):
            values += 1
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(values))
    return model


def deviation(name: str, parameter: torch.Tensor) -> float:
    """The standard deviation of a parameter's random values."""
    if "embed_tokens" in name or "sinks" in name:
        return 1.0
    if parameter.ndim == 1 or name.endswith("_bias"):
        return 0.1  # biases, and norms around 1
    inputs = parameter.shape[1]  # linear weights are [out, in], experts' [E, in, out]
    gain = 2.0 if name.endswith("gate_up_proj") else 1.0  # puts a few gates past the clamp at 7
    return gain / inputs**0.5


def save_model(model: GptOssForCausalLM, directory: Path) -> None:
    """The released layout: experts as MXFP4 bytes, all else bf16, three shards with the released odd numbering."""
    tensors = {}
    for name, parameter in model.state_dict().items():
        if name.endswith(PROJECTIONS):
            # [E, in, out] -> [E, out, in]: packing runs along the inputs
            packed = quantize(jnp.asarray(parameter.float().numpy().swapaxes(1, 2)))
            tensors[f"{name}_blocks"] = torch.from_numpy(np.array(packed.blocks))
            tensors[f"{name}_scales"] = torch.from_numpy(np.array(packed.scales))
        else:
            tensors[name] = parameter.contiguous()
    shards: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for name, tensor in tensors.items():
        # The first layer's scales lie in another shard than its blocks: the format allows it, so readers must cope.
        of_layer = "model.layers.0." in name and "_scales" not in name
        shards[0 if of_layer else 1 if "model.layers." in name else 2][name] = tensor
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i:05d}-of-{len(shards) - 1:05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


def save_adapter(model: GptOssForCausalLM, directory: Path) -> None:
    """LoRA on attention and on both expert projections, as PEFT saves it, with a B that is not zero."""
    settings = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=[f"mlp.experts.{projection}" for projection in PROJECTIONS],
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, settings)
    rng = np.random.default_rng(1)
    for name, parameter in sorted(adapted.named_parameters()):
        if "lora_" in name:
            size = 0.05 if "lora_B" in name else parameter.shape[1] ** -0.5
            parameter.data = torch.from_numpy(rng.standard_normal(parameter.shape, dtype=np.float32) * np.float32(size))
    with tempfile.TemporaryDirectory() as saved:
        adapted.save_pretrained(saved)
        (directory / "adapter_model.safetensors").write_bytes(Path(saved, "adapter_model.safetensors").read_bytes())
        entries = json.loads(Path(saved, "adapter_config.json").read_text())
    entries["target_modules"].sort()  # PEFT writes a set, in an order that changes from run to run
    write_json(directory / "adapter_config.json", entries)


def train_tokenizer(text: Path) -> Tokenizer:
    """Byte-level BPE of the model's vocabulary, learnt from one text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END, PAD, *CHAT],  # ids 0 and 1, as in the config, and 2 to 5
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text)], trainer)
    return tokenizer


def write_json(file: Path, value: object) -> None:
    """Indented JSON with a final newline."""
    file.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()

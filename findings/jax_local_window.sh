#!/usr/bin/env bash
# jax 0.11.2 beside transformers 5.24.0: a window of W is not the same number of keys. With is_causal=True,
# jax.nn.dot_product_attention(local_window_size=W) lets a query see itself and W keys before it, W + 1 in all; sliding_window = W
# in a config of transformers, gpt-oss's among them, means W keys with the query's own. To port one, pass W - 1. Nothing fails
# otherwise, and texts shorter than the window agree.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip --quiet --disable-pip-version-check install jax==0.11.2 transformers==5.24.0 torch==2.14.1
"$dir/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import GptOssConfig, GptOssForCausalLM

LENGTH, WINDOW = 8, 3


def keys_of_jax(window):
    """Of the last query: all scores are equal, and values name their keys."""
    zeros = jnp.zeros((1, LENGTH, 1, LENGTH))
    values = jnp.eye(LENGTH)[None, :, None]
    seen = jax.nn.dot_product_attention(zeros, zeros, values, is_causal=True, local_window_size=window)[0, -1, 0]
    return np.flatnonzero(np.asarray(seen)).tolist()


def keys_of_transformers():
    """Of the last query: tokens whose change changes the last logits of a model with one layer."""
    config = GptOssConfig(
        num_hidden_layers=1, layer_types=["sliding_attention"], sliding_window=WINDOW, hidden_size=32,
        intermediate_size=32, num_local_experts=2, num_experts_per_tok=1, vocab_size=32, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, eos_token_id=1, attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).eval()
    tokens = torch.arange(2, 2 + LENGTH)[None]

    def last(tokens):
        with torch.no_grad():
            return model(tokens).logits[0, -1]

    before = last(tokens)
    changed = []
    for key in range(LENGTH):
        other = tokens.clone()
        other[0, key] = 31
        if not torch.allclose(before, last(other), rtol=0, atol=1e-5):  # experts' products may round apart
            changed.append(key)
    return changed


for name, keys in (
    (f"jax, local_window_size={WINDOW}", by_jax := keys_of_jax(WINDOW)),
    (f"transformers, sliding_window={WINDOW}", by_transformers := keys_of_transformers()),
):
    print(f"{name}: query {LENGTH - 1} sees keys {keys}")
assert by_jax == [4, 5, 6, 7]
assert by_transformers == [5, 6, 7] == keys_of_jax(WINDOW - 1)
PY

"""How much a token costs to train on, and how much a GPU can do."""

from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.weights import ATTENTION, EXPERTS, sizes

PEAK = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}
"""Floating-point operations a second in bfloat16 without sparsity, from the makers' data sheets."""


def flops_per_token(config: Config, length: int) -> float:
    """Operations of forward and backward pass in one token of a sequence, LoRA's own left out.

    Weights are frozen, so that the backward pass multiplies by each once, as the forward pass does. What is computed
    again is not counted.
    """
    sizes_of = sizes(config)
    attention = sum(n * k for name, (n, k) in sizes_of.items() if name in ATTENTION)
    experts = config.num_experts_per_tok * sum(n * k for name, (n, k) in sizes_of.items() if name in EXPERTS)
    router = config.num_local_experts * config.hidden_size
    matrices = config.num_hidden_layers * (attention + experts + router) + config.vocab_size * config.hidden_size
    # A query sees half of a sequence on average, and at most a window; the backward pass takes five products for two.
    seen = sum(length / 2 if window is None else min(window, length / 2) for window in config.windows)
    scores = 2 * config.num_attention_heads * config.head_dim * seen
    return 2 * 2 * matrices + 2 * scores * (1 + 2.5)

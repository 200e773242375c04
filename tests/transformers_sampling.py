"""What transformers would sample from."""

from types import SimpleNamespace

import numpy as np


def transformers_probabilities(logits: np.ndarray, seen: list[int], **options: float) -> np.ndarray:
    """What transformers would sample from, by its own processors in its own order."""
    import torch
    from transformers import GenerationConfig, GenerationMixin

    config = GenerationConfig(do_sample=True, **options)
    mixin = GenerationMixin()
    mixin.config = SimpleNamespace(is_encoder_decoder=False)
    processors = mixin._get_logits_processor(config, input_ids_seq_length=len(seen), device="cpu")
    scores = processors(torch.tensor([seen]), torch.tensor(logits)[None])
    return torch.softmax(scores, dim=-1)[0].numpy()

"""How large the experiment is: the model, and what it is trained on and for how long."""

import dataclasses

from jmoe.gpt_oss.config import Config, Rope, alternating

END = 0
"""The byte that no text holds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """One size of the experiment.

    hidden: of the model; experts are as wide inside.
    source_length, source_batch, source_steps, source_rate: of training the whole model on source code.
    per_category: characters of each category; one in eight is held out.
    length, batch, steps, rate, rank: of training LoRA.
    """

    hidden: int
    layers: int
    experts: int
    top_k: int
    heads: int
    key_heads: int
    head_dim: int
    source_length: int
    source_batch: int
    source_steps: int
    source_rate: float
    per_category: int
    length: int
    batch: int
    steps: int
    rate: float
    rank: int
    seeds: tuple[int, ...]

    @property
    def config(self) -> Config:
        """The model's, a gpt-oss whose tokens are bytes."""
        return Config(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.hidden,
            num_local_experts=self.experts,
            num_experts_per_tok=self.top_k,
            vocab_size=256,
            rms_norm_eps=1e-5,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.head_dim,
            sliding_window=32,
            layer_types=alternating(self.layers),
            rope=Rope(rope_theta=10000.0, factor=1.0),
            eos_token_id=END,
            pad_token_id=END,
        )


SIZES = {
    "ci": Size(
        hidden=64,
        layers=2,
        experts=4,
        top_k=2,
        heads=4,
        key_heads=2,
        head_dim=16,
        source_length=256,
        source_batch=4,
        source_steps=100,
        source_rate=5e-3,
        per_category=256,
        length=256,
        batch=8,
        steps=100,
        rate=7e-3,
        rank=8,
        seeds=(0,),
    ),
    "small": Size(
        hidden=128,
        layers=4,
        experts=8,
        top_k=2,
        heads=4,
        key_heads=2,
        head_dim=32,
        source_length=256,
        source_batch=8,
        source_steps=500,
        source_rate=3e-3,
        per_category=512,
        length=256,
        batch=8,
        steps=250,
        rate=5e-3,
        rank=8,
        seeds=(0, 1, 2),
    ),
    "medium": Size(
        hidden=512,
        layers=8,
        experts=16,
        top_k=4,
        heads=8,
        key_heads=2,
        head_dim=64,
        source_length=256,
        source_batch=32,
        source_steps=2500,
        source_rate=1e-3,
        per_category=512,
        length=256,
        batch=16,
        steps=300,
        rate=1e-3,
        rank=16,
        seeds=(0, 1, 2),
    ),
}

"""What is measured of a whole model, each in a process of its own."""

import dataclasses
from typing import Any, Literal

from jmoe.gpt_oss.config import Config

type Kind = Literal["generate", "finetune", "parts", "load", "transformers"]


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """One measurement of a model with random weights.

    kind: "generate": prefill and decode steps; "finetune": a step of the optimizer; "parts": where the time of
      a decode step goes; "load": a checkpoint from disk; "transformers": a step of the optimizer by transformers
      and PEFT.
    size: "20b", "120b", or "tiny", which a CPU takes in seconds.
    sequences: decoded together, or of a step's batch.
    length: tokens of each prompt, or of each sequence.
    rank: of LoRA on experts and attention; 0: none.
    mesh: what the devices are split in, as model=2; empty: one device.
    """

    kind: Kind
    size: str
    sequences: int = 1
    length: int = 1024
    rank: int = 16
    mesh: str = ""

    def __str__(self) -> str:
        lora = f"LoRA r={self.rank}" if self.rank else "no LoRA"
        on = f", {self.mesh}" if self.mesh else ""
        return f"{self.kind} {self.size}, {self.sequences} x {self.length} tokens, {lora}{on}"

    @property
    def row(self) -> dict[str, Any]:
        """Its fields as results have them: those of one device name no mesh."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value or name != "mesh"}

    @property
    def config(self) -> Config:
        """The model's."""
        return sizes()[self.size]


def sizes() -> dict[str, Config]:
    """The configurations by name."""
    released = Config.gpt_oss_20b()
    tiny = dataclasses.replace(
        released,
        num_hidden_layers=2,
        layer_types=released.layer_types[:2],
        hidden_size=64,
        intermediate_size=64,
        num_local_experts=4,
        vocab_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return {"20b": released, "120b": Config.gpt_oss_120b(), "tiny": tiny}


GPU_CASES = (
    ModelCase("generate", "20b", 16),
    ModelCase("generate", "20b", 16, rank=0),
    ModelCase("generate", "20b", 1),
    ModelCase("generate", "20b", 1, rank=0),
    ModelCase("generate", "120b", 16),
    ModelCase("parts", "20b", 16),
    ModelCase("parts", "20b", 16, rank=0),
    ModelCase("parts", "20b", 1),
    ModelCase("parts", "20b", 1, rank=0),
    ModelCase("finetune", "20b", 1, 4096),
    ModelCase("transformers", "20b", 1, 4096),
    ModelCase("finetune", "120b", 1, 2048, 8),
    ModelCase("load", "20b", rank=0),
)

CPU_CASES = (
    ModelCase("generate", "tiny", 2, 8, 4),
    ModelCase("finetune", "tiny", 1, 16, 4),
    ModelCase("load", "tiny", rank=0),
)

type Figures = dict[str, Any]
"""What a case gave: names with their units, as numbers; "error": why there are none."""

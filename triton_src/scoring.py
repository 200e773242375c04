"""How a router's logits become a choice of experts and their weights, as a value: references, plans and kernels are
given the same one.

The standard library alone, so that a program without Triton has it too; on tiles it is in routing/top_k.py.
"""

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Scoring:
    """The top_k experts of a token by score, and weights made of their scores; gpt-oss's.

    Hashable, and static: another value is another program. The choice is by the logits, whose order the scores have;
    with a bias for the choice, by score + bias. Equal ones go to the lower expert.

    | model | value |
    | --- | --- |
    | gpt-oss, Mixtral, Qwen3-MoE with norm_topk_prob | `Scoring()` |
    | Qwen2-MoE and OLMoE, whose norm_topk_prob is false | `Scoring(renormalize=False)` |
    | DeepSeek-V3 with one group of experts | `Scoring("sigmoid", scale=2.5)`, with choice_bias |

    Attributes:
      function: "softmax" over all experts, or "sigmoid" of each logit alone.
      renormalize: the chosen scores are divided by their sum. Of a softmax, that is the softmax over the chosen logits.
      scale: what multiplies the weights at last; positive and finite.

    Raises:
      ValueError: another function or scale.
    """

    function: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.function not in ("softmax", "sigmoid"):
            raise ValueError(f'function must be "softmax" or "sigmoid", got {self.function!r}')
        object.__setattr__(self, "renormalize", bool(self.renormalize))
        object.__setattr__(self, "scale", float(self.scale))
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {self.scale}")

    @property
    def of_chosen_logits(self) -> bool:
        """Whether the weights depend on the chosen logits alone by their softmax, so that no other logit is read."""
        return self.function == "softmax" and self.renormalize


def not_a_scoring(scoring: object) -> str:
    """The message for another thing in its place."""
    return f"scoring must be a jmoe.Scoring, got {scoring!r}"

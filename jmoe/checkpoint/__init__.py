"""gpt-oss checkpoints on disk: which tensors there are, and a mixture-of-experts layer of them.

Of other models, their mixture-of-experts blocks alone.
"""

from jmoe.checkpoint.config_file import CheckpointWarning as CheckpointWarning
from jmoe.checkpoint.config_file import Config as Config
from jmoe.checkpoint.directory import Checkpoint as Checkpoint
from jmoe.checkpoint.directory import embed as embed
from jmoe.checkpoint.hf_block import HfBlock as HfBlock
from jmoe.checkpoint.hf_block import read_hf_block as read_hf_block
from jmoe.checkpoint.moe_layer import MoeLayer as MoeLayer
from jmoe.checkpoint.moe_layer import load_moe_layer as load_moe_layer
from jmoe.checkpoint.moe_layer import router_logits as router_logits

__all__ = [
    "Checkpoint",
    "CheckpointWarning",
    "Config",
    "HfBlock",
    "MoeLayer",
    "embed",
    "load_moe_layer",
    "read_hf_block",
    "router_logits",
]

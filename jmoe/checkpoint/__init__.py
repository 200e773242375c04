"""gpt-oss checkpoints on disk: which tensors there are, and a mixture-of-experts layer of them."""

from jmoe.checkpoint.config_file import CheckpointWarning as CheckpointWarning
from jmoe.checkpoint.config_file import Config as Config
from jmoe.checkpoint.directory import Checkpoint as Checkpoint
from jmoe.checkpoint.directory import MoeLayer as MoeLayer
from jmoe.checkpoint.directory import embed as embed
from jmoe.checkpoint.directory import load_moe_layer as load_moe_layer
from jmoe.checkpoint.directory import router_logits as router_logits

__all__ = ["Checkpoint", "CheckpointWarning", "Config", "MoeLayer", "embed", "load_moe_layer", "router_logits"]

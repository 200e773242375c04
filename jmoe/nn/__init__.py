"""Flax layers."""

from jmoe.extras import require

require("jmoe.nn", "nn", "flax")

from jmoe.nn.linen import linen_moe as linen_moe
from jmoe.nn.lora import LoraConfig as LoraConfig
from jmoe.nn.moe import MoE as MoE
from jmoe.nn.report import TrainableReport as TrainableReport
from jmoe.nn.report import trainable_report as trainable_report
from jmoe.nn.shared import SharedExperts as SharedExperts
from jmoe.nn.statistics import RouterStatistics as RouterStatistics
from jmoe.nn.statistics import router_statistics as router_statistics
from jmoe.nn.variables import Frozen as Frozen

__all__ = [
    "Frozen",
    "LoraConfig",
    "MoE",
    "RouterStatistics",
    "SharedExperts",
    "TrainableReport",
    "linen_moe",
    "router_statistics",
    "trainable_report",
]

"""The gpt-oss models."""

from jmoe.extras import require

require("jmoe.gpt_oss", "model", "flax", "safetensors")

from jmoe.adapters.settings import AdapterWarning as AdapterWarning
from jmoe.adapters.settings import LoraBLayout as LoraBLayout
from jmoe.gpt_oss.adapter import load_adapter as load_adapter
from jmoe.gpt_oss.adapter import stack_adapters as stack_adapters
from jmoe.gpt_oss.attention import attend as attend
from jmoe.gpt_oss.config import Config as Config
from jmoe.gpt_oss.delta import DeltaReport as DeltaReport
from jmoe.gpt_oss.delta import delta_report as delta_report
from jmoe.gpt_oss.generate import Generated as Generated
from jmoe.gpt_oss.generate import generate as generate
from jmoe.gpt_oss.layout import Layout as Layout
from jmoe.gpt_oss.load import load as load
from jmoe.gpt_oss.log_probs import log_probs as log_probs
from jmoe.gpt_oss.merge import MergeReport as MergeReport
from jmoe.gpt_oss.merge import merge as merge
from jmoe.gpt_oss.model import GptOss as GptOss
from jmoe.gpt_oss.rope_settings import Rope as Rope
from jmoe.gpt_oss.save import save_adapter as save_adapter
from jmoe.gpt_oss.weights import LayerWeights as LayerWeights
from jmoe.gpt_oss.weights import Linear as Linear
from jmoe.gpt_oss.weights import LoraWeights as LoraWeights

__all__ = [
    "AdapterWarning",
    "Config",
    "DeltaReport",
    "Generated",
    "GptOss",
    "LayerWeights",
    "Layout",
    "Linear",
    "LoraBLayout",
    "LoraWeights",
    "MergeReport",
    "Rope",
    "attend",
    "delta_report",
    "generate",
    "load",
    "load_adapter",
    "log_probs",
    "merge",
    "save_adapter",
    "stack_adapters",
]

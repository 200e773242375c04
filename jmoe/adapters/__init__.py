"""LoRA adapters in PEFT's format and its relatives: settings, the layouts of files, factors by target and layer."""

from jmoe.extras import require

require("jmoe.adapters", "model", "safetensors")

from jmoe.adapters.lora import load_lora as load_lora
from jmoe.adapters.lora import stack_loras as stack_loras
from jmoe.adapters.settings import AdapterWarning as AdapterWarning
from jmoe.adapters.settings import LoraBLayout as LoraBLayout
from jmoe.adapters.settings import Settings as Settings

__all__ = ["AdapterWarning", "LoraBLayout", "Settings", "load_lora", "stack_loras"]

"""The option --quantize of the commands that load a model."""

from typing import Literal

Quantize = Literal["mxfp4"]
QUANTIZE_HELP = "mxfp4: round dense experts to MXFP4 while they are loaded; those that are MXFP4 stay as they are."

"""The GPU that kernels are compiled for, when it is not the one at hand."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Target:
    """`backend=Target("sm_90")` is backend "triton" for a GPU of that architecture, present or not.

    With it a layer can be lowered or exported for CUDA on a machine that has no GPU.

    Attributes:
      architecture: "sm_90", or "sm_90a", which is the same here.
      device: the card's name as JAX and torch give it, "NVIDIA H200" for example: launch parameters are those that
        jmoe has for cards of that name, else, and without a name, for the architecture. A table that `jmoe tune` wrote
        on this machine is not used.

    Raises:
      ValueError: the architecture is not sm_ and a compute capability of 8.0 or later, or the device is not a name.
    """

    architecture: str
    device: str | None = None
    capability: int = dataclasses.field(init=False, repr=False)
    """The compute capability times ten: 90 for "sm_90"."""

    def __post_init__(self) -> None:
        if not isinstance(self.architecture, str) or not re.fullmatch(
            r"sm_(8[0-9]|9[0-9]|1[0-9][0-9])a?", self.architecture
        ):
            raise ValueError(f'architecture must be "sm_80" or later, as in "sm_90", got {self.architecture!r}')
        if self.device is not None and (not isinstance(self.device, str) or not self.device.strip()):
            raise ValueError(f'device must be a name, as in "NVIDIA H200", or None, got {self.device!r}')
        vars(self).update(capability=int(self.architecture.removeprefix("sm_").removesuffix("a")))

"""The GPU that kernels are compiled for, when it is not the one at hand."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Target:
    """`backend=Target("sm_90")` is backend "triton" for a GPU of that architecture, present or not.

    With it a layer can be lowered or exported for CUDA on a machine that has no GPU.

    Raises:
      ValueError: the name is not sm_ and a compute capability of 8.0 or later.
    """

    architecture: str

    def __post_init__(self) -> None:
        if not isinstance(self.architecture, str) or not re.fullmatch(
            r"sm_(8[0-9]|9[0-9]|1[0-9][0-9])", self.architecture
        ):
            raise ValueError(f'architecture must be "sm_80" or later, as in "sm_90", got {self.architecture!r}')

    @property
    def capability(self) -> int:
        """The compute capability times ten: 90 for "sm_90"."""
        return int(self.architecture.removeprefix("sm_"))

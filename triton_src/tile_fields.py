"""What values a tile's fields may have, as metadata of their types."""

import dataclasses
from typing import Annotated


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Values that a field takes."""

    values: tuple[int, ...]

    def __contains__(self, value: int) -> bool:
        return value in self.values

    def __str__(self) -> str:
        *first, last = map(str, self.values)
        return f"{', '.join(first)} or {last}"


@dataclasses.dataclass(frozen=True)
class PowerOf2:
    """A field takes powers of two between these two, which are among them."""

    least: int
    most: int

    def __contains__(self, value: int) -> bool:
        return self.least <= value <= self.most and value & (value - 1) == 0

    def __str__(self) -> str:
        return f"a power of two from {self.least} to {self.most}"


@dataclasses.dataclass(frozen=True)
class Between:
    """A field takes integers between these two, which are among them."""

    least: int
    most: int

    def __contains__(self, value: int) -> bool:
        return self.least <= value <= self.most

    def __str__(self) -> str:
        return f"an integer from {self.least} to {self.most}"


Count = Annotated[int, Between(1, 2**31 - 1)]
Stages = Annotated[int, Between(1, 16)]
BufferStages = Annotated[int, Between(2, 16)]  # one is filled while another is read
Splits = Annotated[int, Between(1, 64)]
Registers = Annotated[int, Between(24, 255)]  # of a thread: what ptxas takes
Warps = Annotated[int, PowerOf2(1, 16)]  # of a program
ColumnWarps = Annotated[int, OneOf((1, 2, 4))]
RankBlock = Annotated[int, PowerOf2(16, 64)]

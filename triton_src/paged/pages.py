"""A layer's cache of pages, and the table of those that a sequence has, as planners see them."""

import dataclasses
from typing import Any

from jmoe.triton_src.plan import next_power_of_2


@dataclasses.dataclass(frozen=True)
class Pages:
    """Sizes of a cache [L, count, key_heads, page_size, 2 D] and of tables of `columns` pages.

    Raises:
      NotImplementedError: a page's tokens are not a power of two, or too few for a kernel's product.
    """

    count: int
    key_heads: int
    page_size: int
    columns: int

    def __post_init__(self) -> None:
        if self.page_size < 16 or self.page_size != next_power_of_2(self.page_size):
            raise NotImplementedError(
                f"Triton's attention to pages takes pages of a power of two of at least 16 tokens, got {self.page_size}"
            )

    def most_keys(self, window: int | None) -> int:
        """How many keys a query can see."""
        return self.columns * self.page_size if window is None else min(window, self.columns * self.page_size)

    def constexprs(self) -> dict[str, Any]:
        """The kernels' parameters of these sizes."""
        return {"M": self.key_heads, "COUNT": self.count, "PAGE": self.page_size, "P": self.columns}

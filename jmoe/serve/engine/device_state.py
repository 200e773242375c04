"""What the engine keeps on the device between steps."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.model import shortest_period
from jmoe.gpt_oss.paged import PagedCache, empty_paged_cache
from jmoe.serve.engine import row_options
from jmoe.serve.engine.pages import Geometry
from jmoe.serve.engine.request import MOST_BIASES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageState:
    """What a step of the layers writes; a pytree. The last row of every table, R, is nobody's.

    full, windowed: each row's pages, see jmoe.serve.engine.pages.Geometry.
    """

    cache: PagedCache
    full: Int32[Array, "R+1 P"]
    windowed: Int32[Array, "R+1 C"]

    @classmethod
    def empty(cls, config: Config, geometry: Geometry, rows: int, dtype: DTypeLike) -> "PageState":
        """Zeros."""
        windows = config.windows[: shortest_period(config.windows)]
        pages = [geometry.full_pages if window is None else geometry.windowed_pages for window in windows]
        tables = (
            jnp.zeros((rows + 1, columns), jnp.int32) for columns in (geometry.full_columns, geometry.windowed_columns)
        )
        return cls(empty_paged_cache(config, pages, dtype), *tables)

    def tables(
        self, config: Config, full: Int32[Array, "B P"], windowed: Int32[Array, "B C"]
    ) -> tuple[Int32[Array, "B _"], ...]:
        """For each layer of a group the table that it reads."""
        windows = config.windows[: len(self.cache)]
        return tuple(full if window is None else windowed for window in windows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adjustments:
    """What penalties and logit_bias need of each row; a pytree. Fields as in row_sampling.adjust."""

    counts: Int32[Array, "R+1 V"]
    bias_tokens: Int32[Array, "R+1 N"]
    biases: Float[Array, "R+1 N"]

    @classmethod
    def empty(cls, vocabulary: int, rows: int) -> "Adjustments":
        """Rows without any."""
        counts, tokens = (jnp.zeros((rows + 1, width), jnp.int32) for width in (vocabulary, MOST_BIASES))
        return cls(counts, tokens, jnp.zeros(tokens.shape, jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DeviceState:
    """All of it, a pytree; each program is given up the parts that it writes and returns them.

    tokens: each row's latest, which the host may not have read yet.
    options: each row's, see row_options.
    """

    pages: PageState
    tokens: Int32[Array, " R+1"]
    options: Int32[Array, "R+1 W"]
    adjustments: Adjustments

    @classmethod
    def empty(cls, config: Config, geometry: Geometry, rows: int, dtype: DTypeLike) -> "DeviceState":
        """Of no sequences."""
        return cls(
            PageState.empty(config, geometry, rows, dtype),
            jnp.zeros(rows + 1, jnp.int32),
            jnp.zeros((rows + 1, row_options.WIDTH), jnp.int32),
            Adjustments.empty(config.vocab_size, rows),
        )

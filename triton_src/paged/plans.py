"""Plans of attention to pages, by name."""

from typing import Any

from jmoe.triton_src.decode.plans import Operation
from jmoe.triton_src.paged.decode_attention import PagedDecodeAttentionProblem, plan_paged_decode_attention
from jmoe.triton_src.paged.pages import Pages
from jmoe.triton_src.paged.prefill_attention import PagedPrefillAttentionProblem, plan_paged_prefill_attention
from jmoe.triton_src.plan import Plan
from jmoe.triton_src.tiles import LaunchTable, tile_for

OPERATIONS = {
    "paged_decode_attention": Operation(PagedDecodeAttentionProblem, plan_paged_decode_attention),
    "paged_prefill_attention": Operation(PagedPrefillAttentionProblem, plan_paged_prefill_attention),
}
"""By the name that is also the table's section."""


def plan_paged(operation: str, table: LaunchTable, cache: tuple[int, ...], columns: int, **sizes: Any) -> list[Plan]:
    """The launches of one of OPERATIONS.

    Args:
      cache: [L, pages, M, page_size, 2 D].
      columns: of the sequences' tables of pages.
      sizes: the others of the operation's problem.

    Raises:
      NotImplementedError: see Pages.
    """
    _, count, key_heads, page_size, width = cache
    pages = Pages(count, key_heads, page_size, columns)
    problem = OPERATIONS[operation].problem(pages=pages, head_dim=width // 2, **sizes)
    return OPERATIONS[operation].plan(problem, tile_for(getattr(table, operation), problem.rows))

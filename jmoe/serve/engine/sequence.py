"""One request as the scheduler sees it."""

import dataclasses

from jmoe.serve.engine.page_names import PageNames
from jmoe.serve.engine.pages import SequencePages


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request's tokens, what of them is computed, and what it holds while it runs.

    A step is planned before the tokens of the one before it are read: `pending` of a sequence's tokens are on the
    device alone.

    Attributes:
      tokens: the prompt and the new tokens that have been read.
      prompt_tokens: how many are the prompt's.
      max_tokens: new ones at most.
      names: of its pages.
      shares: whether it may begin with pages that others have computed.
      arrival: its number; the youngest has the largest.
      computed: tokens whose keys and values are in its pages once all planned steps have run.
      pending: planned steps whose results have not been read.
      filling: its tokens so far are still to be computed, piece by piece.
      row: its place among the rows on the device; None: it waits.
      cached_tokens: of the prompt's, those that others had computed; None before it began.
      ended: nothing is to be done with it, nor with results that are still to come.
    """

    tokens: list[int]
    prompt_tokens: int
    max_tokens: int
    names: PageNames
    shares: bool = True
    arrival: int = 0
    computed: int = 0
    pending: int = 0
    filling: bool = False
    pages: SequencePages = dataclasses.field(default_factory=SequencePages)
    row: int | None = None
    cached_tokens: int | None = None
    ended: bool = False

    @property
    def new_tokens(self) -> int:
        """Those that have been read."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def decodes(self) -> bool:
        """Whether its next step is one token's."""
        return self.row is not None and not self.filling and self.new_tokens + self.pending < self.max_tokens

    @property
    def finishing(self) -> bool:
        """Whether all its steps are planned."""
        return self.row is not None and not self.filling and not self.decodes

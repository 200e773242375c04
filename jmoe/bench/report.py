"""What `jmoe bench` prints: a line for each row as it is finished, and a table at the end."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from jmoe.bench.figures import Row, case_of, figure, peer_layer, ratio
from jmoe.bench.ours import CHECKPOINT, PACKED
from jmoe.bench.run import Measured

PEER, RATIO = "peer", f"{PACKED} / peer"


def derived(rows: Sequence[Row], row: Row) -> dict[str, str]:
    """The peer's time and the ratio of a row, where they are known."""
    case = case_of(row)
    peer, proportion = peer_layer(rows, case), ratio(rows, case)
    known = {} if peer is None else {PEER: f"{peer:.1f}"}
    return known if proportion is None else {**known, RATIO: f"{proportion:.2f}"}


def line(rows: Sequence[Row], measured: Measured) -> str:
    """A finished row: what was measured just now, and what follows from it."""
    row = next(row for row in rows if case_of(row) == measured.case)
    cells = {name: text(value) for name, value in measured.microseconds.items()} | derived(rows, row)
    return f"{measured.case}: " + ", ".join(f"{name} {value}" for name, value in cells.items())


def table(rows: Sequence[Row]) -> Table:
    """All rows, with a column for each figure that any has."""
    names = list(dict.fromkeys(name for row in rows for name in row["microseconds"]))
    shown = Table(title="microseconds a call", box=box.SIMPLE_HEAD)
    shown.add_column("layer", no_wrap=True)
    for name in (*names, PEER, RATIO):
        shown.add_column(name, justify="right")
    for row in rows:
        known = derived(rows, row)
        cells = [text(row["microseconds"].get(name, "")) for name in names]
        shown.add_row(str(case_of(row)), *cells, known.get(PEER, ""), known.get(RATIO, ""))
    return shown


def text(value: float | str) -> str:
    """A figure, or the reason why there is none."""
    return value if isinstance(value, str) else f"{value:.1f}"


def jmoe_failed(measured: Measured) -> bool:
    """Whether a layer of jmoe has no figure: ours is not a peer, so that a reason is a failure."""
    names = {PACKED, CHECKPOINT} & measured.microseconds.keys()
    return any(figure({"microseconds": measured.microseconds}, name) is None for name in names)

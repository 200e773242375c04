"""The timing of forward and backward pass, on a CPU."""

from jmoe.bench.case import Matrix, Size
from jmoe.bench.gradient import GROUPED_MM, IMPLEMENTATIONS, MEMORY, RECOMPUTED
from jmoe.bench.ours import PACKED
from jmoe.bench.run import run


def test_time_and_memory_of_each_case() -> None:
    size = Size(64, 64, 2)
    rows = list(run(Matrix(size, (16,), (4,), (0, 4)), IMPLEMENTATIONS))
    assert [row.case.rank for row in rows] == [0, 4]
    for row in rows:
        found = row.microseconds
        assert all(float(found[name]) > 0 for name in (PACKED, RECOMPUTED, MEMORY.format(PACKED)))
    assert rows[0].microseconds[GROUPED_MM] == "GPU only"
    assert GROUPED_MM not in rows[1].microseconds

"""Programs of which some wait for others, in whatever order they start: nobody waits for one that has not started."""

import itertools

import numpy as np
import pytest

from jmoe.triton_src.packed.ready_counters import LOOKS, all_start, is_mine, start
from tests.triton_src.packed.gluon_on_numpy import Pointer, python_body

PROGRAMS, OTHERS = 3, 2
EXPERTS = np.array([7, 7], np.int32)
START = python_body(start)


def shares(order: tuple[int, ...], pieces: int) -> list[list[int]]:
    """The pieces of work that each program does, in the order in which they start."""
    started = Pointer(np.zeros(1, np.int32))
    done = []
    for program in order:
        expert = Pointer(EXPERTS, program - PROGRAMS)
        begin, step = START(started, program, PROGRAMS, pieces, expert)
        done.append(list(range(int(begin), pieces, int(step))))
    return done


@pytest.mark.parametrize("pieces", [PROGRAMS, 2 * PROGRAMS + 1])
def test_in_the_usual_order_each_piece_of_work_is_done_once(pieces: int) -> None:
    done = shares(tuple(range(PROGRAMS + OTHERS)), pieces)
    assert sorted(itertools.chain(*done)) == list(range(pieces))
    assert done[PROGRAMS:] == [[]] * OTHERS


@pytest.mark.parametrize("pieces", [PROGRAMS, 2 * PROGRAMS + 1])
def test_in_any_order_who_waits_has_all_work_done_by_those_that_have_started(pieces: int) -> None:
    for order in itertools.permutations(range(PROGRAMS + OTHERS)):
        done = shares(order, pieces)
        for i, program in enumerate(order):
            if program >= PROGRAMS:
                assert set(itertools.chain(*done[: i + 1])) == set(range(pieces))
                missing = set(range(PROGRAMS)) - set(order[:i])
                assert done[i] == (list(range(pieces)) if missing else [])


def test_a_program_without_rows_does_not_look_for_others() -> None:
    started, nobody = Pointer(np.zeros(1, np.int32)), Pointer(np.array([-1], np.int32))
    begin, step = START(started, PROGRAMS, PROGRAMS, 6, nobody)
    assert list(range(begin, 6, step)) == []


@pytest.mark.parametrize("started", range(PROGRAMS + 1))
def test_others_work_is_left_to_them_once_all_have_started(started: int) -> None:
    word = Pointer(np.array([started], np.int32))
    assert python_body(is_mine)(word, PROGRAMS - 1, PROGRAMS)
    assert python_body(is_mine)(word, PROGRAMS, PROGRAMS) == (started < PROGRAMS)


class Rising(Pointer):
    """An address whose value is one more at each look, up to a limit."""

    def __init__(self, limit: int) -> None:
        self.at, self.looks, self.limit = 0, 0, limit

    @property
    def array(self) -> np.ndarray:  # type: ignore[override]
        self.looks += 1
        return np.array([min(self.looks, self.limit)], np.int32)


@pytest.mark.parametrize(
    ("limit", "programs", "looks", "answer"), [(9, 1, 1, 1), (9, 9, 9, 1), (8, 9, LOOKS.value, 0), (-5, 0, 64, 0)]
)
def test_a_program_looks_again_for_a_while(limit: int, programs: int, looks: int, answer: int) -> None:
    word = Rising(limit)
    assert python_body(all_start)(word, programs, 0) == answer
    assert word.looks == looks

"""Grouping the rows of an append into graph calls, as a function of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualfocus.runtime.calls import IDLE_TOKENS, group_rows

CAPACITY = 100


def groups(
    new: dict[int, int],
    lengths: list[int] | None = None,
    *,
    capacity: int = CAPACITY,
    max_rows: int | None = None,
    ragged_append: bool = True,
) -> list[list[int]]:
    """The rows of each call that appends `new` tokens by row; rows hold nothing unless `lengths` says so."""
    rows = list(new)
    found = group_rows(
        rows,
        list(new.values()),
        lengths or [0] * 40,
        capacity=capacity,
        max_rows=max_rows,
        ragged_append=ragged_append,
    )
    return [[rows[i] for i in group] for group in found]


def test_neighbours_share_a_call() -> None:
    assert groups({0: 1, 1: 1, 2: 1}) == [[0, 1, 2]]
    assert groups({0: 5, 1: 1, 2: 30}) == [[0, 1, 2]]
    assert groups({7: 3}) == [[7]]
    assert groups({}) == []


def test_groups_are_indices_in_the_order_of_the_rows() -> None:
    found = group_rows([3, 1, 2], [1] * 3, [0] * 4, capacity=9, max_rows=None, ragged_append=True)
    assert found == [[1, 2, 0]]


def test_idle_rows_between_two_are_covered_up_to_a_limit() -> None:
    far = IDLE_TOKENS + 1
    assert groups({0: 1, far: 1}) == [[0, far]]
    assert groups({0: 1, far + 1: 1}) == [[0], [far + 1]]
    assert groups({0: 1, far: 1, 2 * far: 1}) == [[0, far, 2 * far]]  # each gap on its own
    # an idle row is padded as the others are
    assert groups({0: IDLE_TOKENS, 2: 1}) == [[0, 2]]
    assert groups({0: IDLE_TOKENS + 1, 2: 1}) == [[0], [2]]
    assert groups({0: 1, 2: IDLE_TOKENS + 1}) == [[0], [2]]


def test_a_group_pads_to_its_own_longest_only() -> None:
    assert groups({0: 1, 3: 1, 30: 50}) == [[0, 3], [30]]
    assert groups({0: 50, 30: 1, 33: 1}) == [[0], [30, 33]]
    assert groups({0: 1, 3: 1, 4: 50}) == [[0, 3], [4]]  # which would pad the idle rows between 0 and 3 too


def test_padding_needs_room_in_every_row() -> None:
    full = CAPACITY - 1
    assert groups({0: 1, 1: 1}, [full, 0]) == [[0, 1]]
    assert groups({0: 1, 1: 2}, [full, 0]) == [[0], [1]]
    assert groups({0: 2, 1: 1}, [0, full]) == [[0], [1]]
    assert groups({0: 1, 2: 1}, [0, full, 0]) == [[0, 2]]
    assert groups({0: 1, 2: 2}, [0, full, 0]) == [[0], [2]]  # the idle row in between is padded too
    assert groups({0: 1, 1: 1}, [CAPACITY - 50, 0, CAPACITY]) == [[0, 1]]  # a row outside does not count


@pytest.mark.parametrize(
    ("max_rows", "expected"), [(1, [[0], [1], [3]]), (2, [[0, 1], [3]]), (3, [[0, 1], [3]]), (4, [[0, 1, 3]])]
)
def test_a_call_covers_so_many_rows_at_most(max_rows: int, expected: list[list[int]]) -> None:
    assert groups({0: 1, 1: 1, 3: 1}, max_rows=max_rows) == expected


def test_without_ragged_appends_only_steps_share_a_call() -> None:
    assert groups({0: 1, 1: 1, 2: 1}, ragged_append=False) == [[0, 1, 2]]
    assert groups({0: 2, 1: 2}, ragged_append=False) == [[0], [1]]
    assert groups({0: 1, 1: 1, 2: 9, 3: 1, 4: 1}, ragged_append=False) == [[0, 1], [2], [3, 4]]


@dataclass(frozen=True)
class Case:
    new: dict[int, int]
    lengths: list[int]
    max_rows: int | None
    ragged_append: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.integers(0, CAPACITY), min_size=1, max_size=24))
    with_room = [row for row, length in enumerate(lengths) if length < CAPACITY]
    rows = draw(st.lists(st.sampled_from(with_room), unique=True)) if with_room else []
    rooms = {row: CAPACITY - lengths[row] for row in rows}
    new = {row: draw(st.integers(1, min(3, room)) | st.integers(1, room)) for row, room in rooms.items()}
    return Case(new, lengths, draw(st.none() | st.integers(1, 8)), draw(st.booleans()))


def may_share(case: Case, group: list[int]) -> bool:
    """Whether one call may append to all rows of an ascending `group`: what `group_rows` has to hold."""
    longest = max(case.new[row] for row in group)
    covered = range(group[0], group[-1] + 1)
    idle = [following - row - 1 for row, following in pairwise(group)]
    return len(group) == 1 or (
        (case.max_rows is None or len(covered) <= case.max_rows)
        and (case.ragged_append or longest == 1)
        and all(gap * longest <= IDLE_TOKENS for gap in idle)
        and all(case.lengths[row] + longest <= CAPACITY for row in covered)
    )


@settings(max_examples=500, deadline=None)
@given(cases())
def test_every_row_is_in_one_group_and_groups_are_few(case: Case) -> None:
    found = groups(case.new, case.lengths, max_rows=case.max_rows, ragged_append=case.ragged_append)
    rows = sorted(case.new)
    assert [row for group in found for row in group] == rows
    assert all(may_share(case, group) for group in found)
    fewest = [0]  # calls for the first n rows
    for stop in range(1, len(rows) + 1):
        fewest.append(min(1 + fewest[at] for at in range(stop) if may_share(case, rows[at:stop])))
    assert len(found) == fewest[-1]

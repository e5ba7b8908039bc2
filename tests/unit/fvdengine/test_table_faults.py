# SPDX-License-Identifier: Apache-2.0
"""Every fault of a chunk table is named once, whatever the table holds."""

import time
from array import array
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvdengine import table_faults
from fvdengine.errors import TableHopeless
from fvdengine.geometry import PLACE_LIMIT, UNMAPPED
from fvdengine.number_set import NumberSet
from fvdengine.table_faults import Collector, Fault, FaultKind, find_faults

CHUNK = 65536


@pytest.fixture
def compact(header):
    """A header whose table reaches two places into the data area."""
    return replace(
        header, table_offset=header.data_offset - 4096, table_size=4096 + CHUNK + 4096,
        chunk_size=CHUNK,
    )  # fmt: skip


def faults(table, header, places=None, preferred=()):
    length = None if places is None else header.data_offset + places * CHUNK
    first = NumberSet()
    for index in preferred:
        first.take(index)
    return list(find_faults(array("I", table), header, length, first))


def test_sound_table_has_none(compact):
    assert faults([2, UNMAPPED, 5, 3], compact, 6) == []
    assert faults([], compact, 6) == []


@pytest.mark.parametrize(
    ("place", "kind"),
    [(0, FaultKind.OVERLAP), (1, FaultKind.OVERLAP), (6, FaultKind.BEHIND),
     (PLACE_LIMIT, FaultKind.RANGE)],
)  # fmt: skip
def test_entry_out_of_bounds_is_named(compact, place, kind):
    assert faults([2, place, 5], compact, 6) == [Fault(1, place, kind)]


def test_length_that_is_not_known_bounds_nothing(compact):
    assert faults([PLACE_LIMIT - 1, 900], compact) == []


def test_of_a_place_taken_twice_the_first_entry_stays(compact):
    table = [4, 3, 4, 4, 3]
    found = [(f.index, f.place) for f in faults(table, compact, 6)]
    assert found == [(2, 4), (3, 4), (4, 3)]


def test_of_a_place_taken_twice_the_preferred_entry_stays(compact):
    found = faults([4, 3, 4, 4, 3], compact, 6, {2, 3, 4})
    assert [(f.index, f.kind) for f in found] == [
        (0, FaultKind.DOUBLE), (1, FaultKind.DOUBLE), (3, FaultKind.DOUBLE),
    ]  # fmt: skip


@given(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, PLACE_LIMIT, UNMAPPED]), max_size=30),
       st.sets(st.integers(0, 29)))  # fmt: skip
def test_table_without_the_faulty_entries_is_sound(table, preferred):
    class Compact:
        data_file, data_offset, table_offset, table_size = "", 1 << 20, 1 << 20, CHUNK
        chunk_size = CHUNK

    found = faults(table, Compact, 6, preferred)
    assert len({f.index for f in found}) == len(found)
    mended = list(table)
    for fault in found:
        assert fault.place == table[fault.index]
        mended[fault.index] = UNMAPPED
    assert faults(mended, Compact, 6) == []
    kept = [place for place in mended if place != UNMAPPED]
    assert set(kept) == {place for place in table if 1 <= place < 6}


def test_hostile_table_takes_bounded_time_and_memory(compact):
    """A million entries of one place, and places far apart: a bit a place is all that is kept."""
    begun = time.process_time()
    hostile = array("I", [2]) * 1_000_000
    hostile.extend(range(PLACE_LIMIT - 2, 2, -(PLACE_LIMIT // 1000)))
    count = sum(1 for _ in find_faults(hostile, compact, None))
    assert count == 999_999
    assert time.process_time() - begun < 20


def test_faults_are_collected_part_by_part_up_to_a_limit(compact, monkeypatch):
    monkeypatch.setattr(table_faults, "FAULTS_MAX", 3)
    collector = Collector(compact, "x.fvd")
    collector(0, array("I", [2, 3, 2]), array("I"))
    collector(3, array("I", [UNMAPPED, 0, 3]), array("I"))
    assert [(f.index, f.kind) for f in collector.faults] == [
        (2, FaultKind.DOUBLE), (4, FaultKind.OVERLAP), (5, FaultKind.DOUBLE),
    ]  # fmt: skip
    with pytest.raises(TableHopeless, match="more than 3 entries"):
        collector(6, array("I", [5, 5]), array("I"))

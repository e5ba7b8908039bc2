# SPDX-License-Identifier: Apache-2.0
"""Places in storage: who may have which, and when one may be used again (I8, I9)."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvdtest.images import make_image, open_image

CHUNK = 8192
OFFSET = 65536
UNMAPPED = 0xFFFFFFFF
SLOW_READER = 7


class Area:
    """Places over a store in memory, and a table to load them from."""

    def __init__(self, probes, *, places=0, room=64, unit=CHUNK, grows=True, chunks=100):
        self.storage = probes.storage.Storage(
            bytes(OFFSET) + b"x" * (places * CHUNK), OFFSET + room * CHUNK, grows
        )
        self.quiescence = probes.compact.Quiescence()
        self.places = probes.compact.Places(
            self.storage, OFFSET, CHUNK, unit, quiescence=self.quiescence
        )
        self.table = probes.compact.Table(chunks, 4096)

    def load(self, entries):
        for chunk, entry in entries.items():
            self.table.load(chunk, entry)
        self.table.settle_load()
        return self.places.take_table(self.table)

    def length(self):
        """Of storage, in places."""
        return (len(self.storage.content()) - OFFSET) / CHUNK


@pytest.fixture
def area(probes):
    return lambda **options: Area(probes, **options)


def test_fresh_places_follow_each_other_and_storage_grows_by_its_unit(area):
    one = area(unit=3 * CHUNK)
    assert one.places.allocate(1) == (0, 1, False)
    assert one.length() == 3
    assert one.places.allocate(2) == (1, 2, False)
    assert one.length() == 3
    assert one.places.allocate(1) == (3, 1, False)
    assert one.length() == 6


def test_no_place_ends_behind_storage(area):
    """A run is as long as storage allows: one unit more, never a part of a chunk."""
    one = area(unit=CHUNK + CHUNK // 2)
    assert one.places.allocate(5) == (0, 1, False)
    assert one.length() == 1.5
    assert one.places.allocate(5) == (1, 2, False)
    assert one.length() == 3


def test_where_the_unit_does_not_fit_a_single_place_may(area):
    one = area(room=4, unit=3 * CHUNK)
    assert [one.places.allocate(1) for _ in range(4)] == [(n, 1, False) for n in range(4)]
    assert one.places.allocate(1) == -errno.ENOSPC
    assert one.length() == 4
    assert one.places.allocate(1) == -errno.ENOSPC, "and again"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EFBIG, errno.EIO])
def test_the_error_of_growing_is_passed_on(area, error):
    one = area()
    one.storage.fail("resize", error, always=True)
    assert one.places.allocate(1) == -error
    one.storage.fail("resize", 0)
    assert one.places.allocate(1) == (0, 1, False)


def test_who_may_not_work_gets_what_is_there(area):
    one = area(places=1)
    assert one.places.allocate(1, may_work=False) == (0, 1, False)
    assert one.places.allocate(1, may_work=False) == -errno.EAGAIN
    assert one.storage.log("resize") == []


def test_who_may_not_work_gets_no_place_that_has_to_be_zeroed(area):
    one = area(places=3)
    assert one.load({0: 1}) == (0, None)
    assert one.places.free_below_fresh == 1
    assert one.places.allocate(1, may_work=False) == (2, 1, False)
    assert one.places.allocate(1) == (0, 1, True)


def test_every_place_of_a_device_has_unknown_content(area):
    one = area(places=3, room=3, grows=False)
    assert one.places.allocate(1, may_work=False) == -errno.EAGAIN
    assert one.places.allocate(2) == (0, 2, True)
    assert one.places.allocate(2) == (2, 1, True)
    assert one.places.allocate(1) == -errno.ENOSPC


# -- a table that is loaded ----------------------------------------------------------------------


@pytest.mark.parametrize(("entries", "reason"), [
    ({3: 2, 7: 2}, "two chunks lie at the same place"),
    ({3: 2, 7: 0x80000002}, "two chunks lie at the same place"),
    ({3: 5}, "outside storage"),
    ({3: 0x7FFFFFFE}, "outside storage"),
    ({3: 0x7FFFFFFF}, "outside storage"),
])  # fmt: skip
def test_a_table_that_cannot_be_is_refused(area, entries, reason):
    one = area(places=5)
    rc, said = one.load(entries)
    assert rc == -errno.EUCLEAN
    assert reason in said


def test_without_room_for_one_place_every_entry_is_outside(area):
    one = area()
    assert one.load({0: 0})[0] == -errno.EUCLEAN


def test_a_part_of_a_chunk_at_the_end_is_no_place(probes, area):
    one = area(places=2)
    one.storage = probes.storage.Storage(one.storage.content()[:-1])
    one.places = probes.compact.Places(one.storage, OFFSET, CHUNK, CHUNK)
    assert one.load({0: 1})[0] == -errno.EUCLEAN


def test_gaps_of_a_table_are_given_out_and_count_as_used_before(area):
    one = area(places=8)
    assert one.load({0: 1, 1: 3, 2: 6}) == (0, None)
    assert one.places.free_below_fresh == 4
    got = [one.places.allocate(1) for _ in range(5)]
    assert got == [(0, 1, True), (2, 1, True), (4, 1, True), (5, 1, True), (7, 1, False)]


def test_a_run_of_free_places_comes_together(area):
    one = area(places=8)
    assert one.load({0: 7, 1: 3}) == (0, None)
    assert one.places.allocate(10) == (0, 3, True)
    assert one.places.allocate(10) == (4, 3, True)


def test_the_mapped_end_is_that_of_the_highest_place(area):
    one = area(places=9)
    assert one.places.mapped_end(one.table) == OFFSET
    assert one.load({4: 6, 5: 2}) == (0, None)
    assert one.places.mapped_end(one.table) == OFFSET + 7 * CHUNK


def test_what_a_dead_predecessor_left_is_given_back_to_storage_in_runs(area):
    one = area(places=200, room=200)
    one.places.reserve(OFFSET + CHUNK, CHUNK)
    assert one.load({0: 4, 1: 5, 2: 7, 3: 180}) == (0, None)
    one.storage.fail("zero", errno.EOPNOTSUPP)
    one.places.give_back_all()
    runs = [(0, 1), (2, 2), (6, 1), (8, 172)]
    zeroed = [entry[1:3] for entry in one.storage.log("zero")]
    assert zeroed == [(OFFSET + first * CHUNK, count * CHUNK) for first, count in runs]
    assert one.places.allocate(1) == (0, 1, True)


# -- a table that grew over the data -----------------------------------------------------------


@pytest.mark.parametrize(("table_offset", "table_bytes", "reserved"), [
    (4096, 4096, (0, 0)), (OFFSET - 4096, 4096, (0, 0)), (OFFSET - 4096, 8192, (0, 1)),
    (OFFSET - 4096, 4096 + CHUNK, (0, 1)), (OFFSET - 4096, 8192 + CHUNK, (0, 2)),
    (OFFSET + CHUNK, 4096, (1, 2)), (OFFSET + CHUNK // 2, CHUNK, (0, 2)),
])  # fmt: skip
def test_places_under_the_table_are_reserved(area, table_offset, table_bytes, reserved):
    assert area().places.reserve(table_offset, table_bytes) == reserved


def test_reserved_places_are_never_given_out(area):
    one = area(places=1)
    assert one.places.reserve(OFFSET - 4096, 4096 + 2 * CHUNK) == (0, 2)
    assert one.places.allocate(3) == (2, 1, False)
    assert one.places.allocate(1) == (3, 1, False)
    assert one.places.free_below_fresh == 0
    one.places.give_back(2, 2)
    assert one.places.allocate(9) == (2, 2, True)


def test_reserved_places_in_the_middle_cut_runs(area):
    one = area(places=10)
    one.places.reserve(OFFSET + 2 * CHUNK, 2 * CHUNK)
    assert one.places.allocate(9) == (0, 2, False)
    assert one.places.allocate(9) == (4, 6, False)
    one.places.give_back(0, 2)
    one.places.give_back(4, 6)
    assert one.places.allocate(9) == (0, 2, True)
    assert one.places.allocate(9) == (4, 6, True)
    assert one.places.free_below_fresh == 0


def test_a_chunk_under_the_table_is_refused(area):
    one = area(places=10)
    one.places.reserve(OFFSET - 4096, 8192)
    rc, said = one.load({3: 0})
    assert rc == -errno.EUCLEAN
    assert "under the chunk table" in said


def test_reserved_places_do_not_count_as_free(area):
    one = area(places=10)
    one.places.reserve(OFFSET - 4096, 4096 + 3 * CHUNK)
    assert one.load({0: 5}) == (0, None)
    assert one.places.free_below_fresh == 2
    assert one.places.allocate(9) == (3, 2, True)
    assert one.places.mapped_end(one.table) == OFFSET + 6 * CHUNK


def test_a_file_is_never_cut_into_the_table(area):
    one = area(places=10)
    one.places.reserve(OFFSET - 4096, 4096 + 3 * CHUNK)
    assert one.places.mapped_end(one.table) == OFFSET + 3 * CHUNK


# -- places that lost their owner (I8) ---------------------------------------------------------


def retired(one, count=1):
    """Places 0 to count - 1 have lost their owners."""
    assert one.places.allocate(count) == (0, count, False)
    for place in range(count):
        assert one.places.retire(place) == 0


def test_a_retired_place_is_not_used_before_a_checkpoint_that_began_later(area):
    one = area(places=1)
    before = one.places.checkpoint_begins()
    retired(one)
    assert one.places.allocate(1) == (1, 1, False)
    assert one.places.release(before) == 0
    assert one.places.allocate(1) == (2, 1, False)
    after = one.places.checkpoint_begins()
    assert one.places.allocate(1) == (3, 1, False)
    assert one.places.release(after) == 1
    assert one.places.allocate(1) == (0, 1, True)


def test_a_retired_place_is_not_used_before_a_slow_reader_has_left(area):
    one = area(places=1)
    one.quiescence.enter(SLOW_READER)
    retired(one)
    assert one.places.release(one.places.checkpoint_begins()) == 0
    assert one.places.retired == 1
    assert one.places.allocate(1) == (1, 1, False)
    assert one.storage.log("zero") == [], "nor is it punched under the reader"
    one.quiescence.leave(SLOW_READER)
    one.quiescence.enter(SLOW_READER)
    assert one.places.release(one.places.checkpoint_begins()) == 1
    assert one.places.allocate(1) == (0, 1, True)


def test_released_places_are_given_back_to_storage(area):
    one = area(places=3)
    retired(one, 3)
    assert one.places.release(one.places.checkpoint_begins()) == 3
    zeroed = sorted(entry[1:3] for entry in one.storage.log("zero"))
    assert zeroed == [(OFFSET + n * CHUNK, CHUNK) for n in range(3)]
    assert one.places.free_below_fresh == 3
    assert one.places.retired == 0


def test_a_place_whose_return_to_storage_failed_is_free_all_the_same(area):
    """Its content is taken for unknown anyway."""
    one = area(places=1)
    retired(one)
    one.storage.fail("zero", errno.EOPNOTSUPP)
    assert one.places.release(one.places.checkpoint_begins()) == 1
    assert one.places.allocate(1) == (0, 1, True)


def test_many_places_are_released_by_one_checkpoint(area):
    one = area(places=300, room=300)
    retired(one, 300)
    assert one.places.release(one.places.checkpoint_begins()) == 300
    assert one.places.allocate(300) == (0, 300, True)


def test_what_the_table_covers_by_now_stays_nobody_s(area):
    one = area(places=3)
    retired(one, 3)
    one.places.reserve(OFFSET, 2 * CHUNK)
    assert one.places.release(one.places.checkpoint_begins()) == 1
    assert [entry[1:3] for entry in one.storage.log("zero")] == [(OFFSET + 2 * CHUNK, CHUNK)]
    assert one.places.allocate(3) == (2, 1, True)


steps = st.lists(st.tuples(
    st.sampled_from(["take", "take", "back", "retire", "begin", "end", "enter", "leave"]),
    st.integers(1, 5)), max_size=60)  # fmt: skip


@given(steps=steps, grows=st.booleans(), reserve=st.integers(0, 3))
def test_no_place_has_two_owners_and_none_is_lost(probes, steps, grows, reserve):
    one = Area(probes, places=0 if grows else 40, room=40, grows=grows)
    one.places.reserve(OFFSET, reserve * CHUNK)
    owned, waiting, ever, inside, open_checkpoint = set(), {}, set(), set(), 0
    for step, number in steps:
        if step == "take":
            got = one.places.allocate(number)
            if got == -errno.ENOSPC:
                assert len(owned) + len(waiting) == 40 - reserve
                continue
            first, count, reused = got
            new = set(range(first, first + count))
            assert 1 <= count <= number
            assert new.isdisjoint(owned | set(waiting) | set(range(reserve)))
            assert max(new) < one.length()
            assert reused or new.isdisjoint(ever)
            owned |= new
            ever |= new
        elif step == "back" and owned:
            place = sorted(owned)[number % len(owned)]
            owned.remove(place)
            one.places.give_back(place, 1)
        elif step == "retire" and owned:
            place = sorted(owned)[number % len(owned)]
            owned.remove(place)
            assert one.places.retire(place) == 0
            waiting[place] = (open_checkpoint, frozenset(inside))
        elif step == "begin":
            open_checkpoint = one.places.checkpoint_begins()
        elif step == "end" and open_checkpoint:
            gone = {
                place for place, (number, users) in waiting.items()
                if number < open_checkpoint and not users & inside
            }  # fmt: skip
            assert one.places.release(open_checkpoint) == len(gone)
            waiting = {place: why for place, why in waiting.items() if place not in gone}
        elif step == "enter" and number not in inside:
            one.quiescence.enter(number)
            inside.add(number)
        elif step == "leave" and number in inside:
            one.quiescence.leave(number)
            inside.remove(number)
            # Whoever enters again is another user.
            waiting = {place: (when, users - {number}) for place, (when, users) in waiting.items()}
        assert one.places.retired == len(waiting)


# -- space beforehand --------------------------------------------------------------------------

MIB = 1 << 20
UNIT = 8 * MIB


@pytest.fixture
def compact(tmp_path):
    """An open compact image whose file grows by 8 MiB, and what its file takes."""
    path = make_image(tmp_path / "a.fvd", size=256 * MIB, compact=True, storage_grow_unit=UNIT)
    opened = open_image(path)
    yield opened.device, lambda: path.stat().st_blocks * 512, opened.close
    opened.close()


def test_a_file_that_is_filled_gets_the_space_of_its_next_growth_at_once(compact):
    device, taken, close = compact
    before = taken()
    for at in range(0, UNIT, MIB):
        device.write(at, b"x" * MIB)
    assert taken() < before + UNIT + MIB
    device.write(UNIT, b"x" * 4096)
    assert before + 2 * UNIT <= taken() < before + 2 * UNIT + MIB
    # What is in use of that is seen by its content, not by its space: it is little.
    for at in range(UNIT, 2 * UNIT, MIB):
        device.write(at, b"y" * 65536)
    device.write(2 * UNIT, b"x")
    assert taken() < before + 2 * UNIT + MIB
    assert device.read(2 * UNIT - MIB, MIB) == b"y" * 65536 + bytes(MIB - 65536)


def test_space_that_was_not_used_in_the_end_is_given_back(compact):
    device, taken, close = compact
    before = taken()
    device.write(0, b"x" * (UNIT + MIB))
    assert taken() >= before + 2 * UNIT
    close()
    assert taken() < before + UNIT + 2 * MIB


def test_scattered_writes_take_what_they_write(compact):
    device, taken, _ = compact
    before = taken()
    for chunk in range(40):
        device.write(chunk * MIB, b"x" * 4096)
    assert taken() < before + MIB

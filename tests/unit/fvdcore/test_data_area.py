# SPDX-License-Identifier: Apache-2.0
"""Where data lie: places are given, zeroed, taken away and flushed in the order of FORMAT.md."""

import errno

import pytest

BLOCK = 4096
CHUNK = 4 * BLOCK
CHUNKS = 16
ENTRIES = 1024  # of a page of the table
SIZE = CHUNKS * CHUNK
TRY = 1
TWO = ["flush", "write journal", "flush"]
ONE = ["write journal", "flush"]


# -- reading and mapping -------------------------------------------------------------------------


def test_what_lies_nowhere_is_zeros_and_not_read(compact):
    one = compact()
    assert one.image.read(100, SIZE - 100) == bytes(SIZE - 100)
    assert one.store.log("read") == []
    assert one.image.status(0, SIZE) == (1, SIZE)


def test_chunks_get_places_in_the_order_of_first_writes(compact):
    one = compact()
    for chunk in (9, 2, 5):
        assert one.image.write(chunk * CHUNK + 10, bytes([chunk]) * 20) == 0
    assert one.table() == {9: 0, 2: 1, 5: 2}
    found = one.image.read(0, SIZE)
    wanted = bytearray(SIZE)
    for chunk in (9, 2, 5):
        wanted[chunk * CHUNK + 10 : chunk * CHUNK + 30] = bytes([chunk]) * 20
    assert found == wanted


def test_chunks_that_lie_together_are_one_transfer(compact):
    one = compact(unit=4 * CHUNK)
    assert one.image.write(0, b"x" * 4 * CHUNK) == 0
    assert one.store.log("write") == [("write", one.at(0), 4 * CHUNK, 0)]
    assert one.image.write(8 * CHUNK, b"y" * CHUNK) == 0
    one.forget()
    assert one.image.read(100, 3 * CHUNK) == b"x" * 3 * CHUNK
    assert one.image.write(5, b"z" * 3 * CHUNK) == 0
    moved = [entry[:3] for entry in one.store.log("read", "write")]
    assert moved == [
        ("read", one.at(0) + 100, 3 * CHUNK), ("write", one.at(0) + 5, 3 * CHUNK),
    ]  # fmt: skip


def test_one_request_over_scattered_chunks(compact):
    one = compact()
    for chunk in (3, 2, 0):
        assert one.image.write(chunk * CHUNK, bytes([chunk + 1]) * CHUNK) == 0
    data = bytes(range(256)) * (4 * CHUNK // 256)
    assert one.image.write(0, data) == 0
    assert one.image.read(0, 4 * CHUNK) == data
    assert one.table() == {3: 0, 2: 1, 0: 2, 1: 3}


def test_the_last_chunk_has_a_whole_place_though_the_disk_ends_in_it(compact):
    one = compact(size=SIZE - CHUNK + 512)
    assert one.image.write(SIZE - CHUNK, b"e" * 512) == 0
    assert one.places() == 1
    assert one.image.read(SIZE - CHUNK, 512) == b"e" * 512
    assert one.image.trim(SIZE - CHUNK, 512) == 0
    assert one.table() == {}


def test_a_try_takes_only_a_fresh_place_that_is_there(compact):
    one = compact(unit=2 * CHUNK)
    assert one.image.write(0, b"x" * 10, TRY) == -errno.EAGAIN
    assert one.image.read(0, 10) == bytes(10)
    assert one.image.write(0, b"x" * 10) == 0
    assert one.image.write(CHUNK, b"y" * 10, TRY) == 0
    assert one.image.write(CHUNK + 20, b"y" * 10, TRY) == 0, "it is mapped by now"
    assert one.image.write(2 * CHUNK, b"z" * 10, TRY) == -errno.EAGAIN


def test_a_first_write_waits_for_all_blocks_of_its_chunk_and_a_later_one_does_not(
    compact, task, wait_until
):
    one = compact()
    one.image.lock(3, 4)
    call = task(one.image.write, 0, b"x" * 10)
    wait_until(one.image.lock_waiters, "the write to wait")
    one.image.unlock(3, 4)
    assert call.result() == 0
    one.image.lock(3, 4)
    assert one.image.write(0, b"y" * 10) == 0
    one.image.unlock(3, 4)


def test_a_chunk_that_lost_its_place_before_a_write_had_its_lock_is_locked_whole(
    compact, task, wait_until
):
    """The write looked while the chunk had a place, and then waited for its next block alone. Two
    of them, at both ends of the chunk, could give it a place each, and one write would be lost."""
    one = compact(base=12)
    assert one.image.write(CHUNK, b"o" * CHUNK) == 0
    assert one.image.write(3 * CHUNK - BLOCK, b"r" * BLOCK) == 0
    one.image.lock(8, 9)
    call = task(one.image.write, 2 * CHUNK - BLOCK, b"n" * 2 * BLOCK)
    wait_until(one.image.lock_waiters, "the write to wait")
    assert one.image.trim(CHUNK, CHUNK) == 0
    one.store.hold("write")
    one.image.unlock(8, 9)
    wait_until(lambda: one.store.waiting("write"), "the chunk to be given a place")
    assert one.image.locks() == [(4, 12)]
    one.store.release("write")
    assert call.result() == 0
    wanted = b"b" * CHUNK + bytes(CHUNK - BLOCK) + b"n" * 2 * BLOCK + b"b" * 2 * BLOCK
    assert one.image.read(0, 3 * CHUNK) == wanted + b"r" * BLOCK


# -- zeroing (I9) --------------------------------------------------------------------------------


def test_a_reused_place_is_zeroed_outside_the_write(compact):
    """I9, S4: its former content shows nowhere."""
    one = compact()
    assert one.image.write(0, b"o" * CHUNK) == 0
    one.free_by_trim(0)
    one.forget()
    assert one.image.write(5 * CHUNK + 700, b"new" * 100) == 0
    assert [entry[:3] for entry in one.store.log("zero", "write")] == [
        ("zero", one.at(0), 700), ("zero", one.at(0) + 1000, CHUNK - 1000),
        ("write", one.at(0) + 700, 300),
    ]  # fmt: skip
    whole = bytes(700) + b"new" * 100
    assert one.image.read(5 * CHUNK, CHUNK) == whole.ljust(CHUNK, b"\0")
    assert one.image.read(0, CHUNK) == bytes(CHUNK)


def test_a_reused_place_over_a_base_is_zeroed_too(compact):
    """Blocks behind the base's end are local from the beginning."""
    one = compact(base=2)
    assert one.image.write(CHUNK, b"o" * CHUNK) == 0
    one.free_by_trim(1)
    assert one.image.write(BLOCK, b"n" * BLOCK) == 0
    assert one.image.read(0, CHUNK) == b"b" * BLOCK + b"n" * BLOCK + bytes(2 * BLOCK)


def test_fresh_places_of_a_file_are_not_zeroed(compact):
    one = compact()
    assert one.image.write(700, b"x") == 0
    assert one.store.log("zero") == []


def test_places_of_a_device_are_zeroed_outside_the_write(compact):
    """S4: what lay on the device before is never shown."""
    one = compact(grows=False, places=4, room=4)
    assert one.image.write(CHUNK + 700, b"x" * 10) == 0
    assert one.image.read(CHUNK, CHUNK) == (bytes(700) + b"x" * 10).ljust(CHUNK, b"\0")
    assert one.image.write(3 * CHUNK, b"y" * CHUNK) == 0
    assert b"\xaa" not in one.image.read(0, SIZE)


def test_a_zeroing_that_fails_maps_nothing(compact):
    one = compact(grows=False, places=4, room=4)
    one.store.fail("zero", errno.EIO)
    assert one.image.write(700, b"x") == -errno.EIO
    assert one.image.read(0, CHUNK) == bytes(CHUNK)
    assert one.table() == {}


def test_a_write_that_fails_leaves_no_mapping_and_its_place_is_zeroed_for_the_next(compact):
    one = compact()
    one.store.fail("write", errno.EIO)
    assert one.image.write(0, b"x" * 10) == -errno.EIO
    assert one.image.read(0, CHUNK) == bytes(CHUNK)
    one.forget()
    assert one.image.write(CHUNK + 100, b"y" * 10) == 0
    assert [entry[:3] for entry in one.store.log("zero")] == [
        ("zero", one.at(0), 100), ("zero", one.at(0) + 110, CHUNK - 110),
    ]  # fmt: skip
    assert one.table() == {1: 0}


def test_a_write_that_found_no_room_gives_back_what_it_took(compact):
    """Or places that no chunk has would keep storage, and the disk would stay full of it."""
    one = compact()
    one.store.fail("write", errno.ENOSPC)
    assert one.image.write(0, b"x" * CHUNK) == -errno.ENOSPC
    assert one.store.content()[one.at(0) : one.at(1)] == bytes(CHUNK)
    hint = 2
    assert one.store.log("zero") == [("zero", one.at(0), CHUNK, hint)]


def test_what_an_earlier_session_left_behind_the_last_chunk_is_cut_off(compact):
    """So what the file grows by reads zeros (I9)."""
    one = compact(places=3)
    assert one.places() == 0, "nothing was mapped"
    assert one.image.write(100, b"x") == 0
    assert one.image.read(0, CHUNK) == (bytes(100) + b"x").ljust(CHUNK, b"\0")
    assert one.store.log("zero") == []


@pytest.mark.parametrize("data_file", [True, False])
def test_a_clean_close_cuts_behind_the_last_chunk(compact, data_file):
    one = compact(unit=5 * CHUNK, data_file=data_file)
    assert one.image.write(CHUNK, b"x") == 0
    assert one.places() == 5
    assert one.image.close() == 0
    assert one.places() == 1
    one.open()
    assert one.image.read(CHUNK, 1) == b"x"


def test_a_device_is_never_cut(compact):
    one = compact(grows=False, places=4, room=4)
    assert one.image.close() == 0
    assert one.places() == 4
    assert one.store.log("resize") == []


# -- zeros and trims -----------------------------------------------------------------------------


def test_zeros_of_what_lies_nowhere_take_no_place(compact):
    one = compact(base=4 * CHUNKS)
    assert one.image.write_zeroes(CHUNK, 2 * CHUNK) == 0
    assert one.image.read(CHUNK, 2 * CHUNK) == bytes(2 * CHUNK)
    assert one.places() == 0
    assert one.image.local() == list(range(4, 12))
    assert one.image.read(0, CHUNK) == b"b" * CHUNK


@pytest.mark.parametrize("base", [0, 4 * CHUNKS])
def test_zeros_that_must_not_be_holes_take_places(compact, base):
    one = compact(base=base)
    assert one.image.write_zeroes(CHUNK + BLOCK, CHUNK, keep=True) == 0
    assert one.image.read(CHUNK + BLOCK, CHUNK) == bytes(CHUNK)
    assert one.table() == {1: 0, 2: 1}


def test_zeros_of_mapped_chunks_are_written_in_place(compact):
    one = compact()
    assert one.image.write(0, b"x" * 2 * CHUNK) == 0
    assert one.image.write_zeroes(100, CHUNK) == 0
    wanted = b"x" * 100 + bytes(CHUNK) + b"x" * (CHUNK - 100)
    assert one.image.read(0, 2 * CHUNK) == wanted
    assert one.table() == {0: 0, 1: 1}


def test_only_a_whole_chunk_of_local_blocks_loses_its_place(compact):
    one = compact(base=4 * CHUNKS)
    assert one.image.write(0, b"x" * 2 * CHUNK) == 0
    assert one.image.write(2 * CHUNK, b"x" * BLOCK) == 0
    assert one.image.trim(0, CHUNK + 3 * BLOCK) == 0
    assert one.image.trim(2 * CHUNK, CHUNK) == 0
    assert one.table() == {1: 1, 2: 2}
    assert one.image.read(0, CHUNK) == bytes(CHUNK)
    assert one.image.read(CHUNK + 3 * BLOCK, BLOCK) == b"x" * BLOCK
    assert one.image.read(2 * CHUNK + BLOCK, 3 * BLOCK) == b"b" * 3 * BLOCK
    assert 0 in one.image.local(), "its blocks stay local, and zero"


def test_a_trim_of_many_chunks_frees_them_all(compact):
    one = compact(unit=SIZE)
    assert one.image.write(0, b"x" * SIZE) == 0
    assert one.image.trim(100, SIZE - 200) == 0
    assert one.table() == {0: 0, 15: 15}
    assert one.image.read(CHUNK, SIZE - 2 * CHUNK) == bytes(SIZE - 2 * CHUNK)


# -- places that lost their owner (I8) ---------------------------------------------------------


def test_full_storage_is_freed_by_a_checkpoint_where_that_helps(compact):
    one = compact(room=3)
    assert one.image.write(0, b"x" * 3 * CHUNK) == 0
    assert one.image.write(3 * CHUNK, b"y" * CHUNK) == -errno.ENOSPC
    assert one.image.trim(CHUNK, CHUNK) == 0
    assert one.image.write(3 * CHUNK, b"y" * CHUNK) == 0
    assert one.table() == {0: 0, 2: 2, 3: 1}
    assert one.image.write(4 * CHUNK, b"z") == -errno.ENOSPC
    assert one.image.read(4 * CHUNK, CHUNK) == bytes(CHUNK)


@pytest.mark.parametrize("full", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("data_file", [True, False])
def test_what_a_trim_freed_is_there_at_once_though_the_store_is_full(compact, full, data_file):
    """A file can always be made longer; that the store is full shows when data are written."""
    one = compact(data_file=data_file)
    assert one.image.write(0, b"x" * 2 * CHUNK) == 0
    assert one.image.trim(0, CHUNK) == 0
    one.data.fail("write", full)
    assert one.image.write(3 * CHUNK, b"y" * CHUNK) == 0
    assert one.table() == {1: 1, 3: 0}
    assert one.image.read(0, 4 * CHUNK) == (
        bytes(CHUNK) + b"x" * CHUNK + bytes(CHUNK) + b"y" * CHUNK)  # fmt: skip


def test_a_write_into_a_chunk_that_has_a_place_takes_what_a_trim_freed(compact):
    """A place may have holes, which need space as well."""
    one = compact()
    assert one.image.write(0, b"x" * 2 * CHUNK) == 0
    assert one.image.trim(0, CHUNK) == 0
    one.store.fail("write", errno.ENOSPC)
    assert one.image.write(CHUNK + 5, b"y" * 10) == 0
    assert one.image.read(CHUNK, 20) == b"xxxxx" + b"y" * 10 + b"xxxxx"
    assert one.table() == {1: 1}


def test_a_store_that_stays_full_is_tried_once_more_and_fails_alone(compact):
    one = compact(data_file=True)
    assert one.image.write(0, b"x" * 3 * CHUNK) == 0
    assert one.image.trim(0, CHUNK) == 0
    one.forget()
    one.data.fail("write", errno.ENOSPC, always=True)
    assert one.image.write(4 * CHUNK, b"y" * CHUNK) == -errno.ENOSPC
    assert len(one.data.log("write")) == 2
    assert one.image.write(4 * CHUNK, b"y" * CHUNK) == -errno.ENOSPC
    assert len(one.data.log("write")) == 3, "there was nothing to free any more"
    one.data.fail("write", 0)
    assert one.image.write(4 * CHUNK, b"y" * CHUNK) == 0


def test_what_nobody_can_wait_for_is_left_to_who_can(compact):
    """The checkpoint is nothing for a connection's own thread."""
    one = compact(data_file=True)
    assert one.image.write(0, b"x" * 2 * CHUNK) == 0
    assert one.image.trim(0, CHUNK) == 0
    one.data.fail("write", errno.ENOSPC, always=True)
    for offset in (CHUNK, 2 * CHUNK):
        assert one.image.write(offset, b"y" * CHUNK, TRY) == -errno.EAGAIN


def test_a_freed_place_is_kept_from_others_while_a_reader_is_in_it(compact, task, wait_until):
    one = compact(room=2)
    assert one.image.write(0, b"x" * 2 * CHUNK) == 0
    one.store.hold("read")
    call = task(one.image.read, 0, CHUNK)
    wait_until(lambda: one.store.waiting("read"), "the reader to be in its place")
    assert one.image.trim(0, CHUNK) == 0
    assert one.image.write(5 * CHUNK, b"y" * CHUNK) == -errno.ENOSPC
    one.store.release("read")
    assert call.result() == b"x" * CHUNK, "what was there when it began"
    assert one.image.write(5 * CHUNK, b"y" * CHUNK) == 0
    assert one.table() == {1: 1, 5: 0}


def test_a_place_is_not_reused_before_the_trim_is_durable(compact):
    """A power loss between must not show one chunk's data in another (I8)."""
    one = compact(unit=2 * CHUNK)
    assert one.image.write(0, b"x" * CHUNK) == 0
    assert one.image.flush() == 0
    assert one.image.trim(0, CHUNK) == 0
    assert one.image.write(CHUNK, b"y" * CHUNK) == 0
    assert one.image.flush() == 0
    assert one.image.write(2 * CHUNK, b"z" * CHUNK) == 0
    assert one.table() == {1: 1, 2: 2}


# -- flushes -------------------------------------------------------------------------------------


def test_a_first_write_into_durable_storage_costs_one_flush(compact):
    one = compact(unit=8 * CHUNK)
    assert one.image.write(0, b"x" * CHUNK) == 0
    assert one.flush() == TWO, "storage that was made longer is not durably there"
    assert one.image.write(CHUNK, b"x" * 100) == 0
    assert one.flush() == ONE
    assert one.image.write(9 * CHUNK, b"y" * 3 * CHUNK) == 0
    assert one.image.trim(CHUNK, CHUNK) == 0
    assert one.flush() == ONE
    assert one.flush() == ["flush"]
    assert one.image.write(5, b"in place") == 0
    assert one.flush() == ["flush"]


def test_a_write_over_the_end_of_durable_storage_costs_two(compact):
    one = compact(unit=2 * CHUNK)
    for chunk, wanted in enumerate([TWO, ONE, TWO, ONE]):
        assert one.image.write(chunk * CHUNK, b"x") == 0
        assert one.flush() == wanted


def test_storage_that_was_cut_is_not_durably_there_when_it_grows_again(compact):
    """A power loss may keep the record and forget the growth, or forget even the cut (I2, I9)."""
    one = compact(places=8, unit=8 * CHUNK)
    assert one.places() == 0, "the session before it had mapped nothing"
    assert one.image.write(0, b"x" * 100) == 0
    assert one.flush() == TWO
    assert one.image.write(CHUNK, b"x" * 100) == 0
    assert one.flush() == ONE


def test_a_place_used_again_costs_two_flushes_once(compact):
    """The zeros must be durable before the mapping (I2)."""
    one = compact(unit=8 * CHUNK)
    assert one.image.write(0, b"x" * 2 * CHUNK) == 0
    one.free_by_trim(0)
    assert one.image.write(5 * CHUNK, b"y" * 10) == 0
    assert one.flush() == TWO
    assert one.image.write(6 * CHUNK, b"y" * 10) == 0
    assert one.flush() == ONE


def test_a_place_used_again_beside_a_commit_costs_the_next_one_two_flushes(
    compact, probes, task, wait_until
):
    """What changes after a commit took its changes is the next one's, zeros included (I2)."""
    gate = probes.gate.Gate()
    one = compact(unit=SIZE, journal_pages=2, gate=gate)
    assert one.image.write(0, b"x" * 4 * CHUNK) == 0
    one.free_by_trim(0)
    for chunk in (1, 2):
        assert one.image.trim(chunk * CHUNK, CHUNK) == 0
        assert one.flush() == ONE
    assert one.image.trim(3 * CHUNK, CHUNK) == 0
    one.store.hold("flush")
    checkpoint = task(one.image.checkpoint)
    wait_until(lambda: one.store.waiting("flush"), "the checkpoint, beside which commits go on")
    commit = task(one.image.flush)
    wait_until(lambda: gate.sleepers() == [None], "one that has its changes and no room for them")
    assert one.image.write(8 * CHUNK + 700, b"new") == 0
    one.store.release("flush")
    assert (checkpoint.result(), commit.result()) == (0, 0)
    assert one.flush() == TWO
    assert one.table() == {8: 0}
    assert one.image.read(8 * CHUNK, CHUNK) == (bytes(700) + b"new").ljust(CHUNK, b"\0")


def test_bits_over_a_base_cost_two_flushes_and_what_lies_behind_it_one(compact):
    one = compact(base=8, unit=SIZE)
    assert one.image.write(2 * CHUNK, b"x" * CHUNK) == 0
    assert one.flush() == TWO
    assert one.image.write(0, b"x" * BLOCK) == 0
    assert one.flush() == TWO
    assert one.image.write(3 * CHUNK, b"x" * BLOCK) == 0
    assert one.flush() == ONE
    assert one.image.local() == [0]


def test_places_of_a_device_cost_two_flushes(compact):
    one = compact(grows=False, places=4, room=4)
    for chunk in range(3):
        assert one.image.write(chunk * CHUNK, b"x" * CHUNK) == 0
        assert one.flush() == TWO


def test_a_data_file_is_flushed_before_the_journal_is_written(compact, task, wait_until):
    one = compact(data_file=True, unit=8 * CHUNK)
    for chunk in range(2):
        assert one.image.write(chunk * CHUNK, b"x" * CHUNK) == 0
        one.forget()
        one.data.hold("flush")
        call = task(one.image.flush)
        wait_until(lambda: one.data.waiting("flush"), "the flush of the data")
        assert one.done() == [], "the journal waits for the data"
        one.data.release("flush")
        assert call.result() == 0
        assert one.done() == ONE
        assert one.data.log() == [("flush", 0, 0, 0)]


def test_a_data_file_that_cannot_be_flushed_lets_no_record_be_written(compact):
    one = compact(data_file=True)
    assert one.image.write(0, b"x" * CHUNK) == 0
    one.forget()
    one.data.fail("flush", errno.EIO)
    assert one.image.flush() == -errno.EIO
    assert one.done() == []
    assert one.image.write(0, b"y") == -errno.EIO


def test_data_lie_in_the_data_file_alone(compact):
    one = compact(data_file=True, base=8)
    length = len(one.store.content())
    assert one.image.write(3 * CHUNK, b"x" * 2 * CHUNK) == 0
    assert one.image.write(BLOCK, b"y" * BLOCK) == 0
    assert one.table() == {3: 0, 4: 1, 0: 2}
    assert one.data.content()[: 2 * CHUNK] == b"x" * 2 * CHUNK
    assert one.data.content()[2 * CHUNK + BLOCK :][:BLOCK] == b"y" * BLOCK
    assert len(one.store.content()) == length


def test_a_checkpoint_makes_table_bitmap_and_epoch_durable_in_this_order(compact):
    one = compact(base=8)
    assert one.image.write(BLOCK, b"y" * BLOCK) == 0
    assert one.image.flush() == 0
    one.forget()
    assert one.image.checkpoint() == 0
    assert one.done() == [
        "flush", "write table", "flush", "write bitmap", "flush", "write sector 4", "flush",
    ]  # fmt: skip


@pytest.mark.parametrize("nth", range(4))
def test_a_flush_that_fails_in_a_checkpoint_ends_it_there(compact, nth):
    one = compact(base=8)
    assert one.image.write(BLOCK, b"y" * BLOCK) == 0
    one.forget()
    one.store.fail("flush", errno.EIO, after=nth)
    assert one.image.checkpoint() == -errno.EIO
    writes = [step for step in one.done() if step != "flush"]
    assert writes == ["write table", "write bitmap", "write sector 4"][:nth]
    assert one.done()[-1] == "flush"


def test_a_chunk_moved_out_of_the_table_s_way_is_durable_before_its_record(compact):
    """I6: what was flushed at its old place must not depend on the flush behind the record."""
    one = compact(unit=8 * CHUNK)
    assert one.image.write(3 * CHUNK, b"x" * CHUNK) == 0
    assert one.table() == {3: 0}
    assert one.places() == 8, "there is durable storage, in which a new chunk needs one flush"
    one.forget()
    assert one.image.grow((ENTRIES + 1) * CHUNK) == 0
    steps = one.done("write", "flush")
    copied = steps.index("write data")
    assert steps[copied : copied + 4] == ["write data", *TWO]
    assert steps.index("write table") > copied + 3
    assert one.table() == {3: 1}
    assert one.image.read(3 * CHUNK, CHUNK) == b"x" * CHUNK


def test_without_a_journal_every_flush_with_changes_is_a_checkpoint(compact):
    one = compact(journal_pages=0, journal_buf_size=0)
    assert one.image.write(0, b"y" * BLOCK) == 0
    assert one.flush() == ["flush", "write table", "flush", "write sector 4", "flush"]
    assert one.flush() == ["flush"]


def test_a_power_loss_at_any_point_shows_flushed_data_or_zeros(compact, probes):
    """Each state that was durable, opened again: a chunk is all of its data, or nothing at all."""
    one = compact(unit=4 * CHUNK)
    assert one.image.write(0, b"1" * CHUNK) == 0
    assert one.image.flush() == 0
    for chunk in range(1, 6):
        assert one.image.write(chunk * CHUNK, bytes([48 + chunk]) * CHUNK) == 0
        left = probes.storage.Storage(one.store.durable(), one.at(CHUNKS), True)
        again = probes.image.Image(left)
        seen = again.read(0, SIZE)
        again.free()
        flushed = b"".join(bytes([48 + n]) * CHUNK for n in range(1, chunk))
        assert seen == b"1" * CHUNK + flushed.ljust(SIZE - CHUNK, b"\0")
        assert one.image.flush() == 0

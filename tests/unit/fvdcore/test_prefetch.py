# SPDX-License-Identifier: Apache-2.0
"""Prefetch: it copies all, finishes in the right order, pauses, waits, fails and starts again."""

import errno
import os
import time

import pytest

from fvdengine.header import Header

BLOCK = 4096
WAIT_SECONDS = 30


@pytest.fixture
def make(probes, image_of, tmp_path):
    made = []

    class Made:
        def __init__(self, blocks=64, base=None, folder=tmp_path, gate=None, **options):
            self.base_bytes = os.urandom(blocks * BLOCK) if base is None else base
            self.path = folder / f"image{len(made)}"
            options = {
                "bytes_per_prefetch": 4 * BLOCK, "num_prefetch_slots": 1,
                "prefetch_min_read_throughput": 0, "prefetch_min_write_throughput": 0,
            } | options  # fmt: skip
            content = image_of(blocks=blocks, **options)
            self.header = Header.unpack(content[:8192])
            with self.path.open("wb") as file:
                file.write(content[: self.header.data_offset])
                file.truncate(len(content))
            self.fd = os.open(self.path, os.O_RDWR)
            self.base = probes.storage.Storage(self.base_bytes)
            self.image = probes.image.Image(self.fd, self.base, gate=gate)
            self.slots = probes.plain.slots()
            made.append(self)

        def count(self, name):
            return self.image.counter(self.slots[name])

        def on_disk(self):
            return Header.unpack(os.pread(self.fd, 8192, 0))

    yield Made
    for one in made:
        one.base.release("read")
        one.image.prefetch_end()
        one.image.free()
        os.close(one.fd)


def pauses(gate):
    """What sleeps with an end; the slots wait for work without one."""
    return [seconds for seconds in gate.sleepers() if seconds is not None and seconds > 0]


@pytest.fixture
def reaches(wait_until):
    def wait(one, state):
        wait_until(lambda: one.image.prefetch_state() == state, f"prefetch to be {state}")

    return wait


def test_it_copies_everything_and_then_needs_no_base(make, reaches):
    one = make()
    assert one.image.write(5 * BLOCK, b"x" * BLOCK) == 0
    assert one.image.prefetch_prepare(0) == 0
    assert one.image.prefetch_thread() == 0
    reaches(one, "done")
    assert one.image.local() == list(range(64))
    assert one.image.facts()["complete"]
    assert one.count("prefetch_bytes") == one.image.prefetch_copied() == 63 * BLOCK
    one.base.fail("read", errno.EIO, always=True)
    expected = bytearray(one.base_bytes)
    expected[5 * BLOCK : 6 * BLOCK] = b"x" * BLOCK
    assert one.image.read(0, 64 * BLOCK) == expected
    assert one.on_disk().base_img_fully_prefetched == 1
    assert os.pread(one.fd, 8, one.header.bitmap_offset) == b"\xff" * 8


def test_holes_of_the_base_are_not_read(make, reaches):
    one = make(base=os.urandom(4 * BLOCK) + bytes(56 * BLOCK) + os.urandom(4 * BLOCK))
    one.image.prefetch_prepare(0)
    one.image.prefetch_thread()
    reaches(one, "done")
    read = sum(length for _, _, length, _ in one.base.log("read"))
    assert read == 8 * BLOCK
    assert one.count("prefetch_zero_bytes") == 56 * BLOCK
    assert os.fstat(one.fd).st_blocks * 512 < one.header.data_offset + 16 * BLOCK


def test_what_is_locked_is_met_again_and_nothing_finishes_before(make, reaches, wait_until):
    one = make()
    one.image.lock(10, 11)
    one.image.prefetch_prepare(0)
    one.image.prefetch_thread()
    wait_until(lambda: len(one.image.local()) >= 60, "all but the locked step")
    assert one.image.prefetch_state() == "running"
    assert one.on_disk().base_img_fully_prefetched == 0
    one.image.unlock(10, 11)
    reaches(one, "done")


def test_the_flag_waits_for_a_failed_write_to_be_made_good(make, reaches):
    """A guest write that failed under its lock left the block absent: prefetch must fetch it."""
    one = make()
    one.base.fail("read", errno.EIO)
    assert one.image.write(3 * BLOCK + 1, b"x") == -errno.EIO
    one.image.prefetch_prepare(0)
    one.image.prefetch_thread()
    reaches(one, "done")
    assert one.image.read(0, 64 * BLOCK) == one.base_bytes


def test_it_pauses_and_goes_on(make, reaches, wait_until):
    one = make()
    one.base.hold("read")
    one.image.prefetch_prepare(0)
    one.image.prefetch_thread()
    wait_until(lambda: one.base.waiting("read"), "the first step to read")
    one.image.prefetch_pause()
    assert one.image.prefetch_state() == "paused"
    one.base.release("read")
    wait_until(lambda: one.image.local() == [0, 1, 2, 3], "the step at hand to end")
    before = len(one.base.log("read"))
    assert one.image.prefetch_run() == 0
    reaches(one, "done")
    assert before == 1


def test_it_waits_for_its_delay(make, probes, reaches, wait_until):
    gate = probes.gate.Gate()
    one = make(gate=gate)
    one.image.prefetch_prepare(7)
    assert one.image.prefetch_state() == "waiting"
    one.image.prefetch_thread()
    wait_until(lambda: pauses(gate) == pytest.approx([7]), "a sleep of the delay")
    gate.advance(6)
    assert (one.image.prefetch_state(), one.image.local()) == ("waiting", [])
    gate.advance(1)
    reaches(one, "done")


def test_a_start_by_hand_needs_no_delay(make, probes, reaches, wait_until):
    gate = probes.gate.Gate()
    one = make(gate=gate)
    one.image.prefetch_prepare(3600)
    one.image.prefetch_thread()
    wait_until(lambda: pauses(gate), "it to wait")
    one.image.prefetch_run()
    reaches(one, "done")


def test_it_is_off_until_it_is_started(make, reaches):
    one = make()
    one.image.prefetch_prepare(-1)
    assert one.image.prefetch_thread() == 0
    assert one.image.prefetch_state() == "disabled"
    assert one.base.log("read") == []
    one.image.prefetch_run()
    reaches(one, "done")


def test_errors_of_the_base_are_retried_ever_more_slowly(make, probes, reaches, wait_until):
    gate = probes.gate.Gate()
    one = make(gate=gate)
    one.base.fail("read", errno.EIO, always=True)
    one.image.prefetch_prepare(0)
    one.image.prefetch_thread()
    spread, slept = [], 0.0
    for errors, pause in enumerate((0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30), 1):
        failed = lambda n=errors: one.count("base_errors_prefetch") == n  # noqa: E731
        wait_until(lambda: failed() and len(pauses(gate)) == 1, "a pause")  # noqa: B023
        [drawn] = pauses(gate)
        assert 0.75 * pause <= drawn <= 1.25 * pause
        spread.append(drawn / pause)
        slept += drawn + 1e-6
        gate.advance(drawn + 1e-6)  # a float may fall short of a nanosecond
    assert max(spread) - min(spread) > 0.01, "no two clones come back at once for ever"
    wait_until(lambda: one.count("base_errors_prefetch") == 12, "one more error")
    wait_until(lambda: pauses(gate), "one more pause")
    assert one.count("prefetch_pauses_error") == 12
    assert one.count("prefetch_paused_ns") / 1e9 == pytest.approx(slept)
    assert 0 < one.count("base_error") <= one.count("prefetch_paused_since")
    one.base.fail("read", 0)
    gate.advance(38)
    reaches(one, "done")


def back_off_until(one, gate, wait_until, over):
    """Let its pauses pass until that holds."""
    while not over():
        wait_until(lambda: pauses(gate) or over(), "a pause")
        for seconds in pauses(gate):
            gate.advance(seconds + 1e-6)  # a float may fall short of a nanosecond


@pytest.mark.parametrize("slots", [1, 5])
def test_a_place_that_cannot_be_read_keeps_no_other_from_coming(
    make, probes, reaches, wait_until, slots
):
    gate = probes.gate.Gate()
    one = make(gate=gate, bytes_per_prefetch=16 * BLOCK, num_prefetch_slots=slots)
    one.base.spoil(21 * BLOCK + 100, 1)
    one.image.prefetch_prepare(0)
    one.image.prefetch_thread()
    others = [block for block in range(64) if block != 21]
    # How often the bad place is tried meanwhile is the disk's matter: the others may wait for it.
    limit = time.monotonic() + WAIT_SECONDS
    back_off_until(
        one, gate, wait_until, lambda: one.image.local() == others or time.monotonic() > limit
    )
    assert one.image.local() == others
    one.base.forget()
    back_off_until(one, gate, wait_until, lambda: len(one.base.log("read")) >= 5)
    assert {entry[1:3] for entry in one.base.log("read")} == {(21 * BLOCK, BLOCK)}
    one.base.spoil(0, 0)
    back_off_until(one, gate, wait_until, lambda: one.image.prefetch_state() == "done")
    assert one.image.read(0, 64 * BLOCK) == one.base_bytes


def test_a_large_range_that_fails_is_passed_after_few_pauses(make, probes, wait_until):
    gate = probes.gate.Gate()
    one = make(gate=gate, blocks=256, bytes_per_prefetch=16 * BLOCK)
    one.base.spoil(0, 192 * BLOCK)
    one.image.prefetch_prepare(0)
    one.image.prefetch_thread()
    others = list(range(192, 256))
    back_off_until(
        one, gate, wait_until,
        lambda: one.image.local() == others or one.count("base_errors_prefetch") > 12,
    )  # fmt: skip
    assert one.image.local() == others


def test_pieces_are_large_again_when_the_base_is_back(make, probes, wait_until):
    gate = probes.gate.Gate()
    one = make(gate=gate, blocks=256, bytes_per_prefetch=16 * BLOCK)
    one.base.fail("read", errno.EIO, always=True)
    one.image.prefetch_prepare(0)
    one.image.prefetch_thread()
    rounds = 16 + 32 + 64 + 128  # of 16 blocks, 8, 4 and 2
    back_off_until(one, gate, wait_until, lambda: one.count("base_errors_prefetch") == rounds)
    one.base.fail("read", 0)
    one.base.forget()
    back_off_until(one, gate, wait_until, lambda: one.image.prefetch_state() == "done")
    sizes = [length // BLOCK for _, _, length, _ in one.base.log("read")]
    assert sizes[0] == 1
    assert sizes.count(16) >= 10
    assert len(sizes) <= 34


@pytest.mark.parametrize("step", [1, 2, 8, 16])
def test_what_it_stored_is_written_back_soon_however_small_the_pieces(make, probes, reaches, step):
    """Else a guest's next fsync pays for all of it."""
    one = make(blocks=64, bytes_per_prefetch=step * BLOCK)
    log = probes.storage.Storage(b"")
    one.image.put_log(log)
    one.image.prefetch_prepare(0)
    one.image.prefetch_thread()
    reaches(one, "done")
    lengths = [entry[2] for entry in log.log("writeback")]
    assert sum(lengths) == 64 * BLOCK
    assert set(lengths) == {16 * BLOCK}


def test_while_it_waits_for_the_base_it_has_no_rate(make, probes, wait_until):
    gate = probes.gate.Gate()
    one = make(gate=gate)
    one.base.fail("read", errno.EIO, after=3, always=True)
    one.base.hold("read")
    one.image.prefetch_prepare(0)
    one.image.prefetch_thread()
    wait_until(lambda: one.base.waiting("read"), "a read")
    gate.advance(1)
    one.base.release("read")
    wait_until(lambda: pauses(gate), "it to wait")
    assert one.count("prefetch_bytes") == 12 * BLOCK
    assert one.count("prefetch_rate") == 0


def test_a_full_image_fails_and_can_be_started_again(make, probes, reaches):
    one = make()
    log = probes.storage.Storage(b"")
    one.image.put_log(log)
    log.fail("write", errno.ENOSPC, after=3, always=True)
    one.image.prefetch_prepare(0)
    one.image.prefetch_thread()
    reaches(one, "failed")
    assert len(one.image.local()) == 12
    assert one.image.facts()["fault"] == 0
    one.image.prefetch_run()
    reaches(one, "failed")
    log.fail("write", 0)
    one.image.prefetch_run()
    reaches(one, "done")
    assert one.image.read(0, 64 * BLOCK) == one.base_bytes


@pytest.mark.parametrize("tiny", ["300k"], indirect=True)
def test_a_full_file_system_fails_and_space_lets_it_go_on(make, reaches, tiny):
    one = make(blocks=64, folder=tiny, journal_pages=2)
    ballast = tiny / "ballast"
    ballast.write_bytes(bytes(128 << 10))
    one.image.prefetch_prepare(0)
    one.image.prefetch_thread()
    reaches(one, "failed")
    assert 0 < len(one.image.local()) < 64
    assert one.image.read(0, 64 * BLOCK) == one.base_bytes, "all is readable still"
    ballast.unlink()
    one.image.prefetch_run()
    reaches(one, "done")
    assert one.image.close() == 0


def test_a_fault_of_the_image_ends_it(make, reaches):
    one = make()
    one.image.set_fault(errno.EIO)
    one.image.prefetch_prepare(0)
    one.image.prefetch_thread()
    reaches(one, "failed")
    assert one.image.local() == []


def test_stopping_leaves_the_rest_in_the_base(make, wait_until, task):
    one = make()
    one.base.hold("read")
    one.image.prefetch_prepare(0)
    one.image.prefetch_thread()
    wait_until(lambda: one.base.waiting("read"), "a step")
    end = task(one.image.prefetch_end)
    wait_until(one.image.prefetch_stopping, "the word to stop")
    one.base.release("read")
    end.result()
    assert len(one.image.local()) <= 4
    assert one.image.close() == 0
    assert one.on_disk().base_img_fully_prefetched == 0


def test_several_reads_are_in_flight_and_one_write(make, probes, reaches, wait_until):
    one = make(num_prefetch_slots=6)
    log = probes.storage.Storage(b"")
    one.image.put_log(log)
    one.base.hold("read")
    log.hold("write")
    one.image.prefetch_prepare(0)
    one.image.prefetch_thread()
    wait_until(lambda: one.base.waiting("read") == 6, "six reads at once")
    one.base.release("read")
    wait_until(lambda: log.waiting("write") == 1, "a write")
    assert log.waiting("write") == 1
    log.release("write")
    reaches(one, "done")
    assert one.image.read(0, 64 * BLOCK) == one.base_bytes
    assert sum(length for _, _, length, _ in one.base.log("read")) == 64 * BLOCK


def test_no_block_is_locked_while_the_base_is_read(make, reaches, wait_until):
    """A guest write goes ahead of a base that hangs, and is not overwritten by what comes late."""
    one = make(num_prefetch_slots=4)
    one.base.hold("read")
    one.image.prefetch_prepare(0)
    one.image.prefetch_thread()
    wait_until(lambda: one.base.waiting("read") == 4, "the reads")
    assert one.image.write(2 * BLOCK, b"new!" * 1024) == 0
    one.base.release("read")
    reaches(one, "done")
    expected = bytearray(one.base_bytes)
    expected[2 * BLOCK : 3 * BLOCK] = b"new!" * 1024
    assert one.image.read(0, 64 * BLOCK) == expected


def test_every_slot_that_fails_is_fetched_again(make, probes, reaches, wait_until):
    one = make(num_prefetch_slots=5)
    for after in range(8):
        one.base.fail("read", errno.EIO, after=after * 3)
    one.image.prefetch_prepare(0)
    one.image.prefetch_thread()
    reaches(one, "done")
    assert one.image.read(0, 64 * BLOCK) == one.base_bytes


@pytest.mark.parametrize("which", ["read", "write"])
def test_a_cap_is_kept(make, probes, reaches, wait_until, which):
    """64 blocks of 4 KiB at 64 KiB/s need four seconds, less the step that begins it."""
    gate = probes.gate.Gate()
    one = make(gate=gate, num_prefetch_slots=4, **{f"prefetch_max_{which}_throughput": 64})
    one.image.prefetch_prepare(0)
    one.image.prefetch_thread()
    passed = 0.0
    while one.image.prefetch_state() != "done":
        wait_until(
            lambda: pauses(gate) or one.image.prefetch_state() == "done", "the next wait"
        )
        for seconds in pauses(gate):
            gate.advance(seconds + 1e-6)  # a float may fall short of a nanosecond
            passed += seconds
    assert 3.0 < passed < 5.5
    assert one.count("prefetch_paused_ns") == 0


@pytest.mark.parametrize("which", ["read", "write"])
def test_a_cap_counts_what_is_still_under_way(make, probes, reaches, wait_until, which):
    """A quarter of a second for each step of 16 KiB, however long the base takes to answer."""
    gate = probes.gate.Gate()
    one = make(gate=gate, num_prefetch_slots=4, **{f"prefetch_max_{which}_throughput": 64})
    one.base.hold("read")
    one.image.prefetch_prepare(0)
    one.image.prefetch_thread()
    for steps in (1, 2, 3):
        wait_until(lambda: one.base.waiting("read") == steps, "the next step")  # noqa: B023
        wait_until(lambda: pauses(gate), "the cap to be kept")
        assert one.base.waiting("read") == steps
        assert 0.2 < pauses(gate)[0] < 0.3
        gate.advance(pauses(gate)[0] + 1e-6)


@pytest.mark.parametrize("which", ["read", "write"])
def test_a_slow_way_makes_it_pause_now_and_then(make, probes, reaches, wait_until, which):
    """Each read or write takes a measuring time on the clock: far below the minimum."""
    gate = probes.gate.Gate()
    one = make(gate=gate, **{f"prefetch_min_{which}_throughput": 5120})
    log = probes.storage.Storage(b"")
    one.image.put_log(log)
    store = one.base if which == "read" else log

    def over():
        return one.image.prefetch_state() == "done"

    store.hold(which)
    one.image.prefetch_prepare(0)
    one.image.prefetch_thread()
    slept = 0.0
    for _ in range(16):
        wait_until(lambda: store.waiting(which), "a step")
        gate.advance(0.11)
        done = len(one.image.local())
        store.pass_one(which)
        wait_until(lambda: len(one.image.local()) > done, "the step to end")  # noqa: B023
        wait_until(lambda: pauses(gate) or store.waiting(which) or over(), "what follows")
        for seconds in pauses(gate):
            assert seconds <= 30
            assert one.image.prefetch_state() == "paused"
            slept += seconds
            gate.advance(seconds + 1e-6)  # a float may fall short of a nanosecond
    store.release(which)
    reaches(one, "done")
    assert 1 <= one.count(f"prefetch_pauses_slow_{which}") <= 15
    assert one.count("prefetch_paused_ns") / 1e9 == pytest.approx(slept, rel=0.01)
    assert one.image.read(0, 64 * BLOCK) == one.base_bytes

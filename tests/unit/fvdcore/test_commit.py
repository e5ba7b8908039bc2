# SPDX-License-Identifier: Apache-2.0
"""The commit pipeline over a store that logs and remembers what is durable.

Orders are those of FORMAT.md section 6; what a power loss would leave is read with Python's codec.
"""

import errno

import pytest

from fvdengine import records
from fvdengine.header import Header

PERIOD, BACKGROUND = 5.0, 30.0


class Pipeline:
    """A Commit upon an image in memory."""

    def __init__(self, probes, content, **options):
        self.storage = probes.storage.Storage(content)
        self.header = Header.unpack(content[:8192])
        self.commit = probes.commit.Commit(self.storage, **options)
        self.storage.forget()

    def places(self):
        """The log with regions for offsets: flush, write journal, write bitmap, write sector 4."""
        head, found = self.header, []
        for kind, offset, length, _ in self.storage.log():
            place = "data"
            if kind == "flush":
                place = ""
            elif offset < 8192:
                place = f"sector {offset // 512}"
            elif offset < head.bitmap_offset + head.bitmap_size:
                place = "bitmap"
            elif offset < head.data_offset:
                place = "journal"
            found.append(f"{kind} {place}".strip())
            assert place != "journal" or offset % 4096 == length % 4096 == 0
        return found

    def survives(self):
        """Blocks that a power loss now would leave local, or raises what Python finds wrong."""
        data = self.storage.durable()
        header = Header.unpack(data[:8192])
        start = header.bitmap_offset
        bits = bytearray(data[start : start + header.bitmap_size])
        start = header.journal_offset
        journal = records.read_journal(data[start : start + header.journal_size], header, "image")
        records.replay(journal, header, bits)
        return {n for n in range(header.bitmap_size * 8) if bits[n // 8] >> n % 8 & 1}


@pytest.fixture
def pipeline(probes, image_of):
    made = []

    def make(gate=None, with_bitmap=True, **options):
        content = image_of(**options)
        made.append(Pipeline(probes, content, gate=gate, with_bitmap=with_bitmap))
        return made[-1]

    yield make
    for one in made:
        one.commit.free()


COMMIT = ["flush", "write journal", "flush"]
CHECKPOINT = ["flush", "write bitmap", "flush", "write sector 4", "flush"]


def test_data_are_flushed_before_their_records_are_written(pipeline):
    one = pipeline()
    one.commit.set_present(3, 9)
    assert one.commit.flush() == 0
    assert one.places() == COMMIT
    assert one.survives() == set(range(3, 9)) == one.commit.durable()


@pytest.mark.parametrize("with_bitmap", [True, False])
def test_nothing_pending_costs_one_flush(pipeline, with_bitmap):
    one = pipeline(with_bitmap=with_bitmap)
    assert one.commit.flush() == 0
    assert one.places() == ["flush"]


def test_a_commit_starts_on_a_fresh_page(pipeline):
    one = pipeline()
    start = one.header.journal_offset
    for block in range(3):
        one.commit.set_present(block * 2, block * 2 + 1)
        assert one.commit.flush() == 0
    writes = one.storage.log("write")
    assert writes == [("write", start + n * 4096, 4096, 0) for n in range(3)]


def test_runs_over_words_become_one_record(pipeline, probes):
    one = pipeline(blocks=300)
    one.commit.set_present(60, 200)
    one.commit.set_present(299, 300)
    assert one.commit.flush() == 0
    assert one.commit.counter(probes.plain.slots()["journal_records"]) == 2
    assert one.survives() == {*range(60, 200), 299}


@pytest.mark.parametrize("blocks", [1, 63, 64, 65, 129])
def test_the_whole_base_with_a_partial_last_block(pipeline, blocks):
    one = pipeline(base_size=blocks * 4096 - 512, size=blocks * 4096)
    one.commit.set_present(0, blocks)
    assert one.commit.flush() == 0
    assert one.survives() == set(range(blocks))


def test_a_checkpoint_makes_each_step_durable_before_the_next(pipeline):
    one = pipeline()
    one.commit.set_present(0, 5)
    assert one.commit.flush() == 0
    before = one.commit.state()
    one.storage.forget()
    assert one.commit.checkpoint() == 0
    assert one.places() == CHECKPOINT
    after = one.commit.state()
    assert after["epoch"] == before["epoch"] + 1 == after["stable_epoch"]
    assert after["tail"] == after["head"] == before["head"]
    assert Header.unpack(one.storage.durable()[:8192]).stable_journal_epoch == after["epoch"]
    assert one.survives() == set(range(5))


def test_a_checkpoint_alone_makes_pending_blocks_durable(pipeline):
    one = pipeline()
    one.commit.set_present(0, 5)
    assert one.commit.checkpoint() == 0
    assert one.commit.durable() == one.survives() == set(range(5))


def test_a_checkpoint_writes_only_pages_that_changed(pipeline):
    one = pipeline(blocks=3 * 32768, block_size=512, bytes_per_prefetch=512)
    one.commit.set_present(2 * 32768, 2 * 32768 + 1)
    assert one.commit.checkpoint() == 0
    writes = one.storage.log("write")
    assert writes[0] == ("write", one.header.bitmap_offset + 8192, 4096, 0)
    one.storage.forget()
    assert one.commit.checkpoint() == 0
    assert one.places() == ["flush", "write sector 4", "flush"]


def test_a_full_ring_falls_back_to_a_checkpoint(pipeline):
    one = pipeline(journal_pages=2)
    for block in range(0, 6, 2):
        one.commit.set_present(block, block + 1)
        one.storage.forget()
        assert one.commit.flush() == 0
    assert one.places() == CHECKPOINT
    assert one.commit.state()["tail"] == 2
    one.commit.set_present(6, 7)
    one.storage.forget()
    assert one.commit.flush() == 0
    assert one.places() == COMMIT
    assert one.survives() == {0, 2, 4, 6}


def test_a_batch_too_large_for_the_journal_falls_back_to_a_checkpoint(pipeline):
    one = pipeline(journal_pages=1, blocks=1000)
    for block in range(0, 500, 2):
        one.commit.set_present(block, block + 1)
    assert one.commit.flush() == 0
    assert one.places() == CHECKPOINT
    assert one.survives() == set(range(0, 500, 2)) == one.commit.durable()


def test_without_a_journal_every_commit_is_a_checkpoint(pipeline):
    one = pipeline(journal_pages=0)
    one.commit.set_present(1, 2)
    assert one.commit.flush() == 0
    assert one.places() == CHECKPOINT
    assert one.survives() == {1}


def test_a_power_loss_at_any_point_leaves_what_was_flushed(pipeline):
    """After each flush of the store; what was committed before never vanishes, and nothing
    becomes local that was not set (I1, I3)."""
    for failing in range(14):
        one = pipeline(journal_pages=2)
        kept, done = set(), set()
        one.storage.fail("flush", errno.EIO, after=failing, always=True)
        for block in range(0, 12, 2):
            one.commit.set_present(block, block + 1)
            done.add(block)
            if one.commit.flush() == 0:
                kept = set(done)
            survived = one.survives()
            assert kept <= survived <= done


# -- sharing -----------------------------------------------------------------------------------


def test_flushes_that_arrive_during_a_commit_share_the_next(pipeline, task, wait_until):
    one = pipeline()
    one.storage.hold("flush")
    one.commit.set_present(0, 1)
    first = task(one.commit.flush)
    wait_until(lambda: one.storage.waiting("flush"), "the first commit to flush")
    one.commit.set_present(2, 3)
    later = [task(one.commit.flush) for _ in range(8)]
    wait_until(lambda: one.commit.state()["started"] == 1, "the others to wait")
    one.storage.release("flush")
    assert [call.result() for call in [first, *later]] == [0] * 9
    assert one.commit.state()["started"] <= 3, "eight waiters needed one commit, or two by chance"
    assert one.survives() == {0, 2}


def test_a_flush_covers_its_own_changes(pipeline, task):
    """Many threads, each sets a block of its own, flushes and looks at once what is durable."""
    one = pipeline(blocks=2048, journal_pages=4)

    def work(first):
        for block in range(first, first + 25):
            one.commit.set_present(block, block + 1)
            assert one.commit.flush() == 0
            assert block in one.survives()

    workers = [task(work, number * 400) for number in range(4)]
    for worker in workers:
        worker.result(30)
    expected = {n * 400 + k for n in range(4) for k in range(25)}
    assert one.survives() == one.commit.durable() == expected


def test_commits_go_on_beside_the_io_of_a_checkpoint(pipeline, task, wait_until):
    one = pipeline()
    one.commit.set_present(0, 1)
    one.storage.hold("write")
    checkpoint = task(one.commit.checkpoint)
    wait_until(lambda: one.storage.waiting("write"), "the checkpoint to write")
    one.commit.set_present(2, 3)
    flush = task(one.commit.flush)
    wait_until(lambda: one.storage.waiting("write") == 2, "the commit to write beside it")
    one.storage.release("write")
    assert (checkpoint.result(), flush.result()) == (0, 0)
    assert one.survives() == {0, 2}


# -- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nth", [0, 1])
def test_a_failed_flush_is_never_retried_into_success(pipeline, nth):
    one = pipeline()
    one.commit.set_present(0, 1)
    one.storage.fail("flush", errno.ENOSPC, after=nth)
    assert one.commit.flush() == -errno.EIO
    one.storage.forget()
    assert one.commit.flush() == -errno.EIO
    assert one.commit.checkpoint() == -errno.EIO
    assert one.places() == [], "metadata are frozen"
    state = one.commit.state()
    assert (state["fault"], state["told"]) == (errno.ENOSPC, 1), "the first cause, told once"
    assert one.commit.durable() == set()


@pytest.mark.parametrize("call", ["flush", "checkpoint"])
def test_a_failed_metadata_write_is_sticky(pipeline, call):
    one = pipeline()
    one.commit.set_present(0, 1)
    one.storage.fail("write", errno.EIO)
    assert getattr(one.commit, call)() < 0
    assert one.commit.flush() == -errno.EIO
    assert one.commit.state()["fault"] == errno.EIO


@pytest.mark.parametrize("nth", [0, 1, 2])
def test_a_failed_checkpoint_frees_no_page(pipeline, nth):
    one = pipeline()
    one.commit.set_present(0, 1)
    assert one.commit.flush() == 0
    one.storage.fail("flush", errno.EIO, after=nth)
    assert one.commit.checkpoint() < 0
    assert one.commit.state()["tail"] == 0
    assert one.survives() == {0}


def test_all_who_wait_learn_of_the_failure(pipeline, task, wait_until):
    one = pipeline()
    one.commit.set_present(0, 1)
    one.storage.hold("flush")
    one.storage.fail("flush", errno.EIO, always=True)
    calls = [task(one.commit.flush)]
    wait_until(lambda: one.storage.waiting("flush"), "the first to flush")
    calls += [task(one.commit.flush) for _ in range(3)]
    one.storage.release("flush")
    assert [call.result() for call in calls] == [-errno.EIO] * 4


# -- the keeper --------------------------------------------------------------------------------


class Keeper:
    """A pipeline whose keeper runs on a clock that the test moves."""

    def __init__(self, pipeline, probes, wait_until, **options):
        self.gate = probes.gate.Gate()
        self.pipeline = pipeline(gate=self.gate, **options)
        self.commit = self.pipeline.commit
        self.wait_until = wait_until
        self.commit.start()
        self.sleeps([None])

    def sleeps(self, deadlines):
        self.wait_until(
            lambda: self.gate.sleepers() == pytest.approx(deadlines), f"a sleep of {deadlines}"
        )

    def commits(self, number):
        self.wait_until(lambda: self.commit.state()["done"] == number, f"commit {number}")


@pytest.fixture
def keeper(pipeline, probes, wait_until):
    made = []

    def make(**options):
        made.append(Keeper(pipeline, probes, wait_until, **options))
        return made[-1]

    yield make
    for one in made:
        one.commit.stop()


def test_the_keeper_sleeps_for_ever_when_nothing_is_pending(keeper):
    one = keeper()
    waits = one.gate.waits
    for _ in range(50):
        one.gate.advance(3600)
    assert one.gate.sleepers() == [None]
    assert one.gate.waits == waits
    assert one.commit.flush() == 0
    assert one.gate.waits == waits, "a guest's flush does not wake it either"


def test_the_keeper_commits_after_the_period(keeper):
    one = keeper()
    one.commit.set_present(0, 1)
    one.sleeps([PERIOD])
    one.gate.advance(PERIOD - 0.5)
    one.sleeps([0.5])
    assert one.commit.state()["done"] == 0
    one.gate.advance(0.6)
    one.commits(1)
    one.sleeps([None])
    assert one.pipeline.survives() == {0}


def test_more_changes_do_not_wake_the_keeper_before_its_time(keeper):
    one = keeper()
    one.commit.set_present(0, 1)
    one.sleeps([PERIOD])
    waits = one.gate.waits
    for block in range(2, 40, 2):
        one.commit.set_present(block, block + 1)
    assert one.gate.waits == waits
    assert one.gate.sleepers() == pytest.approx([PERIOD])


def test_the_keeper_commits_when_the_buffer_is_full(keeper):
    one = keeper(journal_buf_size=160)
    one.commit.set_present(0, 9)
    one.sleeps([PERIOD])
    one.commit.set_present(9, 10)
    one.commits(1)
    assert one.pipeline.survives() == set(range(10))


def test_a_buffer_of_nothing_commits_every_change(keeper):
    one = keeper(journal_buf_size=0)
    for number, block in enumerate([0, 5, 9], 1):
        one.commit.set_present(block, block + 1)
        one.commits(number)


def test_copied_blocks_are_committed_after_half_a_minute(keeper):
    one = keeper()
    one.commit.set_present(0, 1, copied=True)
    one.sleeps([BACKGROUND])
    one.gate.advance(BACKGROUND)
    one.commits(1)
    one.sleeps([None])


def test_copied_blocks_do_not_fill_the_buffer(keeper):
    one = keeper(journal_buf_size=160)
    one.commit.set_present(0, 64, copied=True)
    one.sleeps([BACKGROUND])
    assert one.commit.state()["done"] == 0


def test_without_a_period_changes_wait_for_the_background_time(keeper):
    one = keeper(journal_clean_buf_period=0)
    one.commit.set_present(0, 1)
    one.sleeps([BACKGROUND])


def test_the_keeper_checkpoints_when_the_journal_is_half_full(keeper, wait_until):
    one = keeper(journal_pages=4)
    for block in range(0, 6, 2):
        one.commit.set_present(block, block + 1)
        assert one.commit.flush() == 0
    wait_until(lambda: one.commit.state()["tail"] == 3, "a checkpoint")
    one.wait_until(lambda: not one.commit.state()["checkpointing"], "its end")
    assert one.pipeline.survives() == {0, 2, 4}


def test_the_keeper_stops_trying_after_a_fault(keeper, wait_until):
    one = keeper(journal_buf_size=0)
    one.pipeline.storage.fail("flush", errno.EIO)
    one.commit.set_present(0, 1)
    wait_until(lambda: one.commit.state()["fault"], "the fault")
    one.sleeps([None])


def test_a_guest_write_after_a_copy_is_committed_within_its_period(keeper):
    """The keeper sleeps for 30 s because copied blocks are pending; then the guest writes."""
    one = keeper()
    one.commit.set_present(0, 1, copied=True)
    one.sleeps([BACKGROUND])
    one.commit.set_present(5, 6)
    one.wait_until(lambda: one.gate.sleepers() != pytest.approx([BACKGROUND]), "another look")
    one.gate.advance(PERIOD + 0.1)
    one.commits(1)

# SPDX-License-Identifier: Apache-2.0
"""Opening and closing an image: order of writes, refusals that write nothing, replay, takeover."""

import dataclasses
import errno
import os

import pytest

from fvdengine import records
from fvdengine.errors import EngineFailed
from fvdengine.header import Header
from fvdengine.records import BitmapRecord, Trailer
from fvdtest.images import make_image, open_image

BLOCK = 4096
BOOT = b"boot of the host"


@pytest.fixture
def folder_image(probes, image_of, tmp_path):
    """Write an image to a file and open it as often as wanted."""
    opened = []

    class Maker:
        def __init__(self, content=None, base=None, **options):
            self.path = tmp_path / f"image{len(opened)}-{os.urandom(3).hex()}"
            self.path.write_bytes(image_of(**options) if content is None else content)
            self.base_bytes = os.urandom(64 * BLOCK) if base is None else base

        def open(self, **engine):
            base = engine.pop("base", probes.storage.Storage(self.base_bytes))
            fd = os.open(self.path, os.O_RDONLY if engine.get("read_only") else os.O_RDWR)
            try:
                opened.append(probes.image.Image(fd, base, **engine))
            finally:
                os.close(fd)
            return opened[-1]

        def header(self):
            return Header.unpack(self.path.read_bytes()[:8192])

    yield Maker
    for image in opened:
        image.free()


def refused(probes, maker, **engine):
    """The refusal of an open that must leave every byte as it was."""
    before = maker.path.read_bytes()
    with pytest.raises(probes.image.Refused) as caught:
        maker.open(**engine)
    assert maker.path.read_bytes() == before
    return caught.value


def test_a_session_begins_unclean_and_ends_clean(folder_image):
    one = folder_image()
    before = one.header()
    image = one.open(boot_id=BOOT)
    during = one.header()
    assert during.clean_shutdown == 0
    assert during.extension.boot_id == BOOT
    assert during.extension.open_session != before.extension.open_session
    assert image.close() == 0
    after = one.header()
    assert after.clean_shutdown == 1
    assert after.extension.boot_id == bytes(16)
    assert after.extension.open_session == during.extension.open_session


def test_opening_changes_only_the_sectors_of_the_session(folder_image):
    one = folder_image()
    before = one.path.read_bytes()
    one.open(boot_id=BOOT)
    after = one.path.read_bytes()
    changed = {at // 512 for at in range(0, len(before), 512)
               if before[at : at + 512] != after[at : at + 512]}  # fmt: skip
    assert changed == {4, 14}


def test_a_reader_writes_nothing_even_to_an_unclean_image(folder_image, header_of):
    one = folder_image(clean_shutdown=0)
    header = header_of()
    sector = records.seal_sector([BitmapRecord(0, 8)], Trailer(3, 1), bytes(range(16)))
    with one.path.open("r+b") as file:
        file.seek(header.journal_offset)
        file.write(sector)
    before = one.path.read_bytes()
    image = one.open(read_only=True)
    assert image.local() == [0], "replayed in memory"
    assert image.write(0, b"x") == -errno.EROFS
    assert image.trim(0, BLOCK) == -errno.EROFS
    assert image.write_zeroes(0, BLOCK) == -errno.EROFS
    assert image.close() == 0
    assert one.path.read_bytes() == before


def test_a_writer_settles_what_it_replayed(folder_image, header_of):
    """The bitmap holds it, the epoch outdates the records, so that the ring may be reused (I3)."""
    one = folder_image(clean_shutdown=0)
    header = header_of()
    sector = records.seal_sector([BitmapRecord(16, 16)], Trailer(9, 77), bytes(range(16)))
    with one.path.open("r+b") as file:
        file.seek(header.journal_offset + 4096 * 5)
        file.write(sector)
    image = one.open()
    data = one.path.read_bytes()
    assert data[header.bitmap_offset] == 0b1100
    assert one.header().stable_journal_epoch > 9
    assert image.facts()["epoch"] > 9
    assert image.facts()["sequence"] > 77
    assert image.local() == [2, 3]


BAD_HEADERS = {
    "magic": {"magic": 1}, "data file": {"data_file": "x"}, "table": {"table_size": 4096},
    "block size": {"block_size": 4097}, "overlap": {"data_offset": 73728},
    "too short": {"data_offset": 2**40},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_bad_header_is_refused_and_no_byte_written(probes, folder_image, header_of, name):
    content = dataclasses.replace(header_of(), **BAD_HEADERS[name]).pack().ljust(400_000, b"\0")
    error = refused(probes, folder_image(content))
    assert error.errno == errno.EUCLEAN
    assert error.reason


def test_other_refusals_write_nothing_either(probes, folder_image, header_of):
    one = folder_image()
    assert "needs a base" in refused(probes, one, base=None).reason
    short = probes.storage.Storage(bytes(64 * BLOCK - 512))
    assert "shorter" in refused(probes, one, base=short).reason
    bad = records.seal_sector([BitmapRecord(64 * 8, 8)], Trailer(3, 1), bytes(range(16)))
    with one.path.open("r+b") as file:
        file.seek(header_of().journal_offset)
        file.write(bad)
    assert "journal" in refused(probes, one).reason
    assert "journal" in refused(probes, one, read_only=True).reason


def test_a_base_that_ends_within_its_last_sector_is_long_enough(folder_image, probes):
    one = folder_image(base=b"b" * (64 * BLOCK - 511))
    image = one.open()
    assert image.read(63 * BLOCK, BLOCK) == b"b" * (BLOCK - 511) + bytes(511)


def test_what_is_left_is_never_more_than_the_base_nor_less_than_nothing(folder_image):
    """Figures are read without a lock, between the bit of the last, partial block and its count."""
    image = folder_image(blocks=1, base_size=1024).open()
    assert image.facts()["left"] == 1024
    image.counted(1)
    assert image.facts()["left"] == 0
    image.counted(0)
    assert image.write(0, b"w" * 1024) == 0
    image.counted(0)
    assert image.facts()["left"] == 1024


def test_an_image_without_a_base_needs_none(folder_image):
    one = folder_image(blocks=0, size=65536, journal_pages=0)
    image = one.open(base=None)
    assert image.facts()["complete"]
    assert image.write(5, b"hello") == 0
    assert image.read(4, 7) == b"\0hello\0"
    assert image.close() == 0
    assert one.header().clean_shutdown == 1


def test_what_was_committed_survives_and_the_rest_falls_back(folder_image):
    one = folder_image()
    image = one.open()
    assert image.write(0, b"1" * BLOCK) == 0
    assert image.flush() == 0
    assert image.write(BLOCK, b"2" * BLOCK) == 0
    image.free()  # as a kill would
    again = one.open()
    assert again.local() == [0]
    assert again.read(0, 2 * BLOCK) == b"1" * BLOCK + one.base_bytes[BLOCK : 2 * BLOCK]


# -- live memory -------------------------------------------------------------------------------


@pytest.fixture
def live(tmp_path):
    path = tmp_path / "live"
    path.write_bytes(b"P" * 4096 + bytes(8192))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def test_a_successor_takes_over_what_was_never_flushed(folder_image, live):
    one = folder_image()
    image = one.open(live_fd=live, boot_id=BOOT)
    session = one.header().extension.open_session
    assert image.write(BLOCK, b"2" * BLOCK) == 0
    image.free()
    again = one.open(live_fd=live, boot_id=BOOT, takeover=True)
    assert again.local() == [1]
    assert again.read(BLOCK, BLOCK) == b"2" * BLOCK
    assert one.header().extension.open_session == session, "the session goes on"
    assert again.close() == 0
    assert one.path.read_bytes()[8192] == 0b10
    assert os.pread(live, 4096, 0) == b"P" * 4096, "the first page is not the engine's"


def test_a_fresh_session_forgets_old_live_memory(folder_image, live):
    os.pwrite(live, b"\xff" * 4096, 8192)
    image = folder_image().open(live_fd=live)
    assert image.local() == []


def test_a_fault_is_inherited(folder_image, live):
    os.pwrite(live, errno.ENOSPC.to_bytes(8, "little"), 4096)
    one = folder_image(clean_shutdown=0)
    before = one.path.read_bytes()
    image = one.open(live_fd=live, takeover=True)
    assert image.facts()["fault"] == errno.ENOSPC
    assert image.write(0, b"x") == -errno.EIO
    assert image.flush() == -errno.EIO
    assert image.close() == -errno.EIO
    assert one.path.read_bytes() == before


def test_a_takeover_of_a_disk_that_is_ahead_is_refused(probes, folder_image, live):
    one = folder_image(clean_shutdown=0)
    with one.path.open("r+b") as file:
        file.seek(8192)
        file.write(b"\x01")
    error = refused(probes, one, live_fd=live, takeover=True)
    assert "ahead" in error.reason


def test_live_memory_too_short_is_refused(probes, folder_image, tmp_path):
    path = tmp_path / "short"
    path.write_bytes(bytes(12287))
    fd = os.open(path, os.O_RDWR)
    try:
        assert refused(probes, folder_image(), live_fd=fd).errno == errno.EINVAL
    finally:
        os.close(fd)


# -- finish ------------------------------------------------------------------------------------


def test_finishing_waits_for_locks_and_frees_from_the_base(folder_image, task, wait_until):
    one = folder_image()
    image = one.open()
    assert image.write(0, os.urandom(64 * BLOCK)) == 0
    image.lock(3, 4)
    finish = task(image.finish)
    wait_until(image.lock_waiters, "finish to wait for the lock")
    assert one.header().base_img_fully_prefetched == 0
    image.unlock(3, 4)
    assert finish.result() == 0
    assert one.header().base_img_fully_prefetched == 1
    assert one.path.read_bytes()[8192:8200] == b"\xff" * 8, "the bitmap came before the flag"
    assert image.facts()["complete"]
    assert image.close() == 0
    again = one.open(base=None)
    assert len(again.read(0, 64 * BLOCK)) == 64 * BLOCK


def test_a_journal_that_cannot_be_verified_is_not_dropped(tmp_path):
    """Without its extension the image's uuid is lost: a wrong sum then need not mean torn."""
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(range(256)) * 256)
    path = make_image(tmp_path / "a.fvd", base=str(base))
    opened = open_image(path)
    opened.device.write(0, b"committed" * 1000)
    opened.device.flush()
    opened.abandon()
    with path.open("r+b") as file:
        file.seek(7448)
        file.write(b"\xff\xff\xff\xff")
        file.seek(8192)
        file.write(bytes(8192))  # nor is there a copy to restore it from
    before = path.read_bytes()
    with pytest.raises(EngineFailed, match="cannot be verified"):
        open_image(path)
    assert path.read_bytes() == before

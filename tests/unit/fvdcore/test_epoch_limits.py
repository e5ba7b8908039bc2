# SPDX-License-Identifier: Apache-2.0
"""Epochs and sequences at the end of their range: refused alike by the engine and by Python.

Both are counted on from what an image holds, so a value near 2^64 would wrap to one that replay
ignores; an image must not be able to bring that about.
"""

import errno
from dataclasses import replace

import pytest

from fvdengine import records
from fvdengine.check import check_image
from fvdengine.errors import EngineFailed, InvalidJournal
from fvdengine.records import BitmapRecord, Trailer
from fvdengine.repair import repair_image
from fvdtest.forge import header_of, poke, put_records
from fvdtest.images import content_on_disk, make_image, open_image

SIZE = 1 << 18
UUID = bytes(range(16))


@pytest.mark.parametrize("epoch", [2**63, 2**64 - 1])
def test_a_stable_epoch_that_would_overflow_is_refused(probes, header_of, epoch):
    """After 2^64 - 1 comes epoch 0, older than all others: later commits would be invisible."""
    header = header_of(stable_journal_epoch=epoch)
    length = header.data_offset + header.virtual_disk_size
    engine = probes.layout.Header(probes.storage.Storage(header.pack().ljust(length, b"\0")))
    assert engine.load() == -errno.EUCLEAN


@pytest.mark.parametrize("sequence", [2**63 - 1, 2**63, 2**64 - 1])
def test_a_sequence_is_judged_alike_by_both_codecs(probes, header_of, sequence):
    header = header_of()
    sector = records.seal_sector([BitmapRecord(0, 8)], Trailer(1, sequence), UUID)
    journal = sector.ljust(header.journal_size, b"\0")
    engine = probes.journal.Journal(
        probes.storage.Storage(bytes(header.journal_offset) + journal), header.journal_offset,
        header.journal_size, UUID, header.block_size, header.base_img_size,
    )  # fmt: skip
    try:
        records.read_journal(journal, header, "the image")
        sound = True
    except InvalidJournal:
        sound = False
    assert (engine.replay(1) >= 0) == sound


@pytest.mark.parametrize("epoch", [2**40, 2**62 - 2**32])
def test_an_image_that_was_opened_can_be_opened_again(probes, header_of, epoch):
    """The highest epoch that is accepted leaves room for the sessions that follow."""
    header = header_of()
    sector = records.seal_sector([BitmapRecord(0, 8)], Trailer(epoch, 1), UUID)
    storage = probes.storage.Storage(
        bytes(header.journal_offset) + sector.ljust(header.journal_size, b"\0"))
    place = (header.journal_offset, header.journal_size, UUID, 4096, header.base_img_size)
    first = probes.journal.Journal(storage, *place)
    assert first.replay(1) >= 0
    first.free_pages_until(0)
    first.begin()
    first.put(8, 8)
    first.seal()
    assert first.write() == 0
    assert probes.journal.Journal(storage, *place).replay(1) >= 0


def crafted(path, *, stable=1, epoch=1, sequence=1):
    """An image of which one block, of zeros, is local by a record alone."""
    header = header_of(path)
    changed = replace(header, clean_shutdown=0, stable_journal_epoch=stable).pack()
    poke(path, 0, 2 * changed.ljust(8192, b"\0"))  # its backup copy, too
    put_records(path, header, 3, [BitmapRecord(0, 8)], epoch=epoch, sequence=sequence)
    return path.read_bytes()


LAST, WRITER = 2**62 - 1, 2**61
CASES = {
    "stable epoch": {"stable": LAST, "epoch": LAST},
    "beyond all epochs": {"stable": LAST + 1, "epoch": 7},
    "epoch of a record": {"epoch": LAST},
    "sequence": {"sequence": LAST},
    "epoch without room": {"epoch": WRITER},
    "sequence without room": {"sequence": WRITER - 1},
}


@pytest.mark.parametrize("numbers", CASES.values(), ids=CASES)
def test_numbers_that_are_used_up_are_refused_and_mended(tmp_path, numbers):
    """To go on would lose what is written next, or make an image that nobody can open."""
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * SIZE)
    path = make_image(tmp_path / "disk.fvd", base=str(base), journal_size=65536)
    before = crafted(path, **numbers)
    expected = content_on_disk(path)
    with pytest.raises(EngineFailed, match="check --repair"):
        open_image(path)
    assert path.read_bytes() == before
    opened = open_image(path, read_only=True)
    assert opened.device.read(0, SIZE) == expected
    opened.close()
    found = check_image(path)
    assert found.exit_status == 2
    assert "numbers_used_up" in [finding.code for finding in found.findings]
    repaired = repair_image(path)
    assert repaired.exit_status == 0
    assert "renumber" in [action.code for action in repaired.actions]
    assert content_on_disk(path) == expected
    opened = open_image(path)
    opened.device.write(8192, b"n" * 4096)
    opened.device.flush()
    opened.abandon()
    assert content_on_disk(path)[8192:12288] == b"n" * 4096
    opened = open_image(path)
    assert opened.device.read(8192, 4096) == b"n" * 4096
    opened.close()
    assert check_image(path).exit_status == 0


def test_numbers_of_records_that_do_not_count_are_no_matter(tmp_path):
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * SIZE)
    path = make_image(tmp_path / "disk.fvd", base=str(base), journal_size=65536)
    crafted(path, stable=9, epoch=8, sequence=2**64 - 1)
    assert check_image(path).exit_status == 0
    opened = open_image(path)
    opened.device.write(0, b"n" * 4096)
    opened.device.flush()
    opened.abandon()
    opened = open_image(path)
    assert opened.device.read(0, 8192) == b"n" * 4096 + b"b" * 4096
    opened.close()

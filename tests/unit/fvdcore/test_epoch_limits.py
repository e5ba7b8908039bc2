# SPDX-License-Identifier: Apache-2.0
"""Epochs and sequences at the end of their range: refused alike by the engine and by Python.

Both are counted on from what an image holds, so a value near 2^64 would wrap to one that replay
ignores; an image must not be able to bring that about.
"""

import errno

import pytest

from fvdengine import records
from fvdengine.errors import InvalidJournal
from fvdengine.records import BitmapRecord, Trailer

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

# SPDX-License-Identifier: Apache-2.0
"""Settling: what the journal says is in place, in an order that every crash survives (I3)."""

import os
from array import array
from dataclasses import replace

import pytest

from fvdengine import checkpoint
from fvdengine.checkpoint import Files, settle
from fvdengine.editing import ImageFile
from fvdengine.geometry import UNMAPPED
from fvdengine.header import EPOCH_LIMIT, WRITER_LIMIT
from fvdengine.metadata import load_metadata
from fvdengine.records import BitmapRecord, TableRecord, plain_sector
from fvdtest.forge import (
    Forged,
    Recorder,
    crashes,
    disk_bytes,
    forge_image,
    header_of,
    poke,
    put_records,
)

SIZE = 1 << 18


@pytest.fixture
def unclean(tmp_path):
    """A compact clone with records of two epochs that change bitmap and table."""
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * SIZE)
    path = tmp_path / "c.fvd"
    header = forge_image(
        path, Forged(size=SIZE, base=base, places={0: 3, 1: 0}, local=[0], file_places=6)
    )
    put_records(path, header, 0, [BitmapRecord(8, 8), TableRecord(1, 1, (4, 1))], sequence=5)
    put_records(path, header, 8, [TableRecord(2, 2, (0xFFFFFFFF,))], epoch=2, sequence=6)
    poke(path, 0, replace(header, clean_shutdown=0).pack())
    return path


def run(path, steps=None):
    """Settle the image; return its header."""
    fd = os.open(path, os.O_RDWR)
    image = ImageFile(fd, str(path)) if steps is None else Recorder(fd, str(path), steps)
    try:
        header = header_of(path)
        loaded = load_metadata(fd, header, str(path), image.length())
        return settle(Files(image, image), header, loaded)
    finally:
        os.close(fd)


def test_replayed_state_is_on_disk_and_the_journal_empty(unclean):
    before = disk_bytes(unclean)
    header = run(unclean)
    assert header == header_of(unclean)
    assert (header.stable_journal_epoch, header.clean_shutdown) == (3, 0)
    data = unclean.read_bytes()
    start = header.journal_offset
    assert not any(data[start : start + header.journal_size])
    assert data[header.bitmap_offset] == 0b11
    entries = [data[header.table_offset + i : header.table_offset + i + 4] for i in (0, 4, 8)]
    assert entries == [b"\3\0\0\0", b"\4\0\0\0", b"\xff" * 4]
    assert disk_bytes(unclean) == before


def test_any_crash_leaves_the_same_content(unclean, rng):
    before, content = {str(unclean): unclean.read_bytes()}, disk_bytes(unclean)
    steps = []
    run(unclean, steps)
    count = 0
    for state in crashes(before, steps, rng):
        unclean.write_bytes(state[str(unclean)])
        assert disk_bytes(unclean) == content
        count += 1
    assert count > 12


def test_settled_image_is_left_as_it_is(tmp_path):
    path = tmp_path / "c.fvd"
    forge_image(path, Forged(size=SIZE, places={0: 0}))
    before = path.read_bytes()
    header = run(path)
    assert header.stable_journal_epoch == 2
    poke(path, 0, before[:8192])
    assert path.read_bytes() == before


def test_clean_flag_goes_before_the_first_change(unclean):
    poke(unclean, 0, replace(header_of(unclean), clean_shutdown=1).pack())
    steps = []
    run(unclean, steps)
    writes = [step for _, step in steps if step[0] == "write"]
    assert writes[0][1] == 4 * 512


def test_unchanged_pages_are_not_written(unclean):
    steps = []
    run(unclean, steps)
    written = [(step[1], len(step[2])) for _, step in steps if step[0] == "write"]
    header = header_of(unclean)
    assert [size for at, size in written if at == header.table_offset] == [4096]
    assert [size for at, size in written if at == header.bitmap_offset] == [4096]
    journal = [at for at, _ in written if header.journal_offset <= at < header.table_offset]
    assert journal == [header.journal_offset, header.journal_offset + 4096]


def test_order_is_table_bitmap_epoch_journal_with_flushes_between(unclean):
    steps = []
    run(unclean, steps)
    header = header_of(unclean)
    places = {
        header.table_offset: "table", header.bitmap_offset: "bitmap", 2048: "epoch",
        header.journal_offset: "journal", header.journal_offset + 4096: "journal",
    }  # fmt: skip
    order = [places[step[1]] if step[0] == "write" else "flush" for _, step in steps]
    assert order == [
        "flush", "table", "flush", "bitmap", "flush", "epoch", "flush", "journal", "journal",
        "flush",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("epoch", "sequence", "after"),
    [(EPOCH_LIMIT - 1, 9, 1), (WRITER_LIMIT - 1, 9, 1), (1, WRITER_LIMIT, 1),
     (WRITER_LIMIT - 3, 9, WRITER_LIMIT - 2)],
)  # fmt: skip
def test_epochs_that_are_used_up_begin_anew_behind_an_empty_journal(
    unclean, epoch, sequence, after
):
    put_records(
        unclean, header_of(unclean), 16, [BitmapRecord(0, 8)], epoch=epoch, sequence=sequence
    )
    steps = []
    assert run(unclean, steps).stable_journal_epoch == after
    assert len(load_after(unclean).journal.live) == 0
    sector_4 = [step[2] for _, step in steps if step[0] == "write" and step[1] == 2048]
    epochs = [int.from_bytes(data[116:124], "little") for data in sector_4]
    following = max(epoch, 2) + 1
    assert epochs == ([following, 1] if after == 1 else [following])


def load_after(path):
    with path.open("rb") as file:
        return load_metadata(file.fileno(), header_of(path), str(path))


def test_older_writers_records_are_kept_and_it_gets_a_new_extension(unclean):
    header = header_of(unclean)
    poke(unclean, 0, replace(header, last_open_version=1).pack())
    poke(unclean, header.journal_offset, bytes(65536))
    poke(unclean, header.journal_offset, plain_sector([BitmapRecord(16, 8)]))
    new = run(unclean)
    assert unclean.read_bytes()[header.bitmap_offset] == 0b101
    assert new.last_open_version == 2
    assert new.trusted_extension.image_uuid != header.extension.image_uuid
    assert (new.extension.base_kind, new.extension.create_time) == (
        0, header.extension.create_time,
    )  # fmt: skip


def test_table_part_is_padded_with_unmapped_entries():
    entries = array("I", [1, 2])
    assert checkpoint.table_part(entries, 0, 16) == b"\1\0\0\0\2\0\0\0" + b"\xff" * 8
    assert checkpoint.table_part(entries, 4, 8) == b"\2\0\0\0" + b"\xff" * 4
    assert checkpoint.table_part(entries, 4096, 8) == b"\xff" * 8


def test_unused_places_are_the_same_however_they_are_found(monkeypatch, rng):
    table = array("I", [rng.choice((UNMAPPED, rng.randrange(200))) for _ in range(50)])
    for first, end in ((0, 200), (7, 150), (0, 1), (3, 3)):
        dense = list(checkpoint._unused_places(table, first, end))
        monkeypatch.setattr(checkpoint, "_FEW_PLACES", 0)
        sparse = list(checkpoint._unused_places(table[:2] + array("I"), first, end))
        monkeypatch.undo()
        assert dense == gaps(table, first, end)
        assert sparse == gaps(table[:2], first, end)


def gaps(table, first, end):
    free = [place for place in range(first, end) if place not in set(table)]
    starts = [place for place in free if place - 1 not in free]
    return [
        (low, next(place for place in range(low, end + 1) if place not in free)) for low in starts
    ]

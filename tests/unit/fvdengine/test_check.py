# SPDX-License-Identifier: Apache-2.0
"""Check: each kind of damage is found, named, and has its exit status; nothing is written."""

import os
import time
from dataclasses import replace

import pytest

from fvdengine import chain
from fvdengine.check import check_image
from fvdengine.create import create_image
from fvdengine.errors import (
    EngineError,
    ImageInUse,
    LiveStateLeft,
    NotAnImage,
    TableHopeless,
    UnknownFeature,
)
from fvdengine.findings import FROM_COPY, Severity
from fvdengine.header import Header
from fvdengine.opening import OpenOptions, open_plan
from fvdengine.options import CreateOptions
from fvdengine.records import BitmapRecord, TableRecord, Trailer, seal_sector
from fvdengine.repair import repair_image
from fvdtest.forge import Forged, forge_image, header_of, put_records
from fvdtest.forge import poke as poke_file


def codes(result, severity=None):
    return [f.code for f in result.findings if severity is None or f.severity is severity]


@pytest.fixture
def record(header):
    """A function that makes a journal sector of `image`."""
    uuid = header.extension.image_uuid
    return lambda first, count, epoch=1: seal_sector(
        [BitmapRecord(first, count)], Trailer(epoch, 1), uuid
    )


def test_fresh_image_is_fine(image):
    result = check_image(image)
    assert result.findings == []
    assert result.exit_status == 0
    assert (result.blocks, result.local_blocks) == (256, 0)


def test_unclean_image_is_fine_and_its_journal_is_replayed(image, change, header, poke, record):
    change(clean_shutdown=0)
    poke(header.journal_offset + 4096, record(0, 80))
    result = check_image(image)
    assert result.exit_status == 0
    assert codes(result) == ["not_clean"]
    assert (result.local_blocks, result.replayed_blocks, result.journal.live) == (10, 10, 1)


def test_clean_image_with_something_to_replay_is_corrupt(image, header, poke, record):
    poke(header.journal_offset, record(0, 8))
    result = check_image(image)
    assert codes(result, Severity.CORRUPT) == ["clean_with_records"]
    assert result.exit_status == 2


def test_clean_image_with_old_records_is_fine(image, change, header, poke, record):
    change(stable_journal_epoch=7)
    poke(header.journal_offset, record(0, 8, epoch=6))
    assert check_image(image).findings == []


def test_record_past_the_end_is_corrupt(image, change, header, poke, record):
    change(clean_shutdown=0)
    poke(header.journal_offset, record(1 << 40, 8))
    result = check_image(image)
    assert codes(result, Severity.CORRUPT) == ["invalid_journal"]
    assert result.exit_status == 2


def test_torn_sector_is_a_note(image, change, header, poke, record):
    change(clean_shutdown=0)
    poke(header.journal_offset, record(0, 8)[:-1] + b"x")
    result = check_image(image)
    assert codes(result) == ["torn_sector", "not_clean"]
    assert result.exit_status == 0


def test_bits_behind_the_last_block_are_corrupt(image, header, poke):
    poke(header.bitmap_offset + 32, b"\x05")
    result = check_image(image)
    assert codes(result) == ["bitmap_padding"]
    assert "2 bits" in result.findings[0].message


def test_prefetched_image_must_have_every_bit(image, change, header, poke):
    change(base_img_fully_prefetched=1)
    poke(header.bitmap_offset, b"\xff" * 31 + b"\x7f")
    result = check_image(image)
    assert codes(result) == ["prefetched_without_bits"]
    assert " 1 blocks" in result.findings[0].message
    poke(header.bitmap_offset, b"\xff" * 32)
    assert check_image(image).findings == []


def test_damaged_extension_is_corrupt(image, poke):
    poke(7450, bytes([image.read_bytes()[7450] ^ 1]))
    result = check_image(image)
    assert "extension_crc" in codes(result, Severity.CORRUPT)


@pytest.mark.parametrize("name", ["data_file_fmt", "base_img_fmt"])
def test_a_format_of_another_version_is_not_said_to_be_repaired(image, change, name):
    change(backup=True, **{name: "cow"})
    for look in (check_image, repair_image):
        with pytest.raises(EngineError, match="cow") as caught:
            look(image)
        assert "--repair" not in caught.value.hint


def test_older_writer_is_a_note(image, change):
    change(last_open_version=1)
    result = check_image(image)
    assert "older_writer" in codes(result)
    assert result.exit_status == 0


def test_run_time_changes_do_not_concern_the_backup_copy(image, change):
    change(clean_shutdown=0, stable_journal_epoch=9, ext_open_session=b"s" * 16)
    assert "backup_header" not in codes(check_image(image))


@pytest.mark.parametrize(
    ("values", "name", "severity"),
    [
        ({"copy_on_read": 1}, "copy_on_read", Severity.NOTE),
        ({"ext_base_kind": 4}, "base_kind", Severity.NOTE),
        ({"ext_image_uuid": b"u" * 16}, "image_uuid", Severity.NOTE),
        ({"block_size": 8192}, "block_size", Severity.CORRUPT),
        ({"ext_create_time": 1}, "create_time", Severity.CORRUPT),
    ],
)
def test_backup_copy_may_be_old_but_not_of_another_image(image, change, values, name, severity):
    """An interrupted update leaves an old copy; what never changes must be equal."""
    change(**values)
    result = check_image(image, OpenOptions(accept_changed_base=True))
    found = [f for f in result.findings if f.code == "backup_header"]
    assert [f.severity for f in found] == [severity]
    assert name in found[0].message
    assert "--repair" in found[0].remedy


def test_unreadable_backup_copy_is_corrupt(image, poke):
    poke(8192, bytes(8192))
    result = check_image(image)
    assert codes(result) == ["backup_header"]


@pytest.mark.parametrize(
    "values",
    [{"virtual_disk_size": 1000}, {"bitmap_offset": 8192}, {"data_offset": 1 << 40}],
    ids=str,
)
def test_invalid_header_is_corrupt(image, change, values):
    change(**values)
    result = check_image(image)
    assert result.exit_status == 2
    assert len(result.findings) == 1


def test_truncated_image_is_corrupt(image):
    os.truncate(image, image.stat().st_size - 512)
    result = check_image(image)
    assert codes(result) == ["image_truncated"]
    assert result.exit_status == 2


def test_surplus_at_the_end_is_a_leak(image):
    os.truncate(image, image.stat().st_size + 8192)
    result = check_image(image)
    assert codes(result) == ["file_too_long"]
    assert result.exit_status == 3


def test_changed_base_leaves_the_check_incomplete_unless_accepted(image, base):
    os.utime(base, ns=(1, 1))
    result = check_image(image)
    assert (codes(result), result.exit_status) == (["base_changed"], 1)
    accepted = check_image(image, OpenOptions(accept_changed_base=True))
    assert accepted.exit_status == 0
    assert codes(accepted) == ["base"]


def test_remedies_fit_to_a_check(image, base, change, tmp_path):
    """Whoever checks an image is not told to check it, but told of its base which file it is."""
    os.utime(base, ns=(1, 1))
    (found,) = check_image(image).findings
    assert "or add --accept-changed-base" in found.remedy
    clone = tmp_path / "clone of it.fvd"
    options = CreateOptions(base=str(image), base_format="fvd", accept_changed_base=True)
    create_image(clone, options)
    change(backup=True, block_size=1000)
    (found,) = check_image(image).findings
    assert (found.code, found.remedy) == ("invalid_header", FROM_COPY)
    (found,) = check_image(clone).findings
    assert found.code == "invalid_header"
    assert found.remedy == f"Look at it with `fvdctl check {image}`, or restore it from a copy."


def test_a_table_that_is_none_is_told_at_once(tmp_path):
    """A hole where a table of a gigabyte should be: each of its entries is place 0."""
    path = tmp_path / "hole.fvd"
    create_image(path, CreateOptions(size=1 << 30, compact=True, journal_size=65536))
    size = 1 << 30
    made = Header.unpack(path.read_bytes()[:8192])
    hostile = replace(
        made, virtual_disk_size=size // 4 * made.chunk_size, table_size=size,
        data_offset=made.table_offset + size,
    )  # fmt: skip
    with path.open("r+b") as file:
        file.write(hostile.pack().ljust(8192, b"\0") + hostile.pack())
        file.truncate(made.table_offset)
        file.truncate(hostile.data_offset + (1 << 30))
    begun = time.process_time()
    assert codes(check_image(path)) == ["table_hopeless"]
    with pytest.raises(TableHopeless):
        repair_image(path)
    assert time.process_time() - begun < 20


def test_short_base_says_nothing_about_the_image(image, base):
    os.truncate(base, 512)
    result = check_image(image)
    assert codes(result) == ["base_too_short"]
    assert result.exit_status == 1


def test_missing_base_leaves_the_check_incomplete(image, base):
    base.unlink()
    result = check_image(image)
    assert codes(result) == ["base_missing"]
    assert result.exit_status == 1


def test_corrupt_outweighs_the_rest(image, base, header, poke):
    base.unlink()
    os.truncate(image, image.stat().st_size + 8192)
    poke(header.bitmap_offset + 4000, b"\x01")
    assert check_image(image).exit_status == 2


def test_image_in_use_cannot_be_checked(image):
    with open_plan(image), pytest.raises(ImageInUse):
        check_image(image)


def test_image_of_a_dead_process_needs_a_word(image, change):
    change(clean_shutdown=0, ext_boot_id=chain.boot_id())
    with pytest.raises(LiveStateLeft):
        check_image(image)
    assert check_image(image, OpenOptions(discard_live_state=True)).exit_status == 0


def test_foreign_and_newer_files_cannot_be_checked(base, image, poke):
    with pytest.raises(NotAnImage):
        check_image(base)
    poke(3344, b"\x01")
    with pytest.raises(UnknownFeature):
        check_image(image)


def test_check_changes_nothing(image, change, header, poke, record, digest):
    change(clean_shutdown=0)
    poke(header.journal_offset, record(0, 8))
    before = digest(image), image.stat().st_mtime_ns
    check_image(image)
    assert (digest(image), image.stat().st_mtime_ns) == before


# Compact images and data files -------------------------------------------------------------


@pytest.fixture
def forge(tmp_path, base):
    def make(**values):
        path = tmp_path / "compact.fvd"
        forge_image(path, Forged(size=1 << 18, base=base, **values))
        return path

    return make


def test_compact_image_is_counted(forge):
    path = forge(places={0: 1, 5: 0}, local=[0, 1, 8, 9, 10])
    result = check_image(path)
    assert result.findings == []
    assert (result.chunks, result.mapped_chunks) == (16, 2)
    assert (result.local_blocks, result.zero_blocks) == (5, 3)


@pytest.mark.parametrize(
    ("index", "place", "code"),
    [(3, 1, "entry_double"), (3, 0x7FFFFFFF, "entry_range"), (3, 2, "entry_behind")],
)
def test_wrong_entry_is_corrupt_and_named(forge, index, place, code):
    path = forge(places={0: 1, 5: 0})
    poke_file(path, header_of(path).table_offset + 4 * index, place.to_bytes(4, "little"))
    result = check_image(path)
    assert codes(result, Severity.CORRUPT) == [code]
    assert result.findings[0].where == "table entry 3"
    assert "--repair" in result.findings[0].remedy


def test_many_wrong_entries_are_counted_not_listed(forge):
    path = forge(places={0: 0})
    poke_file(path, header_of(path).table_offset, bytes(64))
    found = [f.message for f in check_image(path).findings if f.code == "entry_double"]
    assert len(found) == 11
    assert found[-1].startswith("5 more")


def test_record_that_takes_a_place_twice_is_corrupt(forge):
    path = forge(places={0: 1, 5: 0})
    header = header_of(path)
    put_records(path, header, 0, [TableRecord(1, 7, (1,))])
    poke_file(path, 0, replace(header, clean_shutdown=0).pack())
    result = check_image(path)
    assert codes(result, Severity.CORRUPT) == ["entry_double"]
    assert result.replayed_chunks == 1


def test_clean_image_with_a_mapping_only_in_the_journal_is_corrupt(forge):
    path = forge(places={0: 1, 5: 0}, file_places=3)
    put_records(path, header_of(path), 0, [TableRecord(1, 7, (2,))])
    assert codes(check_image(path), Severity.CORRUPT) == ["clean_with_records"]


def test_entries_behind_the_last_chunk_are_a_note(forge):
    path = forge(places={0: 0})
    poke_file(path, header_of(path).table_offset + 64, bytes(4))
    result = check_image(path)
    assert (codes(result), result.exit_status) == (["table_padding"], 0)


def test_storage_that_no_chunk_has_is_a_leak(forge):
    path = forge(places={0: 1, 5: 0})
    poke_file(path, header_of(path).table_offset + 20, b"\xff" * 4)
    result = check_image(path)
    assert codes(result) == ["unused_places"]
    assert "16384 bytes" in result.findings[0].message
    assert result.exit_status == 3
    poke_file(path, header_of(path).table_offset, b"\xff" * 4)
    assert codes(check_image(path)) == ["file_too_long"]


def test_what_a_crash_leaves_behind_is_no_leak(forge):
    path = forge(places={0: 1, 5: 0}, values={"clean_shutdown": 0}, file_places=70)
    result = check_image(path)
    assert codes(result) == ["not_clean", "file_too_long"]
    assert result.exit_status == 0


@pytest.mark.parametrize("places", [None, {0: 1, 5: 0}])
def test_data_file_must_be_there_and_long_enough(forge, places):
    path = forge(places=places, data_file="x.data", filled=[0])
    data = path.with_name("x.data")
    assert check_image(path).findings == []
    os.truncate(data, 4096)
    result = check_image(path)
    assert codes(result, Severity.CORRUPT) == (
        ["entry_behind"] * 2 if places else ["data_file_too_short"]
    )
    data.unlink()
    result = check_image(path)
    assert (codes(result), result.exit_status) == (["data_file_missing"], 1)


def test_data_file_with_surplus_is_a_leak(forge):
    path = forge(data_file="x.data", filled=[0])
    os.truncate(path.with_name("x.data"), 1 << 20)
    result = check_image(path)
    assert (codes(result), result.exit_status) == (["file_too_long"], 3)


def test_lost_front_says_that_the_copy_can_restore_it(image, poke):
    poke(0, bytes(8))
    result = check_image(image)
    assert (codes(result), result.exit_status) == (["not_an_image"], 2)
    assert "--repair" in result.findings[0].remedy


def test_journal_is_described(image, header, poke, record):
    poke(header.journal_offset, record(0, 8, epoch=7))
    poke(header.journal_offset + 512, record(0, 8, epoch=7)[:-1] + b"x")
    counts = check_image(image).journal
    assert (counts.live, counts.torn, counts.highest_epoch) == (1, 1, 7)


def test_chunk_size_of_a_raw_image_may_be_anything(image, change):
    change(backup=True, chunk_size=0)
    assert check_image(image).findings == []

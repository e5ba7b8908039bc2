# SPDX-License-Identifier: Apache-2.0
"""Repair: each damage planted, found, told by a dry run, mended, and the data still there."""

import os
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fvdengine import chain, editing, repair
from fvdengine.check import check_image
from fvdengine.create import create_image
from fvdengine.errors import (
    BeyondRepair,
    DataFileMissing,
    ImageInUse,
    ImageTruncated,
    InvalidHeader,
    LiveStateLeft,
    NotAnImage,
    UnknownFeature,
)
from fvdengine.header import Extension
from fvdengine.opening import OpenOptions, open_plan
from fvdengine.options import CreateOptions
from fvdengine.records import BitmapRecord, TableRecord
from fvdengine.repair import repair_image
from fvdtest.forge import (
    BLOCK,
    CHUNK,
    Forged,
    Recorder,
    crashes,
    disk_bytes,
    forge_image,
    header_of,
    poke,
    put_records,
    table_of,
)

SIZE = 1 << 18
PLACES = {0: 4, 1: 0, 5: 2, 11: 5, 12: 1, 15: 3}
UNMAPPED = 0xFFFFFFFF


@dataclass
class Case:
    """An image and what it should show again after its repair."""

    path: Path
    content: bytes

    @property
    def header(self):
        return header_of(self.path)

    def files(self):
        return {
            str(p): p.read_bytes()
            for p in self.path.parent.iterdir() if p.suffix in (".fvd", ".data", ".raw")
        }  # fmt: skip

    def mend(self, codes, status=2):
        """Repair must do just `codes`; a dry run tells the same and changes nothing."""
        before = self.files()
        assert check_image(self.path).exit_status == status
        told = repair_image(self.path, dry_run=True)
        assert self.files() == before
        assert told.exit_status == status
        done = repair_image(self.path)
        assert told.actions == done.actions
        assert [action.code for action in done.actions] == codes
        assert [f.code for f in done.after.findings] == []
        assert check_image(self.path).findings == []
        again = repair_image(self.path)
        assert (again.actions, again.exit_status) == ([], 0)
        return done

    def expect(self, start, end, data=None):
        """The content changes there, to zeros if not told otherwise."""
        data = bytes(end - start) if data is None else data
        self.content = self.content[:start] + data + self.content[end:]

    def assert_intact(self):
        assert disk_bytes(self.path) == self.content


@pytest.fixture
def make(tmp_path):
    def build(**values):
        if values.pop("clone", True):
            values["base"] = tmp_path / "base.raw"
            values["base"].write_bytes(random.Random(3).randbytes(SIZE - 3 * BLOCK - 512))
        path = tmp_path / "c.fvd"
        forge_image(path, Forged(size=SIZE, **values))
        return Case(path, disk_bytes(path))

    return build


@pytest.fixture
def raw(make):
    return make(local=range(1, 50, 2), filled=range(64))


@pytest.fixture
def compact(make):
    return make(local=range(60), places=PLACES)


def entry(case, index, place):
    poke(case.path, case.header.table_offset + 4 * index, place.to_bytes(4, "little"))


@pytest.fixture(params=["raw", "compact", "data file"])
def any_image(request, make):
    layout = {
        "raw": {"local": range(60), "filled": range(64)},
        "compact": {"local": range(60), "places": PLACES},
        "data file": {"local": range(60), "filled": range(64), "data_file": "x.data"},
    }[request.param]
    return make(**layout)


# The header --------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [4096, 8192, 512, 1], ids=str)
def test_lost_first_page_comes_back_from_the_copy(any_image, lost):
    poke(any_image.path, 0, bytes(lost))
    codes = ["restore_header"] if lost < 2560 else ["restore_header", "recover_epoch"]
    any_image.mend([*codes, "replay"])
    any_image.assert_intact()
    assert any_image.header.is_clean
    assert any_image.header.trusted_extension is not None


def test_invalid_field_comes_back_from_the_copy(any_image):
    poke(any_image.path, 16, (1000).to_bytes(8, "little"))
    any_image.mend(["restore_header", "replay"])
    any_image.assert_intact()


def test_lost_page_of_an_unclean_image_loses_nothing_of_its_journal(raw):
    header = raw.header
    put_records(raw.path, header, 0, [BitmapRecord(0, 8)], epoch=4, sequence=9)
    put_records(raw.path, header, 8, [BitmapRecord(16, 8)], epoch=5, sequence=10)
    poke(raw.path, 0, replace(header, clean_shutdown=0, stable_journal_epoch=4).pack())
    raw.content = disk_bytes(raw.path)
    poke(raw.path, 0, bytes(4096))
    raw.mend(["restore_header", "recover_epoch", "replay"])
    raw.assert_intact()
    assert raw.header.stable_journal_epoch == 6


def test_epoch_that_is_still_readable_is_used(compact):
    """A stale record of the same journal would resurrect a mapping."""
    header = compact.header
    put_records(compact.path, header, 0, [TableRecord(3, 2, (4,))], epoch=3, sequence=9)
    poke(compact.path, 0, replace(header, stable_journal_epoch=4).pack())
    compact.content = disk_bytes(compact.path)
    poke(compact.path, 0, bytes(512))
    compact.mend(["restore_header", "replay"])
    compact.assert_intact()


def test_table_wins_over_records_of_an_unknown_epoch(compact):
    header = compact.header
    put_records(compact.path, header, 0, [TableRecord(3, 2, (4,))], epoch=3, sequence=9)
    poke(compact.path, 0, replace(header, stable_journal_epoch=4).pack())
    compact.content = disk_bytes(compact.path)
    poke(compact.path, 0, bytes(4096))
    compact.mend(["restore_header", "recover_epoch", "replay", "unmap_chunk"])
    compact.assert_intact()


def test_data_behind_the_size_that_the_copy_knows_stay(raw):
    length = raw.path.stat().st_size
    os.truncate(raw.path, length + 65536)
    poke(raw.path, length + 4096, b"grown")
    poke(raw.path, 0, bytes(8))
    result = repair_image(raw.path)
    assert raw.path.stat().st_size == length + 65536
    assert result.exit_status == 3
    assert "cut_file" not in [action.code for action in result.actions]


def test_one_run_restores_the_header_and_frees_what_nothing_uses(any_image):
    end = any_image.path.stat().st_size
    os.truncate(any_image.path, -(-end // 4096) * 4096 + 65536)
    if any_image.header.is_compact:
        poke(any_image.path, end + 4096, b"left by a crash")
    poke(any_image.path, 0, bytes(8))
    any_image.mend(["restore_header", "replay", "cut_file"])
    any_image.assert_intact()


def test_header_and_copy_lost_is_beyond_repair(raw):
    poke(raw.path, 8192, bytes(8192))
    poke(raw.path, 16, (1000).to_bytes(8, "little"))
    before = raw.files()
    with pytest.raises(InvalidHeader) as caught:
        repair_image(raw.path)
    assert "copy" in caught.value.hint
    assert raw.files() == before


def test_what_is_no_image_or_a_newer_one_is_left_alone(raw, tmp_path):
    poke(raw.path, 3344, b"\1")
    before = raw.files()
    with pytest.raises(UnknownFeature):
        repair_image(raw.path)
    with pytest.raises(NotAnImage):
        repair_image(tmp_path / "base.raw")
    assert raw.files() == before


@pytest.mark.parametrize("damage", ["torn", "other field", "gone"])
def test_backup_copy_is_made_anew(raw, damage):
    header = raw.header
    if damage == "torn":
        poke(raw.path, 8192 + 1536, b"x" * 1024)
    elif damage == "gone":
        poke(raw.path, 8192, bytes(8192))
    else:
        poke(raw.path, 8192, replace(header, copy_on_read=1).pack())
    raw.mend(["refresh_backup"], 0 if damage == "other field" else 2)
    raw.assert_intact()
    assert raw.header == header


def test_damaged_extension_comes_back_with_its_identity(any_image):
    old = any_image.header
    poke(any_image.path, 7450, b"?!")
    any_image.mend(["restore_extension"])
    any_image.assert_intact()
    new = any_image.header.trusted_extension
    assert (new.image_uuid, new.base_id) == (old.extension.image_uuid, old.extension.base_id)
    assert new.open_session != old.extension.open_session


def test_damaged_extension_does_not_lose_the_journal(raw):
    put_records(raw.path, raw.header, 0, [BitmapRecord(0, 8)])
    poke(raw.path, 0, replace(raw.header, clean_shutdown=0).pack())
    raw.content = disk_bytes(raw.path)
    poke(raw.path, 7450, b"?!")
    raw.mend(["restore_extension", "replay"])
    raw.assert_intact()


def test_extension_without_a_copy_is_made_anew(raw):
    poke(raw.path, 7450, b"?!")
    poke(raw.path, 8192, bytes(8192))
    done = repair_image(raw.path)
    assert [a.code for a in done.actions] == ["renew_extension", "refresh_backup"]
    assert "unknown from now on" in done.actions[0].message
    raw.assert_intact()
    assert raw.header.trusted_extension.base_kind == 0
    assert check_image(raw.path).exit_status == 0


# Journal and bits --------------------------------------------------------------------------


@pytest.mark.parametrize("clean", [0, 1])
def test_journal_is_replayed(any_image, clean):
    header = any_image.header
    put_records(any_image.path, header, 0, [BitmapRecord(480, 8)])
    any_image.content = disk_bytes(any_image.path)
    poke(any_image.path, 0, replace(header, clean_shutdown=clean).pack())
    done = any_image.mend(["replay"], 2 if clean else 0)
    assert "1 blocks" in done.actions[0].message
    any_image.assert_intact()


def test_sector_with_nonsense_is_given_up_and_the_rest_replayed(raw):
    header = raw.header
    put_records(raw.path, header, 0, [BitmapRecord(0, 8)])
    raw.content = disk_bytes(raw.path)
    put_records(raw.path, header, 9, [BitmapRecord(1 << 40, 8)], sequence=2)
    poke(raw.path, 0, replace(header, clean_shutdown=0).pack())
    done = raw.mend(["drop_sector", "replay"])
    assert "journal sector 9" in done.actions[0].message
    assert "lost" in done.actions[0].message
    raw.assert_intact()


def test_bits_behind_the_last_block_are_cleared(any_image):
    header = any_image.header
    poke(any_image.path, header.bitmap_offset + 7, b"\xff")
    poke(any_image.path, header.bitmap_offset + 100, b"\xff")
    any_image.mend(["clear_padding"])
    assert any_image.path.read_bytes()[header.bitmap_offset + 7] == 0x1F
    assert disk_bytes(any_image.path)[: 60 * BLOCK] == any_image.content[: 60 * BLOCK]


def test_entries_behind_the_last_chunk_are_unmapped(compact):
    entry(compact, 16, 0)
    compact.mend(["clear_padding"], 0)
    compact.assert_intact()


def test_claim_to_need_no_base_is_taken_back(raw):
    changed = replace(raw.header, base_img_fully_prefetched=1).pack()
    poke(raw.path, 0, changed)
    poke(raw.path, 8192, changed)
    done = raw.mend(["need_base"])
    assert "36 blocks" in done.actions[0].message
    raw.assert_intact()


# Table and storage -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "words"), [(2, "another chunk keeps"), (0x7FFFFFFF, "out of range"),
                         (1 << 30, "behind the end")],
)  # fmt: skip
def test_wrong_entry_is_unmapped_and_its_range_told(compact, place, words):
    entry(compact, 7, place)
    done = compact.mend(["unmap_chunk"])
    text = done.actions[0].message
    assert words in text
    assert f"bytes {7 * CHUNK} to {8 * CHUNK - 1} of the disk read zeros" in text
    compact.assert_intact()


def test_entry_that_overlaps_the_table_is_unmapped(make):
    case = make(clone=False, places={1: 3, 2: 1})
    grown = replace(
        case.header, table_offset=case.header.data_offset - 4096, table_size=4096 + CHUNK
    )
    places = table_of(grown, {1: 3, 2: 1, 4: 0})
    poke(case.path, 0, grown.pack())
    poke(case.path, 8192, grown.pack())
    data = case.path.read_bytes()
    kept = {place: data[case.header.data_offset + place * CHUNK :][:CHUNK] for place in (1, 3)}
    poke(case.path, grown.table_offset, places)
    done = case.mend(["unmap_chunk"])
    assert "overlaps the table" in done.actions[0].message
    case.expect(0, SIZE)
    case.expect(CHUNK, 3 * CHUNK, kept[3] + kept[1])
    case.assert_intact()


def test_of_two_owners_the_one_in_the_journal_stays(compact):
    header = compact.header
    data = compact.content[5 * CHUNK : 6 * CHUNK]
    put_records(compact.path, header, 0, [TableRecord(1, 9, (2,))])
    poke(compact.path, 0, replace(header, clean_shutdown=0).pack())
    compact.expect(5 * CHUNK, 6 * CHUNK)
    compact.expect(9 * CHUNK, 10 * CHUNK, data)
    compact.mend(["replay", "unmap_chunk"])
    compact.assert_intact()


@pytest.mark.parametrize("data_file", ["", "x.data"])
def test_cut_storage_is_extended_and_what_is_lost_told(make, data_file):
    case = make(local=range(60), places=PLACES, data_file=data_file)
    store = case.path.parent / (data_file or case.path.name)
    os.truncate(store, case.header.data_offset + 4 * CHUNK + 5120)
    done = case.mend(["extend_file", "extend_file", "extend_file"])
    told = " ".join(action.message for action in done.actions)
    assert f"bytes 5120 to {CHUNK - 1} of the disk" in told
    assert f"bytes {11 * CHUNK} to {12 * CHUNK - 1} of the disk" in told
    case.expect(5120, CHUNK)
    case.expect(11 * CHUNK, 12 * CHUNK)
    case.assert_intact()


@pytest.mark.parametrize("data_file", ["", "x.data"])
def test_cut_raw_image_is_extended(make, data_file):
    case = make(local=range(60), filled=range(64), data_file=data_file)
    store = case.path.parent / (data_file or case.path.name)
    os.truncate(store, case.header.data_offset + SIZE - 12800)
    done = case.mend(["extend_file"])
    assert f"bytes {SIZE - 12800} to {SIZE - 1}" in done.actions[0].message
    case.expect(SIZE - 12800, SIZE)
    case.assert_intact()


def test_metadata_that_are_cut_off_are_beyond_repair(raw):
    os.truncate(raw.path, raw.header.journal_offset + 4096)
    before = raw.files()
    with pytest.raises(ImageTruncated):
        repair_image(raw.path)
    assert raw.files() == before


def test_missing_data_file_is_said(make):
    case = make(local=range(60), filled=[0], data_file="x.data")
    (case.path.parent / "x.data").unlink()
    assert check_image(case.path).exit_status == 1
    with pytest.raises(DataFileMissing):
        repair_image(case.path)


def test_surplus_is_cut_and_unused_places_freed(any_image):
    header = any_image.header
    store = any_image.path.parent / (header.data_file or any_image.path.name)
    length = store.stat().st_size
    codes = ["cut_file"]
    if header.is_compact:
        entry(any_image, 12, UNMAPPED)
        any_image.content = disk_bytes(any_image.path)
        codes.append("free_places")
    os.truncate(store, length + 100_000)
    any_image.mend(codes, 3)
    any_image.assert_intact()
    assert store.stat().st_size == length


def test_leftovers_of_an_unclean_image_are_no_leak(compact):
    poke(compact.path, 0, replace(compact.header, clean_shutdown=0).pack())
    os.truncate(compact.path, compact.path.stat().st_size + (1 << 20))
    compact.mend(["replay", "cut_file"], 0)
    compact.assert_intact()


# Manners -----------------------------------------------------------------------------------


def test_sound_image_is_left_alone(any_image):
    before = any_image.files()
    result = repair_image(any_image.path)
    assert (result.actions, result.exit_status) == ([], 0)
    assert any_image.files() == before


@pytest.mark.parametrize("dry_run", [True, False])
def test_image_in_use_is_refused(raw, dry_run):
    with open_plan(raw.path), pytest.raises(ImageInUse):
        repair_image(raw.path, dry_run=dry_run)


@pytest.mark.parametrize("lost", [0, 512])
def test_image_of_a_dead_process_is_refused_unless_given_up(raw, lost):
    extension = replace(raw.header.extension, boot_id=chain.boot_id())
    poke(raw.path, 0, replace(raw.header, clean_shutdown=0, extension=extension).pack())
    poke(raw.path, 0, bytes(lost))
    before = raw.files()
    with pytest.raises(LiveStateLeft):
        repair_image(raw.path)
    assert raw.files() == before
    repair_image(raw.path, OpenOptions(discard_live_state=True))
    assert check_image(raw.path).findings == []


def test_missing_base_does_not_stop_a_repair(raw):
    poke(raw.path, raw.header.bitmap_offset + 100, b"\xff")
    base = raw.path.parent / "base.raw"
    base.rename(base.with_suffix(".away"))
    result = repair_image(raw.path)
    assert [a.code for a in result.actions] == ["clear_padding"]
    assert result.exit_status == 1
    base.with_suffix(".away").rename(base)
    raw.assert_intact()


def test_too_much_damage_is_refused(compact, monkeypatch):
    monkeypatch.setattr(repair, "ACTIONS_MAX", 3)
    for index in range(5):
        entry(compact, index, 0x7FFFFFFF)
    before = compact.files()
    with pytest.raises(BeyondRepair):
        repair_image(compact.path)
    assert compact.files() == before


DAMAGES = {
    "lost page": lambda case: poke(case.path, 0, bytes(4096)),
    "extension": lambda case: poke(case.path, 7450, b"?!"),
    "journal": lambda case: (
        put_records(case.path, case.header, 0, [BitmapRecord(480, 8)]),
        put_records(case.path, case.header, 8, [BitmapRecord(1 << 40, 8)]),
        poke(case.path, 0, replace(case.header, clean_shutdown=0).pack()),
    ),
    "padding": lambda case: poke(case.path, case.header.bitmap_offset + 100, b"\xff"),
    "surplus": lambda case: os.truncate(case.path, case.path.stat().st_size + 100_000),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("layout", [{"filled": range(64)}, {"places": PLACES}], ids=["raw", "c"])
def test_repair_that_is_cut_short_can_be_repeated(make, damage, layout, rng, monkeypatch):
    case = make(local=range(60), **layout)
    damage(case)
    before = {str(case.path): case.path.read_bytes()}
    steps = []
    with monkeypatch.context() as patched:
        patched.setattr(editing, "ImageFile", lambda fd, name: Recorder(fd, name, steps))
        repair_image(case.path)
    content = disk_bytes(case.path)
    for state in crashes(before, steps, rng):
        case.path.write_bytes(state[str(case.path)])
        assert repair_image(case.path).exit_status == 0
        assert disk_bytes(case.path) == content


def test_hostile_journal_takes_bounded_time(tmp_path):
    """Every sector sealed, every record the whole disk of 1 TiB."""
    path = tmp_path / "c.fvd"
    base = tmp_path / "base.raw"
    with base.open("wb") as file:
        file.truncate(1 << 40)
    header = create_image(path, CreateOptions(base=str(base), journal_size=1 << 20)).header
    records = [BitmapRecord(0, 1 << 31)] * 30
    for position in range(header.journal_size // 512):
        put_records(path, header, position, records, sequence=position + 1)
    begun = time.process_time()
    assert repair_image(path, dry_run=True).exit_status == 2
    assert time.process_time() - begun < 60


def test_extension_of_the_front_is_kept_when_only_fields_are_lost(raw):
    session = Extension.unpack(raw.path.read_bytes()[7440:8192]).open_session
    poke(raw.path, 0, bytes(8))
    repair_image(raw.path)
    assert raw.header.extension.open_session != session


@pytest.mark.parametrize("discard", [False, True])
def test_what_a_failed_write_back_left_in_memory_is_dropped(tmp_path, monkeypatch, discard):
    """Giving live state up, a check and a repair read what storage holds, of both files."""
    path = tmp_path / "s.fvd"
    forge_image(path, Forged(size=1 << 18, places={0: 1}, data_file="x.data"))
    files, calls = {os.stat(path).st_ino, os.stat(tmp_path / "x.data").st_ino}, []
    real = os.pread

    def pread(fd, *where):
        calls.append(("read", os.fstat(fd).st_ino))
        return real(fd, *where)

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, *how: calls.append((how, os.fstat(fd).st_ino))
    )
    for look in (check_image, repair_image):
        calls.clear()
        look(path, OpenOptions(discard_live_state=discard))
        dropped = [call for call in calls if call[0] == (0, 0, os.POSIX_FADV_DONTNEED)]
        assert {inode for _, inode in dropped} == (files if discard else set())
        if discard:
            assert calls[0] == dropped[0]

# SPDX-License-Identifier: Apache-2.0
"""Repair where the header and its copy are both readable and disagree, or the epoch is lost.

The images have a history: they were written by the engine over several sessions.
"""

import hashlib
import random
import struct
from dataclasses import replace

import pytest

from fvdengine.check import check_image
from fvdengine.errors import (
    EngineFailed,
    ExtensionDamaged,
    HeadersDisagree,
    InvalidJournal,
    PrefetchedFalsely,
    UnknownFeature,
)
from fvdengine.header import Header
from fvdengine.mapping import map_image
from fvdengine.records import BitmapRecord
from fvdengine.repair import repair_image
from fvdengine.resize import ResizeOptions, resize_image
from fvdengine.update import update_image
from fvdtest.forge import BLOCK, Forged, disk_bytes, forge_image, header_of, poke, put_records
from fvdtest.images import content_on_disk, make_image, open_image

KIB = 1 << 10
MIB = 1 << 20
SIZE = MIB
CHUNK = 64 * KIB
SMALL = {"compact": True, "chunk_size": CHUNK, "storage_grow_unit": 2 * CHUNK,
         "journal_size": CHUNK}  # fmt: skip
OFFSETS = {
    "virtual_disk_size": 16, "data_offset": 24, "base_img_size": 2112, "bitmap_offset": 2120,
    "block_size": 2136, "chunk_size": 2204,
}  # fmt: skip


OPENINGS = [
    ("write", open_image),
    ("read", lambda path: open_image(path, read_only=True)),
    ("map", lambda path: list(map_image(path))),
    ("update", lambda path: update_image(path, {"copy_on_read": "on"})),
    ("update several", lambda path: update_image(
        path, {"copy_on_read": "on", "num_prefetch_slots": "5"})),
    ("grow", lambda path: resize_image(path, "+1M")),
    ("same size", lambda path: resize_image(path, "+0")),
    ("shrink", lambda path: resize_image(path, "128k", ResizeOptions(shrink=True))),
    ("force", lambda path: resize_image(
        path, "128k", ResizeOptions(shrink=True, force=True))),
]  # fmt: skip


def assert_refused_by_all(path, error, text):
    """Whoever relies on the header refuses and changes nothing; a check says that it is corrupt."""
    before = digest(path)
    for name, run in OPENINGS:
        with pytest.raises(error) as caught:
            run(path)
        assert text in caught.value.message, name
        assert "--repair" in caught.value.hint
        assert digest(path) == before, name
    assert check_image(path).exit_status == 2


def digest(path):
    return hashlib.sha256(path.read_bytes()).digest()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A function that copies an image of these options to a new name beside its base.

    The image was written by the engine, every other 32 KiB, and closed.
    """
    folder = tmp_path_factory.mktemp("store")
    base = folder / "base.raw"
    base.write_bytes(random.Random(1).randbytes(SIZE))
    made = {}

    def copy(*, based=False, compact=False):
        key = based, compact
        if key not in made:
            options = {"base": str(base), "journal_size": CHUNK} if based else {}
            path = make_image(
                folder / "made.fvd", size=SIZE, **(options | (SMALL if compact else {}))
            )
            opened = open_image(path)
            for offset in range(0, SIZE, CHUNK):
                opened.device.write(offset, random.Random(offset).randbytes(CHUNK // 2))
            opened.close()
            made[key] = path.read_bytes()
            path.unlink()
        path = folder / f"{len(list(folder.iterdir()))}.fvd"
        path.write_bytes(made[key])
        return path

    return copy


@pytest.fixture
def written(store):
    """The same; what this test copied is removed again."""
    paths = []

    def copy(**options):
        paths.append(store(**options))
        return paths[-1]

    yield copy
    for path in paths:
        path.unlink()


def crashed(path, *changes):
    """Make the image what it is on disk after these writes and a flush, with nothing closed."""
    opened = open_image(path)
    for offset, data in changes:
        opened.device.write(offset, data)
    opened.device.flush()
    left = path.read_bytes()
    opened.close()
    path.write_bytes(left)
    return path


DAMAGE = [
    ({"compact": True}, "data_offset", lambda value: value + 4096),
    ({"compact": True}, "chunk_size", lambda value: value * 2),
    ({"based": True}, "block_size", lambda value: value * 2),
    ({"based": True}, "base_img_size", lambda value: value // 2),
    ({}, "data_offset", lambda value: value ^ 8192),
    ({"compact": True}, "virtual_disk_size", lambda value: value // 4),
    ({}, "virtual_disk_size", lambda value: value // 4),
    ({}, "virtual_disk_size", lambda value: value + (1 << 38)),
]  # fmt: skip
NAMES = [f"{'-'.join(options) or 'raw'}-{field}" for options, field, _ in DAMAGE]


@pytest.mark.parametrize(("options", "field", "change"), DAMAGE, ids=NAMES)
def test_a_damaged_layout_is_not_believed_and_the_copy_not_lost(written, options, field, change):
    path = written(**options)
    content = content_on_disk(path)
    (old,) = struct.unpack_from("<Q", path.read_bytes(), OFFSETS[field])
    poke(path, OFFSETS[field], struct.pack("<Q", change(old)))
    assert_refused_by_all(path, HeadersDisagree, field)
    before = digest(path)
    for dry_run in (True, False):
        with pytest.raises(HeadersDisagree, match=field) as caught:
            repair_image(path, dry_run=dry_run)
        assert "--header backup" in caught.value.hint
        assert digest(path) == before
    assert repair_image(path, header="backup").exit_status == 0
    assert content_on_disk(path) == content


@pytest.mark.parametrize("bit", [20, 28], ids=["over places", "behind the file"])
@pytest.mark.parametrize("is_clean", [True, False])
@pytest.mark.parametrize("is_relocated", [0, 1])
def test_a_table_that_only_damage_made_longer_unmaps_nothing(
    written, bit, is_clean, is_relocated
):
    path = written(compact=True)
    if not is_clean:
        crashed(path, (CHUNK + 32768, b"x" * 32768))
    content = content_on_disk(path)
    header = header_of(path)
    poke(path, 3244, bytes([is_relocated]))
    poke(path, 2196, struct.pack("<Q", header.table_size ^ 1 << bit))
    before = digest(path)
    assert_refused_by_all(path, HeadersDisagree, "table_size")
    with pytest.raises(HeadersDisagree, match="table_size"):
        repair_image(path)
    assert digest(path) == before
    assert "--header" in check_image(path).findings[0].remedy
    assert repair_image(path, header="backup").exit_status == 0
    assert content_on_disk(path) == content


def test_a_table_that_has_grown_is_believed_though_the_copy_is_older(tmp_path):
    """As after a crash before the copy is refreshed; the table took the first place."""
    path = make_image(tmp_path / "image.fvd", size=16 * MIB, compact=True, chunk_size=4096,
                      storage_grow_unit=65536, journal_size=65536)  # fmt: skip
    opened = open_image(path)
    opened.device.write(0, b"a" * 65536)
    opened.device.flush()
    copy = path.read_bytes()[8192:16384]
    opened.device.resize(2048 * MIB)
    opened.device.write(512 * MIB, b"b" * 65536)
    opened.device.flush()
    crashed = path.read_bytes()
    opened.close()
    for data in (path.read_bytes(), crashed):
        path.write_bytes(data)
        poke(path, 8192, copy)
        header, old = header_of(path), Header.unpack(copy)
        assert header.chunks_relocated
        assert header.table_size > old.table_size
        assert check_image(path).exit_status == 0
        opened = open_image(path)
        assert opened.device.read(512 * MIB, 4096) == b"b" * 4096
        opened.close()


@pytest.mark.parametrize("field", ["block_size", "data_offset", "base_img_size", "header_size"])
def test_damage_is_seen_in_an_image_that_is_not_clean(written, field):
    path = written(based=True)
    content = content_on_disk(path)
    where, width = (4, 4) if field == "header_size" else (OFFSETS[field], 8)
    old = int.from_bytes(path.read_bytes()[where : where + width], "little")
    value = {"block_size": old * 2, "data_offset": old - 4096}.get(field, old // 2)
    poke(path, 2160, bytes(4))
    poke(path, where, value.to_bytes(width, "little"))
    assert_refused_by_all(path, HeadersDisagree, field)
    if field == "header_size":  # there is no way to tell the copy that it is none
        with pytest.raises(HeadersDisagree) as caught:
            repair_image(path, header="front")
        assert "--header front" not in caught.value.hint
        assert "--header backup" in caught.value.hint
        assert not any("front" in found.remedy for found in check_image(path).findings)
    assert repair_image(path, header="backup").exit_status == 0
    assert content_on_disk(path) == content


@pytest.mark.parametrize("version", [3, 1 << 31 | 2])
@pytest.mark.parametrize("is_clean", [False, True])
def test_a_damaged_create_version_is_no_older_writer(written, version, is_clean):
    """The extension would never be trusted again, and a repair would keep it so."""
    path = written(based=True)
    content = content_on_disk(path)
    poke(path, 2160, bytes([is_clean]))
    poke(path, 8, struct.pack("<I", version))
    assert_refused_by_all(path, HeadersDisagree, "create_version")
    with pytest.raises(HeadersDisagree, match="create_version"):
        repair_image(path)
    assert repair_image(path, header="backup").exit_status == 0
    assert header_of(path).trusted_extension is not None
    assert content_on_disk(path) == content


@pytest.mark.parametrize("is_clean", [False, True])
@pytest.mark.parametrize("at", [1072, 1079, 2096])
def test_a_damaged_name_does_not_replace_that_of_the_copy(written, at, is_clean):
    path = written(based=True)
    content = content_on_disk(path)
    poke(path, 2160, bytes([is_clean]))
    poke(path, at, bytes([path.read_bytes()[at] ^ 4]))
    assert_refused_by_all(path, HeadersDisagree, "base_img")
    before = digest(path)
    with pytest.raises(HeadersDisagree, match="base_img"):
        repair_image(path)
    assert digest(path) == before
    assert repair_image(path, header="backup").exit_status == 0
    assert content_on_disk(path) == content


def test_a_damaged_format_of_the_data_is_undone_when_the_copy_is_named(written):
    path = written()
    content = content_on_disk(path)
    poke(path, 1056, b"\4")
    assert_refused_by_all(path, HeadersDisagree, "data_file_fmt")
    assert repair_image(path, header="backup").exit_status == 0
    assert content_on_disk(path) == content


def test_a_damaged_base_is_not_read_through(written):
    path = written(compact=True)
    clone = make_image(path.with_suffix(".clone"), size=SIZE, base=str(path), base_format="fvd")
    poke(path, OFFSETS["chunk_size"], struct.pack("<Q", 2 * CHUNK))
    for run in (open_image, lambda image: list(map_image(image))):
        with pytest.raises(HeadersDisagree, match="chunk_size"):
            run(clone)


@pytest.mark.parametrize("is_clean", [False, True])
@pytest.mark.parametrize("at", [7440, 7518])
def test_a_damaged_extension_is_restored_by_a_repair_only(written, at, is_clean):
    """Our own versions write its sum: a wrong one is no sign of an older writer."""
    path = written(based=True)
    content = content_on_disk(path)
    poke(path, 2160, bytes([is_clean, 0, 0, 0]))
    poke(path, at, bytes([path.read_bytes()[at] ^ 1]))
    assert_refused_by_all(path, ExtensionDamaged, "extension")
    assert repair_image(path).exit_status == 0
    assert content_on_disk(path) == content


def test_what_a_guest_wrote_is_no_backup_copy(tmp_path):
    """A header of 8192 bytes leaves no room for one: the disk begins where it would stand."""
    other = forge_image(tmp_path / "other.fvd", Forged())
    path = tmp_path / "image.fvd"
    forge_image(path, Forged(values={"header_size": 8192, "data_offset": 8192}))
    poke(path, 8192, other.pack())
    poke(path, 7518, b"\xff")
    content = disk_bytes(path)
    assert content.startswith(other.pack())
    assert [action.code for action in repair_image(path, dry_run=True).actions] == [
        "renew_extension"
    ]
    assert repair_image(path).exit_status == 0
    assert header_of(path).extension.image_uuid != other.extension.image_uuid
    assert disk_bytes(path) == content


def test_a_changed_creation_time_is_damage_though_the_image_is_not_clean(written):
    path = written(based=True)
    header = header_of(path)
    extension = replace(header.extension, create_time=1)
    poke(path, 0, replace(header, clean_shutdown=0, extension=extension).pack())
    assert check_image(path).exit_status == 2


def test_without_any_good_extension_both_readers_see_the_same(written):
    """The uuid may still be right, and with it the sums of the journal."""
    data = random.Random(3).randbytes(CHUNK)
    path = crashed(written(compact=True), (CHUNK, data))
    content = content_on_disk(path)
    for header in (0, 8192):
        poke(path, header + 7518, b"\xff")
    opened = open_image(path, read_only=True)
    assert opened.device.read(0, SIZE) == content == content_on_disk(path)
    assert content[CHUNK : 2 * CHUNK] == data
    opened.close()
    poke(path, 7450, b"\xff\xff")
    with pytest.raises(EngineFailed):
        open_image(path, read_only=True)
    with pytest.raises(InvalidJournal, match="extension"):
        content_on_disk(path)


def test_the_header_that_was_named_is_kept(written):
    """A copy whose damage left it readable."""
    path = written(compact=True)
    content = content_on_disk(path)
    poke(path, 8192 + OFFSETS["chunk_size"], struct.pack("<Q", 2 * CHUNK))
    with pytest.raises(HeadersDisagree, match="chunk_size"):
        repair_image(path)
    assert repair_image(path, header="front").exit_status == 0
    assert check_image(path).findings == []
    assert content_on_disk(path) == content


@pytest.mark.parametrize("bit", [21, 61])
@pytest.mark.parametrize("options", [{"compact": True}, {"based": True}], ids=str)
def test_an_epoch_that_only_damage_raised_gives_no_records_up(written, bit, options):
    path = crashed(written(**options), (32768, random.Random(2).randbytes(CHUNK)))
    content = content_on_disk(path)
    assert check_image(path).exit_status == 0
    poke(path, 2164, struct.pack("<Q", header_of(path).stable_journal_epoch | 1 << bit))
    assert_refused_by_all(path, HeadersDisagree, "stable_journal_epoch")
    assert repair_image(path, header="backup").exit_status == 0
    assert content_on_disk(path) == content


@pytest.mark.parametrize("has_copy", [True, False])
@pytest.mark.parametrize("has_records", [True, False])
def test_an_epoch_far_above_that_of_the_copy_is_believed(tmp_path, has_copy, has_records):
    """The copy has that of long ago; a journal may just have been emptied."""
    path = tmp_path / "image.fvd"
    epoch = 1 << 30
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(64 * BLOCK))
    values = {"clean_shutdown": 0, "stable_journal_epoch": epoch}
    header = forge_image(path, Forged(64 * BLOCK, base, filled=range(64), values=values))
    if not has_copy:
        poke(path, 8192 + 2164, struct.pack("<Q", 1))
    if has_records:
        put_records(path, header, 0, [BitmapRecord(0, 8)], epoch=epoch - 1)
    before = path.read_bytes()
    assert check_image(path).exit_status == 0
    open_image(path).close()
    path.write_bytes(before)
    assert repair_image(path).exit_status == 0


@pytest.mark.parametrize("is_again", [False, True])
def test_records_of_old_epochs_do_not_come_back(tmp_path, is_again):
    """A place was given back and given to another chunk; the journal still has its first owner."""
    path = make_image(tmp_path / "image.fvd", size=2 * MIB, **SMALL)
    first, second = random.Random(1).randbytes(CHUNK), random.Random(2).randbytes(CHUNK)

    def session(*steps):
        opened = open_image(path)
        for chunk, data in steps:
            if data is None:
                opened.device.trim(chunk * CHUNK, CHUNK)
            else:
                opened.device.write(chunk * CHUNK, data)
            opened.device.flush()
        opened.close()

    session((20, first), (21, first), (2, first))
    session((2, None))
    session((9, second))
    if is_again:
        session((2, first[::-1]))
        session((30, first))
    content = content_on_disk(path)
    poke(path, 0, bytes(4096))
    result = repair_image(path)
    assert "recover_epoch" in [action.code for action in result.actions]
    assert content_on_disk(path) == content


def test_damage_that_looks_like_a_feature_is_undone_when_the_copy_is_named(written):
    path = written(compact=True)
    content = content_on_disk(path)
    poke(path, 4000, b"\xff")
    with pytest.raises(UnknownFeature) as caught:
        repair_image(path)
    assert "--header backup" in caught.value.hint
    assert repair_image(path, header="backup").exit_status == 0
    assert content_on_disk(path) == content


@pytest.mark.parametrize("options", [{}, {"compact": True}], ids=["raw", "compact"])
def test_a_claim_to_need_no_base_is_not_believed_without_the_bits(written, options):
    """What was written under such a claim would set no bits, and a repair would give it up."""
    path = written(based=True, **options)
    content = content_on_disk(path)
    poke(path, 3268, b"\1")
    assert_refused_by_all(path, PrefetchedFalsely, "claims to need no base")
    assert repair_image(path).exit_status == 0
    assert content_on_disk(path) == content


@pytest.mark.parametrize("missing", [0, 1])
def test_a_claim_to_need_no_base_counts_with_bits_that_only_the_journal_has(tmp_path, missing):
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(64 * BLOCK))
    path = tmp_path / "image.fvd"
    values = {"base_img_fully_prefetched": 1, "clean_shutdown": 0}
    header = forge_image(path, Forged(64 * BLOCK, base, filled=range(64), values=values))
    put_records(path, header, 0, [BitmapRecord(0, (64 - missing) * BLOCK // 512)])
    if missing:
        with pytest.raises(PrefetchedFalsely, match="but 1 of its blocks"):
            disk_bytes(path)
        return
    assert disk_bytes(path) == path.read_bytes()[header.data_offset :]
    open_image(path).close()
    assert check_image(path).exit_status == 0
    open_image(path).close()

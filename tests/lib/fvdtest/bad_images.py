# SPDX-License-Identifier: Apache-2.0
"""Every way in which an image can be wrong, as a table: one golden image, one damage, one error.

Whoever opens images must refuse each of them, with a message that names the thing, and change no
byte. `stage` says how far one has to look: "header" at the 8192 bytes and the lengths, "files" at
the data file and the base as well, "metadata" at table and journal.
"""

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from fvdengine.crc32c import sector_crc
from fvdengine.header import Header
from fvdengine.records import (
    BitmapRecord,
    Record,
    TableRecord,
    Trailer,
    plain_sector,
    seal_sector,
)
from fvdtest import golden

COMPACT = "compact-base-equal-journal-page"  # chunks of 8 KiB, 6 places, the journal at 20480
SEPARATE = "compact-base-equal-data-journal-page"
RAW = "raw-base-equal-journal-page"
RAW_DATA = "raw-base-equal-data-journal-page"
EPOCH = 7
U64 = 1 << 64

Damage = Callable[[Path, Header], None]


@dataclass(frozen=True)
class BadImage:
    """What to damage and what must be said: the error's code and words of its sentence."""

    name: str
    stage: str
    code: str
    words: str
    source: str = COMPACT
    header: dict[str, object] = field(default_factory=dict)
    damage: Damage | None = None

    def make(self, directory: Path) -> Path:
        """Unpack the golden image and damage it; return its path."""
        path = golden.unpack(self.source, directory).path
        header = Header.unpack(path.read_bytes()[:8192])
        if self.header:
            header = replace(header, **self.header)  # type: ignore[arg-type]
            write(path, 0, header.pack())
            write(path, 8192, header.pack())
        if self.damage is not None:
            self.damage(path, header)
        return path


def write(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def raw(offset: int, data: bytes) -> Damage:
    """Bytes of the header."""
    return lambda path, header: write(path, offset, data)


def entry(chunk: int, value: int) -> Damage:
    """One entry of the table on the disk."""
    return lambda path, header: write(
        path, header.table_offset + 4 * chunk, struct.pack("<I", value)
    )


def sector(*records: Record, epoch: int = EPOCH, sequence: int = 99) -> Damage:
    """One more journal sector, with a trailer of this image."""

    def damage(path: Path, header: Header) -> None:
        assert header.extension is not None
        sealed = seal_sector(records, Trailer(epoch, sequence), header.extension.image_uuid)
        write(path, header.journal_offset + 7 * 512, sealed)

    return damage


def plain(*records: Record) -> Damage:
    """One more journal sector of an older writer."""
    return lambda path, header: write(
        path, header.journal_offset + 7 * 512, plain_sector(records)
    )


def cut(suffix: str, length: int) -> Damage:
    """Cut a file of the image: to `length`, or by so much where that is negative."""

    def damage(path: Path, header: Header) -> None:
        target = path.with_suffix(suffix)
        os.truncate(target, length if length >= 0 else target.stat().st_size + length)

    return damage


def remove(suffix: str) -> Damage:
    return lambda path, header: path.with_suffix(suffix).unlink()


def link_outside(path: Path, header: Header) -> None:
    path.with_suffix(".data").unlink()
    path.with_suffix(".data").symlink_to("/etc/passwd")


def unknown_record(path: Path, header: Header) -> None:
    """A record of a type that nobody knows, in a sector whose sum is right."""
    assert header.extension is not None
    body = struct.pack("<IIQ", 0x12345678, 8, 0).ljust(488, b"\0")
    blank = body + struct.pack("<2I2Q", 0x544A5646, 0, EPOCH, 99)
    crc = sector_crc(header.extension.image_uuid, blank, 492)
    write(path, header.journal_offset, blank[:492] + struct.pack("<I", crc) + blank[496:])


_INVALID = "invalid_header"
# Fields of the header: name of the case, code, words, the fields.
_FIELDS: list[tuple[str, str, str, dict[str, object]]] = [
    ("header size not of pages", _INVALID, "header_size is 8193", {"header_size": 8193}),
    ("header size huge", _INVALID, "header_size", {"header_size": 2 << 20}),
    ("size 0", _INVALID, "virtual_disk_size is 0", {"virtual_disk_size": 0}),
    ("size odd", _INVALID, "not a multiple of 512", {"virtual_disk_size": 65537}),
    ("size overflows", _INVALID, "virtual_disk_size", {"virtual_disk_size": U64 - 512}),
    ("disk larger than the table", _INVALID, "table_size is 4096",
     {"virtual_disk_size": 1025 * 8192}),
    ("chunk size 0", _INVALID, "chunk_size is 0", {"chunk_size": 0}),
    ("chunk size odd", _INVALID, "chunk_size is 8704", {"chunk_size": 8704}),
    ("chunk size overflows", _INVALID, "chunk_size", {"chunk_size": U64 - 4096}),
    ("chunk not of blocks", _INVALID, "block_size, 8192",
     {"chunk_size": 12288, "block_size": 8192, "bytes_per_prefetch": 65536}),
    ("block size 0", _INVALID, "block_size is 0", {"block_size": 0}),
    ("block size odd", _INVALID, "block_size is 1000", {"block_size": 1000}),
    ("table without a size", _INVALID, "not both set", {"table_size": 0}),
    ("table without a place", _INVALID, "not both set", {"table_offset": 0}),
    ("table size odd", _INVALID, "table_size is not a multiple", {"table_size": 4608}),
    ("table above the memory limit", _INVALID, "memory limit", {"table_size": 1 << 31}),
    ("grow unit below a chunk", _INVALID, "storage_grow_unit", {"storage_grow_unit": 4096}),
    ("data offset overflows", _INVALID, "data_offset", {"data_offset": (1 << 63) - 4096}),
    ("base size without a base", _INVALID, "no base is named", {"base_img": ""}),
    ("base without a size", _INVALID, "base_img_size is 0", {"base_img_size": 0}),
    ("base larger than the disk", _INVALID, "larger than the virtual disk",
     {"base_img_size": 1 << 20}),
    ("bitmap too small", _INVALID, "bitmap_size is 0", {"bitmap_size": 0}),
    ("journal without a size", _INVALID, "journal_offset", {"journal_size": 0}),
    ("journal size odd", _INVALID, "journal_size", {"journal_size": 4608}),
    ("journal buffer too large", _INVALID, "journal_buf_size", {"journal_buf_size": 8192}),
    ("epoch out of range", _INVALID, "stable_journal_epoch", {"stable_journal_epoch": 2**62 + 1}),
    ("no prefetch slots", _INVALID, "num_prefetch_slots is 0", {"num_prefetch_slots": 0}),
    ("prefetch not of blocks", _INVALID, "bytes_per_prefetch", {"bytes_per_prefetch": 5000}),
    ("prefetch limits crossed", _INVALID, "prefetch_max_read", {"prefetch_max_read_throughput": 1}),
    ("nbd without a name", _INVALID, "data_file_fmt is nbd", {"data_file_fmt": "nbd"}),
    ("base format unknown", "unknown_base_format", "parallels", {"base_img_fmt": "parallels"}),
    ("data format unknown", "unknown_data_format", "qcow2", {"data_file_fmt": "qcow2"}),
    ("table in the header", "invalid_sections", "table at 4096", {"table_offset": 4096}),
    ("table over the bitmap", "invalid_sections", "overlaps", {"table_offset": 16384}),
    ("table over the journal", "invalid_sections", "overlaps", {"table_offset": 20480}),
    ("table not aligned", "invalid_sections", "table begins", {"table_offset": 24576 + 512}),
    ("table outside", "invalid_sections", "table at", {"table_offset": 1 << 40}),
    ("table at the end of numbers", "invalid_sections", "table at",
     {"table_offset": U64 - 4096}),
    ("chunks over the bitmap", "invalid_sections", "data area", {"data_offset": 16384}),
    ("chunks over the journal", "invalid_sections", "data area", {"data_offset": 20480}),
    ("chunks not aligned", "invalid_sections", "data area", {"data_offset": 28672 + 512}),
    ("journal over the bitmap", "invalid_sections", "overlaps", {"journal_offset": 16384}),
]  # fmt: skip


def _headers() -> list[BadImage]:
    bad = _INVALID
    found = [BadImage(name, "header", code, words, header=header)
             for name, code, words, header in _FIELDS]  # fmt: skip
    return [
        *found,
        BadImage("data file with an offset", "header", bad, "data_offset is 28672", SEPARATE,
                 {"data_offset": 28672}),
        BadImage("empty", "header", "not_an_image", "is empty", damage=cut(".fvd", 0)),
        BadImage("cut in the header", "header", "image_truncated", "cut short",
                 damage=cut(".fvd", 5000)),
        BadImage("cut in the table", "header", "image_truncated", "cut short",
                 damage=cut(".fvd", 28671)),
        BadImage("raw data cut", "header", "image_truncated", "cut short", RAW,
                 damage=cut(".fvd", -1)),
        BadImage("wrong magic", "header", "not_an_image", "magic", damage=raw(0, b"FVE\0")),
        BadImage("wiki layout", "header", "old_layout", "wiki", damage=raw(4, b"\1\0\0\0")),
        BadImage("early code", "header", "early_code_layout", "January 2011",
                 damage=raw(0, bytes.fromhex("a9f5435101000000"))),
        BadImage("unknown feature", "header", "unknown_feature", "bit 40 is",
                 damage=raw(3349, b"\1")),
        BadImage("data file without an end", "header", bad, "data_file is not NUL-terminated",
                 SEPARATE, damage=raw(32, b"d" * 1024)),
        BadImage("command without an end", "header", bad, "add_storage_cmd is not NUL",
                 damage=raw(2220, b"c" * 1024)),
    ]  # fmt: skip


def _files() -> list[BadImage]:
    return [
        BadImage("data file missing", "files", "data_file_missing", "does not exist", SEPARATE,
                 damage=remove(".data")),
        BadImage("data file outside", "files", "path_not_allowed", "/etc/passwd, named as data",
                 SEPARATE, {"data_file": "/etc/passwd"}),
        BadImage("data file is a link outside", "files", "path_not_allowed", "named as data file",
                 SEPARATE, damage=link_outside),
        BadImage("data file is the image", "files", "data_file_shared", "the image itself",
                 SEPARATE, {"data_file": f"{SEPARATE}.fvd"}),
        BadImage("data file is the base", "files", "chain_loop", "comes back", SEPARATE,
                 {"data_file": "base-65536.raw"}),
        BadImage("data file too short", "files", "data_file_too_short", "65535 bytes, fewer than",
                 RAW_DATA, damage=cut(".data", -1)),
        BadImage("server that nobody allowed", "files", "uri_not_allowed", "nbd://example.org",
                 SEPARATE, {"data_file": "nbd://example.org/x", "data_file_fmt": "nbd"}),
        BadImage("base missing", "files", "base_missing", "does not exist",
                 header={"base_img": "nowhere.raw"}),
        BadImage("base outside", "files", "path_not_allowed", "named as base",
                 header={"base_img": "/etc/passwd"}),
        BadImage("base too short", "files", "base_too_short", "fewer",
                 damage=lambda path, header: os.truncate(path.parent / "base-65536.raw", 512)),
        BadImage("base changed", "files", "base_changed", "it was modified",
                 damage=lambda path, header: os.utime(path.parent / "base-65536.raw", ns=(1, 1))),
    ]  # fmt: skip


def _metadata() -> list[BadImage]:
    table, journal = "invalid_table", "invalid_journal"
    older: dict[str, object] = {"last_open_version": 1}
    return [
        BadImage("two chunks in one place", "metadata", table,
                 "entry 1 maps place 2, which entry 0 maps as well", damage=entry(1, 2)),
        BadImage("two chunks in one place but for a mark", "metadata", table, "which entry 0 maps",
                 damage=entry(1, 0x80000002)),
        BadImage("place that no number has", "metadata", table, "out of range",
                 damage=entry(1, 0x7FFFFFFF)),
        BadImage("place behind the end", "metadata", table, "behind the end", damage=entry(1, 6)),
        BadImage("place far behind the end", "metadata", table, "entry 1 maps place 2147483646",
                 damage=entry(1, 0x7FFFFFFE)),
        BadImage("place behind the end of the data file", "metadata", table, "behind the end",
                 SEPARATE, damage=cut(".data", -512)),
        BadImage("chunk cut off", "metadata", table, "behind the end", damage=cut(".fvd", -1)),
        BadImage("place under the table", "metadata", table, "overlaps the table",
                 "table-grown-over-data", damage=entry(3, 0)),
        BadImage("record maps a place twice", "metadata", table, "which entry 0 maps as well",
                 damage=sector(TableRecord(EPOCH, 4, (2,)))),
        BadImage("record maps behind the end", "metadata", table, "behind the end",
                 damage=sector(TableRecord(EPOCH, 4, (60,)))),
        BadImage("record of no place", "metadata", journal, "is no place",
                 damage=sector(TableRecord(EPOCH, 4, (0x7FFFFFFF,)))),
        BadImage("record past the table", "metadata", journal, "past the end",
                 damage=sector(TableRecord(EPOCH, 7, (3, 4)))),
        BadImage("record far past the table", "metadata", journal, "past the end",
                 damage=sector(TableRecord(EPOCH, 0xFFFFFFFF, (3,)))),
        BadImage("record of no entries", "metadata", journal, "no entries",
                 damage=sector(TableRecord(EPOCH, 4, ()))),
        BadImage("record of another epoch", "metadata", journal, "epoch 6, not 7",
                 damage=sector(TableRecord(EPOCH - 1, 4, (4,)))),
        BadImage("table record without a table", "metadata", journal, "has no table", RAW,
                 damage=sector(TableRecord(EPOCH, 0, (0,)))),
        BadImage("bitmap record without a bitmap", "metadata", journal, "has no bitmap",
                 "compact-base-none-journal-page", damage=sector(BitmapRecord(0, 8))),
        BadImage("bitmap record past the base", "metadata", journal, "past the end", RAW,
                 damage=sector(BitmapRecord(120, 16))),
        BadImage("bitmap record far past the base", "metadata", journal, "past the end", RAW,
                 damage=sector(BitmapRecord(U64 - 8, 16))),
        BadImage("bitmap record of nothing", "metadata", journal, "no sectors", RAW,
                 damage=sector(BitmapRecord(0, 0))),
        BadImage("epoch of a sector out of range", "metadata", journal, "epoch out of range", RAW,
                 damage=sector(BitmapRecord(0, 8), epoch=1 << 62)),
        BadImage("sequence of a sector out of range", "metadata", journal, "sequence out of range",
                 RAW, damage=sector(BitmapRecord(0, 8), sequence=1 << 62)),
        BadImage("record of an unknown type", "metadata", journal, "0x12345678", RAW,
                 damage=unknown_record),
        BadImage("older record past the disk", "metadata", journal, "past the end", RAW, older,
                 damage=plain(BitmapRecord(120, 16))),
        BadImage("older table record past the table", "metadata", journal, "past the end", COMPACT,
                 older, damage=plain(TableRecord(EPOCH, 8, (1,)))),
    ]  # fmt: skip


BAD_IMAGES = {case.name: case for case in (*_headers(), *_files(), *_metadata())}

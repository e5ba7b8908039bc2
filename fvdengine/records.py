# SPDX-License-Identifier: Apache-2.0
"""The journal in Python: parse its sectors, check every bound, replay, and encode records.

An independent oracle for the engine's journal code and the base of `check` and `map`, which must
see an unclean image as the engine would. Replay works on copies of bitmap and table in memory;
nothing here writes. Guards the reading side of I1: a sector counts as a whole or not at all.

Records of writers that know no trailers (plain sectors) have no common epoch: a bitmap record
is applied always, since bits are only ever set, a table record by the epoch it carries itself.

A journal may have a gigabyte, made by somebody else to hurt: only a number for each live sector
is kept, and its records are parsed again when they are applied.
"""

import enum
import operator
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from fvdengine.crc32c import SectorSums, sector_crc
from fvdengine.errors import InvalidJournal
from fvdengine.geometry import PLACE_LIMIT, PLACE_MASK, UNMAPPED, chunk_count
from fvdengine.header import EPOCH_LIMIT, WRITER_LIMIT, Header
from fvdengine.units import MIB, PAGE, SECTOR, divide_up

BITMAP_RECORD = 0x3F2AB8ED
TABLE_RECORD = 0xB4E6F7AC
TRAILER_MAGIC = 0x544A5646  # "FVJT"
TRAILER_OFFSET = 488
RECORDS_SIZE_MAX = 484  # with the end mark, records end at or before the trailer
BITMAP_RECORDS_MAX = 30
TABLE_ENTRIES_MAX = 116
TABLE_ENTRIES_WITH_BITMAP_MAX = 112

_BITMAP = struct.Struct("<2IQ")
_TABLE = struct.Struct("<IQ2I")
_TRAILER = struct.Struct("<2I2Q")
_CRC_OFFSET = TRAILER_OFFSET + 4
_END_MARK = bytes(4)
_JOINED_AT_ONCE = 1 << 20
_COMPARED_AT_ONCE = 1 << 10
_EMPTY_SECTOR = bytes(SECTOR)
_EMPTY_PAGE = bytes(PAGE)
assert TRAILER_OFFSET + _TRAILER.size == SECTOR
# A live sector in one number that sorts as replay goes: epoch + 1 (0: plain), sequence, position.
_POSITION_BITS, _SEQUENCE_BITS = 22, 62

# Gives `size` bytes of the journal, from an offset into it.
Reader = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class BitmapRecord:
    """The blocks of these sectors of the virtual disk are local."""

    first_sector: int
    sectors: int


@dataclass(frozen=True, slots=True)
class TableRecord:
    """Consecutive entries of the chunk table."""

    epoch: int
    first_index: int
    entries: tuple[int, ...]


Record = BitmapRecord | TableRecord


@dataclass(frozen=True, slots=True)
class Trailer:
    """What seals a sector of ours."""

    epoch: int
    sequence: int


class SectorState(enum.Enum):
    """What a journal sector turned out to be."""

    EMPTY = "empty"
    SEALED = "sealed"  # a trailer with the right sum
    PLAIN = "plain"  # records without a trailer, as older writers make them
    TORN = "torn"  # a trailer with a wrong sum: ignored as a whole


@dataclass(frozen=True, slots=True)
class JournalSector:
    """A parsed sector; `position` counts sectors from the start of the journal."""

    position: int
    state: SectorState
    records: tuple[Record, ...] = ()
    trailer: Trailer | None = None


class MalformedSector(ValueError):
    """The bytes of a sector that should hold records do not."""


def seal_sector(records: Iterable[Record], trailer: Trailer, image_uuid: bytes) -> bytes:
    """Return the 512 bytes of a sector of ours; raise ValueError if the records do not fit."""
    body = b"".join(encode_record(record) for record in records)
    if len(body) > RECORDS_SIZE_MAX:
        raise ValueError(f"{len(body)} bytes of records do not fit into a sector")
    blank = body.ljust(TRAILER_OFFSET, b"\0") + _TRAILER.pack(
        TRAILER_MAGIC, 0, trailer.epoch, trailer.sequence
    )
    crc = struct.pack("<I", sector_crc(image_uuid, blank, _CRC_OFFSET))
    return blank[:_CRC_OFFSET] + crc + blank[_CRC_OFFSET + 4 :]


def plain_sector(records: Iterable[Record]) -> bytes:
    """Return the 512 bytes of a sector as a writer without trailers makes it."""
    body = b"".join(encode_record(record) for record in records)
    if len(body) > SECTOR:
        raise ValueError(f"{len(body)} bytes of records do not fit into a sector")
    return body.ljust(SECTOR, b"\0")


def encode_record(record: Record) -> bytes:
    """Return the bytes of one record."""
    if isinstance(record, BitmapRecord):
        return _BITMAP.pack(BITMAP_RECORD, record.sectors, record.first_sector)
    count = len(record.entries)
    head = _TABLE.pack(TABLE_RECORD, record.epoch, count, record.first_index)
    return head + struct.pack(f"<{count}I", *record.entries)


def parse_sector(data: bytes, position: int, image_uuid: bytes) -> JournalSector:
    """Return what the sector holds; raise MalformedSector if it is neither empty nor records."""
    return _parse(data, position, lambda sector: sector_crc(image_uuid, sector, _CRC_OFFSET))


def _parse(
    data: bytes, position: int, sum_of: Callable[[bytes], int] | None
) -> JournalSector:
    """Without `sum_of`, which gives the sum that the sector should have, its own is right."""
    if data == _EMPTY_SECTOR:
        return JournalSector(position, SectorState.EMPTY)
    magic, crc, epoch, sequence = _TRAILER.unpack_from(data, TRAILER_OFFSET)
    if magic != TRAILER_MAGIC:
        return JournalSector(position, SectorState.PLAIN, tuple(_parse_records(data, SECTOR)))
    if sum_of is not None and sum_of(data) != crc:
        return JournalSector(position, SectorState.TORN)
    records = tuple(_parse_records(data, TRAILER_OFFSET))
    for record in records:
        if isinstance(record, TableRecord) and record.epoch != epoch:
            raise MalformedSector(f"has a table record of epoch {record.epoch}, not {epoch}")
    return JournalSector(position, SectorState.SEALED, records, Trailer(epoch, sequence))


def _parse_records(data: bytes, limit: int) -> Iterator[Record]:
    """Yield the records up to the end mark; before a trailer the mark must be there."""
    offset = 0
    while offset + 4 <= limit:
        (kind,) = struct.unpack_from("<I", data, offset)
        if kind == 0:
            return
        if kind == BITMAP_RECORD and offset + _BITMAP.size <= limit:
            _, sectors, first_sector = _BITMAP.unpack_from(data, offset)
            yield BitmapRecord(first_sector, sectors)
            offset += _BITMAP.size
        elif kind == TABLE_RECORD and offset + _TABLE.size <= limit:
            _, epoch, count, first_index = _TABLE.unpack_from(data, offset)
            offset += _TABLE.size
            if count > (limit - offset) // 4:
                raise MalformedSector(f"has a table record of {count} entries")
            yield TableRecord(epoch, first_index, struct.unpack_from(f"<{count}I", data, offset))
            offset += 4 * count
        else:
            raise MalformedSector(f"has an unknown or cut record {kind:#010x} at byte {offset}")
    if limit == TRAILER_OFFSET:
        raise MalformedSector("has no end mark before its trailer")


class LiveSectors:
    """The sectors that replay applies, in its order, each parsed when its turn comes."""

    def __init__(self, read: Reader) -> None:
        self._read = read
        self._keys: list[int] = []

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[JournalSector]:
        for key in self._keys:
            position = key & (1 << _POSITION_BITS) - 1
            yield _parse(self._read(position * SECTOR, SECTOR), position, None)

    @property
    def has_plain(self) -> bool:
        """Whether there is one without a trailer; these come first."""
        return bool(self._keys) and not self._keys[0] >> _POSITION_BITS + _SEQUENCE_BITS

    def places(self) -> Iterator[tuple[int, int]]:
        """Yield (sequence, position) of the sealed ones, in the order of replay."""
        for key in self._keys:
            if key >> _POSITION_BITS + _SEQUENCE_BITS:
                sequence = key >> _POSITION_BITS & (1 << _SEQUENCE_BITS) - 1
                yield sequence, key & (1 << _POSITION_BITS) - 1

    def add(self, sector: JournalSector) -> None:
        key = 0
        if sector.trailer is not None:
            key = sector.trailer.epoch + 1 << _SEQUENCE_BITS | sector.trailer.sequence
        self._keys.append(key << _POSITION_BITS | sector.position)

    def sort(self) -> None:
        self._keys.sort()

    def drop_before(self, epoch: int) -> None:
        """Forget the sealed ones of earlier epochs."""
        first = epoch + 1 << _POSITION_BITS + _SEQUENCE_BITS
        plain = 1 << _POSITION_BITS + _SEQUENCE_BITS
        self._keys = [key for key in self._keys if key < plain or key >= first]


def _no_bytes(offset: int, size: int) -> bytes:
    raise AssertionError("an empty journal is never read")


@dataclass(slots=True)
class Journal:
    """All sectors of a journal that are not empty, and what replay will make of them."""

    live: LiveSectors = field(default_factory=lambda: LiveSectors(_no_bytes))
    record_count: int = 0
    stale_count: int = 0
    torn: list[int] = field(default_factory=list)
    ignored_plain: list[int] = field(default_factory=list)
    highest_epoch: int = 0
    highest_sequence: int = 0


def read_journal(data: bytes | memoryview, header: Header, path: str) -> Journal:
    """Parse the bytes of a journal; see scan_journal."""
    view = memoryview(data)
    return scan_journal(lambda at, size: bytes(view[at : at + size]), len(view), header, path)


def scan_journal(
    read: Reader, size: int, header: Header, path: str,
    drop: Callable[[InvalidJournal], None] | None = None, image_uuid: bytes | None = None,
) -> Journal:  # fmt: skip
    """Parse a journal of `size` bytes; raise InvalidJournal for what must not be replayed, or
    give it to `drop` and go on without it.

    Sectors of epochs below the stable one are counted and not looked into: their records may
    describe a geometry that is gone. `read` is called as long as the answer is used. `image_uuid`
    is the one in an extension whose sum is wrong: where a sum needs another, nothing is known.
    """
    if header.extension is not None:
        image_uuid = header.extension.image_uuid
    elif image_uuid is None:
        image_uuid = bytes(16)
    sum_of = SectorSums(image_uuid, _CRC_OFFSET)
    journal = Journal(LiveSectors(read))
    for begin in range(0, size, MIB):
        piece = read(begin, min(MIB, size - begin))
        for at in _used_sectors(piece):
            position = (begin + at) // SECTOR
            try:
                _enter(journal, piece[at : at + SECTOR], position, sum_of, header, path)
            except InvalidJournal as error:
                if drop is None:
                    raise
                drop(error)
    journal.live.sort()
    return journal


def _used_sectors(piece: bytes) -> Iterator[int]:
    """Yield where sectors begin that may hold something: one comparison a page for the others."""
    for page in range(0, len(piece), PAGE):
        if piece[page : page + PAGE] != _EMPTY_PAGE:
            yield from range(page, min(page + PAGE, len(piece)), SECTOR)


def trailer_epochs(read: Reader, size: int) -> Iterator[int]:
    """Yield the epochs in the trailers of a journal of `size` bytes, whatever their sums are."""
    for begin in range(0, size, MIB):
        piece = read(begin, min(MIB, size - begin))
        for at in _used_sectors(piece):
            magic, _, epoch, _ = _TRAILER.unpack_from(piece, at + TRAILER_OFFSET)
            if magic == TRAILER_MAGIC:
                yield epoch


def _enter(
    journal: Journal, raw: bytes, position: int, sum_of: Callable[[bytes], int], header: Header,
    path: str,
) -> None:  # fmt: skip
    magic, crc, epoch, _ = _TRAILER.unpack_from(raw, TRAILER_OFFSET)
    if magic == TRAILER_MAGIC and header.extension is None and sum_of(raw) != crc:
        raise InvalidJournal(
            path=path, sector=position,
            reason="cannot be judged, as the extension area of the header is damaged",
        )  # fmt: skip
    if magic == TRAILER_MAGIC and epoch < header.stable_journal_epoch:
        journal.stale_count += 1  # ignored whether or not its sum is right: spare computing it
        return
    try:
        sector = _parse(raw, position, sum_of)
        if sector.state is SectorState.PLAIN and header.has_journal_trailers:
            journal.ignored_plain.append(position)
            return
    except MalformedSector as error:
        if magic != TRAILER_MAGIC and header.has_journal_trailers:
            journal.ignored_plain.append(position)
            return
        raise InvalidJournal(path=path, sector=position, reason=str(error)) from error
    if sector.state is SectorState.TORN:
        journal.torn.append(position)
    elif sector.state is not SectorState.EMPTY:
        _check_sector(sector, header, path)
        _note_epochs(journal, sector)
        if sector.trailer is not None:
            journal.highest_sequence = max(journal.highest_sequence, sector.trailer.sequence)
        journal.live.add(sector)
        journal.record_count += len(sector.records)


def _note_epochs(journal: Journal, sector: JournalSector) -> None:
    epochs = [record.epoch for record in sector.records if isinstance(record, TableRecord)]
    if sector.trailer is not None:
        epochs.append(sector.trailer.epoch)
    journal.highest_epoch = max(journal.highest_epoch, *epochs, 0)


def _check_sector(sector: JournalSector, header: Header, path: str) -> None:
    def need(holds: bool, reason: str) -> None:
        if not holds:
            raise InvalidJournal(path=path, sector=sector.position, reason=reason)

    if sector.trailer is not None:
        need(sector.trailer.epoch < EPOCH_LIMIT, "has an epoch out of range")
        need(sector.trailer.sequence < EPOCH_LIMIT, "has a sequence out of range")
    # Older writers recorded the range of the guest's write, which may go past the base.
    covered = header.virtual_disk_size if sector.trailer is None else header.base_img_size
    end_max = divide_up(covered, header.block_size) * (header.block_size // SECTOR)
    for record in sector.records:
        if isinstance(record, TableRecord):
            reason = _table_record_problem(record, sector, header)
            need(not reason, reason)
            continue
        need(header.base_img_size > 0, "has a bitmap record though the image has no bitmap")
        need(record.sectors > 0, "has a bitmap record of no sectors")
        need(
            record.first_sector + record.sectors <= end_max,
            f"has a bitmap record of {record.sectors} sectors at {record.first_sector}, "
            "past the end",
        )


def _table_record_problem(record: TableRecord, sector: JournalSector, header: Header) -> str:
    """Return what is wrong with a table record that counts, "" if nothing."""
    if not header.is_compact:
        return "has a table record though the image has no table"
    if sector.trailer is None and record.epoch < header.stable_journal_epoch:
        return ""
    if record.epoch >= EPOCH_LIMIT:
        return "has a table record of an epoch out of range"
    count = len(record.entries)
    if not count:
        return "has a table record of no entries"
    if record.first_index + count > chunk_count(header.virtual_disk_size, header.chunk_size):
        return f"has a table record of {count} entries at {record.first_index}, past the end"
    for entry in record.entries:
        if entry != UNMAPPED and entry & PLACE_MASK >= PLACE_LIMIT:
            return f"has a table record with the entry {entry:#x}, which is no place"
    return ""


def record_blocks(record: BitmapRecord, header: Header) -> range:
    """Return the blocks that the record makes local: all that it touches, up to the base's end."""
    block_sectors = header.block_size // SECTOR
    count = divide_up(header.base_img_size, header.block_size)
    first = record.first_sector // block_sectors
    end = divide_up(record.first_sector + record.sectors, block_sectors)
    return range(min(first, count), min(end, count))


@dataclass(frozen=True, slots=True)
class Changes:
    """What a replay changed: bits that were clear, table entries that were another."""

    blocks: int = 0
    chunks: int = 0


def replay(
    journal: Journal, header: Header, bitmap: bytearray, table: "array[int] | None" = None
) -> Changes:
    """Apply all live records to `bitmap` and `table`; return how much that changed."""
    blocks = sum(set_bits(bitmap, run) for run in _block_runs(journal, header))
    if table is None:
        return Changes(blocks)
    before: array[int] | None = None
    # Sealed sectors come in the order of their epochs; a plain one has records of any.
    newest = array("Q", bytes(8 * len(table))) if journal.live.has_plain else None
    for record in table_records(journal, header):
        before = before or table[:]
        for index, entry in enumerate(record.entries, record.first_index):
            if newest is not None:
                if record.epoch < newest[index]:
                    continue
                newest[index] = record.epoch
            table[index] = UNMAPPED if entry == UNMAPPED else entry & PLACE_MASK
    return Changes(blocks, _count_other(before, table) if before else 0)


def _count_other(before: "array[int]", after: "array[int]") -> int:
    """Count the entries that differ; most pages of a large table do not."""
    step, count = _COMPARED_AT_ONCE, 0
    for start in range(0, len(after), step):
        old, new = before[start : start + step], after[start : start + step]
        if old != new:
            count += sum(map(operator.ne, old, new))
    return count


def _block_runs(journal: Journal, header: Header) -> Iterator[range]:
    """Yield the blocks that the records name, joined: each of a million may name the whole disk."""
    pending: list[range] = []
    for sector in journal.live:
        pending += [
            record_blocks(record, header)
            for record in sector.records
            if isinstance(record, BitmapRecord)
        ]
        if len(pending) >= _JOINED_AT_ONCE:
            yield from _joined(pending)
            pending = []
    yield from _joined(pending)


def _joined(blocks: list[range]) -> Iterator[range]:
    current = range(0)
    for run in sorted(blocks, key=lambda run: run.start):
        if run.start > current.stop:
            yield current
            current = run
        elif run.stop > current.stop:
            current = range(current.start, run.stop)
    yield current


def table_records(journal: Journal, header: Header) -> Iterator[TableRecord]:
    """Yield the table records that count: those of plain sectors by position, then the sealed in
    the order in which they apply. Of two for one entry that of the higher epoch counts, or else
    the later one."""
    for sector in journal.live:
        for record in sector.records:
            # An earlier epoch is in plain sectors only: sealed ones of old epochs are not live.
            if isinstance(record, TableRecord) and record.epoch >= header.stable_journal_epoch:
                yield record


def set_bits(bitmap: bytearray, blocks: range) -> int:
    """Set a stretch at a time: a hostile journal may name the whole disk in each record."""
    if not blocks:
        return 0
    first, end = blocks.start >> 3, (blocks.stop + 7) >> 3
    old = int.from_bytes(bitmap[first:end], "little")
    mask = ((1 << len(blocks)) - 1) << (blocks.start & 7)
    bitmap[first:end] = (old | mask).to_bytes(end - first, "little")
    return (mask & ~old).bit_count()


def next_epoch(journal: Journal, header: Header) -> int:
    """Return the epoch that a writer continues with; EPOCH_LIMIT where there is none any more."""
    return min(max(journal.highest_epoch, header.stable_journal_epoch) + 1, EPOCH_LIMIT)


def numbers_used_up(journal: Journal, header: Header) -> bool:
    """Whether the epochs or sequences leave a writer no room; an emptied journal begins anew."""
    return max(next_epoch(journal, header), journal.highest_sequence + 1) >= WRITER_LIMIT

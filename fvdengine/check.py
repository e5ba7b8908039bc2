# SPDX-License-Identifier: Apache-2.0
"""Verify an image: header and backup copy, extension, bitmap, table, journal, lengths, bases.

Findings are data; the exit status follows from the worst of them (0 fine, 1 not all could be
checked, 2 corrupt, 3 leaks). Nothing is written. What can be seen of the invariants from outside
is checked: a bit or a mapping that only the journal has belongs to an image that is not clean
(I1, I4), mapped chunks lie in storage, apart from each other and from the table (I2), a fully
prefetched image has every bit (I5).

A base that is not what the image was made from (modified, replaced) is no damage of the image:
status 1, since what comes from the base cannot be vouched for, and 0 with accept_changed_base.
"""

import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from fvdengine import chain, geometry, intent, metadata, paths, records, stores, two_headers
from fvdengine import header as codec
from fvdengine.chain import Layer
from fvdengine.checkpoint import padding_bits, unused_data, used_end
from fvdengine.data_file import DataFile, open_data_file
from fvdengine.errors import (
    EngineError,
    HeadersDisagree,
    ImageTruncated,
    InvalidJournal,
    TableHopeless,
    UnknownFeature,
)
from fvdengine.findings import FROM_COPY, REPAIR, SHOWN_MAX, CheckResult, Severity
from fvdengine.gaps import find_gaps, gap_text
from fvdengine.geometry import UNMAPPED
from fvdengine.header import Extension, Header
from fvdengine.locking import BOTH, lock
from fvdengine.metadata import Metadata, count_set
from fvdengine.options import OpenOptions
from fvdengine.table_faults import Collector, Fault, find_faults, is_padding_clear, size_is_damaged
from fvdengine.units import PAGE, round_up

# Fields that a running engine changes in the header without touching the backup copy.
_RUN_TIME_FIELDS = frozenset(
    {"last_open_version", "clean_shutdown", "stable_journal_epoch", "chunks_relocated",
     "base_img_fully_prefetched", "need_zero_init", "extension"}
)  # fmt: skip
_RUN_TIME_EXTENSION = frozenset({"open_session", "boot_id", "compatible_features", "shrink_size"})
_FIXED_FIELDS = frozenset({"magic", "create_version", "create_time", "incompatible_features"})
_LAYOUT = frozenset(two_headers.LAYOUT_FIELDS)


@dataclass(slots=True)
class Checked:
    """The image while it is being looked at. `storage_fd` is -1 where the data are out of reach."""

    fd: int
    header: Header
    result: CheckResult
    storage_fd: int = -1
    storage_path: str = ""
    storage_length: int | None = None


def check_image(
    path: str | os.PathLike[str], options: OpenOptions | None = None
) -> CheckResult:
    """Check the image; raise only what keeps it from being looked at at all."""
    options = replace(options or OpenOptions(), read_only=True)
    name = os.fspath(path)
    fd = paths.open_file(name)
    try:
        lock(fd, name, BOTH, exclusive=False, wait_seconds=options.lock_wait_seconds)
        if options.discard_live_state:
            paths.forget_cached(fd)
        return check_open(fd, name, options)
    finally:
        os.close(fd)


def check_open(fd: int, name: str, options: OpenOptions) -> CheckResult:
    """Check the image that is open and locked as `fd`."""
    result = CheckResult(name)
    verdict, store = stores.judge_store(fd)
    if verdict is not stores.Verdict.SUPPORTED:
        result.add(
            Severity.NOTE, "untested_store", f"{name} lies on {store}", where="file",
            remedy="Move the image to ext4, xfs, btrfs or tmpfs.",
        )  # fmt: skip
    header = _check_header(fd, result)
    if header is None:
        return result
    if not options.discard_live_state:
        chain.check_not_left_live(header, name)
    checked = Checked(fd, header, result)
    _check_backup(checked)
    data = _open_data(checked, options)
    try:
        _check_metadata(checked)
        _check_length(checked)
        _check_bases(checked, data, options)
    finally:
        if data is not None:
            data.close()
    return result


# Header ------------------------------------------------------------------------------------


def _check_header(fd: int, result: CheckResult) -> Header | None:
    """Return the header if the rest can be looked at; raise if this is no image of ours."""
    length = paths.file_length(fd)
    data = os.pread(fd, codec.HEADER_COPY_SIZE, 0)
    try:
        header = Header.unpack(data, result.path)
        two_headers.validate(fd, result.path, header, length)
    except HeadersDisagree as error:
        result.add_error(error, where="header", is_corrupt=True, remedy=error.hint)
        return None
    except EngineError as error:
        is_damage = error.is_corruption or error.code in ("not_an_image", "old_layout")
        restorable = is_damage and intent.good_backup(fd, result.path) is not None
        if isinstance(error, UnknownFeature) or not (error.is_corruption or restorable):
            chain.point_to_backup(error, fd, result.path)
            raise
        remedy = REPAIR if restorable or isinstance(error, ImageTruncated) else FROM_COPY
        result.add_error(error, where="header", is_corrupt=True, remedy=remedy)
        return None
    if intent.is_staged(header):
        result.add(
            Severity.NOTE, "staged_update", "an update was cut short, and counts all the same",
            where="header", remedy=f"Open it for writing, or {REPAIR}.",
        )  # fmt: skip
        header = intent.settled(header, fd, result.path)
    if intent.is_shrinking(header):
        result.add(
            Severity.NOTE, "shrinking",
            f"a shrink to {intent.shrunk(header).virtual_disk_size} bytes was cut short",
            where="header", remedy=f"Open it for writing, or {REPAIR}.",
        )  # fmt: skip
    if header.last_open_version < max(codec.FORMAT_VERSION, header.create_version):
        result.add(
            Severity.NOTE, "older_writer",
            "an older version wrote the image last: its base cannot be identified",
            where="extension", remedy="Open the image for writing once.",
        )  # fmt: skip
    if two_headers.is_extension_damaged(header):
        result.add(
            Severity.CORRUPT, "extension_crc", "the sum of the extension area is wrong",
            where="extension", remedy=REPAIR,
        )  # fmt: skip
    return header


def _check_backup(checked: Checked) -> None:
    fd, header, result = checked.fd, checked.header, checked.result
    fields = two_headers.disagreement(fd, result.path, header)
    if fields:
        error = two_headers.refusal(result.path, header, fields)
        result.add(
            Severity.CORRUPT, "backup_header", error.message, where="header", remedy=error.hint
        )
        return
    if header.header_size < codec.BACKUP_OFFSET + codec.HEADER_COPY_SIZE:
        result.add(
            Severity.NOTE, "no_backup", "the header has no backup copy", where="backup copy"
        )
        return
    data = os.pread(fd, codec.HEADER_COPY_SIZE, codec.BACKUP_OFFSET)
    # A change that was cut short may have torn the copy, which nothing reads.
    damage = Severity.CORRUPT if header.is_clean else Severity.NOTE
    try:
        backup = Header.unpack(data, f"the backup header of {result.path}")
    except EngineError as error:
        result.add(
            damage, "backup_header", error.message, where="backup copy", remedy=REPAIR
        )
        return
    differing = [
        name
        for name in Header.__dataclass_fields__
        if name not in _RUN_TIME_FIELDS and getattr(header, name) != getattr(backup, name)
    ]
    differing += _extension_differences(header.trusted_extension, backup.extension)
    if not differing:
        return
    # A writer that knows no backup copy could not refresh it, and updates may be interrupted.
    is_older = header.last_open_version < codec.FORMAT_VERSION
    if _FIXED_FIELDS & set(differing) and not is_older:
        damage = Severity.CORRUPT
    elif backup.extension is not None and (is_older or not _LAYOUT & set(differing)):
        damage = Severity.NOTE
    result.add(
        damage, "backup_header",
        f"the backup copy of the header differs in {', '.join(differing[:5])}",
        where="backup copy", remedy=REPAIR,
    )  # fmt: skip


def _extension_differences(main: Extension | None, backup: Extension | None) -> list[str]:
    if main is None:
        return []
    if backup is None:
        return ["the extension area"]
    if main.image_uuid != backup.image_uuid:
        return ["image_uuid"]  # made anew after an older writer
    return [
        name
        for name in Extension.__dataclass_fields__
        if name not in _RUN_TIME_EXTENSION and getattr(main, name) != getattr(backup, name)
    ]


# Data file ---------------------------------------------------------------------------------


def _open_data(checked: Checked, options: OpenOptions) -> DataFile | None:
    """Open where the data lie; what is wrong with a data file is a finding."""
    header, result = checked.header, checked.result
    try:
        data = open_data_file(header, checked.fd, result.path, options)
    except EngineError as error:
        remedy = REPAIR if error.code == "data_file_too_short" else ""
        result.add_error(error, where="data file", remedy=remedy)
        return None
    if data is None:
        checked.storage_fd, checked.storage_path = checked.fd, result.path
    elif data.fd < 0:
        result.add(
            Severity.NOTE, "data_elsewhere",
            f"the data lie on an NBD server, {data.path}, which was not asked", where="data file",
        )  # fmt: skip
    else:
        checked.storage_fd, checked.storage_path = data.fd, data.path
        if options.discard_live_state:
            paths.forget_cached(data.fd)
    if checked.storage_fd >= 0:
        checked.storage_length = paths.file_length(checked.storage_fd)
    return data


# Bitmap, table, journal --------------------------------------------------------------------


def _check_metadata(checked: Checked) -> None:
    fd, header, result = checked.fd, checked.header, checked.result
    used = geometry.used_bitmap(header)
    stored = metadata.read_area(fd, header.bitmap_offset, used, result.path)
    _check_padding(checked, stored)
    table, faults = _load_table(checked)
    _check_table_padding(checked)
    try:
        journal = metadata.load_journal(fd, header, result.path)
    except InvalidJournal as error:
        result.add_error(error, where="journal", remedy=REPAIR)
        journal = records.Journal()
    bitmap = bytearray(stored)
    _report_faults(checked, faults)
    changes = records.replay(journal, header, bitmap, table)
    if table is not None and changes.chunks and not faults:
        _report_faults(checked, find_faults(table, header, checked.storage_length))
    loaded = Metadata(bitmap, table, journal, changes, stored)
    _check_journal(checked, loaded)
    _count(checked, loaded)
    _check_prefetched(checked)
    if table is not None:
        _check_storage(checked, loaded)


def _load_table(checked: Checked) -> "tuple[array[int] | None, list[Fault]]":
    """Return the table as stored and what is wrong with it; None if there is none, or no use in
    looking further."""
    header, path = checked.header, checked.result.path
    if not header.is_compact:
        return None, []
    collector = Collector(header, path, checked.storage_length)
    try:
        return metadata.load_table(checked.fd, header, path, collector), collector.faults
    except TableHopeless as error:
        checked.result.add_error(error, where="table")
        return None, []


def _report_faults(checked: Checked, faults: Iterable[Fault]) -> None:
    """Enter entries that are out of range, in the table, behind the end, or taken twice."""
    header, result = checked.header, checked.result
    counts: dict[str, int] = {}
    for fault in faults:
        counts[fault.kind.code] = counts.get(fault.kind.code, 0) + 1
        if counts[fault.kind.code] <= SHOWN_MAX:
            first = fault.index * header.chunk_size
            result.add(
                Severity.CORRUPT, fault.kind.code,
                f"chunk {fault.index} of the disk (bytes from {first} on) maps place "
                f"{fault.place}, which {fault.kind.value}",
                where=f"table entry {fault.index}", remedy=REPAIR,
            )  # fmt: skip
    for code, count in counts.items():
        if count > SHOWN_MAX:
            result.add(
                Severity.CORRUPT, code, f"{count - SHOWN_MAX} more entries are like that",
                where="table", remedy=REPAIR,
            )  # fmt: skip


def _check_table_padding(checked: Checked) -> None:
    """Entries behind the last chunk are ignored, but a writer of ours leaves them unmapped."""
    header = checked.header
    if not header.is_compact:
        return  # chunk_size may be anything
    if size_is_damaged(checked.fd, header, checked.result.path):
        checked.result.add(
            Severity.CORRUPT, "size_damaged",
            f"the disk has {header.virtual_disk_size} bytes, its table and the backup copy of the "
            "header know more", where="header", remedy=f"{REPAIR} --header backup",
        )  # fmt: skip
    elif not is_padding_clear(checked.fd, header, checked.result.path):
        checked.result.add(
            Severity.NOTE, "table_padding", "the table has entries behind the last chunk",
            where="table", remedy=REPAIR,
        )  # fmt: skip


def _check_journal(checked: Checked, loaded: Metadata) -> None:
    header, result, journal = checked.header, checked.result, loaded.journal
    result.replayed_blocks, result.replayed_chunks = loaded.changes.blocks, loaded.changes.chunks
    counts = result.journal
    counts.live, counts.stale = len(journal.live), journal.stale_count
    counts.torn, counts.ignored = len(journal.torn), len(journal.ignored_plain)
    counts.highest_epoch = journal.highest_epoch
    counts.highest_sequence = journal.highest_sequence
    if not header.journal_size and (header.is_compact or header.needs_base):
        result.add(Severity.NOTE, "no_journal", "the image has no journal", where="journal")
    for position in journal.torn[:SHOWN_MAX]:
        result.add(
            Severity.NOTE, "torn_sector",
            f"journal sector {position} has a wrong sum and is ignored",
            where=f"journal sector {position}",
        )  # fmt: skip
    for gap in find_gaps(journal.live, header.journal_size)[:SHOWN_MAX]:
        result.add(
            Severity.CORRUPT, "lost_sectors", gap_text(gap),
            where=f"journal sector {gap.first}", remedy=REPAIR,
        )  # fmt: skip
    if journal.ignored_plain:
        result.add(
            Severity.NOTE, "sector_without_trailer",
            f"{counts.ignored} journal sectors have no trailer and are ignored", where="journal",
        )  # fmt: skip
    if records.numbers_used_up(journal, header):
        result.add(
            Severity.CORRUPT, "numbers_used_up",
            "the epochs or sequences of the journal are used up: nobody can write to the image",
            where="journal", remedy=REPAIR,
        )  # fmt: skip
    changed = f"{loaded.changes.blocks} blocks and {loaded.changes.chunks} chunks"
    if not header.is_clean:
        result.add(
            Severity.NOTE, "not_clean",
            f"the image was not closed cleanly; the next open replays {counts.live} journal "
            "sectors", where="journal", remedy=f"Open it for writing, or {REPAIR}.",
        )  # fmt: skip
    elif loaded.changes.blocks or loaded.changes.chunks:
        result.add(
            Severity.CORRUPT, "clean_with_records",
            f"the image is marked clean, but its journal changes {changed}", where="journal",
            remedy=REPAIR,
        )  # fmt: skip


def _check_padding(checked: Checked, stored: bytes) -> None:
    """Bits behind the last block must be 0; in an image that was being cut they may be left."""
    header, result = checked.header, checked.result
    result.blocks = metadata.block_count(header) if header.has_base else 0
    surplus = padding_bits(checked.fd, header, result.path, stored)
    if surplus:
        result.add(
            Severity.CORRUPT if header.is_clean else Severity.NOTE, "bitmap_padding",
            f"the bitmap has {surplus} bits set behind its last block", where="bitmap",
            remedy=REPAIR,
        )  # fmt: skip


def _count(checked: Checked, loaded: Metadata) -> None:
    """Count local blocks, mapped chunks, and blocks that are local but have no place."""
    header, result = checked.header, checked.result
    result.local_blocks = count_set(loaded.bitmap, result.blocks)
    table = loaded.table
    if table is None:
        return
    result.chunks, result.mapped_chunks = len(table), loaded.count_mapped()
    per_chunk = header.chunk_size // header.block_size if result.blocks else 0
    for first, end in _unmapped_runs(table) if per_chunk else ():
        low = min(first * per_chunk, result.blocks)
        high = min(end * per_chunk, result.blocks)
        result.zero_blocks += _count_between(loaded.bitmap, low, high)


def _unmapped_runs(table: "array[int]") -> Iterator[tuple[int, int]]:
    start = None
    for first in range(0, len(table), PAGE):
        page = table[first : first + PAGE]
        empty = page.count(UNMAPPED)
        if empty in (0, len(page)):
            if empty and start is None:
                start = first
            if not empty and start is not None:
                yield start, first
                start = None
            continue
        for index, entry in enumerate(page, first):
            if entry == UNMAPPED and start is None:
                start = index
            if entry != UNMAPPED and start is not None:
                yield start, index
                start = None
    if start is not None:
        yield start, len(table)


def _count_between(bitmap: bytearray, first: int, end: int) -> int:
    """Count the bits set in [first, end)."""
    whole = first >> 3
    skipped = first & 7
    head = (bitmap[whole] & ((1 << skipped) - 1)).bit_count() if skipped else 0
    part = bitmap[whole : (end + 7) >> 3]
    return count_set(part, end - (whole << 3)) - head if end > first else 0


def _check_prefetched(checked: Checked) -> None:
    header, result = checked.header, checked.result
    missing = result.blocks - result.local_blocks
    if header.has_base and header.base_img_fully_prefetched and missing:
        result.add(
            Severity.CORRUPT, "prefetched_without_bits",
            f"the image claims to need no base, but {missing} blocks are not marked as local",
            where="header", remedy=REPAIR,
        )  # fmt: skip


# Storage -----------------------------------------------------------------------------------


def _check_storage(checked: Checked, loaded: Metadata) -> None:
    """Look for storage of a compact image that no chunk has."""
    header, result = checked.header, checked.result
    if checked.storage_length is None or stores.is_device(checked.storage_fd):
        return
    severity = Severity.LEAK if header.is_clean else Severity.NOTE
    end = used_end(header, loaded)
    surplus = checked.storage_length - round_up(end, PAGE)
    if surplus > 0:
        result.add(
            severity, "file_too_long",
            f"{checked.storage_path} has {surplus} bytes behind its last mapped chunk",
            where="storage", remedy=REPAIR,
        )  # fmt: skip
    wasted = sum(
        length for _, length in unused_data(checked.storage_fd, header, loaded, end)
    )
    if wasted:
        result.add(
            severity, "unused_places",
            f"{checked.storage_path} stores {wasted} bytes in places that no chunk has",
            where="storage", remedy=REPAIR,
        )  # fmt: skip


def _check_length(checked: Checked) -> None:
    """A raw image has nothing behind its last section; a compact one is judged by its table."""
    header = checked.header
    parts = [(checked.fd, checked.result.path, geometry.required_length(header))]
    if header.data_file and checked.storage_fd >= 0:
        parts.append(
            (checked.storage_fd, checked.storage_path, geometry.required_data_length(header))
        )
    for fd, path, needed in parts:
        if header.is_compact and fd == checked.storage_fd:
            continue
        surplus = paths.file_length(fd) - round_up(needed, PAGE)
        if surplus > 0 and not stores.is_device(fd):
            checked.result.add(
                Severity.LEAK if header.is_clean else Severity.NOTE, "file_too_long",
                f"{path} has {surplus} bytes behind its last section", where="file",
                remedy=REPAIR,
            )  # fmt: skip


# Bases -------------------------------------------------------------------------------------


def _check_bases(checked: Checked, data: DataFile | None, options: OpenOptions) -> None:
    header, result = checked.header, checked.result
    top = Layer(result.path, checked.fd, "fvd", header, header.virtual_disk_size, data)
    warnings: list[str] = []
    try:
        layers = chain.open_chain(top, options, warnings)
    except EngineError as error:
        result.add_error(error, where="base")
        return
    finally:
        for warning in dict.fromkeys(warnings):
            result.add(Severity.NOTE, "base", warning, where="base")
    for layer in layers[1:]:
        layer.close()

# SPDX-License-Identifier: Apache-2.0
"""Verify an image: header and backup copy, extension, bitmap, journal, length, bases.

Findings are data; the exit status follows from the worst of them (0 fine, 1 could not be
checked, 2 corrupt, 3 leaks). Nothing is written. What can be seen of the invariants from outside
is checked: a clean image has nothing left to replay (I4), a fully prefetched one has every
bit set (I5), bits exist for blocks only.
"""

import enum
import os
from dataclasses import dataclass, field, replace

from fvdengine import chain, geometry, metadata, paths, stores
from fvdengine import header as codec
from fvdengine.chain import Layer
from fvdengine.data_file import DataFile, open_data_file
from fvdengine.errors import (
    BaseChanged,
    BaseTooShort,
    EngineError,
    ImageTruncated,
    InvalidJournal,
    InvalidTable,
)
from fvdengine.header import Extension, Header
from fvdengine.locking import BOTH, lock
from fvdengine.metadata import Metadata
from fvdengine.options import OpenOptions
from fvdengine.units import PAGE, round_up
from fvdengine.validation import validate_header

# Fields that a running engine changes in the header without touching the backup copy.
_RUN_TIME_FIELDS = frozenset(
    {"last_open_version", "clean_shutdown", "stable_journal_epoch", "chunks_relocated",
     "base_img_fully_prefetched", "need_zero_init", "extension"}
)  # fmt: skip
_RUN_TIME_EXTENSION = frozenset({"open_session", "boot_id", "compatible_features"})


class Severity(enum.IntEnum):
    """How bad a finding is; the value is the exit status it leads to."""

    NOTE = 0
    UNCHECKED = 1
    CORRUPT = 2
    LEAK = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found."""

    severity: Severity
    code: str
    message: str

    def as_dict(self) -> dict[str, object]:
        return {
            "severity": self.severity.name.lower(), "code": self.code, "message": self.message
        }  # fmt: skip


@dataclass(slots=True)
class CheckResult:
    """All findings and some counts of what was looked at."""

    path: str
    findings: list[Finding] = field(default_factory=list)
    blocks: int = 0
    local_blocks: int = 0
    replayed_blocks: int = 0
    journal_sectors: int = 0

    @property
    def exit_status(self) -> int:
        """Corrupt outweighs unchecked, which outweighs leaks."""
        for severity in (Severity.CORRUPT, Severity.UNCHECKED, Severity.LEAK):
            if any(finding.severity is severity for finding in self.findings):
                return int(severity)
        return 0

    def add(self, severity: Severity, code: str, message: str) -> None:
        self.findings.append(Finding(severity, code, message))

    def add_error(self, error: EngineError, *, is_corrupt: bool | None = None) -> None:
        """Enter what stopped a part of the check."""
        corrupt = error.is_corruption if is_corrupt is None else is_corrupt
        self.add(Severity.CORRUPT if corrupt else Severity.UNCHECKED, error.code, error.message)

    def as_dict(self) -> dict[str, object]:
        return {
            "path": self.path,
            "exit_status": self.exit_status,
            "findings": [finding.as_dict() for finding in self.findings],
            "blocks": self.blocks,
            "local_blocks": self.local_blocks,
            "replayed_blocks": self.replayed_blocks,
            "journal_sectors": self.journal_sectors,
        }


def check_image(
    path: str | os.PathLike[str], options: OpenOptions | None = None
) -> CheckResult:
    """Check the image; raise only what keeps it from being looked at at all."""
    options = replace(options or OpenOptions(), read_only=True)
    name = os.fspath(path)
    result = CheckResult(name)
    fd = paths.open_file(name)
    try:
        verdict, store = stores.judge_store(fd)
        if verdict is not stores.Verdict.SUPPORTED:
            result.add(Severity.NOTE, "untested_store", f"{name} lies on {store}")
        lock(fd, name, BOTH, exclusive=False, wait_seconds=options.lock_wait_seconds)
        header = _check_header(fd, result)
        if header is None:
            return result
        if not options.discard_live_state:
            chain.check_not_left_live(header, name)
        _check_backup(fd, header, result)
        data = _open_data(fd, header, options, result)
        loaded = _check_metadata(fd, header, data, result)
        _check_length(fd, header, loaded, result)
        top = Layer(name, fd, "fvd", header, header.virtual_disk_size, data)
        try:
            _check_bases(top, options, result)
        finally:
            if data is not None:
                data.close()
    finally:
        os.close(fd)
    return result


def _check_header(fd: int, result: CheckResult) -> Header | None:
    """Return the header if the rest can be looked at; raise if this is no image of ours."""
    length = paths.file_length(fd)
    data = os.pread(fd, codec.HEADER_COPY_SIZE, 0)
    try:
        header = Header.unpack(data, result.path)
        validate_header(header, result.path, length)
    except EngineError as error:
        if not error.is_corruption:
            raise
        result.add_error(error)
        return None
    if header.last_open_version < codec.FORMAT_VERSION:
        result.add(
            Severity.NOTE, "older_writer",
            "an older version wrote the image last: its base cannot be identified",
        )  # fmt: skip
    elif header.extension is None:
        result.add(Severity.CORRUPT, "extension_crc", "the sum of the extension area is wrong")
    return header


def _check_backup(fd: int, header: Header, result: CheckResult) -> None:
    if header.header_size < codec.BACKUP_OFFSET + codec.HEADER_COPY_SIZE:
        result.add(Severity.NOTE, "no_backup", "the header has no backup copy")
        return
    data = os.pread(fd, codec.HEADER_COPY_SIZE, codec.BACKUP_OFFSET)
    if len(data) < codec.HEADER_COPY_SIZE:
        raise ImageTruncated(path=result.path, actual=paths.file_length(fd), needed=16384)
    try:
        backup = Header.unpack(data, f"the backup header of {result.path}")
    except EngineError as error:
        result.add(Severity.CORRUPT, "backup_header", error.message)
        return
    differing = [
        name
        for name in Header.__dataclass_fields__
        if name not in _RUN_TIME_FIELDS and getattr(header, name) != getattr(backup, name)
    ]
    differing += _extension_differences(header.trusted_extension, backup.extension)
    if not differing:
        return
    message = f"the backup copy of the header differs in {', '.join(differing[:5])}"
    # A writer that knows no backup copy could not refresh it.
    is_older = header.last_open_version < codec.FORMAT_VERSION
    result.add(Severity.NOTE if is_older else Severity.CORRUPT, "backup_header", message)


def _extension_differences(main: Extension | None, backup: Extension | None) -> list[str]:
    if main is None:
        return []
    if backup is None:
        return ["the extension area"]
    if main.image_uuid != backup.image_uuid:
        return []  # made anew after an older writer; the copy is refreshed at the next update
    return [
        name
        for name in Extension.__dataclass_fields__
        if name not in _RUN_TIME_EXTENSION and getattr(main, name) != getattr(backup, name)
    ]


def _open_data(
    fd: int, header: Header, options: OpenOptions, result: CheckResult
) -> DataFile | None:
    try:
        return open_data_file(header, fd, result.path, options)
    except EngineError as error:
        result.add_error(error)
        return None


def _check_metadata(
    fd: int, header: Header, data: DataFile | None, result: CheckResult
) -> Metadata | None:
    """Return the metadata if the rest may be judged by them."""
    storage = fd if data is None else data.fd
    is_known = storage >= 0 and (data is not None or not header.data_file)
    length = paths.file_length(storage) if is_known else None
    try:
        loaded = metadata.load_metadata(fd, header, result.path, length)
    except (InvalidJournal, InvalidTable) as error:
        result.add_error(error)
        stored = metadata.read_area(fd, header.bitmap_offset, header.bitmap_size, result.path)
        _check_bits(stored, header, result)
        return None
    _check_journal(loaded, header, result)
    _check_bits(loaded.stored_bitmap, header, result)
    result.local_blocks = _count_set(loaded.bitmap, result.blocks)
    if header.has_base and header.base_img_fully_prefetched and result.local_blocks < result.blocks:
        result.add(
            Severity.CORRUPT, "prefetched_without_bits",
            f"the image claims to need no base, but {result.blocks - result.local_blocks} blocks "
            "are not marked as local",
        )  # fmt: skip
    return loaded


def _check_journal(loaded: Metadata, header: Header, result: CheckResult) -> None:
    journal = loaded.journal
    result.replayed_blocks = loaded.replayed_blocks
    result.journal_sectors = len(journal.live)
    if not header.journal_size and header.bitmap_size and header.needs_base:
        result.add(Severity.NOTE, "no_journal", "the image has no journal")
    for position in journal.torn[:10]:
        result.add(
            Severity.NOTE, "torn_sector",
            f"journal sector {position} was not written whole and is ignored",
        )  # fmt: skip
    if journal.ignored_plain:
        result.add(
            Severity.NOTE, "sector_without_trailer",
            f"{len(journal.ignored_plain)} journal sectors have no trailer and are ignored",
        )  # fmt: skip
    if header.is_clean and loaded.replayed_blocks:
        result.add(
            Severity.CORRUPT, "clean_with_records",
            f"the image is marked clean, but its journal holds {loaded.replayed_blocks} blocks "
            "that the bitmap does not have",
        )  # fmt: skip
    if not header.is_clean:
        result.add(
            Severity.NOTE, "not_clean",
            "the image was not closed cleanly; the next open replays "
            f"{len(journal.live)} journal sectors",
        )  # fmt: skip


def _check_bits(stored: bytes, header: Header, result: CheckResult) -> None:
    """Bits behind the last block must be 0: a later grow would take them for blocks."""
    result.blocks = metadata.block_count(header)
    if not header.bitmap_size:
        return
    result.local_blocks = _count_set(stored, result.blocks)
    surplus = _count_set(stored, len(stored) * 8) - result.local_blocks
    if surplus:
        result.add(
            Severity.CORRUPT, "bitmap_padding",
            f"the bitmap has {surplus} bits set behind its last block",
        )  # fmt: skip


def _count_set(bitmap: bytes | bytearray, count: int) -> int:
    return metadata.count_set(bitmap, count)


def _check_length(
    fd: int, header: Header, loaded: Metadata | None, result: CheckResult
) -> None:
    if loaded is None:
        return
    used = round_up(geometry.used_length(header, loaded.highest_place()), PAGE)
    surplus = paths.file_length(fd) - used
    if surplus > 0 and os.path.isfile(result.path):
        result.add(
            Severity.LEAK, "file_too_long", f"the file has {surplus} bytes behind its last section"
        )


def _check_bases(top: Layer, options: OpenOptions, result: CheckResult) -> None:
    warnings: list[str] = []
    try:
        layers = chain.open_chain(top, options, warnings)
    except (BaseChanged, BaseTooShort) as error:
        result.add_error(error, is_corrupt=True)
        return
    except EngineError as error:
        result.add_error(error, is_corrupt=error.is_corruption)
        return
    finally:
        for warning in dict.fromkeys(warnings):
            result.add(Severity.NOTE, "base", warning)
    for layer in layers[1:]:
        layer.close()



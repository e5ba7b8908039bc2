# SPDX-License-Identifier: Apache-2.0
"""Judge the values of a parsed header: scalars, sections, and the formats it names.

An image is untrusted input. Everything here works on numbers alone, so a header that passes
cannot lead any later step outside the file, into an endless loop, or past the memory limits.
"""

from collections.abc import Callable

from fvdengine import geometry
from fvdengine.errors import (
    ImageTruncated,
    InvalidHeader,
    InvalidSections,
    UnknownBaseFormat,
    UnknownDataFormat,
)
from fvdengine.geometry import SIZE_MAX as SIZE_MAX
from fvdengine.header import EPOCH_LIMIT, Header
from fvdengine.units import MIB, PAGE, SECTOR

BASE_FORMATS = ("raw", "fvd", "qcow2", "vmdk", "vhdx", "vdi")
DATA_FORMATS = ("raw", "nbd")
JOURNAL_BUFFER_MAX = 64 * MIB
JOURNAL_PERIOD_MAX_MS = 3_600_000
PREFETCH_SLOTS_MAX = 64
PREFETCH_MEMORY_MAX = 256 * MIB
PREFETCH_DELAY_MAX_S = 10 * 366 * 86400


Need = Callable[[bool, str, str], None]


def _needs(path: str) -> Need:
    def need(holds: bool, field: str, reason: str) -> None:
        if not holds:
            raise InvalidHeader(path=path, field=field, reason=reason)

    return need


def _check_scalars(header: Header, path: str) -> None:
    need = _needs(path)
    need(header.virtual_disk_size > 0, "virtual_disk_size", "is 0")
    need(
        header.virtual_disk_size % SECTOR == 0, "virtual_disk_size",
        f"is {header.virtual_disk_size}, not a multiple of 512",
    )  # fmt: skip
    need(
        header.data_offset + header.virtual_disk_size <= SIZE_MAX, "virtual_disk_size",
        "is too large for its data_offset",
    )  # fmt: skip
    need(
        0 < header.block_size <= geometry.BLOCK_SIZE_LIMIT and header.block_size % SECTOR == 0,
        "block_size", f"is {header.block_size}, not a multiple of 512 up to 2 GiB",
    )  # fmt: skip
    need(
        bool(header.journal_offset) == bool(header.journal_size), "journal_offset",
        "and journal_size are not both set",
    )  # fmt: skip
    need(header.journal_size % PAGE == 0, "journal_size", "is not a multiple of 4096")
    need(header.journal_size <= geometry.METADATA_SIZE_MAX, "journal_size", "is above 1 GiB")
    need(header.stable_journal_epoch <= EPOCH_LIMIT, "stable_journal_epoch", "is too large")
    if header.journal_size:
        need(
            header.journal_buf_size <= header.journal_size, "journal_buf_size",
            "is larger than the journal",
        )  # fmt: skip
    need(header.journal_buf_size <= JOURNAL_BUFFER_MAX, "journal_buf_size", "is above 64 MiB")
    need(
        header.journal_clean_buf_period <= JOURNAL_PERIOD_MAX_MS, "journal_clean_buf_period",
        "is above one hour",
    )  # fmt: skip


def _check_data_file(header: Header, path: str) -> None:
    need = _needs(path)
    if header.data_format not in DATA_FORMATS:
        raise UnknownDataFormat(path=path, format=header.data_format)
    if not header.data_file:
        need(header.data_format == "raw", "data_file_fmt", "is nbd though no data_file is named")
        return
    need(
        header.data_offset == 0, "data_offset",
        f"is {header.data_offset} though the data lie in a data_file",
    )  # fmt: skip


def _check_table(header: Header, path: str) -> None:
    need = _needs(path)
    need(
        bool(header.table_offset) == bool(header.table_size), "table_offset",
        "and table_size are not both set",
    )  # fmt: skip
    if not header.is_compact:
        return
    chunk = header.chunk_size
    need(
        0 < chunk <= SIZE_MAX and chunk % PAGE == 0, "chunk_size",
        f"is {chunk}, not a multiple of 4096",
    )  # fmt: skip
    # A block in two chunks could have its bit recorded without one of its mappings (I1).
    need(
        not header.has_base or chunk % header.block_size == 0, "chunk_size",
        f"is {chunk}, not a multiple of block_size, {header.block_size}",
    )  # fmt: skip
    needed = geometry.table_bytes(header.virtual_disk_size, chunk)
    need(
        header.table_size >= needed, "table_size",
        f"is {header.table_size}, fewer bytes than the {needed} that the disk needs",
    )  # fmt: skip
    need(header.table_size % PAGE == 0, "table_size", "is not a multiple of 4096")
    need(
        header.table_size + header.bitmap_size <= geometry.METADATA_SIZE_MAX, "table_size",
        "and bitmap_size together are above the memory limit of 1 GiB",
    )  # fmt: skip
    need(
        header.storage_grow_unit >= chunk, "storage_grow_unit", "is below chunk_size",
    )  # fmt: skip


def _check_base(header: Header, path: str) -> None:
    need = _needs(path)
    need(
        bool(header.base_img_size) == header.has_base, "base_img_size",
        "is 0 though a base is named" if header.has_base else "is set though no base is named",
    )  # fmt: skip
    if not header.has_base:
        need(
            not (header.bitmap_offset or header.bitmap_size), "bitmap_size",
            "is set though no base is named",
        )  # fmt: skip
        return
    if header.base_format not in BASE_FORMATS:
        raise UnknownBaseFormat(path=path, format=header.base_format)
    need(header.base_img_size % SECTOR == 0, "base_img_size", "is not a multiple of 512")
    need(
        header.base_img_size <= header.virtual_disk_size, "base_img_size",
        "is larger than the virtual disk",
    )  # fmt: skip
    needed = geometry.bitmap_bytes(header.base_img_size, header.block_size)
    need(header.bitmap_offset > 0, "bitmap_offset", "is 0 though a base is named")
    need(
        header.bitmap_size >= needed, "bitmap_size",
        f"is {header.bitmap_size}, fewer bytes than the {needed} that the base needs",
    )  # fmt: skip
    need(header.bitmap_size % PAGE == 0, "bitmap_size", "is not a multiple of 4096")
    need(
        header.bitmap_size <= geometry.METADATA_SIZE_MAX, "bitmap_size",
        "is above the memory limit of 1 GiB",
    )  # fmt: skip


def _check_prefetch(header: Header, path: str) -> None:
    need = _needs(path)
    need(
        1 <= header.num_prefetch_slots <= PREFETCH_SLOTS_MAX, "num_prefetch_slots",
        f"is {header.num_prefetch_slots}, not 1 to {PREFETCH_SLOTS_MAX}",
    )  # fmt: skip
    need(header.bytes_per_prefetch > 0, "bytes_per_prefetch", "is 0")
    need(
        not header.has_base or header.bytes_per_prefetch % header.block_size == 0,
        "bytes_per_prefetch", "is not a multiple of block_size",
    )  # fmt: skip
    need(
        header.num_prefetch_slots * header.bytes_per_prefetch <= PREFETCH_MEMORY_MAX,
        "bytes_per_prefetch", "times num_prefetch_slots is above 256 MiB",
    )  # fmt: skip
    need(
        header.prefetch_start_delay <= PREFETCH_DELAY_MAX_S, "prefetch_start_delay",
        "is above ten years",
    )  # fmt: skip
    for way in ("read", "write"):
        measure = f"prefetch_{way}_throughput_measure_time"
        need(getattr(header, measure) >= 1, measure, "is 0")
        low, high = f"prefetch_min_{way}_throughput", f"prefetch_max_{way}_throughput"
        need(getattr(header, high) >= getattr(header, low), high, f"is below {low}")


def validate_sections(header: Header, path: str, file_length: int) -> None:
    """Check that all sections are aligned, behind the header, disjoint and inside the file."""
    parts = geometry.sections(header)
    for section in parts[1:]:
        if section.offset % PAGE:
            raise InvalidSections(
                path=path, section=section.name,
                reason=f"begins at {section.offset}, not a multiple of 4096",
            )  # fmt: skip
    if header.is_compact and not header.data_file:
        _check_compact_area(header, path, parts)
    for before, after in geometry.overlaps(parts):
        raise InvalidSections(
            path=path, section=after.name,
            reason=f"at {after.offset} overlaps the {before.name}, which ends at {before.end}",
        )  # fmt: skip
    last = parts[-1]
    if last.end > file_length:
        if last.offset >= file_length and last.name != "data area":
            raise InvalidSections(
                path=path, section=last.name,
                reason=f"at {last.offset} lies outside the file of {file_length} bytes",
            )  # fmt: skip
        raise ImageTruncated(path=path, actual=file_length, needed=last.end)


def _check_compact_area(
    header: Header, path: str, parts: list[geometry.Section]
) -> None:
    """Check where chunks begin: behind all metadata but the table, which may have grown."""
    if header.data_offset % PAGE:
        raise InvalidSections(
            path=path, section="data area",
            reason=f"begins at {header.data_offset}, not a multiple of 4096",
        )  # fmt: skip
    for part in parts:
        if part.name != "table" and part.end > header.data_offset:
            raise InvalidSections(
                path=path, section="data area",
                reason=f"at {header.data_offset} overlaps the {part.name}, "
                f"which ends at {part.end}",
            )  # fmt: skip


def validate_header(header: Header, path: str, file_length: int) -> None:
    """Raise the first thing that is wrong with `header`, in the order of the format."""
    _check_scalars(header, path)
    _check_data_file(header, path)
    _check_base(header, path)
    _check_table(header, path)
    _check_prefetch(header, path)
    validate_sections(header, path, file_length)

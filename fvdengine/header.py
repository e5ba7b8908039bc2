# SPDX-License-Identifier: Apache-2.0
"""The header of an image: 41 fields and the extension area, to and from bytes.

This is the Python codec of FORMAT.md sections 1 and 2. The compiled engine has one of its own,
written independently; the tests compare them. Parsing checks what can be seen without the rest
of the file, in the order of the format (magic, header size, incompatible features, names);
`validation.py` judges the values.
"""

import os
import struct
from dataclasses import dataclass, field

from fvdengine.crc32c import crc32c
from fvdengine.errors import (
    EarlyCodeLayout,
    ImageTruncated,
    InvalidHeader,
    NotAnImage,
    OldLayout,
    UnknownFeature,
)
from fvdengine.units import MIB, PAGE, SECTOR

MAGIC = 0x00445646  # "FVD\0"
EARLY_CODE_MAGIC = 0x5143F5A9  # of the code of January 2011, which had a layout of its own
EPOCH_LIMIT = 1 << 62  # of epochs and sequences of records
WRITER_LIMIT = 1 << 61  # no session begins with one above, and none can come from here to the other
FORMAT_VERSION = 2
HEADER_FIELDS_SIZE = 7440
HEADER_COPY_SIZE = 8192
BACKUP_OFFSET = 8192
HEADER_SIZE_DEFAULT = 16384
HEADER_SIZE_MIN = 8192
HEADER_SIZE_MAX = MIB
EXTENSION_OFFSET = HEADER_FIELDS_SIZE
UUID_OFFSET = 8  # of image_uuid in the extension
EXTENSION_END_MAX = 7680  # the end of sector 14: the extension never leaves it
NAME_SIZE = 1024
FORMAT_NAME_SIZE = 16
FEATURES_SIZE = 4096

# compatible_features, by bit
FEATURE_JOURNAL_TRAILERS = 1
FEATURE_UPDATE_STAGED = 2  # the backup copy holds the fields of an update, see intent
FEATURE_NAMES_CHANGING = 4  # the names in the backup copy may be others than in the header

# base_kind: how base_id identifies the base
BASE_UNKNOWN = 0
BASE_FVD = 1
BASE_URI = 2
BASE_FILE = 3
BASE_DEVICE = 4

FIELDS_FORMAT = "<4I2Q1024s16s1024s16s4Q2QI3Q4Q1024s2IQq2I8QI4096s"
_FIELDS = struct.Struct(FIELDS_FORMAT)
_EXTENSION = struct.Struct("<2I16s16s16s3QB7s32s")
_SHRINK_BYTES = 7  # they count sectors
EXTENSION_SIZE = _EXTENSION.size
assert _FIELDS.size == HEADER_FIELDS_SIZE
assert EXTENSION_OFFSET + EXTENSION_SIZE <= EXTENSION_END_MAX

_TEXT_FIELDS = {
    "data_file": NAME_SIZE,
    "data_file_fmt": FORMAT_NAME_SIZE,
    "base_img": NAME_SIZE,
    "base_img_fmt": FORMAT_NAME_SIZE,
    "add_storage_cmd": NAME_SIZE,
}


@dataclass(frozen=True, slots=True)
class Extension:
    """The extension area at 7440; it lies wholly inside sector 14.

    `shrink_size` is the size in bytes that a shrink of the disk is under way to, else 0.
    """

    image_uuid: bytes
    open_session: bytes
    boot_id: bytes
    create_time: int
    compatible_features: int
    base_length: int
    base_kind: int
    base_id: bytes
    shrink_size: int = 0

    def pack(self) -> bytes:
        """Return the extension with its size and sum filled in."""
        sectors = (self.shrink_size // SECTOR).to_bytes(_SHRINK_BYTES, "little")
        blank = _EXTENSION.pack(
            EXTENSION_SIZE, 0, self.image_uuid, self.open_session, self.boot_id, self.create_time,
            self.compatible_features, self.base_length, self.base_kind, sectors, self.base_id,
        )  # fmt: skip
        return blank[:4] + struct.pack("<I", crc32c(blank)) + blank[8:]

    @classmethod
    def unpack(cls, data: bytes) -> "Extension | None":
        """Return the extension that `data` begins with, or None if its size or sum is wrong.

        A longer extension of a newer version is read as far as it is known; its sum covers it all.
        """
        size, expected = struct.unpack_from("<2I", data)
        if not EXTENSION_SIZE <= size <= EXTENSION_END_MAX - EXTENSION_OFFSET:
            return None
        if crc32c(data[:4] + bytes(4) + data[8:size]) != expected:
            return None
        *others, sectors, base_id = _EXTENSION.unpack_from(data)[2:]
        values = (*others, base_id, int.from_bytes(sectors, "little") * SECTOR)
        return cls(*values)


@dataclass(frozen=True, slots=True)
class Header:
    """All fields of the header, in their order on disk, and the extension area."""

    magic: int
    header_size: int
    create_version: int
    last_open_version: int
    virtual_disk_size: int
    data_offset: int
    data_file: str
    data_file_fmt: str
    base_img: str
    base_img_fmt: str
    base_img_size: int
    bitmap_offset: int
    bitmap_size: int
    block_size: int
    journal_offset: int
    journal_size: int
    clean_shutdown: int
    stable_journal_epoch: int
    journal_buf_size: int
    journal_clean_buf_period: int
    table_offset: int
    table_size: int
    chunk_size: int
    storage_grow_unit: int
    add_storage_cmd: str
    chunks_relocated: int
    copy_on_read: int
    max_outstanding_copy_on_read_data: int
    prefetch_start_delay: int
    base_img_fully_prefetched: int
    num_prefetch_slots: int
    bytes_per_prefetch: int
    prefetch_read_throughput_measure_time: int
    prefetch_write_throughput_measure_time: int
    prefetch_min_read_throughput: int
    prefetch_min_write_throughput: int
    prefetch_max_read_throughput: int
    prefetch_max_write_throughput: int
    prefetch_throttle_time: int
    need_zero_init: int
    incompatible_features: bytes = field(default=bytes(FEATURES_SIZE), repr=False)
    extension: Extension | None = None

    @property
    def has_base(self) -> bool:
        """Whether the image names a base, needed or not."""
        return bool(self.base_img)

    @property
    def needs_base(self) -> bool:
        """Whether blocks may still be missing, so that the base must be there."""
        return self.has_base and not self.base_img_fully_prefetched

    @property
    def is_compact(self) -> bool:
        """Whether a table says where the chunks lie."""
        return self.table_size != 0

    @property
    def data_format(self) -> str:
        """The format of the data file; an empty name means raw. Content is never looked at."""
        return self.data_file_fmt or "raw"

    @property
    def is_clean(self) -> bool:
        """Whether the last writer closed the image; a hint, replaying is always safe."""
        return self.clean_shutdown != 0

    @property
    def trusted_extension(self) -> Extension | None:
        """The extension, unless a writer that knows none has opened the image since."""
        if self.last_open_version < max(FORMAT_VERSION, self.create_version):
            return None
        return self.extension

    @property
    def has_journal_trailers(self) -> bool:
        """Whether a journal sector without a trailer is to be ignored."""
        extension = self.trusted_extension
        if extension is None:
            return False
        return bool(extension.compatible_features & FEATURE_JOURNAL_TRAILERS)

    @property
    def base_format(self) -> str:
        """The format of the base; an empty name means raw. Content is never looked at."""
        return self.base_img_fmt or "raw"

    def pack(self) -> bytes:
        """Return the 8192 bytes of the header with its extension."""
        values: list[int | bytes] = []
        for name in HEADER_FIELD_NAMES:
            value = getattr(self, name)
            values.append(encode_name(value, name) if isinstance(value, str) else value)
        packed = _FIELDS.pack(*values)
        if self.extension is not None:
            packed += self.extension.pack()
        return packed.ljust(HEADER_COPY_SIZE, b"\0")

    @classmethod
    def unpack(cls, data: bytes, path: str = "the image") -> "Header":
        """Return the header that `data` begins with, checked as far as its own bytes go."""
        check_prelude(data, path, len(data))
        values: list[int | str | bytes] = list(_FIELDS.unpack_from(data))
        for index, name in enumerate(HEADER_FIELD_NAMES):
            value = values[index]
            if name in _TEXT_FIELDS and isinstance(value, bytes):
                values[index] = _decode_name(value, name, path)
        extension = Extension.unpack(data[EXTENSION_OFFSET:HEADER_COPY_SIZE])
        return cls(*(*values, extension))  # type: ignore[arg-type]


HEADER_FIELD_NAMES = tuple(
    name for name in Header.__dataclass_fields__ if name != "extension"
)
assert len(HEADER_FIELD_NAMES) == 41


def check_prelude(data: bytes, path: str, file_length: int) -> None:
    """Check length, magic, header size and incompatible features, in this order."""
    if not file_length:
        raise NotAnImage(path=path, reason="it is empty")
    if data[:4] == struct.pack("<I", EARLY_CODE_MAGIC):
        raise EarlyCodeLayout(path=path)
    if data[:4] != struct.pack("<I", MAGIC):
        raise NotAnImage(path=path, reason="it does not begin with the FVD magic")
    if len(data) < HEADER_COPY_SIZE:
        raise ImageTruncated(path=path, actual=file_length, needed=HEADER_COPY_SIZE)
    (header_size,) = struct.unpack_from("<I", data, 4)
    if header_size < PAGE:
        raise OldLayout(path=path)
    if header_size % PAGE or not HEADER_SIZE_MIN <= header_size <= HEADER_SIZE_MAX:
        raise InvalidHeader(
            path=path, field="header_size",
            reason=f"is {header_size}, not a multiple of 4096 from 8192 to 1 MiB",
        )  # fmt: skip
    features = data[HEADER_FIELDS_SIZE - FEATURES_SIZE : HEADER_FIELDS_SIZE]
    if any(features):
        raise UnknownFeature(path=path, bits=_set_bits(features))


def _set_bits(features: bytes) -> str:
    """Name the bits that are set, at most four of them."""
    number = int.from_bytes(features, "little")
    bits: list[str] = []
    while number and len(bits) < 4:
        lowest = (number & -number).bit_length() - 1
        bits.append(str(lowest))
        number &= number - 1
    return ", ".join(bits) + (", ..." if number else "")


def encode_name(name: str, field_name: str) -> bytes:
    """Return `name` as the bytes of its field, NUL included."""
    size = _TEXT_FIELDS[field_name]
    encoded = os.fsencode(name)
    if len(encoded) >= size:
        raise InvalidHeader(
            path="the image", field=field_name, reason=f"is longer than {size - 1} bytes"
        )
    if b"\0" in encoded:
        raise InvalidHeader(path="the image", field=field_name, reason="holds a NUL character")
    return encoded.ljust(size, b"\0")


def _decode_name(raw: bytes, field_name: str, path: str) -> str:
    name, separator, _ = raw.partition(b"\0")
    if not separator:
        raise InvalidHeader(path=path, field=field_name, reason="is not NUL-terminated")
    return os.fsdecode(name)

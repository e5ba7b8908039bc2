# SPDX-License-Identifier: Apache-2.0
"""The C structures of the format against the Python codec: every field, place and size.

The codec's structures are read here from their format strings, so that the two descriptions are
compared with each other and not with a third.
"""

import struct

import pytest

from fvdengine import header, records

HEADER_FORMAT = header._FIELDS.format
EXTENSION_FORMAT = header._EXTENSION.format
EXTENSION_NAMES = (
    "ext_size", "ext_crc32c", "image_uuid", "open_session", "boot_id", "create_time",
    "compatible_features", "base_length", "base_kind", "shrink_size", "base_id",
)  # fmt: skip


def places(text, names):
    """Field -> (offset, size) of a struct format string; padding bytes count as a field."""
    found, order, body, count = {}, text[0], text[1:], ""
    at, left = 0, list(names)
    for sign in body:
        if sign.isdigit():
            count += sign
            continue
        repeat = int(count or 1)
        units = [f"{count}{sign}"] if sign in "sx" else [sign] * repeat
        for unit in units:
            width = struct.calcsize(order + unit)
            found[left.pop(0)] = (at, width)
            at += width
        count = ""
    assert not left
    return found


@pytest.mark.parametrize(
    ("structure", "text", "names"),
    [
        ("header", HEADER_FORMAT, header.HEADER_FIELD_NAMES),
        ("extension", EXTENSION_FORMAT, EXTENSION_NAMES),
        ("trailer", records._TRAILER.format, ("magic", "crc", "epoch", "sequence")),
        ("record", records._BITMAP.format, ("type", "sectors", "first_sector")),
    ],
)
def test_fields_lie_where_the_python_codec_has_them(probes, structure, text, names):
    assert probes.layout.fields()[structure] == places(text, names)
    assert probes.layout.sizes()[structure] == struct.calcsize(text)


def test_constants_are_those_of_the_python_codec(probes):
    assert probes.layout.constants() == {
        "magic": header.MAGIC, "version": header.FORMAT_VERSION,
        "bitmap_record": records.BITMAP_RECORD, "table_record": records.TABLE_RECORD,
        "trailer_magic": records.TRAILER_MAGIC, "records_bytes": records.RECORDS_SIZE_MAX,
        "trailer_offset": records.TRAILER_OFFSET,
        "extension_offset": header.EXTENSION_OFFSET,
        "feature_trailers": header.FEATURE_JOURNAL_TRAILERS,
    }  # fmt: skip


def test_no_scalar_of_header_or_extension_straddles_a_sector(probes):
    tables = probes.layout.fields()
    parts = [(0, tables["header"]), (header.EXTENSION_OFFSET, tables["extension"])]
    for start, fields in parts:
        for name, (offset, size) in fields.items():
            first, last = (start + offset) // 512, (start + offset + size - 1) // 512
            assert first == last or size >= 1024, name

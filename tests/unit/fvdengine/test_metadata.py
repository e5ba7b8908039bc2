# SPDX-License-Identifier: Apache-2.0
"""Reading bitmap and journal together, and walking over runs of bits."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvdengine import metadata
from fvdengine.errors import ImageTruncated
from fvdengine.records import BitmapRecord, Trailer, seal_sector


def runs_of(bitmap, first, end):
    """The model: look at every bit."""
    found = []
    for bit in range(first, end):
        value = bool(bitmap[bit >> 3] >> (bit & 7) & 1)
        if found and found[-1][2] == value:
            found[-1][1] = bit + 1
        else:
            found.append([bit, bit + 1, value])
    return [tuple(run) for run in found]


pieces = st.one_of(
    st.binary(max_size=4),
    st.integers(0, 9).map(bytes),
    st.integers(0, 9).map(lambda count: b"\xff" * count),
)


@given(st.lists(pieces, max_size=6).map(b"".join), st.data())
def test_runs_equal_the_model(bitmap, data):
    end = data.draw(st.integers(0, len(bitmap) * 8))
    first = data.draw(st.integers(0, end))
    assert list(metadata.bit_runs(bitmap, first, end)) == runs_of(bitmap, first, end)


def test_journal_is_replayed_into_the_copy_only(image, header, poke, digest):
    poke(header.bitmap_offset, b"\x01")
    record = seal_sector([BitmapRecord(8, 16)], Trailer(1, 1), header.extension.image_uuid)
    poke(header.journal_offset + 4096, record)
    before = digest(image)
    fd = os.open(image, os.O_RDONLY)
    try:
        found = metadata.load_metadata(fd, header, str(image))
    finally:
        os.close(fd)
    assert found.bitmap[0] == 0b111
    assert found.stored_bitmap[0] == 0b1
    assert found.replayed_blocks == 2
    assert found.count_local(header) == 3 * 4096
    assert digest(image) == before


def test_area_behind_the_end_is_an_error(image):
    fd = os.open(image, os.O_RDONLY)
    try:
        with pytest.raises(ImageTruncated):
            metadata.read_area(fd, image.stat().st_size - 10, 20, str(image))
    finally:
        os.close(fd)

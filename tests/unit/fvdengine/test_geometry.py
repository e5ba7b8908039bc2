# SPDX-License-Identifier: Apache-2.0
"""The sizes and places chosen at create."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvdengine import geometry
from fvdengine.units import GIB, MIB, TIB

sectors = st.integers(1, 1 << 40).map(lambda number: number * 512)


@pytest.mark.parametrize(
    ("base", "block"),
    [
        (512, 4096), (128 * GIB, 4096), (128 * GIB + 512, 8192), (1 * TIB, 32768),
        (16 * TIB, 512 * 1024), (64 * TIB, 2 * MIB), (1024 * TIB, 2 * MIB),
    ],
)  # fmt: skip
def test_block_size_is_the_smallest_with_a_small_bitmap(base, block):
    assert geometry.choose_block_size(base) == block


@given(sectors, st.integers(0, 1 << 48), st.sampled_from([None, 4096, 65536, 2 * MIB]))
def test_layout_is_aligned_disjoint_and_large_enough(size, base, block):
    layout = geometry.choose_layout(size, base, block, None)
    assert layout.base_img_size <= size
    assert layout.base_img_size == min(-(-base // 512) * 512, size)
    parts = [(0, 16384)]
    if base:
        assert layout.bitmap_size * 8 * layout.block_size >= layout.base_img_size
        parts.append((layout.bitmap_offset, layout.bitmap_size))
        parts.append((layout.journal_offset, layout.journal_size))
    else:
        assert (layout.bitmap_size, layout.journal_size) == (0, 0)
    parts.append((layout.data_offset, size))
    for (offset, length), (following, _) in zip(parts, parts[1:], strict=False):
        assert offset + length <= following
        assert following % 4096 == 0
    assert layout.data_offset + size == layout.file_size
    assert layout.metadata_end <= layout.data_offset


def test_sections_of_a_header_are_sorted(header):
    names = [section.name for section in geometry.sections(header)]
    assert names == ["header", "bitmap", "journal", "data area"]
    assert list(geometry.overlaps(geometry.sections(header))) == []


def test_required_length_is_the_end_of_the_data(header):
    expected = header.data_offset + header.virtual_disk_size
    assert geometry.required_length(header) == expected

# SPDX-License-Identifier: Apache-2.0
"""Sizes: reading, printing, rounding."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvdengine import units
from fvdengine.errors import InvalidSize


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("512", 512), ("4k", 4096), ("64K", 65536), ("1.5G", 3 << 29),
        ("20GiB", 20 << 30),
        ("2tb", 2 << 40), (" 7m ", 7 << 20), ("0.5k", 512), ("7E", 7 << 60),
    ],
)  # fmt: skip
def test_size_is_read(text, size):
    assert units.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "k", "-1", "1x", "1.0001", "1e3", "0x10", "1 000", "8E", "inf", "१", "1k1"]
)
def test_bad_size_is_refused(text):
    with pytest.raises(InvalidSize):
        units.parse_size(text)


@given(st.integers(0, (1 << 60) - 1), st.sampled_from(["", "k", "M", "G", "T"]))
def test_exact_multiples_survive_printing_and_reading(number, suffix):
    size = number % 1000 * {"": 1, "k": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[suffix]
    assert units.parse_size(units.format_size(size)) == size


@given(st.integers(0, 1 << 70))
def test_printed_size_is_short(size):
    assert len(units.format_size(size)) <= 8 or size >= 1 << 63


@given(st.integers(0, 1 << 64), st.integers(1, 1 << 40))
def test_rounding_up_gives_the_next_multiple(value, unit):
    rounded = units.round_up(value, unit)
    assert rounded % unit == 0
    assert value <= rounded < value + unit
    assert units.divide_up(value, unit) * unit == rounded


def test_negative_size_is_printed_with_its_sign():
    assert units.format_size(-2048) == "-2k"

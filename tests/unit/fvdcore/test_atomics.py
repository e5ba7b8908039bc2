# SPDX-License-Identifier: Apache-2.0
"""Bit counting of atomics.h against Python's integers."""

from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(1, 2**64 - 1))
def test_bits_of_a_word(probes, word):
    trailing = (word & -word).bit_length() - 1
    assert probes.plain.bits(word) == (trailing, 64 - word.bit_length(), word.bit_count())

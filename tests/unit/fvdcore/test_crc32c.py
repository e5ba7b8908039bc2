# SPDX-License-Identifier: Apache-2.0
"""CRC-32C: the processor's instruction, the table walk and the Python one agree."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvdengine.crc32c import crc32c

# RFC 3720, appendix B.4, and the check value of the catalogue of parametrised CRCs.
VECTORS = [
    (b"", 0),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
]


@pytest.mark.parametrize(("data", "value"), VECTORS, ids=[str(i) for i in range(len(VECTORS))])
def test_known_vectors(probes, data, value):
    assert probes.plain.crc(data) == value
    assert probes.plain.crc_reference(data) == value


@given(data=st.binary(max_size=600), start=st.integers(0, 2**32 - 1))
def test_all_implementations_agree(probes, data, start):
    value = crc32c(data, start)
    assert probes.plain.crc(data, start) == value
    assert probes.plain.crc_reference(data, start) == value


@given(data=st.binary(max_size=300), cut=st.integers(0, 300))
def test_calls_chain(probes, data, cut):
    for crc in (probes.plain.crc, probes.plain.crc_reference):
        assert crc(data[cut:], crc(data[:cut])) == crc(data)


@given(data=st.binary(min_size=16, max_size=100), skip=st.integers(0, 15))
def test_alignment_does_not_matter(probes, data, skip):
    assert probes.plain.crc(memoryview(data)[skip:]) == crc32c(data[skip:])

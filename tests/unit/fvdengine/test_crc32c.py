# SPDX-License-Identifier: Apache-2.0
"""CRC-32C against the published vectors of RFC 3720, and its chaining."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvdengine.crc32c import SectorSums, crc32c, sector_crc


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_published_vectors(data, expected):
    assert crc32c(data) == expected


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_sums_chain(first, second):
    assert crc32c(second, crc32c(first)) == crc32c(first + second)


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=512, max_size=512))
def test_sector_sum_covers_uuid_and_sector_without_its_own_field(uuid, sector):
    blank = sector[:492] + bytes(4) + sector[496:]
    assert sector_crc(uuid, sector, 492) == crc32c(uuid + blank)
    assert sector_crc(uuid, blank, 492) == sector_crc(uuid, sector, 492)


@pytest.mark.parametrize("is_built", [True, False])
def test_many_sums_are_the_same_with_and_without_the_engine(monkeypatch, rng, is_built):
    if not is_built:
        monkeypatch.setitem(sys.modules, "fvdcore", None)
    uuid = rng.randbytes(16)
    sums = SectorSums(uuid, 492)
    monkeypatch.setattr(SectorSums, "PATIENCE", 3)
    for _ in range(6):
        sector = rng.randbytes(512)
        assert sums(sector) == sector_crc(uuid, sector, 492)

# SPDX-License-Identifier: Apache-2.0
"""Sectors that name their writer and their place: the Python side of sim_pattern.pxd."""

import struct

SECTOR = 512
BASE = 0xFFFFFFF0
POISON = 0xFFFFFFF1
_ODD = 0x9E3779B97F4A7C15
_STEP = 0xD1342543DE82EF95
_MASK = (1 << 64) - 1
_WORDS = struct.Struct("<64Q")
_STEPS = [i * _STEP for i in range(64)]


def sector(stamp: int, place: int) -> bytes:
    """The content of one sector."""
    word = ((place << 32) | stamp) * _ODD
    return _WORDS.pack(*[(word + step) & _MASK for step in _STEPS])


class Sheet:
    """A long run of patterned sectors, made once and cut to size."""

    def __init__(self, stamp: int, sectors: int) -> None:
        self._bytes = b"".join(sector(stamp, place) for place in range(sectors))

    def cut(self, first: int, count: int) -> bytes:
        """Sectors first to first + count."""
        return self._bytes[first * SECTOR : (first + count) * SECTOR]

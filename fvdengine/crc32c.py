# SPDX-License-Identifier: Apache-2.0
"""CRC-32C (Castagnoli) in plain Python, the check sum of the extension area and the journal.

`crc32c(data, value)` chains like zlib's crc32: the register is inverted on entry and on exit
of every call, so `crc32c(b, crc32c(a)) == crc32c(a + b)`, and `value` 0 starts a new sum.

"Seeded with image_uuid" (FORMAT.md, journal) means exactly

    crc = crc32c(image_uuid)                    # the 16 bytes, started from 0
    crc = crc32c(sector with its crc field 0, crc)

which is the CRC-32C of the 528 bytes uuid + sector. The compiled engine has its own
implementation; the tests compare the two, and it takes over where there are very many sums.
"""

from collections.abc import Callable

_POLYNOMIAL = 0x82F63B78  # reflected 0x1EDC6F41


def _table() -> tuple[int, ...]:
    entries = []
    for index in range(256):
        value = index
        for _ in range(8):
            value = (value >> 1) ^ _POLYNOMIAL if value & 1 else value >> 1
        entries.append(value)
    return tuple(entries)


_TABLE = _table()


def crc32c(data: bytes | bytearray | memoryview, value: int = 0) -> int:
    """Return the CRC-32C of `data`, continuing from the sum `value` of what came before."""
    table = _TABLE
    register = value ^ 0xFFFFFFFF
    for byte in bytes(data):
        register = table[(register ^ byte) & 0xFF] ^ (register >> 8)
    return register ^ 0xFFFFFFFF


def sector_crc(image_uuid: bytes, sector: bytes, crc_offset: int) -> int:
    """Return the sum of a journal `sector` whose own u32 sum stands at `crc_offset`."""
    blanked = sector[:crc_offset] + bytes(4) + sector[crc_offset + 4 :]
    return crc32c(blanked, crc32c(image_uuid))


class SectorSums:
    """sector_crc for the sectors of one journal, which may have two million of them.

    From `PATIENCE` sectors on the compiled engine computes the sums, where it is installed.
    """

    PATIENCE = 2000  # about a tenth of a second

    def __init__(self, image_uuid: bytes, crc_offset: int) -> None:
        self._start = crc32c(image_uuid)
        self._crc_offset = crc_offset
        self._count = 0
        self._function: Callable[[bytes, int], int] = crc32c

    def __call__(self, sector: bytes) -> int:
        self._count += 1
        if self._count == self.PATIENCE:
            self._function = _native() or crc32c
        at = self._crc_offset
        return self._function(sector[:at] + bytes(4) + sector[at + 4 :], self._start)


def _native() -> Callable[[bytes, int], int] | None:
    try:
        from fvdcore import crc32c as native
    except ImportError:
        return None
    return native

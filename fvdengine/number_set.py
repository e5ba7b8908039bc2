# SPDX-License-Identifier: Apache-2.0
"""A set of numbers below 2^31, a bit each, with memory only where there are any.

A hostile chunk table or journal names very many places, or a few that lie very far apart.
"""

_BYTES = 512
_NUMBERS = 8 * _BYTES


class NumberSet:
    """What has been seen, for chunks and places."""

    def __init__(self) -> None:
        self._parts: dict[int, bytearray] = {}

    def __bool__(self) -> bool:
        return bool(self._parts)

    def __contains__(self, number: int) -> bool:
        part = self._parts.get(number // _NUMBERS)
        at = number % _NUMBERS
        return part is not None and bool(part[at >> 3] & 1 << (at & 7))

    def take(self, number: int) -> bool:
        """Enter `number`; return whether it was there before."""
        part = self._parts.get(number // _NUMBERS)
        if part is None:
            part = self._parts[number // _NUMBERS] = bytearray(_BYTES)
        at = number % _NUMBERS
        byte, bit = at >> 3, 1 << (at & 7)
        if part[byte] & bit:
            return True
        part[byte] |= bit
        return False

# SPDX-License-Identifier: Apache-2.0
"""Units of size: the constants of the format, reading sizes from text, and printing them.

A size without a unit is in bytes. Suffixes are powers of 1024, everywhere.
"""

import re
from fractions import Fraction

from fvdengine.errors import InvalidSize

SECTOR = 512
PAGE = 4096
KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

_SUFFIXES = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB, "p": 1 << 50, "e": 1 << 60}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtpe]?)(?:i?b)?", re.IGNORECASE | re.ASCII)
_SIZE_MAX = (1 << 63) - 1


def parse_size(text: str) -> int:
    """Return the bytes that `text` means, such as 4096, 64k, 1.5G or 20GiB."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidSize(text=repr(text), reason="it is not a number with a known suffix")
    value = Fraction(match[1]) * _SUFFIXES[match[2].lower()]
    if value.denominator != 1:
        raise InvalidSize(text=repr(text), reason="it is not a whole number of bytes")
    if value > _SIZE_MAX:
        raise InvalidSize(text=repr(text), reason="it is larger than 8E less one byte")
    return int(value)


def format_size(size: int) -> str:
    """Return `size` for people: exact where a suffix divides it, else with two decimals."""
    if size < 0:
        return "-" + format_size(-size)
    for suffix, factor in (("E", 1 << 60), ("P", 1 << 50), ("T", TIB), ("G", GIB), ("M", MIB),
                           ("k", KIB)):
        if size >= factor:
            if size % factor == 0:
                return f"{size // factor}{suffix}"
            return f"{size / factor:.2f}{suffix}"
    return f"{size}"


def round_up(value: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


def divide_up(value: int, unit: int) -> int:
    """Return how many `unit`s are needed to hold `value`."""
    return -(-value // unit)

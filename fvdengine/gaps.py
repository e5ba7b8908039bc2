# SPDX-License-Identifier: Apache-2.0
"""Find what a journal has lost after it was durable.

A sector with a wrong sum is what a crash leaves of the commit in flight, and ignored. But a commit
begins on a fresh page, and only after the one before it was flushed: so what is missing in
front of a later commit, by the sequence numbers, was damaged later. Guards I6 from outside.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from fvdengine.records import LiveSectors
from fvdengine.units import PAGE, SECTOR

_SECTORS = PAGE // SECTOR


@dataclass(frozen=True, slots=True)
class Gap:
    """`count` sectors are missing, the first of them at this position or later."""

    count: int
    first: int


@dataclass(slots=True)
class _Page:
    """A page of the ring: the sequence of its first sector, those of its sectors that are live."""

    number: int
    base: int
    live: int = 0


def find_gaps(live: LiveSectors, journal_size: int) -> list[Gap]:
    """Return what is surely damage in a journal of `journal_size` bytes, in the order of replay.

    What may as well be the torn end of the last commit is left out.
    """
    ring = journal_size // PAGE
    found: list[Gap] = []
    pending: list[Gap] = []
    for page, following in pairwise(_pages(live)):
        used = following.base - page.base
        between = (following.number - page.number) % ring - 1
        if used <= 0 or between < 0:
            return []  # no writer of ours made that
        ended = used < _SECTORS * (between + 1)
        if ended:  # a commit ended here or later, so all before this page was flushed
            found += pending
            pending = []
        missing = used - page.live.bit_count()
        if missing:
            lowest = (~page.live & page.live + 1).bit_length() - 1
            gap = Gap(missing, page.number * _SECTORS + lowest)
            # None of the pages between them was full: commits ended in each.
            is_lost = ended and used - page.live.bit_length() < _SECTORS
            (found if is_lost else pending).append(gap)
    return found


def _pages(live: LiveSectors) -> Iterator[_Page]:
    current: _Page | None = None
    for sequence, position in live.places():
        number, index = divmod(position, _SECTORS)
        base = sequence - index
        if current is None or (current.number, current.base) != (number, base):
            if current is not None:
                yield current
            current = _Page(number, base)
        current.live |= 1 << index
    if current is not None:
        yield current


def gap_text(gap: Gap) -> str:
    """Say what it means."""
    sectors = "a journal sector is" if gap.count == 1 else f"{gap.count} journal sectors are"
    return (
        f"{sectors} damaged at {gap.first} or behind, though later commits are whole: "
        "a change that stood there alone is lost"
    )

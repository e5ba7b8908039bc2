# SPDX-License-Identifier: Apache-2.0
"""Boot profiles: in which order a base was first read, so that prefetch can follow that order.

A profile is text. The first line is `fvd-profile 1`, each other one is OFFSET LENGTH in decimal
bytes of the disk, in the order of the first reads; lines that begin with # mean nothing. It says
nothing about content: one that is stale, or was made over another base, only lets prefetch begin
elsewhere. Recordings of several runs are merged by how early they came to a place. A profile for
all clones of a base lies beside it and has its name with `.profile` behind it.
"""

import os
import stat
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

from fvdengine.errors import UnusableProfile

MAGIC = "fvd-profile 1"
SUFFIX = ".profile"
ENTRIES_MAX = 65536
BYTES_MAX = 4 << 20
GRAIN = 4096
PLACE_MAX = 1 << 62  # what the engine follows; a longer number could not be read again

Extent = tuple[int, int]


def parse_profile(text: str, path: str) -> list[Extent]:
    """Return (offset, length) of each line; raise UnusableProfile, which names the wrong one."""
    lines = text.split("\n")
    if lines[0].rstrip() != MAGIC:
        raise UnusableProfile(path=path, reason=f"its first line is not '{MAGIC}'")
    found = []
    for number, line in enumerate(lines[1:], 2):
        words = line.split()
        if not words or line.startswith("#"):
            continue
        is_number = [word.isascii() and word.isdigit() and len(word) < 20 for word in words]
        if len(words) != 2 or not all(is_number) or not int(words[1]):
            raise UnusableProfile(path=path, reason=f"line {number} is not OFFSET LENGTH")
        found.append((int(words[0]), int(words[1])))
        if len(found) > ENTRIES_MAX:
            raise UnusableProfile(path=path, reason=f"it has more than {ENTRIES_MAX} lines")
    return found


def read_profile(path: str | os.PathLike[str]) -> list[Extent]:
    """Read a profile; raise UnusableProfile."""
    name = os.fspath(path)
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UnusableProfile(path=name, reason=error.strerror or str(error)) from error
    try:
        return read_open_profile(fd, name)
    finally:
        os.close(fd)


def read_beside(base: str | os.PathLike[str]) -> list[Extent]:
    """Read the profile that lies beside a base; nothing where there is none. UnusableProfile."""
    name = os.fspath(base) + SUFFIX
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UnusableProfile(path=name, reason=error.strerror or str(error)) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UnusableProfile(path=name, reason="it is not a regular file")
        return read_open_profile(fd, name)
    finally:
        os.close(fd)


def read_open_profile(fd: int, path: str) -> list[Extent]:
    """The same of an open file; one that is empty holds nothing. What a crash left of the last
    line, where no newline follows, is passed over."""
    try:
        data = os.pread(fd, BYTES_MAX + 1, 0)
    except OSError as error:
        raise UnusableProfile(path=path, reason=error.strerror or str(error)) from error
    if len(data) > BYTES_MAX:
        raise UnusableProfile(path=path, reason=f"it is longer than {BYTES_MAX} bytes")
    if not data:
        return []
    whole, _, last = data.rstrip(b"\0").decode("latin-1").rpartition("\n")
    try:
        return parse_profile(f"{whole}\n{last}" if whole else last, path)
    except UnusableProfile:
        if not whole:
            raise
        return parse_profile(whole, path)


def format_profile(extents: Iterable[Extent]) -> str:
    """The text of a profile."""
    return "".join([f"{MAGIC}\n", *(f"{offset} {length}\n" for offset, length in extents)])


def write_open_profile(fd: int, extents: Sequence[Extent]) -> None:
    """Put a profile in the place of what an open file holds."""
    data = format_profile(extents[:ENTRIES_MAX]).encode()
    os.ftruncate(fd, 0)
    os.pwrite(fd, data, 0)


def append_open_profile(fd: int, extents: Sequence[Extent]) -> None:
    """Add lines to an open file, which a profile becomes where it is empty."""
    end = os.fstat(fd).st_size
    lines = format_profile(extents) if end == 0 else format_profile(extents)[len(MAGIC) :]
    os.pwrite(fd, lines.encode(), end)


def merge_profiles(recordings: Sequence[Sequence[Extent]]) -> list[Extent]:
    """One order of all places, each once: what came early in any recording comes early. Places are
    told apart by pages of 4096 bytes; those beyond any disk are left out."""
    ranked = sorted(
        (rank, which, extent)
        for which, extents in enumerate(recordings)
        for rank, extent in enumerate(extents)
    )
    seen = _Seen()
    merged: list[list[int]] = []
    for _, _, (offset, length) in ranked:
        end = min(offset + length, PLACE_MAX)
        for first, last in seen.add(offset // GRAIN, (end + GRAIN - 1) // GRAIN):
            if merged and sum(merged[-1]) == first * GRAIN:
                merged[-1][1] += (last - first) * GRAIN
            else:
                merged.append([first * GRAIN, (last - first) * GRAIN])
    return [(offset, length) for offset, length in merged][:ENTRIES_MAX]


class _Seen:
    """Runs of pages, in order and apart: a run may be as long as a disk."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._ends: list[int] = []

    def add(self, first: int, end: int) -> list[tuple[int, int]]:
        """Add [first, end), and return the parts of it that are new."""
        if first >= end:
            return []
        # The runs that it meets or touches become one.
        low, high = bisect_left(self._ends, first), bisect_right(self._firsts, end)
        new, at = [], first
        for known, known_end in zip(self._firsts[low:high], self._ends[low:high], strict=True):
            if at < known:
                new.append((at, known))
            at = max(at, known_end)
        if at < end:
            new.append((at, end))
        begin = min([first, *self._firsts[low : min(low + 1, high)]])
        stop = max([end, *self._ends[max(low, high - 1) : high]])
        self._firsts[low:high], self._ends[low:high] = [begin], [stop]
        return new

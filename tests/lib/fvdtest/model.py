# SPDX-License-Identifier: Apache-2.0
"""What a device must contain: every byte, flat in memory, and how to make bases full of traps."""

from __future__ import annotations

import random
from pathlib import Path

KIB = 1024
MIB = 1024 * KIB


class FlatModel:
    """The content of a device as a plain array of bytes."""

    def __init__(self, size: int, content: bytes = b"") -> None:
        self.data = bytearray(size)
        self.data[: len(content)] = content[:size]

    @property
    def size(self) -> int:
        """Bytes of the device."""
        return len(self.data)

    def write(self, offset: int, data: bytes) -> None:
        """Note a write."""
        assert offset + len(data) <= self.size
        self.data[offset : offset + len(data)] = data

    def read(self, offset: int, length: int) -> bytes:
        """Tell what must be there."""
        return bytes(self.data[offset : offset + length])

    def save(self, path: Path) -> Path:
        """Write the content as a raw file, for programs that compare files."""
        path.write_bytes(self.data)
        return path

    def difference(self, other: bytes, start: int = 0) -> str | None:
        """Say where other bytes, which begin at start, differ; None when they are the same."""
        expected = self.data[start : start + len(other)]
        if expected == other:
            return None
        wrong = [at for at in range(len(expected)) if expected[at : at + 1] != other[at : at + 1]]
        if not wrong:
            return f"{len(other)} bytes where only {len(expected)} can be"
        first = wrong[0]
        return (
            f"{len(wrong)} bytes differ, the first at {start + first}: expected "
            f"{bytes(expected[first : first + 16]).hex()}, "
            f"found {bytes(other[first : first + 16]).hex()}"
        )


def base_content(rng: random.Random, size: int) -> bytes:
    """Random bytes, nowhere zero by chance, with runs of zeros that blocks only partly share."""
    content = bytearray()
    while len(content) < size:
        content += rng.randbytes(min(4 * MIB, size - len(content))).replace(b"\0", b"\x5a")
    for _ in range(max(1, size // (256 * KIB))):
        length = min(size, rng.choice([512, 4096, 12 * KIB, 64 * KIB, 100_000]))
        offset = rng.randrange(size - length + 1) // 512 * 512
        content[offset : offset + length] = bytes(length)
    return bytes(content)


def random_range(rng: random.Random, size: int, length_max: int) -> tuple[int, int]:
    """A range inside the device: odd or aligned, small or large, often at an edge."""
    length = rng.choice([1, 511, 512, 513, 4095, 4096, 4097, 8192, rng.randint(1, length_max)])
    length = min(length, size, length_max)
    offset = rng.randint(0, size - length)
    alignment = rng.choice([1, 512, 4096, 65536])
    offset -= offset % alignment
    if rng.random() < 0.05:
        offset = size - length
    return offset, length

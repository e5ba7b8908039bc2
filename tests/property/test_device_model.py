# SPDX-License-Identifier: Apache-2.0
"""The engine against a plain byte array: random geometry, random operations, reopen, death, power.

A device must hold what was written to it, whatever the block size, whatever the length of the base,
however requests straddle its blocks and its end, across clean reopens, across the death of the
process with live state (I7) and without (I6: what was flushed). After each flush the image file
alone, read by the Python codec, must say the same (independent of the engine).
"""

import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fvdengine.geometry import Wanted
from fvdtest.images import Opened, content_on_disk, make_image, open_image, shape_image

SECTOR = 512
DISK_MAX = 192 * 1024

spans = st.tuples(st.integers(0, DISK_MAX), st.one_of(
    st.sampled_from([1, 511, 512, 4095, 4096, 4097, 8192]), st.integers(1, 70_000)))


class DeviceMachine(RuleBasedStateMachine):
    """One image, one model; every rule is what a guest or a misfortune may do."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="fvd-model-"))
        self.image = self.directory / "clone.fvd"
        self.opened: Opened | None = None
        self.model = bytearray()

    @initialize(
        sectors=st.integers(1, DISK_MAX // SECTOR),
        base_bytes=st.one_of(st.just(0), st.integers(1, DISK_MAX + 9000)),
        depth=st.sampled_from([1, 1, 1, 2, 5]),
        block=st.sampled_from([4096, 8192, 16384, 65536]),
        chunk_blocks=st.sampled_from([0, 0, 1, 2, 3, 16]),
        journal=st.sampled_from([0, 4096, 8192, 65536]),
        data_file=st.sampled_from([False, False, True]),
        is_tight=st.booleans(),
        copy_on_read=st.booleans(),
        seed=st.integers(0, 2**32),
        holes=st.booleans(),
    )
    def make(
        self,
        sectors: int,
        base_bytes: int,
        depth: int,
        block: int,
        chunk_blocks: int,
        journal: int,
        data_file: bool,
        is_tight: bool,
        copy_on_read: bool,
        seed: int,
        holes: bool,
    ) -> None:
        noise = random.Random(seed)
        base = bytearray(noise.randbytes(base_bytes))
        if holes:
            for begin in range(0, base_bytes, 3 * 8192):
                base[begin : begin + 8192] = bytes(len(base[begin : begin + 8192]))
        size = sectors * SECTOR
        below, form = None, "raw"
        if base_bytes:
            below = self.directory / "base.raw"
            below.write_bytes(base)
        for level in range(1, depth if base_bytes else 1):
            below = make_image(
                self.directory / f"{level}.fvd", base=str(below), base_format=form,
                block_size=4096 << level % 3,
            )  # fmt: skip
            form = "fvd"
            base = base.ljust(-(-len(base) // SECTOR) * SECTOR, b"\0")
            opened = open_image(below, crew_threads=1)
            patch = noise.randbytes(min(3000, len(base)))
            opened.device.write(len(base) - len(patch), patch)
            base[len(base) - len(patch) :] = patch
            opened.close()
        wanted = Wanted(
            size, block_size=block, journal_size=journal, is_compact=chunk_blocks > 0,
            chunk_size=chunk_blocks * block or None, has_data_file=data_file,
        )  # fmt: skip
        shape_image(
            self.image, below, form, wanted, "data.raw" if data_file else "", is_tight,
            copy_on_read=copy_on_read,
        )  # fmt: skip
        self.noise = noise
        self.model = bytearray(base[:size].ljust(size, b"\0"))
        self.since_flush = [bytes(self.model)]
        self.live: Path | None = None
        self.open()

    def open(self, takeover: bool = False) -> None:
        self.opened = open_image(
            self.image, live_dir=self.live, takeover=takeover, crew_threads=2
        )

    @property
    def device(self):  # type: ignore[no-untyped-def]
        assert self.opened is not None
        return self.opened.device

    def clip(self, span: tuple[int, int]) -> tuple[int, int]:
        offset = span[0] % len(self.model)
        return offset, min(span[1], len(self.model) - offset)

    @rule(span=spans, fua=st.booleans())
    def write(self, span: tuple[int, int], fua: bool) -> None:
        offset, length = self.clip(span)
        data = self.noise.randbytes(length)
        self.device.write(offset, data, fua=fua)
        self.model[offset : offset + length] = data
        self.since_flush.append(bytes(self.model))

    @rule(span=spans, no_hole=st.booleans(), fua=st.booleans())
    def write_zeroes(self, span: tuple[int, int], no_hole: bool, fua: bool) -> None:
        offset, length = self.clip(span)
        self.device.write_zeroes(offset, length, no_hole=no_hole, fua=fua)
        self.model[offset : offset + length] = bytes(length)
        self.since_flush.append(bytes(self.model))

    @rule(span=spans)
    def trim(self, span: tuple[int, int]) -> None:
        """Trimmed content is undefined, but a trim must touch nothing outside its range, and each
        sector inside is either as it was or zeros."""
        offset, length = self.clip(span)
        self.device.trim(offset, length)
        seen = self.device.read(offset, length)
        old = self.model[offset : offset + length]
        for at in range(0, length, SECTOR):
            piece = seen[at : at + SECTOR]
            # A changed byte has become zero: a trim may end within a sector.
            assert all(
                new in (was, 0) for new, was in zip(piece, old[at : at + SECTOR], strict=True)
            )
        self.model[offset : offset + length] = seen
        self.since_flush.append(bytes(self.model))

    @rule(span=spans)
    def read(self, span: tuple[int, int]) -> None:
        offset, length = self.clip(span)
        assert self.device.read(offset, length) == self.model[offset : offset + length]

    @rule()
    def flush(self) -> None:
        self.device.flush()
        self.since_flush = [bytes(self.model)]
        assert content_on_disk(self.image) == self.model

    @rule(sectors=st.one_of(st.integers(1, 300), st.sampled_from([8, 32, 128, 8192])))
    def grow(self, sectors: int) -> None:
        """What is new reads zeros; a table of 4096-byte chunks grows into the data area."""
        if len(self.model) > 32 * DISK_MAX:
            return
        new = bytes(sectors * SECTOR)
        self.device.resize(len(self.model) + len(new))
        self.model += new
        self.since_flush = [was + new for was in self.since_flush]

    @rule()
    def prefetch(self) -> None:
        self.device.prefetch_start()

    @rule()
    def pause(self) -> None:
        self.device.prefetch_pause()

    @rule(live=st.booleans())
    def reopen(self, live: bool) -> None:
        assert self.opened is not None
        self.opened.close()
        assert content_on_disk(self.image) == self.model
        self.live = self.directory / "live" if live else None
        self.open()

    @precondition(lambda self: self.live is not None)
    @rule()
    def die_and_take_over(self) -> None:
        """I7: nothing acknowledged is lost, flushed or not."""
        assert self.opened is not None
        self.opened.abandon()
        self.open(takeover=True)
        assert self.device.read(0, len(self.model)) == self.model

    @precondition(lambda self: self.live is None)
    @rule()
    def die_without_live_state(self) -> None:
        """I6, as far as a process death can show it: each sector is as flushed, or as anything that
        was written since (the page cache survives; what was not committed falls back)."""
        assert self.opened is not None
        self.opened.abandon()
        self.open()
        seen = self.device.read(0, len(self.model))
        for at in range(0, len(seen), SECTOR):
            now = seen[at : at + SECTOR]
            assert any(now == was[at : at + SECTOR] for was in self.since_flush), at
        self.model = bytearray(seen)
        self.since_flush = [bytes(seen)]

    @invariant()
    def block_status_covers_the_disk(self) -> None:
        if self.opened is not None:
            extents = self.device.block_status(0, len(self.model))
            assert sum(length for length, _ in extents) == len(self.model)

    def teardown(self) -> None:
        if self.opened is not None:
            self.opened.close()
            assert content_on_disk(self.image) == self.model
        shutil.rmtree(self.directory)


class TestDevice(DeviceMachine.TestCase):
    settings = settings(stateful_step_count=40, max_examples=40)


@pytest.mark.proof
@pytest.mark.timeout(600)
class TestDeviceForLonger(DeviceMachine.TestCase):
    settings = settings(stateful_step_count=80, max_examples=200)

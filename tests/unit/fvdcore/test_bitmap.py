# SPDX-License-Identifier: Apache-2.0
"""Block state in memory against a Python model: searches, bits, marks, counts, borders."""

import errno

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

PAGE_BITS = 32768
SIZES = (1, 2, 63, 64, 65, 127, 128, 129, 4095, 4096, 4097, PAGE_BITS - 1, PAGE_BITS,
         PAGE_BITS + 1, 2 * PAGE_BITS + 65)  # fmt: skip
points = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0]))
lengths = st.integers(0, 300)
nudges = st.sampled_from([None, -1, 0, 1, 63])


@pytest.fixture(scope="module", autouse=True)
def probe_for_the_machine(probes):
    BitmapMachine.module = probes.bitmap


def bytes_for(blocks):
    return -(-blocks // PAGE_BITS) * 4096


def mask(first, end):
    return (1 << end) - (1 << first)


def only(*bits):
    return sum(1 << bit for bit in bits)


def fold(bits, unit):
    """One bit for each unit of bits that are not all 0."""
    found, at = 0, 0
    while bits >> at:
        piece = bits >> at & mask(0, unit)
        found |= bool(piece) << at // unit
        at += unit
    return found


def lowest(bits, first, end):
    """The first set bit of [first, end), or end."""
    inside = bits & mask(first, end)
    return (inside & -inside).bit_length() - 1 if inside else end


class BitmapMachine(RuleBasedStateMachine):
    """bitmap_t and integers as bit sets; ranges like to begin and end near borders of words."""

    module = None

    @initialize(blocks=st.sampled_from(SIZES))
    def make(self, blocks):
        self.blocks = blocks
        self.real = self.module.Bitmap(blocks, bytes_for(blocks))
        self.present = self.durable = self.words = 0
        self.pending = self.copied = 0

    def span(self, first, length, nudge):
        first = min(int(first * self.blocks), self.blocks - 1)
        if nudge is not None:
            first = max(0, min(self.blocks - 1, first // 64 * 64 + nudge))
        return first, min(self.blocks, first + 1 + length)

    @rule(at=points, length=lengths, nudge=nudges, copied=st.booleans())
    def set_present(self, at, length, nudge, copied):
        first, end = self.span(at, length, nudge)
        fresh = mask(first, end) & ~self.present
        assert self.real.set_present(first, end, copied) == fresh.bit_count()
        self.present |= fresh
        self.pending += fresh.bit_count()
        self.copied += fresh.bit_count() if copied else 0
        self.words |= fold(fresh, 64)

    @rule(at=points, length=lengths, nudge=nudges)
    def set_durable(self, at, length, nudge):
        first, end = self.span(at, length, nudge)
        self.real.set_durable(first, end)
        self.durable |= mask(first, end)

    @rule(at=points, length=st.one_of(lengths, st.integers(0, 70_000)), nudge=nudges)
    def search(self, at, length, nudge):
        first, end = self.span(at, length, nudge)
        clear = lowest(~self.present, first, end)
        assert self.real.next_clear(first, end) == clear
        if first < end:
            assert self.real.run_end(first, end) == lowest(self.present, first + 1, end)
        assert self.real.all_present(first, end) == (clear == end)
        assert self.real.test(first) == bool(self.present >> first & 1)

    @rule(at=points)
    def search_nothing(self, at):
        first = int(at * self.blocks)
        assert self.real.next_clear(first, first) == first

    @rule()
    def recount(self):
        self.real.recount()

    @invariant()
    def arrays_and_marks_are_as_modelled(self):
        assert self.real.present() == self.present
        assert self.real.durable() == self.durable
        assert self.real.marks() == (self.words, fold(self.words, 64), fold(self.words, 512))
        assert self.real.counts() == (self.present.bit_count(), self.pending, self.copied)


BitmapMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=20)
TestBitmap = BitmapMachine.TestCase


@pytest.mark.parametrize("block", [0, 62, 63, 64, 127, 4095])
def test_a_run_is_never_empty_though_its_first_block_is_set_meanwhile(probes, block):
    """Somebody saw the block clear; a writer then set it, before the end of the run was sought."""
    real = probes.bitmap.Bitmap(4096, 4096)
    assert real.next_clear(block, 4096) == block
    real.set_present(block, block + 1, False)
    assert real.run_end(block, 4096) == 4096
    assert real.run_end(block, block + 1) == block + 1


def as_bytes(bits, blocks):
    raw = bytearray(bytes_for(blocks))
    for bit in bits:
        raw[bit // 8] |= 1 << bit % 8
    return bytes(raw)


@pytest.mark.parametrize("blocks", [65, 4097, PAGE_BITS + 1])
def test_a_takeover_notes_what_is_present_and_not_durable(probes, blocks):
    present = {0, 63, 64, blocks - 1}
    real = probes.bitmap.Bitmap(blocks, bytes_for(blocks))
    real.load(as_bytes(present, blocks), as_bytes({0}, blocks))
    assert real.note_difference() == 0
    real.recount()
    left = present - {0}
    words, groups, pages = real.marks()
    assert words == only(*{block // 64 for block in left})
    assert groups == only(*{block // 4096 for block in left})
    assert pages == only(*{block // PAGE_BITS for block in left})
    assert real.counts() == (len(present), len(left), 0)


def test_a_takeover_refuses_a_disk_ahead_of_the_live_state(probes):
    real = probes.bitmap.Bitmap(100, 4096)
    real.load(as_bytes({1, 2}, 100), as_bytes({1, 3}, 100))
    assert real.note_difference() == -errno.EUCLEAN


@pytest.mark.parametrize("blocks", [1, 63, 64, 65, PAGE_BITS - 1])
def test_bits_behind_the_last_block_are_cleared(probes, blocks):
    """An image may carry anything in the padding of its bitmap."""
    real = probes.bitmap.Bitmap(blocks, bytes_for(blocks))
    full = b"\xff" * bytes_for(blocks)
    real.load(full, full)
    real.clear_padding()
    real.recount()
    assert real.present() == real.durable() == mask(0, blocks)
    assert real.counts()[0] == blocks

# SPDX-License-Identifier: Apache-2.0
"""The stats page: names against slots, histogram buckets, going on in a file, foreign pages."""

import errno
import os
import struct

import pytest

from fvdengine.stats import read_stats


@pytest.fixture
def page_file(probes, tmp_path):
    path = tmp_path / "stats"
    path.write_bytes(bytes(probes.plain.page_shape()[3]))
    return path


@pytest.fixture
def mapped(probes, page_file):
    """Map the page anew: mapped() as often as wanted; freed at the end."""
    pages = []

    def make():
        fd = os.open(page_file, os.O_RDWR)
        try:
            pages.append(probes.plain.Page(fd))
        finally:
            os.close(fd)
        return pages[-1]

    yield make
    for page in pages:
        page.free()


def everything(stats):
    return stats.counters | stats.gauges | stats.histograms | stats.times


def test_each_slot_has_the_name_that_the_page_says(probes, page_file, mapped):
    """Every slot gets a number of its own; a reader finds it under the slot's name."""
    page, slots = mapped(), probes.plain.slots()
    for slot in slots.values():
        page.count(0, slot, slot + 1000)
    stats = read_stats(page_file)
    assert set(everything(stats)) == set(slots)
    for name, slot in slots.items():
        value = everything(stats)[name]
        seen = value.buckets[0] if name in stats.histograms else value
        assert seen == slot + 1000, name


def test_slots_follow_without_gap_or_overlap(probes):
    total, _, buckets, _ = probes.plain.page_shape()
    slots = probes.plain.slots()
    taken = []
    for name, slot in slots.items():
        taken += range(slot, slot + (buckets + 1 if "duration" in name else 1))
    assert sorted(taken) == list(range(total))


def test_a_counter_is_the_sum_of_all_blocks_and_a_gauge_is_block_0(probes, page_file, mapped):
    page, slots = mapped(), probes.plain.slots()
    _, blocks, _, _ = probes.plain.page_shape()
    for block in range(blocks):
        page.count(block, slots["cor_bytes"], block)
    page.gauge_set(slots["pending_blocks"], 5)
    page.gauge_add(slots["pending_blocks"], -12)
    stats = read_stats(page_file)
    assert stats.counters["cor_bytes"] == blocks * (blocks - 1) // 2
    assert page.sum(slots["cor_bytes"]) == stats.counters["cor_bytes"]
    assert stats.gauges["pending_blocks"] == -7


@pytest.mark.parametrize(
    ("ns", "bucket"),
    [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (1023, 9), (1024, 10), (1025, 10),
     (2**47, 47), (2**48 - 1, 47), (2**48, 47), (2**63, 47)],
)  # fmt: skip
def test_a_duration_is_counted_in_its_bucket(probes, page_file, mapped, ns, bucket):
    page, slots = mapped(), probes.plain.slots()
    page.observe(3, slots["commit_duration"], ns)
    found = read_stats(page_file).histograms["commit_duration"]
    assert [k for k, n in enumerate(found.buckets) if n] == [bucket]
    assert (found.count, found.sum_ns) == (1, ns)


def test_of_times_the_oldest_or_the_newest_is_told(probes, page_file, mapped):
    page, slots = mapped(), probes.plain.slots()
    assert read_stats(page_file).times == {}
    for block, ns in ((2, 70), (5, 30), (9, 50)):
        page.count(block, slots["busy_since"], ns)
        page.count(block, slots["base_ok"], ns)
    assert read_stats(page_file).times == {"busy_since": 30, "base_ok": 70}


def test_a_new_mapping_knows_of_no_request_of_a_dead_process(probes, page_file, mapped):
    page, slots = mapped(), probes.plain.slots()
    for name in ("busy_since", "prefetch_paused_since", "base_ok"):
        page.count(4, slots[name], 1000)
    mapped()
    assert read_stats(page_file).times == {"base_ok": 1000}


def test_counts_go_on_after_a_new_mapping(probes, page_file, mapped):
    slots = probes.plain.slots()
    mapped().count(1, slots["io_requests_read"], 40)
    mapped().count(2, slots["io_requests_read"], 2)
    assert read_stats(page_file).counters["io_requests_read"] == 42


@pytest.mark.parametrize(
    ("offset", "width", "what"),
    [(0, "B", "magic"), (12, "I", "slots"), (16, "I", "blocks"),
     (32, "Q", "stride")],
    ids=lambda value: value if isinstance(value, str) and len(value) > 2 else "",
)  # fmt: skip
def test_a_page_of_another_version_starts_at_zero(probes, page_file, mapped, offset, width, what):
    """Its counters would be summed under wrong names."""
    slots = probes.plain.slots()
    mapped().count(1, slots["io_requests_read"], 40)
    page = bytearray(page_file.read_bytes())
    value = struct.unpack_from("<" + width, page, offset)[0] ^ 0x55
    with page_file.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack("<" + width, value))
    mapped()
    stats = read_stats(page_file)
    assert stats.counters["io_requests_read"] == 0, what


def test_a_file_too_short_is_refused_and_untouched(probes, tmp_path):
    path = tmp_path / "short"
    path.write_bytes(b"x" * (probes.plain.page_shape()[3] - 1))
    fd = os.open(path, os.O_RDWR)
    try:
        with pytest.raises(OSError, match="counters_init") as caught:
            probes.plain.Page(fd)
    finally:
        os.close(fd)
    assert caught.value.errno == errno.EINVAL
    assert set(path.read_bytes()) == {ord("x")}


def test_private_memory_begins_at_zero(probes):
    page = probes.plain.Page(-1)
    assert all(page.sum(slot) == 0 for slot in probes.plain.slots().values())
    page.free()

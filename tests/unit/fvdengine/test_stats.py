# SPDX-License-Identifier: Apache-2.0
"""The statistics page: sums over blocks, signed gauges, histograms; damaged pages are refused."""

import os
import struct

import pytest

from fvdengine.errors import ImageNotFound, InvalidStats
from fvdengine.stats import read_stats

SLOTS = 54  # counter, gauge, 49 of a histogram, one of a kind to come, two times
ENTRIES = [(b"requests", 0, 0, 1), (b"inflight", 1, 1, 1), (b"duration", 2, 2, 49),
           (b"later", 9, 51, 1), (b"since", 3, 52, 1), (b"last", 4, 53, 1)]  # fmt: skip


def page(blocks, /, **header):
    entries = header.pop("entries", ENTRIES)
    count = entries if isinstance(entries, int) else len(entries)
    entries = ENTRIES if isinstance(entries, int) else entries
    fields = {
        "magic": b"FVDSTAT1", "version": 1, "slots": SLOTS, "blocks": len(blocks),
        "entries": count, "offset": 8192, "stride": 512, **header,
    }  # fmt: skip
    data = bytearray(8192 + 512 * len(blocks))
    struct.pack_into("<8s4I2Q", data, 0, *fields.values())
    for index, entry in enumerate(entries):
        struct.pack_into("<52s3I", data, 4096 + 64 * index, *entry)
    for index, slots in enumerate(blocks):
        struct.pack_into(f"<{len(slots)}Q", data, 8192 + 512 * index, *slots)
    return bytes(data)


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "stats"
    first = [5, (1 << 64) - 3, *range(48), 1000, 0, 0, 6]
    second = [7, 99, *([1] * 48), 500, 0, 8, 5]
    path.write_bytes(page([first, second]))
    return path


def test_values_are_summed_by_kind(good):
    found = read_stats(good)
    assert found.counters == {"requests": 12}
    assert found.gauges == {"inflight": -3}
    histogram = found.histograms["duration"]
    assert histogram.buckets == tuple(range(1, 49))
    assert histogram.sum_ns == 1500
    assert histogram.count == sum(histogram.buckets)
    assert found.times == {"since": 8, "last": 6}


def test_a_time_that_never_was_is_not_told(tmp_path):
    path = tmp_path / "stats"
    path.write_bytes(page([[0] * SLOTS, [0] * SLOTS]))
    assert read_stats(path).times == {}


@pytest.mark.parametrize("top", [0, 255, 1 << 57, (1 << 64) - 1])
def test_sums_are_exact_whatever_stands_in_the_slots_beside(tmp_path, top):
    """Blocks are added as one long number where that cannot run over."""
    path = tmp_path / "stats"
    blocks = [[number % 7, top, *range(49), 0, 0, 0] for number in range(300)]
    path.write_bytes(page(blocks[:200]))
    assert read_stats(path).counters["requests"] == sum(b[0] for b in blocks[:200])
    path.write_bytes(page(blocks))
    found = read_stats(path)
    assert found.counters["requests"] == sum(b[0] for b in blocks)
    assert found.histograms["duration"].buckets == tuple(n * 300 for n in range(48))


def test_counters_wrap_as_the_engine_does(tmp_path):
    path = tmp_path / "stats"
    path.write_bytes(page([[(1 << 64) - 1] * SLOTS, [2] * SLOTS]))
    found = read_stats(path)
    assert found.counters["requests"] == found.histograms["duration"].sum_ns == 1


def test_descriptor_is_read_without_moving_it(good):
    fd = os.open(good, os.O_RDONLY)
    try:
        assert read_stats(fd) == read_stats(str(good))
        assert os.lseek(fd, 0, os.SEEK_CUR) == 0
    finally:
        os.close(fd)


def test_missing_page_is_said_so(tmp_path):
    with pytest.raises(ImageNotFound):
        read_stats(tmp_path / "none")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"FVDSTAT1",
        page([[0] * SLOTS], magic=b"FVDSTAT2"),
        page([[0] * SLOTS], version=2),
        page([[0] * SLOTS], blocks=0),
        page([[0] * SLOTS], blocks=3),
        page([[0] * SLOTS], slots=65),
        page([[0] * SLOTS], entries=1 << 31),
        page([[0] * SLOTS], offset=4096),
        page([[0] * SLOTS], offset=1 << 63),
        page([[0] * SLOTS], stride=8),
        page([[0] * SLOTS], entries=[(b"x", 0, SLOTS, 1)]),
        page([[0] * SLOTS], entries=[(b"x", 2, 0, 0)]),
    ],
    ids=["empty", "short", "magic", "version", "no blocks", "many blocks", "many slots",
         "many entries", "offset low", "offset high", "stride", "slot", "no slots"],
)  # fmt: skip
def test_damaged_page_is_refused(tmp_path, data):
    path = tmp_path / "stats"
    path.write_bytes(data)
    with pytest.raises(InvalidStats):
        read_stats(path)

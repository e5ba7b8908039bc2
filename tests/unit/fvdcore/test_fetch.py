# SPDX-License-Identifier: Apache-2.0
"""Windows of demand reads: aligned, only over what is absent, apart from each other, growing."""

import os

import pytest

BLOCK = 4096
KIB = 1024
WINDOW = 128 * KIB
OUTSTANDING = 16 << 20


@pytest.fixture
def make(probes, image_of, tmp_path):
    made = []

    def make(blocks=1024, window=WINDOW, **options):
        options = {"max_outstanding_copy_on_read_data": OUTSTANDING} | options
        path = tmp_path / f"image{len(made)}"
        path.write_bytes(image_of(blocks=blocks, **options))
        fd = os.open(path, os.O_RDWR)
        base = probes.storage.Storage(bytes(blocks * BLOCK))
        image = probes.image.Image(fd, base)
        made.append(image)
        os.close(fd)
        image.fetch_prepare(window)
        return image

    yield make
    for image in made:
        image.fetch_free()
        image.free()


def test_a_read_takes_the_aligned_window_around_it(make):
    image = make()
    assert image.fetch_begin(WINDOW + 60 * KIB, WINDOW + 64 * KIB)[1:] == (WINDOW, 2 * WINDOW)


def test_parts_of_blocks_become_whole_blocks(make):
    image = make()
    assert image.fetch_begin(700, 900)[1:] == (0, WINDOW)


def test_a_read_across_windows_takes_of_the_second_what_it_needs(make):
    image = make()
    assert image.fetch_begin(WINDOW - BLOCK, WINDOW + 100)[1:] == (0, WINDOW + 100)


@pytest.mark.parametrize("window", [0, BLOCK - 1])
def test_without_a_size_nothing_is_widened(make, window):
    image = make(window=window)
    assert image.fetch_begin(8 * BLOCK, 9 * BLOCK) == (-1, 8 * BLOCK, 9 * BLOCK)


def test_local_blocks_bound_a_window(make):
    image = make()
    assert image.write(2 * BLOCK, b"x" * BLOCK) == 0
    assert image.write(9 * BLOCK, b"x" * BLOCK) == 0
    assert image.fetch_begin(5 * BLOCK, 6 * BLOCK)[1:] == (3 * BLOCK, 9 * BLOCK)


def test_what_is_local_at_both_ends_is_not_widened(make):
    image = make()
    assert image.write(0, b"x" * 4 * BLOCK) == 0
    assert image.fetch_begin(BLOCK, 2 * BLOCK) == (-1, BLOCK, 2 * BLOCK)


def test_an_end_that_is_local_stays_where_it_is(make):
    image = make()
    assert image.write(4 * BLOCK, b"x" * BLOCK) == 0
    assert image.fetch_begin(4 * BLOCK, 6 * BLOCK)[1:] == (4 * BLOCK, WINDOW)


def test_a_window_ends_with_the_base(make):
    image = make(blocks=40)
    assert image.fetch_begin(38 * BLOCK, 39 * BLOCK)[1:] == (32 * BLOCK, 40 * BLOCK)
    assert image.fetch_begin(40 * BLOCK, 41 * BLOCK)[0] == -1


def test_what_another_read_fetches_is_not_fetched_twice(make):
    image = make()
    place, _, _ = image.fetch_begin(0, BLOCK)
    assert image.fetch_begin(8 * BLOCK, 9 * BLOCK) == (-1, 8 * BLOCK, 9 * BLOCK)
    image.fetch_end(place)
    assert image.fetch_begin(8 * BLOCK, 9 * BLOCK)[1:] == (0, WINDOW)


def test_windows_stop_at_those_under_way(make):
    image = make()
    image.fetch_begin(40 * BLOCK, 41 * BLOCK)  # [32, 64)
    assert image.fetch_begin(31 * BLOCK, 32 * BLOCK)[1:] == (0, 32 * BLOCK)
    assert image.fetch_begin(64 * BLOCK, 65 * BLOCK)[1:] == (64 * BLOCK, 128 * BLOCK)


def test_a_reader_that_goes_on_gets_ever_more_up_to_eight_windows(make):
    image = make()
    assert image.fetch_sizes() == (WINDOW, 8 * WINDOW)
    at, lengths = 0, []
    for _ in range(6):
        place, begin, end = image.fetch_begin(at, at + BLOCK)
        image.fetch_end(place)
        assert begin == at
        lengths.append((end - begin) // WINDOW)
        at = end
    assert lengths == [1, 2, 4, 8, 8, 8]


def test_readers_are_told_apart(make):
    image = make(blocks=4096)
    ends = {}
    for start in range(0, 8 * 4 * WINDOW, 4 * WINDOW):
        place, _, ends[start] = image.fetch_begin(start, start + BLOCK)
        image.fetch_end(place)
    for start, at in ends.items():
        place, begin, end = image.fetch_begin(at, at + BLOCK)
        assert (begin, end) == (at, start + 3 * WINDOW), "its window grew"
        assert image.fetch_begin(at, at + BLOCK)[0] == -1
        image.fetch_end(place)


def test_no_window_is_larger_than_copy_on_read_would_keep(make):
    image = make(max_outstanding_copy_on_read_data=256 * KIB)
    assert image.fetch_sizes() == (64 * KIB, 64 * KIB)


def test_more_reads_than_windows_are_not_widened(make):
    image = make(blocks=65 * 32)
    for at in range(0, 64, 2):
        assert image.fetch_begin(at * WINDOW, at * WINDOW + BLOCK)[0] >= 0
    far = 64 * WINDOW
    assert image.fetch_begin(far, far + BLOCK) == (-1, far, far + BLOCK)

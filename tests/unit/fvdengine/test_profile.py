# SPDX-License-Identifier: Apache-2.0
"""Boot profiles: their text, what is refused, merging."""

import os
import random

import pytest

from fvdengine.errors import UnusableProfile
from fvdengine.profile import (
    ENTRIES_MAX,
    format_profile,
    merge_profiles,
    parse_profile,
    read_beside,
    read_open_profile,
    read_profile,
    write_open_profile,
)

PAGE = 4096


def test_text_and_back():
    extents = [(1 << 40, PAGE), (0, 512), (7, 3)]
    assert parse_profile(format_profile(extents), "p") == extents


def test_comments_and_empty_lines_mean_nothing():
    assert parse_profile("fvd-profile 1\n# boot\n\n 0  4096 \n", "p") == [(0, 4096)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "first line"), ("fvd-profile 2\n", "first line"), ("\x7fELF\0\0", "first line"),
        ("fvd-profile 1\n1\n", "line 2"), ("fvd-profile 1\n0 1\n1 2 3\n", "line 3"),
        ("fvd-profile 1\n-1 5\n", "line 2"), ("fvd-profile 1\n0 0\n", "line 2"),
        ("fvd-profile 1\n0 ²\n", "line 2"), ("fvd-profile 1\n0 " + "9" * 20, "line 2"),
        ("fvd-profile 1\n" + "0 1\n" * (ENTRIES_MAX + 1), "more than"),
    ],
)  # fmt: skip
def test_what_is_no_profile_is_refused(text, reason):
    with pytest.raises(UnusableProfile, match=reason):
        parse_profile(text, "p")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UnusableProfile, match="No such file"):
        read_profile(tmp_path / "none")


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path, kind):
    path = tmp_path / "other"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    if kind == "fifo":
        with pytest.raises(UnusableProfile, match="seek"):
            read_profile(path)
    else:
        with pytest.raises(UnusableProfile, match="directory"):
            read_profile(path)


def test_one_beside_a_base_is_found_and_none_is_no_mistake(tmp_path):
    base = tmp_path / "golden.img"
    assert read_beside(base) == []
    (tmp_path / "golden.img.profile").write_text("fvd-profile 1\n4096 512\n")
    assert read_beside(base) == [(PAGE, 512)]


@pytest.mark.parametrize("kind", ["folder", "fifo", "link", "text"])
def test_another_thing_beside_a_base_is_refused(tmp_path, kind):
    path = tmp_path / "golden.img.profile"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/etc/passwd")
    else:
        path.write_text("dear diary")
    with pytest.raises(UnusableProfile):
        read_beside(tmp_path / "golden.img")


@pytest.mark.parametrize("tail", ["40", "40 ", "40 x", "4096 4096 4"])
def test_a_last_line_without_its_end_is_passed_over_where_it_is_wrong(tmp_path, tail):
    path = tmp_path / "p"
    path.write_text("fvd-profile 1\n0 4096\n" + tail)
    assert read_profile(path) == [(0, PAGE)]
    path.write_text("fvd-profile 1\n0 4096\n" + tail + "\n")
    with pytest.raises(UnusableProfile, match="line 3"):
        read_profile(path)


def test_a_file_too_long_is_refused(tmp_path):
    path = tmp_path / "long"
    path.write_text("fvd-profile 1\n")
    os.truncate(path, 1 << 30)
    with pytest.raises(UnusableProfile, match="longer"):
        read_profile(path)


def test_a_longer_profile_is_replaced_wholly(tmp_path):
    fd = os.open(tmp_path / "p", os.O_RDWR | os.O_CREAT)
    assert read_open_profile(fd, "p") == []
    write_open_profile(fd, [(0, PAGE)] * 1000)
    write_open_profile(fd, [(PAGE, PAGE)])
    os.close(fd)
    assert read_profile(tmp_path / "p") == [(PAGE, PAGE)]


def test_merging_keeps_what_came_early_early_and_each_place_once():
    first = [(0, PAGE), (10 * PAGE, 2 * PAGE), (50 * PAGE, PAGE)]
    second = [(90 * PAGE, PAGE), (11 * PAGE, 2 * PAGE)]
    assert merge_profiles([first, second]) == [
        (0, PAGE), (90 * PAGE, PAGE), (10 * PAGE, 3 * PAGE), (50 * PAGE, PAGE),
    ]  # fmt: skip
    assert merge_profiles([first]) == first
    assert merge_profiles([]) == []


def test_merging_takes_whole_pages():
    assert merge_profiles([[(100, 10), (5000, 1), (200, 4096)]]) == [(0, 2 * PAGE)]


def test_merging_takes_no_longer_for_long_extents():
    """A whole disk that was read in its order is one of them; nobody need have been honest."""
    disk = [(0, 1 << 50), (PAGE, 1 << 61), (0, 9_999_999_999_999_999_999)]
    assert merge_profiles([disk, [(3 * PAGE, PAGE)]]) == [(0, 1 << 62)]
    beyond = [(9_999_999_999_999_999_999, 1), (1 << 62, PAGE)]
    assert merge_profiles([beyond, [(PAGE, PAGE)]]) == [(PAGE, PAGE)]
    assert parse_profile(format_profile(merge_profiles([disk])), "p") == [(0, 1 << 62)]


def test_merging_is_what_merging_page_by_page_is():
    rng = random.Random(4)
    for _ in range(50):
        runs = [
            [(rng.randrange(200) * PAGE, rng.randrange(1, 30) * PAGE) for _ in range(20)]
            for _ in range(3)
        ]
        merged = merge_profiles(runs)
        pages = [page for at, length in merged for page in range(at, at + length, PAGE)]
        assert pages == page_by_page(runs)


def page_by_page(runs):
    """The same in the simplest way."""
    order = sorted(
        (rank, which, extent) for which, run in enumerate(runs) for rank, extent in enumerate(run)
    )
    found = {}
    for _, _, (at, length) in order:
        found |= dict.fromkeys(range(at, at + length, PAGE))
    return list(found)

# SPDX-License-Identifier: Apache-2.0
"""What a journal lost after it was durable is told from what a crash cut short."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fvdengine.check import check_image
from fvdengine.gaps import Gap, find_gaps
from fvdengine.records import BitmapRecord, LiveSectors, Trailer, read_journal, seal_sector
from fvdengine.repair import repair_image
from fvdtest.forge import put_records

RING = 16 * 4096


@pytest.fixture
def gaps(header):
    """Gaps of commits of so many sectors each, of which the ones numbered in `lost` are gone."""

    def find(commits, lost, first_page=0):
        area, positions = bytearray(RING), []
        page, sequence = first_page, 1
        for sectors in commits:
            for index in range(sectors):
                at = (page * 4096 + index * 512) % RING
                sealed = seal_sector(
                    [BitmapRecord(0, 8)], Trailer(1, sequence), header.extension.image_uuid
                )
                area[at : at + 512] = sealed
                positions.append(at // 512)
                sequence += 1
            page += -(-sectors // 8)
        for number in lost:
            at = positions[number] * 512
            area[at : at + 512] = os.urandom(488) + area[at + 488 : at + 512]
        return find_gaps(read_journal(area, header, "x.fvd").live, RING)

    return find


@pytest.mark.parametrize("first_page", [0, 14])
@pytest.mark.parametrize(
    ("commits", "lost", "expected"),
    [
        ([3, 3], [1], [(1, 1)]),
        ([3, 3], [0, 2], [(2, 0)]),
        ([1, 1, 1], [1], [(1, 1)]),
        ([3, 2, 2, 2], [3, 4, 5, 6], [(4, 3)]),
        ([8, 1, 1], [4], [(1, 4)]),
        ([20, 4, 1], [9], [(1, 9)]),
    ],
    ids=["middle", "edges", "page", "pages", "full", "long"],
)
def test_what_later_commits_stand_behind_is_lost(gaps, commits, lost, expected, first_page):
    found = gaps(commits, lost, first_page)
    assert [gap.count for gap in found] == [count for count, _ in expected]
    if first_page == 0:
        assert [gap.first for gap in found] == [first for _, first in expected]


@pytest.mark.parametrize(
    ("commits", "lost"),
    [([3], [1]), ([3, 3], [4]), ([2, 20], [3, 9, 17]), ([9], [0, 7]), ([8, 16], [8, 9, 10])],
)
def test_what_may_be_the_end_of_the_last_commit_is_not(gaps, commits, lost):
    assert gaps(commits, lost) == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    commits=st.lists(st.integers(1, 20), min_size=1, max_size=5), data=st.data(),
    start=st.integers(0, 15),
)  # fmt: skip
def test_torn_last_commit_is_never_called_damage(gaps, commits, data, start):
    last = sum(commits) - commits[-1]
    torn = data.draw(st.sets(st.integers(last, sum(commits) - 1)))
    assert gaps(commits, torn, start) == []


def test_sequences_that_nobody_writes_are_left_alone(header):
    uuid = header.extension.image_uuid
    hostile = b"".join(
        seal_sector([BitmapRecord(0, 8)], Trailer(1, sequence), uuid)
        for sequence in (9, 9, 1 << 61, 0, 3)
    )
    find_gaps(read_journal(hostile.ljust(4096, b"\0"), header, "x.fvd").live, 4096)
    assert find_gaps(LiveSectors(lambda _, size: bytes(size)), 0) == []
    assert Gap(1, 2) == Gap(1, 2)


def test_check_names_the_damage_and_repair_goes_on_without_it(image, header, poke, change):
    header = change(clean_shutdown=0, backup=True)
    for turn in range(3):
        records = [BitmapRecord(turn * 8, 8)]
        put_records(image, header, turn * 8, records, sequence=turn + 1)
    assert check_image(image).exit_status == 0
    poke(header.journal_offset + 4096, b"\xff" * 16)
    found = check_image(image)
    assert found.exit_status == 2
    (finding,) = [item for item in found.findings if item.code == "lost_sectors"]
    assert "a journal sector is damaged at 1 or behind" in finding.message
    assert "--repair" in finding.remedy
    dry = repair_image(image, dry_run=True)
    assert "drop_sector" in [action.code for action in dry.actions]
    done = repair_image(image)
    assert done.exit_status == 0
    assert done.after.local_blocks == 2

# SPDX-License-Identifier: Apache-2.0
"""Quantiles between two looks, marks of a map."""

import pytest

from fvdapi.activity import Activity, DeviceMap, duration_quantile
from fvdapi.models import DeviceState


@pytest.mark.parametrize(
    ("now", "before", "q", "seconds"),
    [
        ([], (), 0.99, None),
        ([0, 0], (), 0.99, None),
        ([0, 0, 5], (), 0.99, 8e-9),
        ([99, 0, 1], (), 0.99, 2e-9),
        ([98, 0, 2], (), 0.99, 8e-9),
        ([5, 5], [5, 5], 0.99, None),
        ([5, 6], [5], 0.5, 4e-9),
        # A worker of another page may have begun anew: nothing is negative.
        ([1, 2], [50, 0], 0.99, 4e-9),
        ([1], [1, 0, 7], 0.99, None),
    ],
)
def test_a_quantile_is_the_end_of_its_bucket(now, before, q, seconds):
    assert duration_quantile(q, now, before) == seconds


def test_marks_of_a_map():
    found = DeviceMap(
        name="web", size_bytes=1,
        local=(8, 0, 4, 0, 0, 1), base=(0, 8, 4, 0, 0, 0), zero=(0, 0, 0, 8, 0, 7),
    )  # fmt: skip
    assert found.strip() == "#.+-?#"


def test_totals_are_sums_of_what_is_there():
    one = Activity(
        name="web", device=None, image="/i", state=DeviceState.ATTACHED,
        counters={"io_errors_read_eio": 2, "io_errors_write_enospc": 3, "io_bytes_read": 7},
    )  # fmt: skip
    assert one.total("io_bytes_read", "io_bytes_write") == 7
    assert one.total_of("io_errors_") == 5

# SPDX-License-Identifier: Apache-2.0
"""Metrics cost at most two instructions more in a hundred, scrapes included."""

import pytest

from fvdtest import cost

MORE_MAX = 0.02


@pytest.mark.proof
def test_metrics_cost_little(tmp_path, record_property):
    found = cost.measure(tmp_path)
    record_property("cost", found.text())
    print(found.text())
    assert 0 < found.more <= MORE_MAX

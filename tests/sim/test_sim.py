# SPDX-License-Identifier: Apache-2.0
"""The engine keeps its promises under seeded schedules, crashes and faults (the simulator).

What a run is, says tests/README.md; the parts are in tests/native/sim_* and fvdtest.sim. A failure
prints the line that makes the run again.
"""

import pytest

from fvdtest.sim import campaign, scenario

FIRST = 1
SEEDS = 60


def complain(outcome):
    return [
        f"{why}\nagain: .venv/bin/python tests/dev.py sim --scenario {name} --seed {seed}"
        for name, seed, why in outcome.failures
    ]


@pytest.mark.parametrize("name", scenario.SCENARIOS)
def test_fixed_seeds_keep_all_promises(name):
    outcome = campaign.campaign(name, range(FIRST, FIRST + SEEDS))
    assert complain(outcome) == []
    assert outcome.runs == SEEDS
    assert outcome.totals["clones"] >= 15 * SEEDS


def test_seeds_that_once_failed_do_so_no_more():
    for name, seed in campaign.kept_seeds():
        assert complain(campaign.campaign(name, range(seed, seed + 1))) == []


def test_same_seed_makes_the_same_run():
    first = campaign.campaign("mixed", range(500, 530))
    again = campaign.campaign("mixed", range(500, 530))
    assert first.digests == again.digests
    assert len(set(first.digests.values())) == 30


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_campaign_of_two_thousand_seeds():
    outcome = campaign.campaign("mixed", range(10_000, 12_000))
    print(outcome.summary())
    assert complain(outcome) == []
    assert outcome.totals["requests"] >= 2000 * 270
    assert outcome.totals["clones"] >= 2000 * 18

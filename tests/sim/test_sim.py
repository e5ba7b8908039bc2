# SPDX-License-Identifier: Apache-2.0
"""The engine keeps its promises under seeded schedules, crashes and faults (the simulator).

What a run is, says tests/README.md; the parts are in tests/native/sim_* and fvdtest.sim. A failure
prints the line that makes the run again.
"""

import re

import pytest

from fvdtest.sim import campaign, engine, scenario

pytestmark = pytest.mark.timeout(400)  # the first test may have to compile

FIRST = 1
SEEDS = 50
GROWS = 19  # its table grows into its data, and a chunk moves away
SMALL = ("small", "grow", "nth")  # these have tests of their own
OFTEN = 0.05  # of the runs, at least, each of these happens in
# Sockets and files, what Python asks for, and the ring of a trace.
NOT_SIMULATED = {
    "control", "device", "fields", "figures", "file_storage", "layers", "links", "nbd_loop",
    "nbd_pool", "nbd_send", "trace",
}
MARKS = (
    "commit", "checkpoint", "busy_checkpoint", "wrap", "takeover", "cut_in_recovery",
    "no_space", "sticky", "prefetched", "replay", "copy_on_read", "copy_on_write", "fault",
    "inline", "crew", "resized", "relocated", "updated", "chain", "flat", "outage", "ahead",
    "patient", "given_up", "copy_later",
)  # fmt: skip


def complain(outcome):
    return [
        f"{why}\nagain: .venv/bin/python tests/dev.py sim --scenario {name} --seed {seed}"
        for name, seed, why in outcome.failures
    ]


@pytest.mark.parametrize("name", [name for name in scenario.SCENARIOS if name not in SMALL])
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


def test_threads_that_meet_without_a_lock_are_interleaved():
    outcome = campaign.campaign("mixed", range(500, 510))
    assert outcome.totals["stepped"] >= 1000


def test_an_engine_whose_atomic_operations_are_no_steps_is_refused():
    with pytest.raises(engine.BuildError, match="without FVD_STEPS"):
        engine.own_steps(0)


def test_every_module_with_atomic_operations_takes_steps():
    ordered = re.compile(r"\b(load_acquire|store_release|\w+_(acq_rel|release|acquire)|fence)\b")
    found = {path.stem for path in engine.ENGINE.glob("*.pyx") if ordered.search(path.read_text())}
    assert found - set(engine.MODULES) == NOT_SIMULATED


def test_every_subset_of_few_unflushed_sectors_is_recovered_from():
    outcome = campaign.campaign("small", range(100, 130))
    assert complain(outcome) == []
    assert outcome.totals["clones"] >= 8_000


def test_a_crash_at_any_step_of_growing_and_updating_leaves_all_or_nothing():
    check_growing(range(103, 110))


def check_growing(seeds):
    outcome = campaign.campaign("grow", seeds)
    assert complain(outcome) == []
    assert outcome.totals["clones"] >= 100 * len(seeds)
    assert outcome.seen["resized"] >= len(seeds) // 2
    assert outcome.seen["updated"] >= len(seeds) // 2
    assert outcome.seen["relocated"]


def test_nth_failure_of_every_kind_is_survived():
    check_every_failure(2)


def check_every_failure(geometry):
    first = geometry * scenario.NTH_RUNS
    outcome = campaign.campaign("nth", range(first, first + scenario.NTH_RUNS))
    assert complain(outcome) == []
    assert outcome.totals["fault"] + outcome.totals["base_fault"]
    # With the last n of each kind nothing fails, and the run is the same one: no n was left out.
    last = range(first + scenario.NTH_MAX - 1, first + scenario.NTH_RUNS, scenario.NTH_MAX)
    assert len({outcome.digests[seed] for seed in last}) == 1
    return outcome


@pytest.mark.proof
@pytest.mark.timeout(600)
def test_nth_failure_of_every_kind_is_survived_in_many_geometries():
    for geometry in range(20, 30):
        check_every_failure(geometry)
    assert check_every_failure(GROWS).seen["relocated"]


@pytest.mark.proof
@pytest.mark.timeout(600)
def test_every_subset_of_few_unflushed_sectors_in_many_geometries():
    outcome = campaign.campaign("small", range(1000, 1400))
    assert complain(outcome) == []


@pytest.mark.proof
@pytest.mark.timeout(600)
def test_a_crash_at_any_step_of_growing_and_updating_in_many_geometries():
    check_growing(range(1000, 1030))


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_campaign_of_two_thousand_seeds():
    outcome = campaign.campaign("mixed", range(10_000, 12_000))
    print(outcome.summary())
    assert complain(outcome) == []
    assert outcome.totals["requests"] >= 2000 * 270
    assert outcome.totals["clones"] >= 2000 * 18
    rare = {name: outcome.seen[name] for name in MARKS if outcome.seen[name] < 2000 * OFTEN}
    assert rare == {}

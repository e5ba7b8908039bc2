# SPDX-License-Identifier: Apache-2.0
"""The simulator catches planted bugs: a test of the tests.

One runs always, all of them in `make proof`. Builds are kept, one module each.
"""

import pytest

from fvdtest.sim import canary, run

pytestmark = pytest.mark.timeout(400)  # the first test may have to compile

ALWAYS = ("place_reused_without_zeroing",)


@pytest.fixture(scope="module", autouse=True)
def _simulator():
    run.native()


@pytest.mark.parametrize("name", ALWAYS)
def test_simulator_catches_a_planted_bug(name):
    assert canary.hunt(canary.by_name(name)).failures, f"{name} escaped"


@pytest.mark.proof
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in canary.names() if name not in ALWAYS])
def test_simulator_catches_every_planted_bug(name):
    assert canary.hunt(canary.by_name(name)).failures, f"{name} escaped"


def test_canaries_are_many_and_fit_the_source():
    sources = [canary.planted(canary.by_name(name)) for name in canary.names()]
    assert len(sources) >= 20
    wanted = {f"b{n}" for n in range(1, 9)}
    assert {name.split("_")[0] for name in canary.names()} >= wanted


def test_canary_that_does_not_fit_is_refused():
    stale = canary.Canary("stale", "commit", "no such text", "")
    with pytest.raises(canary.CanaryError, match="0 times"):
        canary.planted(stale)

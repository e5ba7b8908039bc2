# SPDX-License-Identifier: Apache-2.0
"""The simulator, or a test of its own, catches each planted bug: a test of the tests.

One runs always, all of them in `make proof`. Builds are kept, one module each.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fvdtest.sim import canary, engine, run

pytestmark = pytest.mark.timeout(400)  # the first test may have to compile

TESTS = Path(__file__).resolve().parents[1]
ALWAYS = ("place_reused_without_zeroing",)
TESTED = tuple(name for name in canary.names() if canary.by_name(name).test)
HUNTED = tuple(name for name in canary.names() if name not in ALWAYS + TESTED)
HUNTS = (
    "test_simulator_catches_a_planted_bug", "test_simulator_catches_every_planted_bug",
    "test_own_test_of_a_planted_bug_fails_with_it",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _simulator(request):
    """The simulator; and the next canaries are built while one is hunted."""
    run.native()
    wanted = [item.callspec.params["name"] for item in request.session.items
              if getattr(item, "originalname", "") in HUNTS]  # fmt: skip
    with ThreadPoolExecutor(engine.JOBS) as pool:
        for name in wanted:
            pool.submit(canary.build, canary.by_name(name))
        yield
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", ALWAYS)
def test_simulator_catches_a_planted_bug(name):
    assert canary.hunt(canary.by_name(name)).failures, f"{name} escaped"


@pytest.mark.proof
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", HUNTED)
def test_simulator_catches_every_planted_bug(name):
    assert canary.hunt(canary.by_name(name)).failures, f"{name} escaped"


@pytest.mark.proof
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TESTED)
def test_own_test_of_a_planted_bug_fails_with_it(name):
    assert canary.hunt(canary.by_name(name)).failures, f"{name} escaped"


@pytest.mark.parametrize("name", TESTED)
def test_own_test_of_a_planted_bug_is_there(name):
    path, _, test = canary.by_name(name).test.partition("::")
    assert re.search(rf"^def {test}\(", (TESTS / path).read_text(), re.MULTILINE)


def test_canaries_are_many_and_fit_the_source():
    sources = [canary.planted(canary.by_name(name)) for name in canary.names()]
    assert len(sources) >= 20
    wanted = {f"b{n}" for n in range(1, 9)}
    assert {name.split("_")[0] for name in canary.names()} >= wanted


def test_canary_that_does_not_fit_is_refused():
    stale = canary.Canary("stale", "commit", "no such text", "")
    with pytest.raises(canary.CanaryError, match="0 times"):
        canary.planted(stale)

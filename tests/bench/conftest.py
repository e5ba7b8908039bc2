# SPDX-License-Identifier: Apache-2.0
"""What takes the compiler long happens before the first test, which has a limit of time."""

import contextlib

import pytest

from fvdtest.bench import engine
from fvdtest.bench.stand import StandError


def pytest_collection_finish(session):
    if any("native" in getattr(item, "fixturenames", ()) for item in session.items):
        with contextlib.suppress(StandError):  # the fixture will tell
            engine.probes()


@pytest.fixture(scope="session")
def native():
    """The engine's C functions, compiled."""
    return engine.probes()

# SPDX-License-Identifier: Apache-2.0
"""Bytes from strangers: all seeds and all that was ever found, and a short search in make proof."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fvdtest.fuzzing import TARGETS, close_served

HERE = Path(__file__).resolve().parent
SECONDS = 15


def known(name):
    """The seeds of a target, and what broke it once."""
    found = sorted((HERE / "found" / name).glob("*"))
    return [*TARGETS[name].seeds(), *(path.read_bytes() for path in found)]


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_known_does_no_harm(name):
    try:
        for data in known(name):
            TARGETS[name].run(data)
            TARGETS[name].run(data[: len(data) // 2])
    finally:
        close_served()


@pytest.mark.proof
@pytest.mark.timeout(SECONDS + 200)
@pytest.mark.parametrize("name", TARGETS)
def test_a_short_search_finds_nothing(name, tmp_path):
    words = [sys.executable, "-P", HERE / "main.py", name, str(SECONDS), tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert not list(tmp_path.iterdir()), done.stderr[-5000:]
    runs = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    assert runs is not None, done.stderr[-2000:]
    assert int(runs[1]) > 100

# SPDX-License-Identifier: Apache-2.0
"""Outside programs, and waiting: always with a limit, always saying what went wrong."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TIME_LIMIT_SECONDS = 60.0
WAIT_SECONDS = 30.0
POLL_SECONDS = 0.01
# The bindings of libnbd belong to the interpreter of the system, not to that of the tests.
SYSTEM_PYTHON = "/usr/bin/python3"


def need(*programs: str) -> None:
    """Skip the test where a program is not installed, naming it."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def run(
    *words: str | Path,
    time_limit: float = TIME_LIMIT_SECONDS,
    status: int | None = 0,
    stdin: str | None = None,
) -> str:
    """Run a program and return its standard output; anything unexpected fails with all output."""
    need(str(words[0]))
    done = subprocess.run(
        [str(word) for word in words],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=time_limit,
        check=False,
    )
    if status is not None and done.returncode != status:
        pytest.fail(
            f"{' '.join(map(str, words))}\nexit status {done.returncode}, not {status}\n"
            f"{done.stdout}{done.stderr}"
        )
    return done.stdout


def wait_until(claim: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> Any:
    """Wait for a condition and return what it gave; fail with its name when it never comes."""
    deadline = time.monotonic() + seconds
    while True:
        value = claim()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s in vain for {what}")
        time.sleep(POLL_SECONDS)  # the interval of polling, never the whole wait


def libnbd_script(uri: str, script: str, time_limit: float = TIME_LIMIT_SECONDS) -> str:
    """Run a Python script with libnbd's own bindings, `h` being connected to the URI."""
    need(SYSTEM_PYTHON)
    if subprocess.run([SYSTEM_PYTHON, "-c", "import nbd"], capture_output=True).returncode:
        pytest.skip("not installed: python3-libnbd")
    options = ("--base-allocation", "-u", uri, "-c", script)
    return run(SYSTEM_PYTHON, "-m", "nbd", *options, time_limit=time_limit)

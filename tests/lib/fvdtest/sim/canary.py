# SPDX-License-Identifier: Apache-2.0
"""Builds the engine with a planted bug, in a scratch copy, and lets the simulator look for it, or
runs the test that must fail with it.

Only the changed module is compiled; the others are those of every run (engine.py). A build is kept
under the digest of its source and of all declarations.
"""

import fcntl
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fvdtest.sim import campaign, engine
from fvdtest.sim.canaries import CANARIES, Canary

ROOT = Path(__file__).resolve().parents[4]
ENGINE = ROOT / "cython/fvdcore"
OUTPUT = ROOT / "build/canaries"
SEEDS = 4000
TEST_LIMIT = 240


class CanaryError(Exception):
    """A planted bug does not fit the source any more, or does not compile."""


def by_name(name: str) -> Canary:
    """The canary of that name."""
    for canary in CANARIES:
        if canary.name == name:
            return canary
    raise CanaryError(f"no canary is called {name}; there are: {', '.join(names())}")


def names() -> list[str]:
    """All of them."""
    return [canary.name for canary in CANARIES]


def planted(canary: Canary) -> str:
    """The module's source with the bug in it."""
    source = (ENGINE / f"{canary.module}.pyx").read_text()
    found = source.count(canary.old)
    if found != 1:
        raise CanaryError(f"{canary.name}: its text stands {found} times in {canary.module}.pyx")
    return source.replace(canary.old, canary.new)


def build(canary: Canary) -> Path:
    """A folder for PYTHONPATH in which fvdcore has the bug."""
    source = planted(canary)
    digest = hashlib.sha256(source.encode() + Path(engine.__file__).read_bytes())
    for path in sorted([*ENGINE.glob("*.pxd"), *ENGINE.glob("*.h")]):
        digest.update(path.read_bytes())
    folder = OUTPUT / canary.name / "fvdcore"
    folder.mkdir(parents=True, exist_ok=True)
    with (OUTPUT / f"{canary.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        engine.link_others(engine.build() / "fvdcore", folder, (canary.module,))
        stamp = folder.parent / "digest"
        if not stamp.exists() or stamp.read_text() != digest.hexdigest():
            compile_module(canary, source, folder)
            stamp.write_text(digest.hexdigest())
    return folder.parent


def compile_module(canary: Canary, source: str, folder: Path) -> None:
    """Make the changed module."""
    text = folder / f"{canary.module}.pyx"
    text.write_text(source)
    generated = folder / f"{canary.module}.c"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cython", "-3", "-I", folder.parent, text, "-o", generated],
        cwd=folder.parent, capture_output=True, text=True, timeout=engine.TIME_LIMIT, check=False,
    )  # fmt: skip
    if done.returncode:
        raise CanaryError(done.stdout + done.stderr)
    extra = [ENGINE / "crc32c_impl.c"] if canary.module == "crc32c" else []
    engine.compile_module(generated, folder / f"{canary.module}{engine.SUFFIX}", *extra)


def environment(canary: Canary) -> dict[str, str]:
    """What makes a program run the engine with the bug in it; it is built if need be."""
    folder = build(canary)
    return {"PYTHONPATH": str(folder), "FVD_STEPPED": "1", "FVD_CANARY": f"{folder}/fvdcore"}


def try_test(canary: Canary) -> campaign.Outcome:
    """Run the canary's own test, which must fail."""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider",
         f"--basetemp={OUTPUT / canary.name / 'tests'}", f"tests/{canary.test}"],
        cwd=ROOT, env=os.environ | environment(canary), capture_output=True, text=True,
        timeout=TEST_LIMIT, check=False,
    )  # fmt: skip
    if done.returncode > pytest.ExitCode.TESTS_FAILED:  # a broken invariant is below 0
        raise CanaryError(f"{canary.test} cannot be run:\n{done.stdout}{done.stderr}")
    outcome = campaign.Outcome(runs=1, seconds=time.monotonic() - begin)
    if done.returncode:
        why = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        outcome.failures.append(("", 0, "\n".join(why) or f"it ended with {done.returncode}"))
    return outcome


def hunt(canary: Canary, seeds: int = SEEDS) -> campaign.Outcome:
    """Look for the bug; the outcome has failures if it was found."""
    if canary.test:
        return try_test(canary)
    wanted = range(canary.first, canary.first + seeds)
    return campaign.campaign(
        canary.scenario, wanted, environment=environment(canary), stop_early=True
    )

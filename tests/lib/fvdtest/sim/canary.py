# SPDX-License-Identifier: Apache-2.0
"""Builds the engine with a planted bug, in a scratch copy, and lets the simulator look for it.

Only the changed module is compiled; the others are those of the tree. A build is kept under the
digest of its source and of all declarations.
"""

import fcntl
import hashlib
import subprocess
import sys
import sysconfig
from pathlib import Path

from fvdtest.sim import campaign
from fvdtest.sim.canaries import CANARIES, Canary

ROOT = Path(__file__).resolve().parents[4]
ENGINE = ROOT / "cython/fvdcore"
OUTPUT = ROOT / "build/canaries"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
SEEDS = 4000
FIRST = 1000
TIME_LIMIT = 240


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


def run(argv: list[str | Path], folder: Path) -> None:
    """Run a compiler."""
    done = subprocess.run(
        [str(word) for word in argv], cwd=folder, capture_output=True, text=True,
        timeout=TIME_LIMIT, check=False,
    )  # fmt: skip
    if done.returncode:
        raise CanaryError(done.stdout + done.stderr)


def build(canary: Canary) -> Path:
    """A folder for PYTHONPATH in which fvdcore has the bug."""
    source = planted(canary)
    digest = hashlib.sha256(source.encode())
    for path in sorted([*ENGINE.glob("*.pxd"), *ENGINE.glob("*.h")]):
        digest.update(path.read_bytes())
    folder = OUTPUT / canary.name / "fvdcore"
    folder.mkdir(parents=True, exist_ok=True)
    with (OUTPUT / f"{canary.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = folder.parent / "digest"
        if not stamp.exists() or stamp.read_text() != digest.hexdigest():
            compile_module(canary, source, folder)
            stamp.write_text(digest.hexdigest())
        link_others(canary, folder)
    return folder.parent


def link_others(canary: Canary, folder: Path) -> None:
    """All that is not changed is the tree's."""
    own = f"{canary.module}{SUFFIX}"
    for path in ENGINE.iterdir():
        wanted = path.suffix in (".so", ".py", ".pxd", ".h") and path.name != own
        if wanted and not (folder / path.name).exists():
            (folder / path.name).unlink(missing_ok=True)
            (folder / path.name).symlink_to(path)


def compile_module(canary: Canary, source: str, folder: Path) -> None:
    """Make the changed module."""
    link_others(canary, folder)
    text = folder / f"{canary.module}.pyx"
    text.write_text(source)
    generated = folder / f"{canary.module}.c"
    run([sys.executable, "-P", "-m", "cython", "-3", "-I", folder.parent, text, "-o", generated],
        folder.parent)  # fmt: skip
    extra = [ENGINE / "crc32c_impl.c"] if canary.module == "crc32c" else []
    target = folder / f"{canary.module}{SUFFIX}"
    target.unlink(missing_ok=True)
    run(
        ["gcc", "-shared", "-fPIC", "-O1", "-fno-strict-aliasing", "-D_GNU_SOURCE", "-w",
         f"-I{sysconfig.get_path('include')}", f"-I{ENGINE}", generated, *extra, "-o", target],
        folder.parent,
    )  # fmt: skip


def hunt(canary: Canary, seeds: int = SEEDS) -> campaign.Outcome:
    """Look for the bug; the outcome has failures if it was found."""
    folder = build(canary)
    environment = {"PYTHONPATH": str(folder), "FVD_CANARY": f"{folder}/fvdcore"}
    return campaign.campaign(
        canary.scenario, range(FIRST, FIRST + seeds), environment=environment, stop_early=True
    )

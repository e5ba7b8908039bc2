# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the seed, the profiles of hypothesis, the check for programs left over.

Fixtures of one kind of test live beside those tests. The plugin named here sends the tests marked
`kernel` into User Mode Linux.
"""

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["fvdtest.uml_plugin"]

DEFAULT_SEED = 20260101

# The same surroundings for every run: what programs print must not depend on who runs the tests.
os.environ |= {"TERM": "xterm", "LANG": "C.UTF-8", "TZ": "UTC"}
for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "LC_ALL", "FVDD_SOCKET"):
    os.environ.pop(name, None)

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("fresh", deadline=None, print_blob=True, max_examples=1000)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("fvd").addoption(
        "--seed",
        type=int,
        default=int(os.environ.get("FVD_SEED", DEFAULT_SEED)),
        help="seed of the randomised tests; hypothesis has --hypothesis-seed of its own",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "proof: a longer campaign, run by make proof only")


def pytest_report_header(config: pytest.Config) -> str:
    return f"fvd: --seed {config.option.seed}, fixed hypothesis examples (--hypothesis-profile ci)"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this test; printed, so that a failure shows the line that repeats it."""
    value = int(request.config.option.seed)
    print(f"seed {value}; again: pytest '{request.node.nodeid}' --seed {value}")
    return value


@pytest.fixture
def rng(seed: int) -> random.Random:
    """A generator that depends on the seed alone."""
    return random.Random(seed)


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 8 MiB unless told otherwise."""
    size = getattr(request, "param", "8m")
    folder = tmp_path / "tiny"
    folder.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(argv, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def children() -> list[str]:
    """Commands of the processes that this one has started and that still run."""
    found = []
    own = str(os.getpid())
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text()
            command = status.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, UnicodeDecodeError):
            continue
        state, parent = text.rpartition(")")[2].split()[:2]
        if parent == own and state != "Z":
            found.append(f"{status.parent.name}: {command.strip()}")
    return found


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process that outlives the tests is a fault of a test or of the program under test."""
    left = children()
    if left and session.exitstatus == 0:
        print("\nprocesses left over by the tests:\n  " + "\n  ".join(left))
        session.exitstatus = pytest.ExitCode.TESTS_FAILED

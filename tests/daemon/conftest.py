# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the daemon tests: bases with content, clones of them, running daemons."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fvdtest.daemon import Daemon, Program, Relay, fvdctl, running_daemon
from fvdtest.model import FlatModel

BASE_SIZE = 8 << 20


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base without a zero in it, so that data can never be mistaken for a hole."""
    path = tmp_path / "base.raw"
    path.write_bytes(bytes(random.Random(7).choices(range(1, 256), k=4096)) * (BASE_SIZE // 4096))
    return path


@pytest.fixture
def clone(tmp_path: Path, base: Path) -> Callable[..., tuple[Path, FlatModel]]:
    """Make a clone of the base: its path, and what it must contain."""

    def make(name: str = "web", *options: object) -> tuple[Path, FlatModel]:
        path = tmp_path / f"{name}.fvd"
        fvdctl("create", path, "--base", base, "--base-format", "raw", *options)
        return path, FlatModel(BASE_SIZE, base.read_bytes())

    return make


@pytest.fixture
def restarts() -> int:
    """How many restarts a worker gets; tests that need another number override it."""
    return 5


@pytest.fixture
def daemon(tmp_path: Path, restarts: int) -> Iterator[Daemon]:
    """A running fvdd with a stand-in kernel; everything is detached at the end."""
    with running_daemon(tmp_path, restarts=restarts) as running:
        yield running


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    """The real program fvdd, running."""
    with Program(tmp_path) as running:
        yield running
        assert running.stop() == 0, running.log


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    """fvdd, and those that follow it; what is not orphaned is detached at the end."""
    made = Relay(tmp_path)
    try:
        yield made
        made.running.detach_all()
    finally:
        made.stop()
        made.running.kill_workers()

# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the kernel tests: a running fvdd, a store with holes, mounts that are undone.

Everything here happens inside User Mode Linux, as root, with the kernel's own nbd driver. Images
lie in a fresh folder of an ext4 file system on a disk of the machine (STORE), never on hostfs: it
has neither holes nor a page cache that a power cut could take away.
"""

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from fvdtest.guest import Fvd, hanging, load_driver, run, wait_until

STORE = Path("/run/store")
LOG_TAIL = 4000
# Whoever waits for a disk of the machine is there for moments.
HANGING_SECONDS = 30


def nobody_hangs() -> None:
    """No program stays where no signal reaches it: not after a detach, done or refused, nor after
    a shutdown."""
    wait_until(lambda: not hanging(), HANGING_SECONDS, "programs to leave the state D")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """A test that fails shows what fvdd said last."""
    report = yield
    fvd = getattr(item, "funcargs", {}).get("fvd")
    if report.failed and fvd is not None and fvd.log.exists():
        words = fvd.log.read_text(errors="replace")[-LOG_TAIL:]
        report.sections.append(("fvdd", words))
    return report


@pytest.fixture
def store(request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty folder for images, with holes and flushes like on a real machine."""
    folder = STORE / request.node.name.replace("/", "_").replace("[", "-").rstrip("]")
    folder.mkdir()
    yield folder
    run("rm", "-rf", folder)


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount devices: call it with a device and options, it returns the mount point."""
    made: list[Path] = []

    def mount(device: str, *options: str) -> Path:
        point = tmp_path / f"mount{len(made)}"
        point.mkdir()
        run("mount", *options, device, point)
        made.append(point)
        return point

    yield mount
    for point in reversed(made):
        if point.is_mount():
            run("umount", point)


@pytest.fixture
def loops() -> Iterator[Callable[[Path], str]]:
    """Loop devices over files: call it with a file."""
    load_driver("loop", "block/loop.ko")
    made: list[str] = []

    def loop(file: Path) -> str:
        made.append(run("losetup", "--find", "--show", file).stdout.strip())
        return made[-1]

    yield loop
    for node in made:
        run("losetup", "--detach", node)


@pytest.fixture
def settled() -> Callable[[], None]:
    """Call it where nobody may hang, before all is detached."""
    return nobody_hangs


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fvd]:
    """One fvdd for all tests: starting it takes seconds in here."""
    daemon = Fvd(tmp_path_factory.mktemp("fvdd"))
    daemon.start()
    yield daemon
    daemon.stop()


@pytest.fixture
def fvd(daemon: Fvd, request: pytest.FixtureRequest) -> Iterator[Fvd]:
    """fvdd with nothing attached; so it is left, with nobody who waits in the kernel for ever, and
    nothing unexpected is logged meanwhile. Where it cannot be left so, the machine runs no more
    tests: they would fail one after the other, each after minutes."""
    assert daemon.names() == []
    begin = daemon.log.stat().st_size
    yield daemon
    try:
        for name in daemon.names():
            daemon.detach(name)
        nobody_hangs()
    except BaseException:
        request.session.shouldfail = "what this test left cannot be removed"
        raise
    text = daemon.log.read_bytes()[begin:].decode()
    assert "Traceback" not in text, text

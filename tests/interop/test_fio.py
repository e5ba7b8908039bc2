# SPDX-License-Identifier: Apache-2.0
"""fio with its own checksums, through libnbd, while the engine copies in the background.

fio writes a random mix, reads it back and compares the checksum in every block; the pass after a
clean stop reads the same blocks again by the same seed. What fio did not write is compared with
the base, so that nothing was damaged beside it. The long form of the campaign takes FVD_FIO_SECONDS
for each phase and belongs to `make proof`.
"""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from fvdtest.model import KIB, MIB, base_content
from fvdtest.nbd_client import NbdClient
from fvdtest.serve import Server
from fvdtest.tools import need, run

from .conftest import create

SHORT_SECONDS = 2
LONG_SECONDS = int(os.environ.get("FVD_FIO_SECONDS", "60"))
UNTOUCHED = 2 * MIB  # at the front, where no job writes
# Prefetch begins when fio is well under way.
BACKGROUND = ("--copy-on-read", "--prefetch-delay", "1")


def need_nbd_engine() -> None:
    """Debian's fio has the engine; without it nothing here would be proved: a failure."""
    need("fio")
    engines = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, check=False)
    if "nbd" not in engines.stdout.split():
        pytest.fail("this fio has no nbd engine; install Debian's")


def fio(uri: str, size: int, *options: str, time_limit: float) -> None:
    """One run of fio over the part behind the untouched front."""
    common = [
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--verify=crc32c",
        "--verify_fatal=1", "--verify_backlog=256", "--verify_state_save=0",
        "--randrepeat=1", "--randseed=4711",
        "--norandommap=0", f"--offset={UNTOUCHED}", f"--size={size - UNTOUCHED}",
        "--iodepth=32", "--group_reporting",
    ]  # fmt: skip
    run(*common, *options, time_limit=time_limit)


def clone_of(directory: Path, rng: random.Random, size: int) -> tuple[Path, bytes]:
    """A clone of a raw base of that size, and what is at the untouched front."""
    content = base_content(rng, size)
    base = directory / "base.raw"
    base.write_bytes(content)
    image = create(directory / "image.fvd", base=str(base), base_format="raw")
    return image, content[:UNTOUCHED]


def expect_front(server: Server, front: bytes) -> None:
    """The part beside fio's is still that of the base."""
    with NbdClient.attach(server.uri) as client:
        assert client.read(0, len(front)) == front


def verify_campaign(directory: Path, rng: random.Random, size: int, seconds: int) -> None:
    """Random writes verified while they happen, once more at the end, and after a clean stop."""
    need_nbd_engine()
    image, front = clone_of(directory, rng, size)
    limit = seconds * 4 + 60
    timed = ("--time_based", f"--runtime={seconds}")
    with Server(image, *BACKGROUND, directory=directory) as server:
        # Aligned to the blocks of the image, and not even to sectors.
        fio(server.uri, size, "--rw=randrw", "--bs=4k", *timed, time_limit=limit)
        fio(server.uri, size, "--rw=randrw", "--bs=5000", *timed, time_limit=limit)
        expect_front(server, front)
        assert "event=prefetch state=done" in server.log
        # One whole pass, with flushes, to be read again after the stop.
        fio(server.uri, size, "--rw=randwrite", "--bs=8k", "--fsync=64", time_limit=limit)
    with Server(image, directory=directory) as server:
        fio(
            server.uri, size, "--rw=randwrite", "--bs=8k", "--verify_only=1",
            time_limit=limit,
        )  # fmt: skip
        expect_front(server, front)


def test_random_writes_verify_with_copy_on_read_and_prefetch(
    tmp_path: Path, rng: random.Random
) -> None:
    verify_campaign(tmp_path, rng, 64 * MIB, SHORT_SECONDS)


def four_at_once(directory: Path, rng: random.Random, size: int, seconds: int) -> None:
    """Four jobs with a connection and a region each, while nbdcopy reads over four more."""
    need_nbd_engine()
    need("nbdcopy")
    image, front = clone_of(directory, rng, size)
    part = (size - UNTOUCHED) // 4 // MIB * MIB
    jobs = (
        "--numjobs=4", f"--offset_increment={part}", f"--size={part}", "--rw=randrw", "--bs=4k",
        "--time_based", f"--runtime={seconds}",
    )  # fmt: skip
    with Server(image, *BACKGROUND, directory=directory) as server:
        copying = subprocess.Popen(
            ["nbdcopy", "--connections=4", "--threads=4", server.uri, str(directory / "copy.raw")]
        )
        fio(server.uri, size, *jobs, time_limit=seconds * 4 + 60)
        assert copying.wait(60) == 0
        expect_front(server, front)
        assert "event=prefetch state=done" in server.log
    assert (directory / "copy.raw").read_bytes()[:UNTOUCHED] == front


def test_four_connections_at_once_verify(tmp_path: Path, rng: random.Random) -> None:
    four_at_once(tmp_path, rng, 66 * MIB, SHORT_SECONDS)


@pytest.mark.proof
@pytest.mark.timeout(LONG_SECONDS * 12 + 300)
def test_long_verify_campaign(tmp_path: Path, rng: random.Random) -> None:
    verify_campaign(tmp_path, rng, 512 * MIB, LONG_SECONDS)


@pytest.mark.proof
@pytest.mark.timeout(LONG_SECONDS * 5 + 300)
def test_long_campaign_of_four_connections(tmp_path: Path, rng: random.Random) -> None:
    four_at_once(tmp_path, rng, 514 * MIB, LONG_SECONDS)


def test_check_sees_a_planted_fault(tmp_path: Path, rng: random.Random) -> None:
    """The campaign is worth something only if it fails where a byte is wrong."""
    need_nbd_engine()
    size = UNTOUCHED + 2 * MIB
    image, _ = clone_of(tmp_path, rng, size)
    with Server(image, directory=tmp_path) as server:
        fio(server.uri, size, "--rw=randwrite", "--bs=8k", time_limit=60)
        with NbdClient.attach(server.uri) as client:
            client.write(UNTOUCHED + 555 * KIB, b"\xff\0\xff\0")
        with pytest.raises(pytest.fail.Exception, match="verify"):
            fio(
                server.uri, size, "--rw=randwrite", "--bs=8k", "--verify_only=1",
                time_limit=60,
            )  # fmt: skip

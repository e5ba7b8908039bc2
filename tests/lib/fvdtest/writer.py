# SPDX-License-Identifier: Apache-2.0
"""Loads on a file system that remember what was acknowledged: synced files, archives, fio."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from fvdtest.guest import wait_until

STEP = 5
WAIT_SECONDS = 60.0
# Every so many files an archive of many small ones is unpacked.
ARCHIVE_EVERY = 10
ARCHIVE_FILES = 20


class Writer(threading.Thread):
    """Writes numbered files, each synced, and now and then unpacks an archive and syncs it all,
    while the with block runs; an error is raised at its end.

    `slowest` is the longest time that one file took, in seconds: what a user saw of a pause.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(name="writer")
        self.folder = folder
        self.written: dict[str, bytes] = {}
        self.slowest = 0.0
        self._error: OSError | subprocess.CalledProcessError | None = None
        self._ending = threading.Event()

    def run(self) -> None:
        try:
            number = 0
            while not self._ending.is_set():
                begin = time.monotonic()
                if number % ARCHIVE_EVERY == ARCHIVE_EVERY - 1:
                    self._unpack(f"{number:06}")
                else:
                    self._write(f"{number:06}", os.urandom(50_000))
                self.slowest = max(self.slowest, time.monotonic() - begin)
                number += 1
        except (OSError, subprocess.CalledProcessError) as error:
            self._error = error

    def _write(self, name: str, data: bytes) -> None:
        with (self.folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.written[name] = hashlib.sha256(data).digest()

    def _unpack(self, name: str) -> None:
        """Unpack an archive of small files in folders, sync each, remember them all."""
        contents = {
            f"{name}/{number % 4}/{number}": os.urandom(100 + 500 * number)
            for number in range(ARCHIVE_FILES)
        }
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for path, data in contents.items():
                member = tarfile.TarInfo(path)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        subprocess.run(
            ["tar", "-xC", self.folder], input=packed.getvalue(), check=True, capture_output=True
        )
        for path in [*contents, *{str(Path(path).parent) for path in contents}, name, "."]:
            descriptor = os.open(self.folder / path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        for path, data in contents.items():
            self.written[path] = hashlib.sha256(data).digest()

    def wait_for_more(self, files: int = STEP) -> None:
        """Return when some files more are written."""
        count = len(self.written)
        wait_until(
            lambda: self._error is not None or len(self.written) > count + files,
            WAIT_SECONDS,
            "writes",
        )
        if self._error is not None:
            raise self._error

    def check(self, folder: Path) -> None:
        """Every file is there with the content that was acknowledged."""
        found = {
            name: hashlib.sha256((folder / name).read_bytes()).digest() for name in self.written
        }
        assert found == self.written

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending.set()
        self.join(WAIT_SECONDS)
        assert not self.is_alive(), "the writer is stuck"
        if error is None and self._error is not None:
            raise self._error


@contextlib.contextmanager
def verifying_fio(folder: Path) -> Iterator[None]:
    """fio writes, syncs, reads back and compares checksums, past the page cache, all the while."""
    begun = folder.with_name(f"{folder.name}.begun")
    begun.unlink(missing_ok=True)
    argv = [
        "fio", "--name=verify", f"--directory={folder}", "--size=48M", "--rw=randrw", "--bs=4k",
        "--ioengine=psync", "--direct=1", "--fsync=16", "--verify=crc32c", "--verify_backlog=64",
        "--verify_fatal=1", "--verify_state_save=0", "--time_based", "--runtime=36000",
        "--output-format=json", f"--exec_prerun=touch {begun}",
    ]  # fmt: skip
    # In the folder that it starts in it leaves a file with what the program before it said.
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder.parent
    ) as process:
        try:
            wait_until(begun.exists, WAIT_SECONDS, "the first request of fio")
            yield
            assert process.poll() is None, "fio ended early"
        finally:
            process.send_signal(signal.SIGINT)
            try:
                output = process.communicate(timeout=WAIT_SECONDS)[0].decode()
            except subprocess.TimeoutExpired:
                process.kill()
                raise
    assert "verify:" not in output, output
    job = json.loads(output[output.index("{") :])["jobs"][0]
    assert job["error"] == 0, output
    assert job["write"]["total_ios"] > 0, output
    assert job["read"]["total_ios"] > 0, output

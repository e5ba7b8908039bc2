# SPDX-License-Identifier: Apache-2.0
"""The real command in a process of its own, and images to aim it at."""

import contextlib
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import fvdengine
from fvdctl.main import main
from fvdengine.create import create_image
from fvdengine.header import Header
from fvdengine.options import CreateOptions

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    status: int
    out: str
    err: str


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with base.raw (random bytes) and clone.fvd over it."""
    (tmp_path / "base.raw").write_bytes(random.Random(11).randbytes(1 << 20))
    options = CreateOptions(base=str(tmp_path / "base.raw"), journal_size=65536)
    create_image(tmp_path / "clone.fvd", options)
    return tmp_path


@pytest.fixture
def fvdctl(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Answer]:
    """Run a command line in this process, in the directory of `place`."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Answer:
        status = main(list(words))
        captured = capfd.readouterr()
        return Answer(status, captured.out, captured.err)

    return run


@pytest.fixture
def edit(place: Path) -> Callable[..., None]:
    """Change header fields of clone.fvd, extension fields by ext_NAME."""

    def write(**values: object) -> None:
        path = place / "clone.fvd"
        header = Header.unpack(path.read_bytes()[:8192])
        inner = {name[4:]: value for name, value in values.items() if name.startswith("ext_")}
        outer = {name: value for name, value in values.items() if not name.startswith("ext_")}
        assert header.extension is not None
        extension = replace(header.extension, **inner)  # type: ignore[arg-type]
        with path.open("r+b") as file:
            packed = replace(header, **outer, extension=extension).pack()  # type: ignore[arg-type]
            file.write(packed)
            file.seek(8192)
            file.write(packed)

    return write


def digests(directory: Path) -> dict[str, str]:
    """The check sum of every regular file in a directory tree."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


@contextlib.contextmanager
def running(code: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run Python code in another process until the block ends; it prints a line when ready."""
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline()
        try:
            yield process
        finally:
            process.stdin.close()
            process.wait(10)


@pytest.fixture
def public_place() -> Iterator[Path]:
    """A directory that every user may enter, unlike those of pytest."""
    for place in (Path(fvdengine.__file__), Path(sys.executable)):
        if not all(parent.stat().st_mode & 0o005 == 0o005 for parent in place.parents):
            pytest.skip(f"no other user can run {place}")
    path = Path(tempfile.mkdtemp(prefix="fvd-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)

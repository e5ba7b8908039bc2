# SPDX-License-Identifier: Apache-2.0
"""Small bases and images, and the means to damage them byte by byte."""

import hashlib
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fvdengine.create import create_image
from fvdengine.header import Header
from fvdengine.options import CreateOptions

BASE_SIZE = 1 << 20


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A raw base of 1 MiB: random, never zeros, with an old modification time."""
    path = tmp_path / "base.raw"
    path.write_bytes(random.Random(7).randbytes(BASE_SIZE))
    os.utime(path, ns=(10**18, 10**18))
    return path


@pytest.fixture
def image(tmp_path: Path, base: Path) -> Path:
    """A fresh clone of `base` with a journal of 64 KiB."""
    path = tmp_path / "clone.fvd"
    create_image(path, CreateOptions(base=str(base), journal_size=65536))
    return path


@pytest.fixture
def header(image: Path) -> Header:
    """The header of `image`."""
    return Header.unpack(image.read_bytes()[:8192])


@pytest.fixture
def digest() -> Callable[[Path], str]:
    """A function that gives the check sum of a file."""
    return lambda path: hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def poke(image: Path) -> Callable[[int, bytes], None]:
    """A function that overwrites bytes of `image`."""

    def write(offset: int, data: bytes) -> None:
        with image.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return write


@pytest.fixture
def change(image: Path) -> Callable[..., Header]:
    """A function that changes header fields of `image`, and extension fields by `ext_NAME`."""

    def write(*, backup: bool = False, **values: object) -> Header:
        old = Header.unpack(image.read_bytes()[:8192])
        own = {name: value for name, value in values.items() if not name.startswith("ext_")}
        inner = {name[4:]: value for name, value in values.items() if name.startswith("ext_")}
        new = replace(old, **own)
        if inner:
            new = replace(new, extension=replace(new.extension, **inner))
        with image.open("r+b") as file:
            for offset in (0, 8192) if backup else (0,):
                file.seek(offset)
                file.write(new.pack())
        return new

    return write

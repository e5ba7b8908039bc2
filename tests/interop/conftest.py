# SPDX-License-Identifier: Apache-2.0
"""The worlds of the interop tests: images whose every byte is known."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fvdengine.create import create_image
from fvdengine.options import CreateOptions
from fvdtest.model import KIB, MIB, FlatModel, base_content, random_range
from fvdtest.serve import Server

BASE_SIZE = 6 * MIB + 5 * 512
IMAGE_SIZE = 8 * MIB + 512


@dataclass
class World:
    """One image, what it must contain, and where its files lie."""

    directory: Path
    image: Path
    model: FlatModel
    rng: random.Random

    def serve(self, *options: str, tcp: bool = False) -> Server:
        """Serve the image."""
        return Server(self.image, *options, directory=self.directory, tcp=tcp)

    def new_file(self, name: str) -> Path:
        """A path for what a test writes."""
        return self.directory / name

    def expect(self, server: Server) -> None:
        """Read the whole device and compare it with the model."""
        with server.connect() as client:
            assert client.size == self.model.size
            for offset in range(0, self.model.size, MIB):
                length = min(MIB, self.model.size - offset)
                found = client.read(offset, length)
                assert self.model.difference(found, offset) is None

    def scribble(self, server: Server, count: int = 60) -> None:
        """Write, trim and zero here and there, on the device and in the model."""
        with server.connect() as client:
            for _ in range(count):
                offset, length = random_range(self.rng, self.model.size, 200 * KIB)
                if self.rng.random() < 0.15:
                    client.write_zeroes(offset, length, no_hole=self.rng.random() < 0.5)
                    self.model.write(offset, bytes(length))
                else:
                    data = self.rng.randbytes(length)
                    client.write(offset, data, fua=self.rng.random() < 0.1)
                    self.model.write(offset, data)
            client.flush()


def create(path: Path, **options: object) -> Path:
    """Make an image."""
    create_image(path, CreateOptions(**options))  # type: ignore[arg-type]
    return path


def plain_world(directory: Path, rng: random.Random) -> World:
    """An image without a base, with data in it."""
    image = create(directory / "image.fvd", size=IMAGE_SIZE)
    world = World(directory, image, FlatModel(IMAGE_SIZE), rng)
    with world.serve() as server:
        world.scribble(server)
    return world


def clone_world(directory: Path, rng: random.Random, **options: object) -> World:
    """A fresh clone, larger than its raw base."""
    base = directory / "base.raw"
    content = base_content(rng, BASE_SIZE)
    base.write_bytes(content)
    image = create(
        directory / "image.fvd", size=IMAGE_SIZE, base=str(base), base_format="raw", **options
    )
    return World(directory, image, FlatModel(IMAGE_SIZE, content), rng)


def chain_world(directory: Path, rng: random.Random) -> World:
    """A clone of a clone; the lower one has writes of its own and another block size."""
    lower = clone_world(directory, rng, block_size=64 * KIB)
    lower.image.rename(directory / "lower.fvd")
    lower.image = directory / "lower.fvd"
    with lower.serve() as server:
        lower.scribble(server)
    upper = create(directory / "image.fvd", base=str(lower.image), base_format="fvd")
    return World(directory, upper, lower.model, rng)


@pytest.fixture
def clone(tmp_path: Path, rng: random.Random) -> World:
    """A fresh clone of a raw base."""
    return clone_world(tmp_path, rng)


KINDS = {"plain": plain_world, "clone": clone_world, "chain": chain_world}


@pytest.fixture(scope="session")
def made_worlds() -> dict[str, World]:
    """One of each kind, made when first asked for; tests work on copies."""
    return {}


Copier = Callable[[str, Path], World]


@pytest.fixture(scope="session")
def copy_of(request: pytest.FixtureRequest, made_worlds: dict[str, World]) -> Copier:
    """Make a copy of the world of a kind."""
    factory: pytest.TempPathFactory = request.getfixturevalue("tmp_path_factory")

    def copy(kind: str, directory: Path) -> World:
        if kind not in made_worlds:
            rng = random.Random(f"{kind} {request.config.option.seed}")
            made_worlds[kind] = KINDS[kind](factory.mktemp(kind), rng)
        return copy_world(made_worlds[kind], directory)

    return copy


def copy_world(original: World, directory: Path) -> World:
    """Copy the files of a world, and what it must contain."""
    for path in original.directory.iterdir():
        if path.suffix in (".raw", ".fvd"):
            # With its times: a base that has another one has changed.
            shutil.copy2(path, directory)
    model = FlatModel(original.model.size, bytes(original.model.data))
    return World(directory, directory / original.image.name, model, random.Random(4711))


@pytest.fixture(params=list(KINDS))
def world(
    request: pytest.FixtureRequest, tmp_path: Path, rng: random.Random, copy_of: Copier
) -> World:
    """Every kind of image in turn."""
    made = copy_of(request.param, tmp_path)
    made.rng = rng
    return made


@dataclass
class Reading:
    """A server of one world for tests that only read; they share it."""

    world: World
    server: Server
    expected: Path  # the content as a raw file


@pytest.fixture(scope="session", params=list(KINDS))
def reading(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, copy_of: Copier
) -> Iterator[Reading]:
    """Every kind of image in turn, served."""
    made = copy_of(request.param, tmp_path_factory.mktemp("reading"))
    expected = made.model.save(made.directory / "expected.img")
    with made.serve() as server:
        yield Reading(made, server, expected)

# SPDX-License-Identifier: Apache-2.0
"""A base whose storage hangs when its image is opened: what is local is served, the rest comes."""

import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from fvdcore import EngineFault
from fvdengine import patience
from fvdengine.create import create_image
from fvdengine.errors import StorageHangs
from fvdengine.header import Header
from fvdengine.opening import open_device, open_plan
from fvdengine.options import CreateOptions, OpenOptions
from fvdtest.tools import wait_until

SIZE = 1 << 20
OPTIONS = OpenOptions(base_timeout=20.0)
HASTY = OpenOptions(base_timeout=0.5)


@pytest.fixture
def content():
    return random.Random(5).randbytes(SIZE)


@pytest.fixture
def make(tmp_path, content):
    """A clone of a base in that format: make("raw") -> its path; the base is base.FORMAT."""

    def create(image_format):
        raw, base = tmp_path / "base.raw", tmp_path / f"base.{image_format}"
        raw.write_bytes(content)
        if image_format == "qcow2":
            subprocess.run(
                ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, base], check=True
            )
        elif image_format == "fvd":
            create_image(base, CreateOptions(base=str(raw), journal_size=65536))
        image = tmp_path / "clone.fvd"
        create_image(image, CreateOptions(base=str(base), base_format=image_format))
        return image

    return create


@pytest.fixture
def hang(monkeypatch):
    """Call it: then no storage of a base answers any more."""
    return lambda: monkeypatch.setattr(patience, "answers", lambda path: False)


@pytest.fixture
def held(tmp_path, monkeypatch):
    """What waits for a base goes on when this file is there."""
    program = tmp_path / "python"
    program.write_text(
        f"#!/bin/sh\nwhile ! [ -e {tmp_path}/go ]; do sleep 0.02; done\n"
        f'exec {sys.executable} "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return tmp_path / "go"


@pytest.mark.parametrize("image_format", ["raw", "fvd", "qcow2"])
def test_what_is_local_is_served_and_the_rest_when_it_comes(
    make, content, hang, held, image_format
):
    image = make(image_format)
    hang()
    with open_plan(image, OPTIONS) as plan:
        assert plan.layers[1].remote.is_late
        assert any("does not answer" in word for word in plan.warnings)
        device = open_device(plan, prefetch_delay=-1)
    device.start()
    try:
        device.write(0, b"x" * 4096)
        assert device.read(0, 4096) == b"x" * 4096
        held.touch()
        assert device.read(4096, SIZE - 4096) == content[4096:]
        device.prefetch_start()
        wait_until(lambda: device.status()["base_bytes_left"] == 0, "the rest")
    finally:
        device.close()


def change(base, image_format):
    """Make it another base than it was."""
    if image_format == "fvd":
        with open_plan(base, OpenOptions()) as plan:
            device = open_device(plan)
        device.start()
        device.close()
    else:
        os.utime(base, ns=(10**18, 10**18))


@pytest.mark.parametrize("image_format", ["raw", "fvd", "qcow2"])
def test_a_base_that_is_another_one_is_never_read(make, content, hang, tmp_path, image_format):
    image = make(image_format)
    change(tmp_path / f"base.{image_format}", image_format)
    hang()
    with open_plan(image, HASTY) as plan:
        device = open_device(plan, prefetch_delay=-1)
    device.start()
    with pytest.raises(EngineFault):
        device.read(0, 4096)
    device.close()
    with open_plan(image, replace(OPTIONS, accept_changed_base=True)) as plan:
        device = open_device(plan, prefetch_delay=-1)
    device.start()
    assert device.read(0, 4096) == content[:4096]
    device.close()


def test_a_base_that_may_not_be_opened_is_not(make, hang, tmp_path):
    image = make("raw")
    (tmp_path / "elsewhere").mkdir()
    moved = image.rename(tmp_path / "elsewhere" / image.name)
    rename_base(moved, str(tmp_path / "base.raw"))
    hang()
    with open_plan(moved, HASTY) as plan:
        device = open_device(plan, prefetch_delay=-1)
    device.start()
    with pytest.raises(EngineFault):
        device.read(0, 4096)
    device.close()


def rename_base(image, name):
    """Let the header, and its copy, name the base so."""
    header = Header.unpack(image.read_bytes()[:8192])
    with image.open("r+b") as file:
        file.write(replace(header, base_img=name).pack() * 2)


def test_a_reader_of_headers_that_hangs_is_noticed(make, content, monkeypatch):
    """A file may be open at once, and its bytes not come."""
    image = make("fvd")
    monkeypatch.setattr(patience, "reads", lambda fd, length: False)
    with open_plan(image, OPTIONS) as plan:
        assert plan.layers[1].remote.is_late


def test_nobody_waits_for_it_in_vain(make, hang, monkeypatch):
    """Where the program that would serve it is missing, that it hangs is told."""
    image = make("raw")
    hang()
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(StorageHangs, match="does not answer"):
        open_plan(image, OPTIONS)


def test_no_image_is_made_over_it(tmp_path, hang):
    (tmp_path / "base").write_bytes(bytes(SIZE))
    hang()
    with pytest.raises(StorageHangs):
        create_image(tmp_path / "clone.fvd", CreateOptions(base=str(tmp_path / "base")))
    assert not (tmp_path / "clone.fvd").exists()

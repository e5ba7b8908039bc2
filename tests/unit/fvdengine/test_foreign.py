# SPDX-License-Identifier: Apache-2.0
"""Bases in other programs' formats, over a real qemu-nbd; files that name files are refused."""

import os
import random
import struct
import subprocess
from dataclasses import replace

import pytest

from fvdengine import foreign
from fvdengine.check import check_image
from fvdengine.create import create_image
from fvdengine.errors import BaseChanged, InvalidOption, ProgramMissing, UnusableForeignBase
from fvdengine.header import BASE_FILE, Header
from fvdengine.opening import open_device, open_plan
from fvdengine.options import CreateOptions, OpenOptions

SIZE = 4 << 20
READ = OpenOptions(read_only=True)


def qemu_img(*words):
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, timeout=60)


@pytest.fixture
def content():
    return random.Random(11).randbytes(SIZE // 2) + bytes(SIZE // 4) + b"z" * (SIZE // 4)


@pytest.fixture
def raw(tmp_path, content):
    path = tmp_path / "golden.raw"
    path.write_bytes(content)
    return path


@pytest.fixture
def make(tmp_path, raw):
    """Convert the content: make("qcow2", "option") -> path."""

    def convert(image_format, *options):
        path = tmp_path / f"golden.{image_format}"
        words = [word for option in options for word in ("-o", option)]
        qemu_img("convert", "-O", image_format, *words, raw, path)
        return path

    return convert


@pytest.mark.parametrize("image_format", foreign.FORMATS)
def test_a_clone_reads_through_qemu_nbd(make, tmp_path, content, image_format):
    base = make(image_format)
    clone = tmp_path / "clone.fvd"
    create_image(clone, CreateOptions(base=str(base), base_format=image_format))
    header = Header.unpack(clone.read_bytes()[:8192])
    assert header.base_img_fmt == image_format
    assert header.extension.base_kind == BASE_FILE
    assert header.extension.base_length >= SIZE
    with open_plan(clone, READ) as plan:
        assert plan.warnings == []
        device = open_device(plan)
    assert device.read(0, SIZE) == content
    device.close()
    assert check_image(clone, READ).exit_status == 0


def test_a_base_that_changed_is_refused(make, tmp_path):
    base = make("qcow2")
    clone = tmp_path / "clone.fvd"
    create_image(clone, CreateOptions(base=str(base), base_format="qcow2"))
    os.utime(base, ns=(1, 1))
    with pytest.raises(BaseChanged, match="modified"):
        open_plan(clone, READ)
    open_plan(clone, replace(READ, accept_changed_base=True)).close()


def refused(base, image_format, match, tmp_path):
    with pytest.raises(UnusableForeignBase, match=match):
        create_image(tmp_path / "x.fvd", CreateOptions(base=str(base), base_format=image_format))
    assert not (tmp_path / "x.fvd").exists()


@pytest.mark.parametrize("image_format", foreign.FORMATS)
@pytest.mark.parametrize("data", [b"", b"QFI\xfb", b"KDMV", b"x" * 4096])
def test_a_file_of_another_kind_is_refused(tmp_path, image_format, data):
    path = tmp_path / "base"
    path.write_bytes(data)
    refused(path, image_format, "begin|kind|elsewhere", tmp_path)


def test_a_qcow2_that_names_files_is_refused(tmp_path, raw):
    overlay = tmp_path / "overlay.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", raw, "-F", "raw", overlay)
    refused(overlay, "qcow2", "backing file", tmp_path)
    outside = tmp_path / "outside.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data'}", outside, "1M")
    refused(outside, "qcow2", "another file", tmp_path)


@pytest.mark.parametrize(
    ("offset", "value", "match"),
    [(4, struct.pack(">I", 9), "version"), (32, struct.pack(">I", 1), "encrypted")],
)
def test_a_qcow2_that_cannot_be_read_is_refused(make, tmp_path, offset, value, match):
    base = make("qcow2")
    with base.open("r+b") as file:
        file.seek(offset)
        file.write(value)
    refused(base, "qcow2", match, tmp_path)


def test_what_qemu_nbd_refuses_is_told_in_its_words(make, tmp_path):
    """An incompatible feature that only later versions know."""
    base = make("qcow2")
    with base.open("r+b") as file:
        file.seek(72)
        file.write(struct.pack(">Q", 1 << 62))
    refused(base, "qcow2", "cannot be used as qcow2: Unsupported qcow2 feature", tmp_path)


@pytest.mark.parametrize("subformat", ["monolithicFlat", "twoGbMaxExtentSparse"])
def test_a_vmdk_that_names_files_is_refused(make, tmp_path, subformat):
    refused(make("vmdk", f"subformat={subformat}"), "vmdk", "one file", tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (b"parentCID=ffffffff", b"parentCID=12345678", "parent"),
        (b" SPARSE ", b" FLAT   ", "other files"),
    ],
)
def test_a_vmdk_whose_description_leads_elsewhere_is_refused(make, tmp_path, old, new, match):
    base = make("vmdk")
    data = base.read_bytes()
    assert old in data
    base.write_bytes(data.replace(old, new, 1))
    refused(base, "vmdk", match, tmp_path)


def test_holes_cannot_be_searched(make, tmp_path):
    base = make("qcow2")
    with pytest.raises(InvalidOption, match="--detect-holes"):
        create_image(
            tmp_path / "x.fvd",
            CreateOptions(base=str(base), base_format="qcow2", detect_holes=65536),
        )


def test_a_missing_qemu_nbd_names_its_package(make, tmp_path, monkeypatch):
    base = make("qcow2")
    monkeypatch.setattr("fvdengine.children.shutil.which", lambda program: None)
    with pytest.raises(ProgramMissing) as caught:
        create_image(tmp_path / "x.fvd", CreateOptions(base=str(base), base_format="qcow2"))
    assert caught.value.details["package"] in ("qemu-utils", "util-linux")

# SPDX-License-Identifier: Apache-2.0
"""Data files: found, allowed, locked, long enough, and never another file of the chain."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from fvdengine import stores
from fvdengine.create import create_image
from fvdengine.errors import (
    ChainLoop,
    DataFileMissing,
    DataFileShared,
    DataFileTooShort,
    ImageInUse,
    NeedsZeroedStore,
    NotAFile,
    PathNotAllowed,
    UnsupportedStore,
    UriNotAllowed,
)
from fvdengine.header import Header
from fvdengine.opening import OpenOptions, open_plan
from fvdengine.options import CreateOptions
from fvdengine.stores import Verdict

READ = OpenOptions(read_only=True)
WRITE = OpenOptions()


def separate(image: Path, data: Path, name: str = "", **values: object) -> Path:
    """Let `image` have its data in `data`, which is made as long as its disk."""
    header = Header.unpack(image.read_bytes()[:8192])
    data.touch()
    os.truncate(data, header.virtual_disk_size)
    changed = replace(header, data_file=name or data.name, data_offset=0, **values)
    with image.open("r+b") as file:
        file.write(2 * changed.pack().ljust(8192, b"\0"))  # its backup copy, too
    return data


@pytest.fixture
def data(tmp_path, image):
    return separate(image, tmp_path / "clone.data")


@pytest.mark.parametrize("options", [READ, WRITE], ids=["read", "write"])
def test_data_file_is_opened_with_its_image(image, data, options):
    with open_plan(image, options) as plan:
        top = plan.layers[0]
        assert top.data.path == str(data)
        assert top.storage == (top.data.fd, str(data))
        assert os.path.samestat(os.fstat(top.data.fd), data.stat())
    assert len([fd for fd in os.listdir("/proc/self/fd") if "clone" in link(fd)]) == 0


def link(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def test_image_that_is_its_own_storage_says_so(image):
    with open_plan(image, READ) as plan:
        assert plan.layers[0].data is None
        assert plan.layers[0].storage == (plan.layers[0].fd, str(image))


def test_two_images_cannot_write_one_data_file(image, data, base, tmp_path):
    second = tmp_path / "second.fvd"
    create_image(second, CreateOptions(base=str(base), journal_size=65536))
    separate(second, data)
    with open_plan(image, WRITE), pytest.raises(ImageInUse, match=r"clone\.data is in use"):
        open_plan(second, READ)
    with open_plan(image, READ), open_plan(second, READ), pytest.raises(ImageInUse):
        open_plan(second, WRITE)
    open_plan(second, WRITE).close()


def damage_missing(image, data, tmp_path):
    data.unlink()


def damage_short(image, data, tmp_path):
    os.truncate(data, (1 << 20) - 1)


def damage_directory(image, data, tmp_path):
    data.unlink()
    data.mkdir()


def damage_link(image, data, tmp_path):
    data.unlink()
    data.symlink_to("/etc/passwd")


CASES = {
    "missing": (damage_missing, DataFileMissing, r"clone\.data of .* does not exist"),
    "short": (damage_short, DataFileTooShort, "1048575 bytes, fewer than the 1048576"),
    "directory": (damage_directory, NotAFile, "a directory"),
    "link outside": (damage_link, PathNotAllowed, "named as data file of"),
    "the image": (
        lambda image, data, place: separate(image, image), DataFileShared, "the image itself",
    ),
    "the base": (
        lambda image, data, place: separate(image, place / "base.raw"), ChainLoop, "comes back",
    ),
    "outside": (
        lambda image, data, place: separate(image, data, "/etc/passwd"), PathNotAllowed,
        "/etc/passwd, named as data file",
    ),
    "an unlisted server": (
        lambda image, data, place: separate(
            image, data, "nbd://example.org/x", data_file_fmt="nbd"
        ), UriNotAllowed, "nbd://example.org/x, named as data file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_wrong_data_file_is_refused_and_nothing_changed(
    image, data, tmp_path, digest, case, read_only
):
    damage, error, text = case
    damage(image, data, tmp_path)
    os.utime(tmp_path / "base.raw", ns=(10**18, 10**18))
    before, files = digest(image), len(os.listdir("/proc/self/fd"))
    with pytest.raises(error, match=text) as caught:
        open_plan(image, OpenOptions(read_only=read_only))
    assert caught.value.hint
    assert digest(image) == before
    # What an earlier test left may be closed meanwhile; nothing may come.
    assert len(os.listdir("/proc/self/fd")) <= files


def test_data_file_elsewhere_needs_to_be_allowed(image, tmp_path):
    vm = tmp_path / "vm"
    vm.mkdir()
    data = separate(image, vm / "x.data", "../elsewhere.data")
    data.rename(tmp_path / "elsewhere.data")
    target = vm / image.name
    image.rename(target)
    allowed = OpenOptions(allow_dirs=(str(tmp_path),))
    header = Header.unpack(target.read_bytes()[:8192])
    with target.open("r+b") as file:
        file.write(2 * replace(header, base_img="../base.raw").pack())
    with pytest.raises(PathNotAllowed, match="as data file of") as caught:
        open_plan(target, READ)
    assert "--allow-dir" in caught.value.hint
    open_plan(target, allowed).close()


def test_data_file_of_a_base_is_opened_for_reading(image, data, tmp_path):
    second = tmp_path / "second.fvd"
    create_image(second, CreateOptions(base=str(image), base_format="fvd"))
    with open_plan(second, WRITE) as plan:
        assert [layer.storage[1] for layer in plan.layers] == [
            str(second), str(data), str(tmp_path / "base.raw"),
        ]  # fmt: skip
        with pytest.raises(OSError, match="Bad file"):
            os.pwrite(plan.layers[1].data.fd, b"x", 0)
        with pytest.raises(ImageInUse):
            open_plan(image, WRITE)


def test_compact_image_may_have_an_empty_data_file(image, data):
    separate(image, data, table_offset=86016, table_size=4096, chunk_size=65536)
    os.truncate(data, 0)
    with image.open("r+b") as file:
        file.seek(86016)
        file.write(b"\xff" * 4096)
    open_plan(image, WRITE).close()


def test_network_store_of_the_data_is_refused_for_writing_only(image, data, monkeypatch):
    real = stores.judge_store
    monkeypatch.setattr(
        stores, "judge_store",
        lambda fd: (Verdict.REFUSED, "nfs4") if link(fd) == str(data) else real(fd),
    )  # fmt: skip
    with pytest.raises(UnsupportedStore, match=r"clone\.data lies on nfs4"):
        open_plan(image, WRITE)
    open_plan(image, READ).close()


@pytest.mark.parametrize("with_data_file", [True, False])
def test_zeros_relied_on_need_a_store_that_has_them(
    image, tmp_path, change, monkeypatch, with_data_file
):
    if with_data_file:
        separate(image, tmp_path / "clone.data")
    change(need_zero_init=1)
    open_plan(image, WRITE).close()
    monkeypatch.setattr(stores, "is_device", lambda fd: True)
    with pytest.raises(NeedsZeroedStore, match="on a block device") as caught:
        open_plan(image, READ)
    assert "--sparse=always" in caught.value.hint

# SPDX-License-Identifier: Apache-2.0
"""What is not there is told from what cannot be read for want of descriptors or memory."""

import errno

import pytest

from fvdd.attach import sysfs


def failing(number):
    def fake_open(*words, **more):
        raise OSError(number, "as asked")

    return fake_open


@pytest.fixture
def block(tmp_path):
    for name, backend in (("nbd0", "fvd:a:1"), ("nbd1", "fvd:b:2"), ("sda", "fvd:c:3")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "backend").write_text(backend + "\n")
    (tmp_path / "nbd2").mkdir()
    return str(tmp_path)


def test_what_is_not_there_is_empty(tmp_path, monkeypatch):
    assert sysfs.read_text(str(tmp_path / "none")) == ""
    assert sysfs.read_int(str(tmp_path / "none")) is None
    for number in (errno.ENODEV, errno.ENXIO):
        monkeypatch.setattr(sysfs, "open", failing(number), raising=False)
        assert sysfs.read_text("any") == ""


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES])
def test_what_cannot_be_read_is_no_answer(block, monkeypatch, number):
    monkeypatch.setattr(sysfs, "open", failing(number), raising=False)
    for look in (
        lambda: sysfs.read_text(f"{block}/nbd0/backend"),
        lambda: sysfs.find_backend("fvd:b:2", sys_block=block),
    ):
        with pytest.raises(OSError, match="as asked"):
            look()
    assert sysfs.owner_of(0) == ""


def test_device_is_found_by_its_backend(block):
    assert sysfs.find_backend("fvd:b:2", 0, block) == 1
    assert sysfs.find_backend("fvd:b:2", 1, block) == 1
    assert sysfs.find_backend("fvd:c:3", None, block) is None
    assert sysfs.find_backend("fvd:c:3", None, f"{block}/none") is None


def test_folder_that_cannot_be_listed_is_no_answer(block, monkeypatch):
    monkeypatch.setattr(sysfs.os, "listdir", failing(errno.EMFILE))
    with pytest.raises(OSError, match="as asked"):
        sysfs.find_backend("fvd:b:2", sys_block=block)


def test_only_a_want_of_means_is_raised():
    sysfs.raise_if_lacking(OSError(errno.ESRCH, "ended"))
    with pytest.raises(OSError, match="too many"):
        sysfs.raise_if_lacking(OSError(errno.EMFILE, "too many"))

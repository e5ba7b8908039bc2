# SPDX-License-Identifier: Apache-2.0
"""Missing nbd support: the causes are told apart, each with its remedy."""

import asyncio
import sys

import pytest

from fvdd.attach import support
from fvdd.attach.attachment import AttachError
from fvdd.attach.nbd_netlink import FamilyMissing


class _Netlink:
    """The driver's netlink family, there or not; appears when the module was loaded."""

    def __init__(self, there=False):
        self.there = there

    async def probe(self):
        if not self.there:
            raise FamilyMissing


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A host with privileges, without nbd; tests change what they are about."""
    monkeypatch.setattr(support, "missing_privilege", lambda: None)
    monkeypatch.setattr(support, "MODULE_FOLDER", str(tmp_path / "absent"))
    monkeypatch.setattr(support, "modules_folder", lambda release: None)

    async def fails():
        return "modprobe: FATAL: Module nbd not found"

    monkeypatch.setattr(support, "load_module", fails)
    return monkeypatch


def _error(netlink) -> AttachError:
    with pytest.raises(AttachError) as caught:
        asyncio.run(support.require_nbd(netlink))
    assert caught.value.hint
    return caught.value


def test_driver_that_answers_is_enough(host):
    asyncio.run(support.require_nbd(_Netlink(there=True)))


def test_module_is_loaded_when_that_helps(host):
    netlink = _Netlink()

    async def load():
        netlink.there = True
        return ""

    host.setattr(support, "load_module", load)
    asyncio.run(support.require_nbd(netlink))


def test_kernel_without_modules(host):
    error = _error(_Netlink())
    assert error.code == "nbd_module_missing"
    assert "no modules on this host" in error.message
    assert "reboot" in error.hint


def test_package_with_the_module_is_missing(host, tmp_path):
    host.setattr(support, "modules_folder", lambda release: str(tmp_path))
    error = _error(_Netlink())
    assert error.code == "nbd_module_missing"
    assert "install the package" in error.hint


def test_module_that_does_not_load(host, tmp_path):
    folder = tmp_path / "kernel" / "drivers" / "block"
    folder.mkdir(parents=True)
    (folder / "nbd.ko.xz").touch()
    host.setattr(support, "modules_folder", lambda release: str(tmp_path))
    error = _error(_Netlink())
    assert "could not be loaded (modprobe: FATAL" in error.message


def test_modprobe_is_missing(host):
    async def absent():
        return "modprobe is not installed"

    host.setattr(support, "load_module", absent)
    assert "kmod" in _error(_Netlink()).hint


def test_network_namespace(host, tmp_path):
    (tmp_path / "nbd").mkdir()
    host.setattr(support, "MODULE_FOLDER", str(tmp_path / "nbd"))
    error = _error(_Netlink())
    assert error.code == "nbd_family_missing"
    assert "PrivateNetwork" in error.hint


@pytest.mark.parametrize("there", [True, False])
def test_no_privilege(host, there):
    host.setattr(support, "missing_privilege", lambda: "fvdd lacks the capability CAP_SYS_ADMIN")
    error = _error(_Netlink(there))
    assert error.code == ("nbd_no_permission" if there else "nbd_module_missing")
    assert "CAP_SYS_ADMIN" in error.message


def test_library_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "fvdd.attach.nbd_netlink", None)
    with pytest.raises(AttachError) as caught:
        support.load_netlink()
    assert caught.value.code == "pyroute2_missing"
    assert "pip install" in caught.value.hint


@pytest.mark.parametrize("name", ["nbd.ko", "nbd.ko.xz", "nbd.ko.zst"])
def test_module_file_is_found_compressed_or_not(tmp_path, name):
    folder = tmp_path / "kernel" / "drivers" / "block"
    folder.mkdir(parents=True)
    assert not support.module_file_exists(str(tmp_path))
    (folder / name).touch()
    assert support.module_file_exists(str(tmp_path))


def test_built_in_driver_is_found(tmp_path):
    (tmp_path / "modules.builtin").write_text("kernel/drivers/block/nbd.ko\n")
    assert support.module_file_exists(str(tmp_path))

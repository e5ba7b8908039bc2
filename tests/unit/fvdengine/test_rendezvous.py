# SPDX-License-Identifier: Apache-2.0
"""The address of an image's server follows the file, whatever it is called."""

import os
import socket

import pytest

from fvdengine.rendezvous import may_command, peer_user, server_address


def test_address_is_the_file_s_and_not_the_name_s(tmp_path):
    image, other = tmp_path / "a.fvd", tmp_path / "b.fvd"
    image.write_bytes(b"x")
    other.write_bytes(b"x")
    (tmp_path / "link").symlink_to(image)
    address = server_address(str(image))
    assert address.startswith("\0")
    assert server_address(str(tmp_path / "link")) == address
    assert server_address(str(other)) != address
    image.rename(tmp_path / "c.fvd")
    assert server_address(str(tmp_path / "c.fvd")) == address


def test_address_fits_a_socket_and_is_free_again_when_its_owner_ends(tmp_path):
    address = server_address(str(tmp_path))
    for _ in range(2):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.bind(address)


def test_missing_image_has_no_address(tmp_path):
    with pytest.raises(FileNotFoundError):
        server_address(str(tmp_path / "none"))


def test_only_root_and_the_same_user_are_obeyed():
    assert may_command(0)
    assert may_command(os.geteuid())
    assert not may_command(os.geteuid() + 12345)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_user(ours) == os.geteuid()

# SPDX-License-Identifier: Apache-2.0
"""Encoding of the messages to the kernel, against bytes written out by hand from its ABI."""

import struct

import pytest

from fvdd.attach.nbd_netlink import Command, NbdMessage, Settings, attributes, message

NESTED = 0x8000


def _attribute(number: int, payload: bytes) -> bytes:
    data = struct.pack("=HH", 4 + len(payload), number) + payload
    return data + bytes(-len(data) % 4)


def _u64(number: int, value: int) -> bytes:
    return _attribute(number, struct.pack("=Q", value))


def _u32(number: int, value: int) -> bytes:
    return _attribute(number, struct.pack("=I", value))


def _body(made: NbdMessage) -> bytes:
    """The encoded message behind the netlink header."""
    made.encode()
    return bytes(made.data[16:])


SETTINGS = Settings(
    backend="fvd:web:0000",
    size_bytes=1 << 40,
    block_size=512,
    flags=0x16D,
    kernel_timeout=0,
    dead_timeout=43200,
)


def test_connect_carries_everything_explicitly():
    body = _body(message(Command.CONNECT, attributes(SETTINGS, 3, [5, 6])))
    items = b"".join(_attribute(1 | NESTED, _u32(1, fd)) for fd in (5, 6))
    expected = (
        struct.pack("=BBH", 1, 1, 0)
        + _u32(1, 3)
        + _u64(2, 1 << 40)
        + _u64(3, 512)
        + _u64(4, 0)
        + _u64(5, 0x16D)
        + _u64(8, 43200)
        + _attribute(7 | NESTED, items)
        + _attribute(10, b"fvd:web:0000\0")
    )
    assert body == expected


def test_connect_without_number_leaves_the_choice_to_the_kernel():
    names = [name for name, _ in attributes(SETTINGS, None, [5])]
    assert "NBD_ATTR_INDEX" not in names
    # A timeout of 0 is a value: left out, the previous user's would stay in force.
    assert ("NBD_ATTR_TIMEOUT", 0) in attributes(SETTINGS, None, [5])


def test_reconfigure_changes_only_what_is_given():
    again = Settings(backend="b", kernel_timeout=90, dead_timeout=7)
    body = _body(message(Command.RECONFIGURE, attributes(again, 0, [9])))
    expected = (
        struct.pack("=BBH", 3, 1, 0)
        + _u32(1, 0)
        + _u64(4, 90)
        + _u64(8, 7)
        + _attribute(7 | NESTED, _attribute(1 | NESTED, _u32(1, 9)))
        + _attribute(10, b"b\0")
    )
    assert body == expected


@pytest.mark.parametrize(("command", "number"), [(Command.DISCONNECT, 2), (Command.STATUS, 5)])
def test_short_commands(command, number):
    body = _body(message(command, attributes(None, 12)))
    assert body == struct.pack("=BBH", number, 1, 0) + _u32(1, 12)


def test_status_answer_is_decoded():
    items = b"".join(
        _attribute(1, _u32(1, index) + _attribute(2, struct.pack("=B", connected)))
        for index, connected in ((0, 1), (7, 0))
    )
    body = struct.pack("=BBH", 5, 1, 0) + _attribute(9, items)
    header = struct.pack("=IHHII", 16 + len(body), 0x1A, 0, 1, 0)
    made = NbdMessage(header + body)
    made.decode()
    found = {
        item.get_attr("NBD_DEVICE_INDEX"): item.get_attr("NBD_DEVICE_CONNECTED")
        for item in made.get_attr("NBD_ATTR_DEVICE_LIST").get_attrs("NBD_DEVICE_ITEM")
    }
    assert found == {0: 1, 7: 0}

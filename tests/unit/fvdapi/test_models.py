# SPDX-License-Identifier: Apache-2.0
"""Models of the control API: what is accepted, what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fvdapi.models import (
    AttachRequest,
    DeviceStatus,
    is_device_name,
    is_partition_name,
    name_from_image,
)

STATUS = {
    "name": "web",
    "device": "/dev/nbd0",
    "image": "/srv/web.fvd",
    "state": "attached",
    "read_only": False,
    "timeouts": {
        "resend_timeout": 2,
        "base_timeout": 60,
        "kernel_timeout": 0,
        "dead_timeout": 43200,
    },
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image", "relative.fvd"),
        ("image", "/a\0b"),
        ("image", ""),
        ("name", "a/b"),
        ("name", ".."),
        ("name", ""),
        ("name", "x" * 65),
        ("name", "web\n"),
        ("device", "/dev/sda"),
        ("device", "/dev/nbd"),
        ("device", "/dev/nbd0p1"),
        ("connections", 0),
        ("connections", 17),
        ("transport", "iscsi"),
        ("sector_size", 1024),
        ("wait", "forever"),
        ("allow_dirs", ["relative"]),
        ("prefetch_delay", -2),
        ("copy_on_reed", True),
    ],
)
def test_bad_attach_request_is_refused(field, value):
    with pytest.raises(ValidationError):
        AttachRequest.model_validate({"image": "/a.fvd", field: value})


def test_defaults_of_attach_are_those_of_the_documentation():
    request = AttachRequest(image="/a.fvd")
    assert (request.connections, request.sector_size, request.wait) == (1, 512, "partitions")
    assert request.prefetch_delay is None
    assert not request.read_only


def test_answer_of_a_newer_daemon_is_read():
    status = DeviceStatus.model_validate({**STATUS, "colour": "blue"})
    assert status.name == "web"


def test_status_has_the_documented_fields():
    shown = DeviceStatus.model_validate(STATUS).model_dump(mode="json")
    assert set(shown) >= {
        "name", "device", "image", "state", "read_only", "transport", "connections", "worker_pid",
        "size_bytes", "local_bytes", "base_bytes_left", "prefetch", "restarts", "timeouts",
    }  # fmt: skip
    assert set(shown["prefetch"]) >= {
        "state", "rate_bytes_per_second", "eta_seconds", "paused_reason",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/srv/web.fvd", "web"),
        ("/srv/My Disk (1).fvd", "My-Disk-1"),
        ("/srv/.hidden", "hidden"),
        ("/srv/...", "device"),
        ("/srv/no-suffix", "no-suffix"),
        ("/srv/a.b.fvd", "a.b"),
        ("/srv/äöü.fvd", "device"),
        ("/srv/disk-part1.fvd", "disk_part1"),
        ("/srv/disk-part1", "disk_part1"),
        ("/srv/my-partition1.fvd", "my-partition1"),
    ],
)
def test_name_comes_from_the_image(path, name):
    assert name_from_image(path) == name


@given(st.text())
def test_name_from_any_image_is_a_name(text):
    assert is_device_name(name_from_image("/" + text))


@given(st.from_regex(r"[a-z]{0,60}-part[0-9]{1,8}", fullmatch=True))
def test_name_from_an_image_is_no_partitions(text):
    assert is_partition_name(text)
    assert not is_partition_name(name_from_image("/" + text))

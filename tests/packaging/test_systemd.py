# SPDX-License-Identifier: Apache-2.0
"""The unit of fvdd keeps mounted devices alive and offers what the daemon relies on."""

import re

import pytest

from fvdtest import tree

UNIT = tree.ROOT / "packaging/systemd/fvdd.service"


def settings():
    """The settings of the unit as {section: [(name, value)]}."""
    found = {}
    section = None
    for line in UNIT.read_text().splitlines():
        if match := re.fullmatch(r"\[(\w+)\]", line):
            section = found.setdefault(match.group(1), [])
        elif line and not line.startswith("#"):
            name, _, value = line.partition("=")
            section.append((name, value))
    return found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Type", "notify"),
        ("KillMode", "process"),
        ("RuntimeDirectory", "fvd"),
        ("RuntimeDirectoryPreserve", "yes"),
        ("LimitMEMLOCK", "infinity"),
    ],
)
def test_service_has(name, value):
    assert (name, value) in settings()["Service"]


@pytest.mark.parametrize("name", ["PrivateNetwork", "PrivateMounts", "ProtectSystem"])
def test_service_does_not_hide_the_host(name):
    assert name not in dict(settings()["Service"])


def test_module_options_make_no_device_in_advance():
    text = (tree.ROOT / "packaging/modprobe.d/fvd.conf").read_text()
    assert "options nbd nbds_max=0 max_part=16" in text.splitlines()

# SPDX-License-Identifier: Apache-2.0
"""What a device is, as labels; the room of its image."""

import os

import pytest

from fvdd.metrics.exposition import Exposition
from fvdd.metrics.identity import Identity, strip_secrets, write_identities, write_stores


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("/srv/base.raw", "/srv/base.raw"),
        ("https://user:secret@host:8443/a?token=x#y", "https://host:8443/a"),
        ("nbd://host/export", "nbd://host/export"),
    ],
)
def test_secrets_stay_out_of_labels(base, shown):
    assert strip_secrets(base) == shown


def test_all_is_in_one_sample():
    out = Exposition()
    base = "nbd://me:pass@host/export"
    write_identities(
        out, [Identity("nbd0", "/dev/nbd0", "web", "/i.fvd", "nbd", base, "raw", "fvd:web:1")]
    )
    assert out.text().splitlines()[2:] == [
        'fvd_device_info{device="nbd0",devpath="/dev/nbd0",name="web",image="/i.fvd",attach="nbd",'
        'base="nbd://host/export",base_format="raw",cookie="fvd:web:1"} 1'
    ]


def test_room_is_told_and_an_image_that_is_gone_has_no_sample(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(b"x" * 70000)
    out = Exposition()
    write_stores(out, [("nbd0", str(image)), ("nbd1", str(tmp_path / "gone"))])
    lines = [line for line in out.text().splitlines() if not line.startswith("#")]
    assert len(lines) == 2
    taken = os.stat(image).st_blocks * 512
    assert lines[1] == f'fvd_image_allocated_bytes{{device="nbd0"}} {taken}'

# SPDX-License-Identifier: Apache-2.0
"""Bits behind the last block mean nothing: a takeover must not be refused over them."""

from fvdengine.header import Header
from fvdtest.images import make_image, open_image

SIZE = 40 * 4096


def test_padding_bits_on_disk_do_not_refuse_a_takeover(tmp_path):
    (tmp_path / "base.raw").write_bytes(b"b" * SIZE)
    image = make_image(tmp_path / "clone.fvd", base=str(tmp_path / "base.raw"), block_size=4096)
    header = Header.unpack(image.read_bytes()[:8192])
    with image.open("r+b") as file:
        file.seek(header.bitmap_offset + 5)
        file.write(b"\xff" * 100)
    opened = open_image(image, live_dir=tmp_path / "live")
    opened.device.write(4096, b"w" * 4096)
    opened.abandon()
    successor = open_image(image, live_dir=tmp_path / "live", takeover=True)
    assert successor.device.read(0, 3 * 4096) == b"b" * 4096 + b"w" * 4096 + b"b" * 4096
    successor.close()

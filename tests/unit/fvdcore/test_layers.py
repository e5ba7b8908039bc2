# SPDX-License-Identifier: Apache-2.0
"""Opening a chain: what each failure leaves behind, and that every layer is read through."""

import os

import pytest

from fvdcore import Device, EngineFault
from fvdtest.images import make_image, open_image

SIZE = 1 << 20


def open_descriptors():
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("bad", [0, 1, 2], ids=["top", "middle", "base"])
def test_a_layer_that_cannot_be_opened_leaves_no_descriptor(tmp_path, bad):
    base = tmp_path / "base.raw"
    base.write_bytes(os.urandom(SIZE))
    middle = make_image(tmp_path / "middle.fvd", base=str(base))
    top = make_image(tmp_path / "top.fvd", base=str(middle), base_format="fvd")
    fds = [os.open(top, os.O_RDWR), os.open(middle, os.O_RDONLY), os.open(base, os.O_RDONLY)]
    before = open_descriptors()
    used = list(fds)
    used[bad] = 999
    layers = list(zip(used, ("fvd", "fvd", "raw"), strict=True))
    with pytest.raises(EngineFault, match="Bad file descriptor"):
        Device.open(layers)
    assert open_descriptors() == before
    for fd in fds:
        os.close(fd)


def test_a_chain_of_five_reads_every_layer(tmp_path):
    content = bytearray(os.urandom(SIZE))
    (tmp_path / "0.raw").write_bytes(content)
    below, form = str(tmp_path / "0.raw"), "raw"
    for level in range(1, 6):
        name = f"{level}.fvd"
        make_image(tmp_path / name, base=below, base_format=form)
        opened = open_image(tmp_path / name)
        patch = os.urandom(5000)
        opened.device.write(level * 100_000, patch)
        content[level * 100_000 : level * 100_000 + 5000] = patch
        assert opened.device.read(0, SIZE) == content
        opened.close()
        below, form = str(tmp_path / name), "fvd"

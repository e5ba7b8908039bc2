# SPDX-License-Identifier: Apache-2.0
"""A base on storage that hangs, as a network file system whose server is gone: a suspended device
holds every read up in the kernel, where nobody can call it back."""

import mmap
import os
import signal
import struct

import pytest

from fvdtest.guest import load_driver, run, wait_until
from fvdtest.nbd_client import CMD_READ, NbdError
from fvdtest.serve import Server

pytestmark = pytest.mark.kernel

SIZE = 16 << 20
BLOCK = 4096
READS = 24  # more than there are threads for what may hang
EIO = 5
NODE = "/dev/mapper/hanging"


@pytest.fixture
def base(store, loops):
    """The content of a block device that can be suspended."""
    load_driver("dm_mod", "md/dm-mod.ko")
    content = os.urandom(SIZE)
    (store / "disk").write_bytes(content)
    table = f"0 {SIZE // 512} linear {loops(store / 'disk')} 0"
    run("dmsetup", "create", "hanging", "--table", table)
    # Who closes a block device last waits in the kernel for its I/O: not the server, that is.
    held = os.open(NODE, os.O_RDONLY)
    yield content
    run("dmsetup", "resume", "hanging")
    os.close(held)
    run("dmsetup", "remove", "--retry", "hanging")


def suspend():
    run("dmsetup", "suspend", "--noflush", "--nolockfs", "hanging")


def test_a_base_that_hangs_holds_up_nothing_else(fvd, base, store, tmp_path):
    image = store / "clone.fvd"
    policy = ("--allow-dir", "/dev")
    fvd.ctl("create", image, "--base", NODE, "--base-format", "raw", *policy)
    options = (*policy, "--prefetch-delay", "off", "--base-timeout", "2")
    with Server(image, *options, directory=tmp_path) as server:
        with server.connect() as client, server.connect() as waiting:
            client.write(0, b"x" * BLOCK)
            suspend()
            for at in range(READS):
                where = SIZE // 2 + at * 65536
                waiting.send(struct.pack(">IHHQQI", 0x25609513, 0, CMD_READ, at, where, BLOCK))
            for turn in range(1, 9):
                client.write(turn * BLOCK, b"y" * BLOCK)
                client.flush()
                assert client.read(turn * BLOCK, BLOCK) == b"y" * BLOCK
            answers = [struct.unpack(">IIQ", waiting.receive(16))[1:] for _ in range(READS)]
            assert sorted(answers) == [(EIO, at) for at in range(READS)]
            assert client.read(0, BLOCK) == b"x" * BLOCK
            run("dmsetup", "resume", "hanging")
            wait_until(lambda: reads(client, base), 60, "the base to be back")
            suspend()
            waiting.send(struct.pack(">IHHQQI", 0x25609513, 0, CMD_READ, 1, SIZE - BLOCK, BLOCK))
            client.flush()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def reads(client, base):
    """Whether a read of the base is answered, which must be rightly."""
    try:
        found = client.read(SIZE // 2, BLOCK)
    except NbdError:
        return False
    assert found == base[SIZE // 2 :][:BLOCK]
    return True


@pytest.fixture
def far(base, mounts):
    """A folder on a file system that can be made to hang, with nothing of it in memory."""
    run("mkfs.ext4", "-q", "-F", NODE)
    point = mounts(NODE)

    def forget():
        run("umount", point)
        run("mount", NODE, point)
        suspend()

    yield point, forget
    run("dmsetup", "resume", "hanging")


@pytest.mark.parametrize("image_format", ["raw", pytest.param("fvd", marks=pytest.mark.proof)])
def test_an_image_whose_base_hangs_is_attached_and_serves_what_is_local(
    fvd, far, store, image_format
):
    """Nor does a successor wait for it, nor a detach; and it is read when it is there again."""
    point, forget = far
    content = os.urandom(SIZE // 4)
    (point / "golden.raw").write_bytes(content)
    if image_format == "fvd":
        below = ("--base", point / "golden.raw", "--journal-size", "64k")
        fvd.ctl("create", point / "golden.fvd", *below)
    image, golden = store / "clone.fvd", point / f"golden.{image_format}"
    options = ("--name", "web", "--allow-dir", point, "--prefetch-delay", "off", "--wait", "node")
    fvd.ctl("create", image, "--base", golden, "--base-format", image_format, *options[2:4])
    # Whoever opens the node makes the kernel look for partitions: that much is local.
    with open(fvd.attach(image, *options), "r+b") as disk:
        disk.write(b"x" * (64 * BLOCK))
    fvd.detach("web")
    forget()
    node = os.open(fvd.attach(image, *options), os.O_RDWR | os.O_DIRECT)
    try:
        page = mmap.mmap(-1, BLOCK)
        assert os.preadv(node, [page], BLOCK) == BLOCK
        assert page[:] == b"x" * BLOCK
        os.kill(fvd.status("web")["worker_pid"], signal.SIGKILL)
        assert os.pwritev(node, [page], 2 * BLOCK) == BLOCK
        run("dmsetup", "resume", "hanging")
        assert os.preadv(node, [page], 70 * BLOCK) == BLOCK
        assert page[:] == content[70 * BLOCK : 71 * BLOCK]
    finally:
        os.close(node)
    fvd.detach("web")

# SPDX-License-Identifier: Apache-2.0
"""A clone of a real file system: quick to attach, private, complete in the end."""

import os
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fvdtest.guest import checksum, run, wait_until
from fvdtest.remote import Nbdkit

pytestmark = pytest.mark.kernel

TREE = Path("/usr/lib/python3.11/asyncio")
PREFETCH_SECONDS = 120


def samples():
    """The metrics endpoint as {(name, labels): value}."""
    with urllib.request.urlopen("http://127.0.0.1:9809/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(name, **labels):
    wanted = set(labels.items())
    return sum(
        value for (sample, has), value in samples().items() if sample == name and wanted <= set(has)
    )


def make_base(store, *options):
    content = store / "content"
    content.mkdir()
    run("cp", "-a", TREE, content / "tree")
    (content / "noise").write_bytes(os.urandom(24 << 20))
    path = store / "base.img"
    run("mkfs.ext4", "-q", "-F", *options, "-d", content, path, "300M")
    return path


@pytest.fixture
def base(store):
    """An ext4 file system with a tree and a large file of noise, as a raw file."""
    return make_base(store)


@pytest.fixture
def far(base, tmp_path):
    """The same behind an NBD server."""
    with Nbdkit(tmp_path, "file", base) as server:
        yield server


def clone(fvd, base, name, *options, uri=None):
    image = base.with_name(f"{name}.fvd")
    fvd.ctl("create", image, "--base", uri or base, "--base-format", "raw", *options)
    return image


def test_clone_changes_and_its_base_does_not(fvd, base, mounts):
    before = checksum(base)
    image = clone(fvd, base, "clone", "--prefetch-delay", "off")
    point = mounts(fvd.attach(image))
    content = base.with_name("content")
    run("diff", "-r", content / "tree", point / "tree")
    (point / "tree/base_events.py").write_text("changed")
    (point / "new").write_bytes(b"n" * 300_001)
    run("rm", "-r", point / "tree/__pycache__")
    run("umount", point)
    fvd.detach(image)
    assert checksum(base) == before
    fvd.ctl("check", image)

    device = fvd.attach(image)
    run("e2fsck", "-fn", device)
    point = mounts(device)
    assert (point / "tree/base_events.py").read_text() == "changed"
    assert (point / "new").read_bytes() == b"n" * 300_001
    assert not (point / "tree/__pycache__").exists()
    assert checksum(point / "noise") == checksum(content / "noise")
    run("umount", point)


def test_mount_reads_little_of_the_base(fvd, base, mounts):
    image = clone(fvd, base, "clone", "--prefetch-delay", "off")
    point = mounts(fvd.attach(image))
    assert 0 < total("fvd_base_bytes_total") < 4 << 20
    run("umount", point)


def test_prefetch_completes_and_the_data_are_right(fvd, base, far, mounts):
    """From a server, which nobody needs any more when it is done."""
    no_minima = ("--prefetch-min-read", "0", "--prefetch-min-write", "0")  # a busy machine is slow
    image = clone(fvd, base, "clone", "--prefetch-delay", "0", *no_minima, uri=far.uri)
    device = fvd.attach(image, "--name", "clone", "--allow-uri", far.uri)
    point = mounts(device)
    (point / "during").write_bytes(b"d" * 1_000_000)
    # The last block is local before the state that says so is durable (I5).
    finished = wait_until(
        lambda: (now := fvd.status("clone"))["prefetch"]["state"] == "done" and now,
        PREFETCH_SECONDS,
        "prefetch",
    )
    assert finished["base_bytes_left"] == 0
    far.kill()
    read = total("fvd_base_bytes_total")
    content = base.with_name("content")
    assert checksum(point / "noise") == checksum(content / "noise")
    run("diff", "-r", content / "tree", point / "tree")
    assert total("fvd_base_bytes_total") == read
    run("umount", point)
    run("e2fsck", "-fn", device)
    fvd.detach("clone")
    fvd.ctl("check", image)

    point = mounts(fvd.attach(image, "--name", "clone"))
    assert (point / "during").read_bytes() == b"d" * 1_000_000
    assert checksum(point / "noise") == checksum(content / "noise")
    run("umount", point)


def test_second_read_comes_from_the_clone(fvd, store, mounts):
    # Nothing has to be dropped: there is room for all, and no two reads share a block, since the
    # file system has none smaller than the clone's.
    base = make_base(store, "-b", "4096")
    options = ("--prefetch-delay", "off", "--max-outstanding-copy-on-read", "64M")
    image = clone(fvd, base, "clone", "--copy-on-read", *options)
    device = fvd.attach(image, "--name", "clone")
    point = mounts(device, "-o", "ro,noload")
    noise = checksum(point / "noise")
    run("umount", point)
    read = total("fvd_base_bytes_total")
    assert read > 20 << 20
    run("blockdev", "--flushbufs", device)
    point = mounts(device, "-o", "ro,noload")
    assert checksum(point / "noise") == noise
    assert total("fvd_base_bytes_total") == read
    run("umount", point)


def test_metrics_count_what_was_done(fvd, base, mounts):
    image = clone(fvd, base, "clone", "--prefetch-delay", "off")
    device = fvd.attach(image, "--name", "clone")
    label = {"device": Path(device).name}
    point = mounts(device)
    before = total("fvd_io_bytes_total", op="write", **label)
    (point / "new").write_bytes(os.urandom(8 << 20))
    run("sync", "-f", point)
    assert total("fvd_io_bytes_total", op="write", **label) - before >= 8 << 20
    assert total("fvd_io_requests_total", op="flush", **label) > 0
    assert total("fvd_io_errors_total", **label) == 0
    assert total("fvd_device_up", **label) == 1
    run("umount", point)
    fvd.detach("clone")
    assert not [key for key in samples() if ("device", Path(device).name) in key[1]]

# SPDX-License-Identifier: Apache-2.0
"""`fvdctl status`, `top` and what the page asks for say in words what is wrong, while it is."""

import json
import os
import re

import pytest

from fvdapi.models import PrefetchRequest
from fvdctl.view import Picture, all_lines
from fvdtest.daemon import wait_until

MIB = 1 << 20


def told(daemon, topic):
    """The text of web's trouble of this topic; None where there is none."""
    found = {one.topic: one.text for one in daemon.device("web").troubles}
    return found.get(topic)


def row(daemon):
    """The row of web in `top`."""
    with daemon.client() as client:
        lines = all_lines(Picture(client.activity()), "name", "web", 80, 24)
    return next(line for line in lines if line.startswith("> web"))


def test_a_base_that_cannot_be_read_is_told_and_why_and_when_it_is_over(daemon, clone, base):
    content = base.read_bytes()
    disk = daemon.attach(clone()[0], "--wait", "node")
    disk.read(0, 4096)
    with pytest.raises(OSError, match="answered with an error"):
        disk.read(1 << 40, 4096)
    assert daemon.device("web").troubles == (), "a wrong request is none"
    os.truncate(base, 4096)
    with pytest.raises(OSError, match="answered with an error"):
        disk.read(2 * MIB, 512)
    wait_until(lambda: str(base) in (told(daemon, "errors") or ""), "what failed last")
    shown = daemon.ctl("status", "web").stdout
    assert re.search(r"^TROUBLE +base: the last read of the base failed: no good", shown, re.M)
    assert re.match(r"1 requests failed \(1 read base\), .* read of 512 at 2097152: Input/output "
                    r"error, ", told(daemon, "errors"))  # fmt: skip
    text = told(daemon, "base")
    assert re.search(r"no good answer since 20\d\d-.*, \d+s ago, .*; the last error \d+s ago, "
                     r"of 512 at 2097152: Input/output error$", text)  # fmt: skip
    assert "NO BASE" in row(daemon)
    assert " attached, NO BASE " in daemon.ctl("list").stdout
    with daemon.client() as client:
        client.prefetch("web", PrefetchRequest(action="start"))
    wait_until(lambda: told(daemon, "prefetch"), "prefetch to wait")
    assert told(daemon, "prefetch") == "waits for the base, and tries again by itself"
    waits = daemon.device("web").prefetch
    assert (waits.state, waits.paused_reason, waits.rate_bytes_per_second) == ("waiting", "base", 0)
    assert re.search(r"^prefetch +waiting for the base$", daemon.ctl("status", "web").stdout, re.M)
    line = daemon.ctl("prefetch", "web", "wait", "--json", "--timeout", "1", check=False).stdout
    assert json.loads(line.splitlines()[0])["paused_reason"] == "base"
    base.write_bytes(content)
    disk.read(2 * MIB, 512)
    assert told(daemon, "base") is None
    assert "ERRORS" in row(daemon), "for a while"


def test_the_store_is_the_one_that_the_data_are_in(daemon, clone, tmp_path):
    image, _ = clone("web", "--data-file", tmp_path / "web.raw")
    disk = daemon.attach(image, "--wait", "node")
    disk.write(0, b"w" * MIB)
    found = {key[0]: value for key, value in daemon.metrics().items() if "nbd0" in str(key[1])}
    system = os.statvfs(tmp_path)
    taken = os.stat(tmp_path / "web.raw").st_blocks * 512
    assert found["fvd_image_allocated_bytes"] == taken >= MIB, "the data file, not the image"
    assert found["fvd_backing_store_size_bytes"] == system.f_blocks * system.f_frsize


def test_an_image_that_was_cut_stops_and_goes_on_when_it_is_whole_again(daemon, tmp_path):
    image = tmp_path / "web.fvd"
    daemon.ctl("create", image, "8M")
    disk = daemon.attach(image)
    content = os.urandom(8 * MIB)
    disk.write(0, content)
    disk.flush()
    whole = image.read_bytes()
    os.truncate(image, len(whole) - 4 * MIB)
    with pytest.raises(OSError, match="answered with an error"):
        disk.read(6 * MIB, 4096)
    with pytest.raises(OSError, match="answered with an error"):
        disk.write(7 * MIB, bytes(4096))
    with pytest.raises(OSError, match="answered with an error"):
        disk.flush()
    assert "was made shorter by another program" in told(daemon, "fault")
    refused = daemon.ctl("detach", "web", check=False)
    assert refused.returncode, refused
    assert daemon.device("web").state == "attached"
    refused = daemon.ctl("recover", "web", "--discard-unflushed", check=False)
    assert refused.returncode, refused
    assert "is cut short" in refused.stderr
    image.write_bytes(whole)  # from a copy
    daemon.ctl("recover", "web", "--discard-unflushed")
    assert disk.read(0, 8 * MIB) == content

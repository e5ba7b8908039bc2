# SPDX-License-Identifier: Apache-2.0
"""Names that change their meaning while an image is opened: what was not allowed is never read.

Whoever owns the directory of an image may swap things in it at any moment; the one who opens it may
be root. Some tests put the swap at the worst place, one lets a process swap as fast as it can.
"""

import contextlib
import os
import subprocess
import sys

import pytest

from fvdengine import chain, paths
from fvdengine.create import create_image
from fvdengine.errors import BaseMissing, EngineError, PathNotAllowed
from fvdengine.opening import open_plan
from fvdengine.options import CreateOptions, OpenOptions

SECRET = b"secret".ljust(4096, b"!")
PUBLIC = b"public".ljust(4096, b".")
READ = OpenOptions(read_only=True)


@pytest.fixture
def place(tmp_path):
    """home/ is the attacker's; secrets/ holds what he must not see, under the same name."""
    for folder, content in (("home/vm", PUBLIC), ("secrets", SECRET)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "base.raw").write_bytes(content)
        times = (0, 0)
        os.utime(tmp_path / folder / "base.raw", times)
    (tmp_path / "secrets/other.fvd").write_bytes(b"")
    return tmp_path


def content(fd):
    try:
        return os.pread(fd, 4096, 0)
    finally:
        os.close(fd)


def swap_in(place, monkeypatch, name, swap):
    """Call `swap` just before the function `name` of paths does its work."""
    original = getattr(paths, name)

    def racing(*arguments, **options):
        swap()
        monkeypatch.setattr(paths, name, original)
        return original(*arguments, **options)

    monkeypatch.setattr(paths, name, racing)


def test_directory_that_became_a_link_is_not_followed(place, monkeypatch):
    def swap():
        (place / "home/vm").rename(place / "home/old")
        (place / "home/vm").symlink_to(place / "secrets")

    swap_in(place, monkeypatch, "_open_beneath", swap)
    with pytest.raises((PathNotAllowed, BaseMissing)):
        content(paths.open_base("base.raw", str(place / "home/vm/clone.fvd"), ())[0])


def test_image_that_became_a_link_does_not_move_its_directory(place, monkeypatch):
    """The header is the attacker's; then the image's name leads to somebody else's directory."""
    image = place / "home/vm/clone.fvd"
    create_image(image, CreateOptions(base=str(place / "home/vm/base.raw")))
    original = chain.read_header

    def racing(fd, path):
        header = original(fd, path)
        image.rename(place / "home/vm/moved.fvd")
        image.symlink_to(place / "secrets/other.fvd")
        monkeypatch.setattr(chain, "read_header", original)
        return header

    monkeypatch.setattr(chain, "read_header", racing)
    with open_plan(image, READ) as plan:
        assert os.pread(plan.layers[1].fd, 4096, 0) == PUBLIC


def test_base_that_became_a_link_does_not_move_the_directory_of_its_own_base(place, monkeypatch):
    middle, image = place / "home/vm/middle.fvd", place / "home/vm/top.fvd"
    create_image(middle, CreateOptions(base=str(place / "home/vm/base.raw")))
    create_image(image, CreateOptions(base=str(middle), base_format="fvd"))
    original = chain.read_header

    def racing(fd, path):
        header = original(fd, path)
        if path == str(middle):
            middle.rename(place / "home/vm/moved.fvd")
            middle.symlink_to(place / "secrets/other.fvd")
        return header

    monkeypatch.setattr(chain, "read_header", racing)
    with open_plan(image, READ) as plan:
        assert os.pread(plan.layers[2].fd, 4096, 0) == PUBLIC


def test_data_file_lies_where_the_image_was_when_it_was_opened(place, monkeypatch):
    image = place / "home/vm/clone.fvd"
    create_image(image, CreateOptions(size=1 << 20, data_file=str(image.parent / "clone.data")))
    (place / "secrets/clone.data").write_bytes(SECRET * 256)
    original = chain.read_header

    def racing(fd, path):
        header = original(fd, path)
        image.rename(place / "home/vm/moved.fvd")
        image.symlink_to(place / "secrets/other.fvd")
        return header

    monkeypatch.setattr(chain, "read_header", racing)
    with open_plan(image, READ) as plan:
        assert os.pread(plan.layers[0].data.fd, 6, 0) != b"secret"


SWAPPER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
one, other = (os.fsencode(word) for word in sys.argv[1:])
print("ready", flush=True)
while True:
    libc.renameat2(-100, one, -100, other, 2)
"""


@pytest.fixture
def swapper(place):
    """home/vm is, from moment to moment, the directory or a link to the secrets."""
    (place / "home/link").symlink_to(place / "secrets")
    words = [sys.executable, "-P", "-c", SWAPPER, place / "home/vm", place / "home/link"]
    process = subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("openat2", [True, False], ids=["openat2", "by steps"])
def test_racing_swapper_never_wins(place, swapper, monkeypatch, openat2):
    if not openat2:
        monkeypatch.setattr(paths, "_SYS_OPENAT2", 0xFFFF)  # ENOSYS
    image = str(place / "home/vm/clone.fvd")
    # Where the image was opened; its name may by now mean another place.
    directory = str(place / "home/vm")
    opened = refused = 0
    while (opened < 20 or refused < 20) and opened + refused < 200_000:
        try:
            fd, _ = paths.open_base("base.raw", image, (), directory)
            assert content(fd) == PUBLIC
            opened += 1
        except EngineError:
            refused += 1
    assert swapper.poll() is None
    assert opened >= 20
    assert refused >= 20


def test_swapper_would_win_without_the_policy(place, swapper):
    """So that the race above is a race."""
    found = set()
    for _ in range(200_000):
        with contextlib.suppress(OSError):
            found.add((place / "home/vm/base.raw").read_bytes())
        if len(found) == 2:
            break
    assert found == {PUBLIC, SECRET}

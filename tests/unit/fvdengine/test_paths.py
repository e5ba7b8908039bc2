# SPDX-License-Identifier: Apache-2.0
"""The path policy: where an image may lead, and where not, with every trick of symlinks."""

import os
import socket
import stat
import subprocess

import pytest

from fvdengine import paths
from fvdengine.errors import BaseMissing, ImageNotFound, IoFailed, NotAFile, PathNotAllowed


@pytest.fixture
def place(tmp_path):
    """vm/clone.fvd, vm/sub/in.raw, other/out.raw."""
    for name in ("vm/sub", "other"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("vm/clone.fvd", "vm/in.raw", "vm/sub/in.raw", "other/out.raw"):
        (tmp_path / name).write_text(name)
    return tmp_path


def content(result):
    fd, real = result
    try:
        assert os.path.samestat(os.fstat(fd), os.stat(real))
        assert os.get_inheritable(fd) is False
        return os.pread(fd, 100, 0).decode()
    finally:
        os.close(fd)


def open_base(place, name, *allowed):
    return content(paths.open_base(name, str(place / "vm/clone.fvd"), allowed))


@pytest.mark.parametrize("name", ["in.raw", "sub/in.raw", "./sub/../in.raw", "../vm/in.raw"])
def test_own_tree_is_allowed(place, name):
    assert open_base(place, name).endswith("in.raw")


def test_absolute_name_in_the_own_tree_is_allowed(place):
    assert open_base(place, str(place / "vm/sub/in.raw")) == "vm/sub/in.raw"


@pytest.mark.parametrize("name", ["../other/out.raw", "/etc/passwd", "sub/../../other/out.raw"])
def test_outside_is_refused(place, name):
    with pytest.raises(PathNotAllowed) as caught:
        open_base(place, name)
    assert "--allow-dir" in caught.value.hint


def test_symlink_out_of_the_tree_is_refused(place):
    (place / "vm/link").symlink_to("../other/out.raw")
    (place / "vm/dir").symlink_to(place / "other")
    for name in ("link", "dir/out.raw"):
        with pytest.raises(PathNotAllowed):
            open_base(place, name)


def test_symlink_inside_the_tree_is_followed(place):
    (place / "vm/current").symlink_to("sub/in.raw")
    assert open_base(place, "current") == "vm/sub/in.raw"


def test_allowed_directory_is_allowed_and_no_more(place):
    assert open_base(place, "../other/out.raw", str(place / "other")) == "other/out.raw"
    with pytest.raises(PathNotAllowed):
        open_base(place, "/etc/passwd", str(place / "other"))


def test_name_that_only_begins_like_an_allowed_directory_is_refused(place):
    (place / "other-too").mkdir()
    (place / "other-too/x.raw").write_text("x")
    with pytest.raises(PathNotAllowed):
        open_base(place, str(place / "other-too/x.raw"), str(place / "other"))


def test_image_reached_by_a_symlink_has_the_tree_of_its_target(place):
    (place / "clone.fvd").symlink_to("vm/clone.fvd")
    assert content(paths.open_base("in.raw", str(place / "clone.fvd"), ())) == "vm/in.raw"


def test_missing_base_is_named(place):
    with pytest.raises(BaseMissing, match=r"vm/gone\.raw"):
        open_base(place, "gone.raw")


def test_directory_pipe_and_socket_are_refused(place):
    os.mkfifo(place / "vm/pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "vm/socket"))
        for name, kind in (("sub", "a directory"), ("pipe", "a named pipe"), ("socket", "socket")):
            with pytest.raises(NotAFile, match=kind):
                open_base(place, name)
            with pytest.raises(NotAFile, match=kind):
                paths.open_file(str(place / "vm" / name))


def test_character_device_is_refused_without_being_opened():
    with pytest.raises(NotAFile, match="a character device"):
        paths.open_file("/dev/null")


@pytest.mark.parametrize("name", ["/proc/self/mem", "/proc/self/maps", "/proc/cpuinfo"])
def test_what_the_kernel_makes_up_is_refused(place, name):
    for call in (lambda: paths.open_file(name), lambda: open_base(place, name, "/")):
        with pytest.raises(NotAFile, match=r"made up by the kernel \(proc\), not a regular file"):
            call()


def test_walk_without_openat2_agrees(place):
    root = os.open(place / "vm", os.O_PATH | os.O_DIRECTORY)
    (place / "vm/link").symlink_to("in.raw")
    (place / "vm/dir").symlink_to("sub")
    try:
        fd = paths._walk_beneath(root, "sub/in.raw")
        assert stat.S_ISREG(os.fstat(fd).st_mode)
        os.close(fd)
        for name in ("link", "dir/in.raw", "../other/out.raw"):
            with pytest.raises(OSError, match="symbolic|cross-device|Not a directory"):
                paths._walk_beneath(root, name)
    finally:
        os.close(root)


def test_swapped_component_is_not_followed(place):
    """Between the check and the open a directory became a symlink: openat2 refuses."""
    (place / "vm/swapped").symlink_to(place / "other")
    with pytest.raises(OSError, match="symbolic"):
        paths._open_beneath(str(place / "vm"), "swapped/out.raw")


def test_base_beside_the_image_is_remembered_relative(place, monkeypatch):
    monkeypatch.chdir(place)
    image = str(place / "vm/new.fvd")
    assert paths.stored_base_name("vm/sub/in.raw", image) == "sub/in.raw"
    assert paths.stored_base_name("other/out.raw", image) == str(place / "other/out.raw")


def test_missing_proc_is_said_so(place, monkeypatch):
    real_open = os.open

    def without_proc(path, flags, *more, **named):
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return real_open(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", without_proc)
    monkeypatch.setattr(os.path, "isdir", lambda path: False)
    with pytest.raises(IoFailed, match="/proc is not mounted"):
        paths.open_file(str(place / "vm/in.raw"))


def test_missing_file_is_said_so(tmp_path):
    with pytest.raises(ImageNotFound):
        paths.open_file(str(tmp_path / "nothing"))


def test_length_and_identity_are_those_of_the_file(place):
    first = paths.open_file(str(place / "vm/in.raw"))
    second = paths.open_file(str(place / "vm/sub/../in.raw"), writable=True)
    third = paths.open_file(str(place / "vm/sub/in.raw"))
    try:
        assert paths.file_length(first) == len("vm/in.raw")
        assert paths.file_identity(first) == paths.file_identity(second)
        assert paths.file_identity(first) != paths.file_identity(third)
    finally:
        for fd in (first, second, third):
            os.close(fd)


@pytest.mark.parametrize(
    "text", ["plain", "spa ce", "it's", "x\ny'\\z", "\u00e4\u00f6", "tab\t$(id)", "\udcff`", ""]
)
def test_shell_words_are_what_they_were(text):
    word = paths.shell_word(text)
    assert word.isprintable()
    done = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True)
    assert done.stdout == os.fsencode(text)

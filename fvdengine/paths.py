# SPDX-License-Identifier: Apache-2.0
"""How files named by the user and by images are opened, and which of them are refused.

The name of a base or data file comes from an untrusted image. It is followed only into the
directory tree of the image itself and into directories that were allowed explicitly, only to
regular files and block devices, and with all symlinks resolved before that check. The file is then
opened with openat2 and no symlink allowed on the whole way from the root, so that nothing can be
swapped between check and open. What the image's own directory is, its descriptor says: its name may
lead elsewhere by then.
"""

import contextlib
import ctypes
import errno
import os
import shlex
import stat
from collections.abc import Iterator, Sequence

from fvdengine import stores, uris
from fvdengine.errors import (
    BaseMissing,
    DataFileMissing,
    ImageInUse,
    IoFailed,
    NotAFile,
    PathNotAllowed,
    from_os_error,
)

_SYS_OPENAT2 = 437  # the same number on every architecture that Debian has
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08

_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def open_file(path: str, *, writable: bool = False, exclusive: bool = False) -> int:
    """Open the image or base that the user named; symlinks are followed.

    The kind of the file is looked at before it is opened, since opening a pipe may wait and
    opening a device may act. `exclusive` claims a block device against mounts and other owners.
    """
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, path) from error
    try:
        return _reopen(handle, path, writable, exclusive)
    finally:
        os.close(handle)


def open_folder(real: str) -> int:
    """An O_PATH descriptor of the directory `real`, a real path, for use as a dir_fd; OSError where
    a symlink is on the way by now."""
    if real == "/":
        return os.open(real, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return _open_beneath("/", os.path.relpath(real, "/"))


def directory_of(fd: int) -> str:
    """Return the directory in which the open file lies, whatever its name leads to by now."""
    return os.path.dirname(os.readlink(f"/proc/self/fd/{fd}"))


def open_base(
    name: str,
    image_path: str,
    allow_dirs: Sequence[str | os.PathLike[str]],
    directory: str | None = None,
) -> tuple[int, str]:
    """Open the base `name` of the image for reading; return the descriptor and its real path.

    `directory` is the image's own; without it, where `image_path` leads.
    """
    directory = directory or _directory_named(image_path)
    real = _real(os.path.join(directory, name))
    with _handle_of(real, image_path, directory, allow_dirs, "base") as handle:
        return _reopen(handle, real, writable=False, exclusive=False), real


def place_of(name: str, image_path: str, directory: str | None = None) -> str:
    """Return where the image's base `name` is to be found, before any look at it."""
    return os.path.join(directory or _directory_named(image_path), name)


def open_data_file(
    name: str,
    image_path: str,
    allow_dirs: Sequence[str | os.PathLike[str]],
    *,
    writable: bool,
    directory: str | None = None,
) -> tuple[int, str]:
    """Open the data file `name` of the image by the same policy as a base."""
    directory = directory or _directory_named(image_path)
    real = _real(os.path.join(directory, name))
    with _handle_of(real, image_path, directory, allow_dirs, "data file") as handle:
        return _reopen(handle, real, writable=writable, exclusive=writable), real


def resolve(name: str, image_path: str) -> str:
    """Return the real path of what the image calls `name`."""
    return _real(os.path.join(_directory_named(image_path), name))


def _directory_named(image_path: str) -> str:
    return os.path.dirname(_real(image_path))


def _real(path: str) -> str:
    """Resolve symlinks; one that goes while it is read is an error, too."""
    try:
        return os.path.realpath(path)
    except OSError as error:
        raise from_os_error(error, path) from error


def check_allowed(
    real: str, image_path: str, allow_dirs: Sequence[str | os.PathLike[str]], role: str
) -> str:
    """Return the allowed directory that `real` lies in; raise PathNotAllowed if there is none."""
    return _check(real, image_path, _directory_named(image_path), allow_dirs, role)


def _check(
    real: str,
    image_path: str,
    directory: str,
    allow_dirs: Sequence[str | os.PathLike[str]],
    role: str,
) -> str:
    root = allowed_root(real, directory, allow_dirs)
    if root is None:
        raise _not_allowed(image_path, real, role)
    return root


@contextlib.contextmanager
def _handle_of(
    real: str,
    image_path: str,
    directory: str,
    allow_dirs: Sequence[str | os.PathLike[str]],
    role: str,
) -> Iterator[int]:
    """Give an O_PATH descriptor of a file that the policy allows, reached without any symlink."""
    root = _check(real, image_path, directory, allow_dirs, role)
    try:
        handle = _open_beneath(root, os.path.relpath(real, root))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            if role == "base":
                raise BaseMissing(path=image_path, base=real) from error
            raise DataFileMissing(path=image_path, data=real) from error
        if error.errno in (errno.ELOOP, errno.EXDEV):
            raise _not_allowed(image_path, real, role) from error
        raise from_os_error(error, real) from error
    try:
        yield handle
    finally:
        os.close(handle)


def _not_allowed(image_path: str, named: str, role: str) -> PathNotAllowed:
    directory = os.path.dirname(named)
    return PathNotAllowed(
        path=image_path, base=named, role=role, directory=directory,
        quoted=shlex.quote(directory),
    )  # fmt: skip


def allowed_root(
    real: str, directory: str, allow_dirs: Sequence[str | os.PathLike[str]]
) -> str | None:
    """Return the allowed directory that the resolved path `real` lies in, or None."""
    for candidate in (directory, *allow_dirs):
        root = directory if candidate is directory else os.path.realpath(candidate)
        if os.path.commonpath((root, real)) == root and real != root:
            return root
    return None


def stored_base_name(base: str, image_path: str) -> str:
    """Return the name under which a new image remembers `base`, given relative to the caller.

    Relative to the image's directory where the base lies in its tree, so that the two can be
    moved together; absolute otherwise. A URI is remembered as it is.
    """
    if uris.is_uri(base):
        return base
    directory = os.path.dirname(os.path.realpath(image_path))
    absolute = os.path.join(os.path.realpath(os.path.dirname(base) or "."), os.path.basename(base))
    if os.path.commonpath((directory, absolute)) == directory:
        return os.path.relpath(absolute, directory)
    return absolute


def _open_beneath(root: str, relative: str) -> int:
    """Open `relative` as O_PATH without leaving `root` and without following any symlink; nor is
    one followed to `root`, which is a real path and absolute."""
    if root != "/":
        relative = os.path.join(os.path.relpath(root, "/"), relative)
        # Leading out of the root and in again by another way is no way that we made.
        if ".." in relative.split(os.sep):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), relative)
    directory = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        how = _OpenHow(
            os.O_PATH | os.O_CLOEXEC, 0,
            _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS,
        )  # fmt: skip
        fd: int = _libc.syscall(
            ctypes.c_long(_SYS_OPENAT2), ctypes.c_int(directory),
            ctypes.c_char_p(os.fsencode(relative)), ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )  # fmt: skip
        if fd >= 0:
            return fd
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.EPERM):
            raise OSError(number, os.strerror(number), os.path.join("/", relative))
        return _walk_beneath(directory, relative)
    finally:
        os.close(directory)


def _walk_beneath(directory: int, relative: str) -> int:
    """Do what openat2 does where it is missing or filtered: one component at a time."""
    current = os.dup(directory)
    try:
        for part in relative.split(os.sep):
            if part in ("", ".", ".."):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), relative)
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
            following = os.open(part, flags, dir_fd=current)
            os.close(current)
            current = following
            if stat.S_ISLNK(os.fstat(current).st_mode):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), relative)
    except OSError:
        with contextlib.suppress(OSError):
            os.close(current)
        raise
    return current


_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def _reopen(handle: int, path: str, writable: bool, exclusive: bool) -> int:
    """Open for I/O what the O_PATH descriptor `handle` refers to, once its kind is known."""
    status = os.fstat(handle)
    mode = status.st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        kind = next((text for matches, text in _KINDS if matches(mode)), "a special file")
        raise NotAFile(path=path, kind=kind)
    # Such files take no space; most that take none are new ones.
    if stat.S_ISREG(mode) and not status.st_blocks and not os.major(status.st_dev):
        store = stores.store_name(handle)
        if store in stores.MADE_UP:
            raise NotAFile(path=path, kind=f"made up by the kernel ({store})")
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOCTTY
    if exclusive and stat.S_ISBLK(mode):
        flags |= os.O_EXCL
    try:
        return os.open(f"/proc/self/fd/{handle}", flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise ImageInUse(
                path=path, holder="the kernel (it is mounted or part of another device)", pids=[]
            ) from error
        if error.errno == errno.ENOENT and not os.path.isdir("/proc/self/fd"):
            raise IoFailed(
                path=path, reason="cannot open it safely: /proc is not mounted",
                hint="Mount /proc (`mount -t proc proc /proc`).",
            ) from error  # fmt: skip
        action = "write" if writable else "read"
        raise from_os_error(error, path, action) from error


def forget_cached(fd: int) -> None:
    """Drop clean pages: after a failed write-back they may show what storage does not hold."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def file_length(fd: int) -> int:
    """Return the length of a regular file or block device."""
    status = os.fstat(fd)
    return os.lseek(fd, 0, os.SEEK_END) if stat.S_ISBLK(status.st_mode) else status.st_size


def file_identity(fd: int) -> tuple[int, int, int]:
    """Return what tells two files apart: device and inode, or the device number of a device."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return (0, 0, status.st_rdev)
    return (status.st_dev, status.st_ino, 0)


def shell_word(text: str) -> str:
    """`text` as one word that can be pasted into a shell, whatever is in it."""
    if text.isprintable():
        return shlex.quote(text)
    body = "".join(
        c if c.isprintable() and c not in "\\'" else "".join(f"\\x{b:02x}" for b in os.fsencode(c))
        for c in text
    )
    return f"$'{body}'"

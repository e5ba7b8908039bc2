# SPDX-License-Identifier: Apache-2.0
"""Hold an image still under its own name: an empty image takes its place, on top of it.

The name of the image always leads to a complete one: first the old file gets a second name, then
the new one, whose base that is, is renamed over the first. What is written goes to the new file;
once the old one need not be still any more, the local data of the new one are put into it and it
gets its name back. Whoever dies in between leaves an image with a base beside it, as good as any.

The new image does not record which state of its base it was made from: nobody else writes that
base, and while data are put into it the one must go on being a base of the other.
"""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace

from fvdengine import editing, paths
from fvdengine.chain import read_header
from fvdengine.create import create_image
from fvdengine.errors import EngineError, HeldByBackup, InvalidOption, from_os_error
from fvdengine.header import BASE_UNKNOWN, Header
from fvdengine.metadata import Run, Source, load_metadata, runs
from fvdengine.options import CreateOptions

FORMAT = "fvd"
# Of the names beside an image: its file while it is still, and the one that is to take its place.
SUFFIX = ".backup-base"
FRESH = ".new"
PREFETCH_OFF = -1


def put_over(
    image: str, base: str, options: CreateOptions, before: Callable[[str], None] = lambda _: None
) -> None:
    """Call the file of `image` `base` from now on, and make `image` a new image over it.

    `options` says what the chain below may be. Nobody may have the image open for writing. Raises
    InvalidOption where the image is no plain file or `base` exists, and other EngineErrors; after
    any error everything is as before. `before` is told the name of the new image, complete, before
    it takes the place of `image`.
    """
    try:
        _put_over(image, base, options, before)
    except OSError as error:
        raise from_os_error(error, base, "create") from error


def _put_over(
    image: str, base: str, options: CreateOptions, before: Callable[[str], None]
) -> None:
    status = os.stat(image)
    if not stat.S_ISREG(status.st_mode):
        raise InvalidOption(option="image", reason=f"{image} is not a plain file")
    fresh = base + FRESH
    with contextlib.suppress(FileNotFoundError):
        os.unlink(fresh)
    if is_begun(image, base):
        os.unlink(base)
    try:
        os.link(image, base)
    except FileExistsError as error:
        raise InvalidOption(option="base", reason=f"{base} exists already") from error
    try:
        # Run as the image, but that what is still is not copied up.
        like = replace(header_of(image), copy_on_read=0, prefetch_start_delay=PREFETCH_OFF)
        create_image(fresh, replace(options, base=base, base_format=FORMAT, like=like))
        _forget_identity(fresh)
        os.chown(fresh, status.st_uid, status.st_gid)
        os.chmod(fresh, stat.S_IMODE(status.st_mode))
        before(fresh)
        os.rename(fresh, image)
        flush_folder(image)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        with contextlib.suppress(OSError):
            if is_begun(image, base):
                os.unlink(base)
            else:
                os.rename(base, image)
        raise


def put_back(image: str, base: str) -> None:
    """Give the file `base`, which holds everything by now, the name `image` back; EngineError."""
    try:
        os.rename(base, image)
        flush_folder(image)
    except OSError as error:
        raise from_os_error(error, image, "rename a file to") from error


def is_over(image: str, base: str) -> bool:
    """Whether `base` is there and is the base of `image`, as put_over makes it."""
    if not os.path.exists(base):
        return False
    header = header_of(image)
    named = os.path.join(os.path.dirname(image), header.base_img)
    return bool(header.base_img) and os.path.exists(named) and os.path.samefile(named, base)


def base_aside(image: str) -> str | None:
    """The base that put_over made of an image, whatever that is called now; None where the image
    is not over such a one. EngineError where it is no image."""
    name = header_of(image).base_img
    base = os.path.join(os.path.dirname(image), name)
    return base if name.endswith(SUFFIX) and os.path.exists(base) else None


def check_not_held(path: str) -> None:
    """HeldByBackup where a backup that was broken off left an image on top of that at `path`: it
    does not know which state of it that was made from, and would change with it unnoticed."""
    base = os.path.realpath(path)
    image = base.removesuffix(SUFFIX)
    held = False
    if image != base:
        with contextlib.suppress(EngineError):  # what is no image has no base
            held = is_over(image, base)
    if held:
        raise HeldByBackup(path=path, image=image)


def is_begun(image: str, base: str) -> bool:
    """Whether `base` is but another name of `image`: a put_over was broken off."""
    try:
        return os.path.samestat(os.lstat(base), os.stat(image))
    except FileNotFoundError:
        return False


def header_of(image: str) -> Header:
    """The header of an image that may be in use; EngineError where it is none."""
    fd = paths.open_file(image)
    try:
        return read_header(fd, image)
    finally:
        os.close(fd)


def session_of(image: str) -> str:
    """The session of the last opening for writing; "" where the image does not say it."""
    return session_in(header_of(image))


def session_in(header: Header) -> str:
    """The same of a header."""
    extension = header.trusted_extension
    return extension.open_session.hex() if extension is not None else ""


def local_runs(fd: int, path: str, header: Header) -> Iterator[Run]:
    """Yield what an image holds itself, in order; raise InvalidJournal, InvalidTable."""
    loaded = load_metadata(fd, header, path)
    for run in runs(loaded, header, 0, header.virtual_disk_size):
        if run.source is not Source.BASE:
            yield run


def flush_folder(path: str) -> None:
    """Make the names beside `path` durable."""
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _forget_identity(path: str) -> None:
    with editing.open_for_change(path) as file:
        old = editing.read_free_header(file)
        extension = old.trusted_extension
        editing.finish_update(file)
        if extension is not None:
            extension = replace(extension, base_kind=BASE_UNKNOWN, base_id=bytes(32), base_length=0)
            editing.write_header(file, old, replace(old, extension=extension))
            editing.write_backup(file, old)

# SPDX-License-Identifier: Apache-2.0
"""The separate data file of an image: found by the path policy, locked, long enough.

A data file belongs to one image: its own lock keeps two images that name the same file apart, and
a file that is the image itself or another of its chain is refused. An NBD server that has the
data is only named here; the engine connects to it.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass

from fvdengine import geometry, locking, paths, remote, stores
from fvdengine.errors import (
    DataFileShared,
    DataFileTooShort,
    InvalidUri,
    NeedsZeroedStore,
    UnsupportedStore,
)
from fvdengine.header import Header
from fvdengine.options import OpenOptions


@dataclass(frozen=True, slots=True)
class DataFile:
    """Where the data of an image lie. `fd` is -1 where `path` is the URI of an NBD server."""

    path: str
    fd: int

    @property
    def source(self) -> int | str:
        """What the engine opens: a descriptor or a URI."""
        return self.path if self.fd < 0 else self.fd

    def close(self) -> None:
        """Close the descriptor; not idempotent."""
        if self.fd >= 0:
            os.close(self.fd)


def open_data_file(
    header: Header,
    image_fd: int,
    image_path: str,
    options: OpenOptions,
    seen: Collection[tuple[int, int, int]] = (),
) -> DataFile | None:
    """Open and lock the data file that `header` names, None if it names none.

    Checks the storage of the data in any case. `seen` are the files of other images of the chain.
    """
    if not header.data_file:
        _check_zeroed(header, image_fd, image_path)
        return None
    if header.data_format == "nbd":
        return _open_server(header, image_path, options)
    fd, real = paths.open_data_file(
        header.data_file, image_path, options.allow_dirs, writable=not options.read_only,
        directory=paths.directory_of(image_fd),
    )  # fmt: skip
    try:
        identity = paths.file_identity(fd)
        if identity == paths.file_identity(image_fd):
            raise DataFileShared(path=image_path, data=real, other="the image itself")
        if identity in seen:
            raise DataFileShared(path=image_path, data=real, other="another file of its chain")
        verdict, store = stores.judge_store(fd)
        if verdict is stores.Verdict.REFUSED and not options.read_only:
            raise UnsupportedStore(path=real, store=store)
        wait = options.lock_wait_seconds
        locking.lock(fd, real, exclusive=not options.read_only, wait_seconds=wait)
        _check_zeroed(header, fd, image_path)
        needed = geometry.required_data_length(header)
        length = paths.file_length(fd)
        if length < needed:
            raise DataFileTooShort(path=image_path, data=real, actual=length, needed=needed)
    except BaseException:
        os.close(fd)
        raise
    return DataFile(real, fd)


def _open_server(header: Header, path: str, options: OpenOptions) -> DataFile:
    """Name an NBD server for the engine, if it is allowed: the URI comes from an image."""
    if header.need_zero_init:
        raise NeedsZeroedStore(path=path, store="an NBD server")
    uri = remote.parse_allowed(header.data_file, options.allow_uris, path, "data file")
    if not uri.is_nbd:
        reason = "data can only lie in an NBD server"
        raise InvalidUri(uri=uri.shown, reason=reason, example="nbd://HOST:PORT/EXPORT")
    return DataFile(uri.text, -1)


def _check_zeroed(header: Header, fd: int, path: str) -> None:
    """Refuse a store whose unwritten parts may hold anything where the image relies on zeros."""
    if header.need_zero_init and stores.is_device(fd):
        raise NeedsZeroedStore(path=path, store="a block device")

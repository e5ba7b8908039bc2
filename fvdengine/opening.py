# SPDX-License-Identifier: Apache-2.0
"""Open an image: lock it, validate everything, open its chain, and hand it to the engine.

Two steps. `open_plan` does all that can fail without writing a byte and holds the locks;
`open_device` gives the open files to the compiled engine, which validates headers, bitmap and
journal once more by its own code before it writes. This is the only module that imports the
compiled engine, and only when a device is opened: looking at images needs no native code.
"""

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

from fvdengine import (
    chain,
    editing,
    intent,
    locking,
    metadata,
    paths,
    remote,
    shrink,
    stores,
    uris,
)
from fvdengine.chain import Layer
from fvdengine.checkpoint import Files
from fvdengine.errors import (
    DataServerUnreachable,
    EngineError,
    EngineFailed,
    EngineMissing,
    LiveStateMismatch,
    NoDirectIo,
    UnsupportedStore,
    from_os_error,
)
from fvdengine.header import HEADER_COPY_SIZE, Header
from fvdengine.locking import BOTH, LockRange
from fvdengine.options import OpenOptions
from fvdengine.server_file import ServerFile

if TYPE_CHECKING:
    from fvdcore import Device, EngineFault

__all__ = ["Layer", "OpenOptions", "OpenPlan", "lock_owner", "open_device", "open_plan"]

TAKEOVER_WAIT_SECONDS = 30
FETCH_BYTES = 128 << 10
DIRECT_CREW = 32  # past the page cache each request waits for the device
DATA_FAULT = "open the data file of layer {}"  # where the engine names it

EngineLayer = tuple[int, str] | tuple[int, str, int | str] | tuple[str, str, dict[str, int | bool]]


@dataclass(slots=True)
class OpenPlan:
    """An image that is locked and fully validated, with its whole chain open.

    The locks belong to the descriptors in `layers`: they end when these and the duplicates that
    the engine makes are closed.
    """

    path: str
    layers: list[Layer]
    options: OpenOptions
    boot_id: bytes
    warnings: list[str] = field(default_factory=list)
    direct_fd: int = -1
    is_closed: bool = False

    @property
    def header(self) -> Header:
        header = self.layers[0].header
        assert header is not None
        return header

    def close(self) -> None:
        """Let go of the image and its chain; idempotent."""
        if not self.is_closed:
            self.is_closed = True
            for layer in self.layers:
                layer.close()
            if self.direct_fd >= 0:
                os.close(self.direct_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_plan(path: str | os.PathLike[str], options: OpenOptions | None = None) -> OpenPlan:
    """Lock and validate the image and open its chain; nothing is written."""
    options = options or OpenOptions()
    name = os.fspath(path)
    writable = not options.read_only
    warnings: list[str] = []
    fd = paths.open_file(name, writable=writable, exclusive=writable and not options.owner_held)
    with _closed_on_error(fd):
        _check_store(fd, name, writable, warnings)
        _lock_image(fd, name, options)
        if options.discard_live_state:
            paths.forget_cached(fd)
        top = chain.open_layer(fd, name, "fvd", _data_options(options))
    try:
        assert top.header is not None
        if options.discard_live_state and top.data is not None and top.storage[0] >= 0:
            paths.forget_cached(top.storage[0])
        if not (options.takeover or options.discard_live_state):
            chain.check_not_left_live(top.header, name)
        if top.header.trusted_extension is None:
            warnings.append(
                f"{name} was last opened by an older version of the format: "
                "the identity of its base is unknown"
            )
        if writable and not options.takeover and intent.is_shrinking(top.header):
            smaller = intent.shrunk(top.header)  # as it will be when the engine reads it
            top = replace(top, header=smaller, length=smaller.virtual_disk_size)
        layers = chain.open_chain(top, options, warnings)
    except BaseException:
        top.close()
        raise
    plan = OpenPlan(name, layers, options, chain.boot_id(), list(dict.fromkeys(warnings)))
    if options.cache == "none":
        try:
            plan.direct_fd = _open_direct(top, writable)
        except BaseException:
            plan.close()
            raise
    return plan


def _open_direct(top: Layer, writable: bool) -> int:
    """Open the file with the data of the top once more, past the page cache."""
    fd, path = top.storage
    if fd < 0:
        raise NoDirectIo(path=path, reason="they are on a server")
    return _past_the_cache(f"/proc/self/fd/{fd}", path, os.O_RDWR if writable else os.O_RDONLY)


def check_direct(path: str) -> None:
    """NoDirectIo where cache mode none cannot be with the file at `path`: its file system lacks
    O_DIRECT."""
    os.close(_past_the_cache(path, path, os.O_RDONLY | os.O_NOFOLLOW))


def _past_the_cache(place: str, path: str, access: int) -> int:
    try:
        return os.open(place, access | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        raise NoDirectIo(path=path, reason=os.strerror(error.errno or 0)) from error


def lock_owner(
    path: str | os.PathLike[str], wait_seconds: float = 0, *, exclusive: bool = True
) -> int:
    """Open the image for writing and take its owner range; the caller keeps the descriptor. Not
    `exclusive`: others may read it, and nobody may write.

    The descriptor keeps the write-back error state of the file alive, too. A block device is
    claimed as a whole, so the process that does the I/O must be told `owner_held`.
    """
    name = os.fspath(path)
    fd = paths.open_file(name, writable=True, exclusive=True)
    with _closed_on_error(fd):
        locking.lock(
            fd, name, (LockRange.OWNER,), exclusive=exclusive, wait_seconds=wait_seconds
        )
    return fd


def lock_reader(path: str | os.PathLike[str], wait_seconds: float = 0) -> int:
    """Open the image for reading and hold it against writers; the caller keeps the descriptor."""
    name = os.fspath(path)
    fd = paths.open_file(name)
    with _closed_on_error(fd):
        locking.lock(
            fd, name, (LockRange.OWNER,), exclusive=False, wait_seconds=wait_seconds
        )
    return fd


def keep_owner(fd: int) -> int:
    """Another descriptor of an image that is held as a whole, `fd`: it keeps the owner range, and
    whoever does the I/O can take the other. The caller keeps it."""
    kept = os.dup(fd)
    with _closed_on_error(kept):
        locking.unlock(kept, (LockRange.WRITER,))
    return kept


def relock_owner(fd: int, path: str, wait_seconds: float = 0, *, exclusive: bool = True) -> None:
    """Hold against everybody what is held against writers only, or the other way round, without a
    moment between; ImageInUse, and it is held as before."""
    locking.lock(fd, path, (LockRange.OWNER,), exclusive=exclusive, wait_seconds=wait_seconds)


def open_device(
    plan: OpenPlan,
    *,
    live_fd: int = -1,
    stats_fd: int = -1,
    open_session: bytes | None = None,
    crew_threads: int = 8,
    copy_on_read: bool | None = None,
    prefetch_delay: int | None = None,
    on_full: str = "error",
    can_grow: bool = False,
    fetch_size: int | None = None,
    prefetch_policy: str = "polite",
    record_reads: bool = False,
    fetch_first: Sequence[tuple[int, int]] = (),
) -> "Device":
    """Hand the plan's open files to the engine; writable, this begins a session on the disk.

    on_full: "error", or "wait" for guests' changes that find no space. can_grow: the caller
    answers the event ("grow", bytes) with storage_grown(). fetch_size: bytes that a read takes at
    once from a distant base where copy-on-read keeps them. prefetch_policy: "polite", "eager" or
    "fixed". record_reads: first_reads() shall tell the order of reads; fetch_first: such an order,
    (offset, length) in bytes, for prefetch to follow.
    The engine duplicates the descriptors, so `plan.close()` is right at any time after this.
    """
    if plan.options.takeover and live_fd < 0:
        raise LiveStateMismatch(
            directory="(none)", path=plan.path, reason="a takeover needs the live state"
        )
    try:
        from fvdcore import Device, EngineFault
    except ImportError as error:
        raise EngineMissing(reason=str(error)) from error
    if not plan.options.read_only:
        _finish_change(plan)
    try:
        return Device.open(
            [_engine_layer(layer) for layer in plan.layers],
            read_only=plan.options.read_only,
            live_fd=live_fd,
            takeover=plan.options.takeover,
            stats_fd=stats_fd,
            boot_id=plan.boot_id,
            open_session=open_session,
            crew_threads=max(crew_threads, DIRECT_CREW if plan.direct_fd >= 0 else 0),
            copy_on_read=copy_on_read,
            prefetch_delay=prefetch_delay,
            base_timeout=plan.options.base_timeout,
            on_full=on_full,
            can_grow=can_grow,
            fetch_size=FETCH_BYTES if fetch_size is None else fetch_size,
            prefetch_policy=prefetch_policy,
            record_reads=record_reads,
            fetch_first=fetch_first,
            cache=plan.options.cache,
            direct_fd=plan.direct_fd,
        )
    except EngineFault as error:
        raise _opening_failure(plan, error) from error


def _opening_failure(plan: OpenPlan, error: "EngineFault") -> EngineError:
    for at, layer in enumerate(plan.layers):
        if layer.storage[0] < 0 and error.where == DATA_FAULT.format(at):
            uri = uris.parse_uri(layer.storage[1])
            return DataServerUnreachable(data=uri.shown, reason=error.reason)
    return EngineFailed(path=plan.path, reason=str(error), errno=error.errno)


def wait_for_data_servers(plan: OpenPlan) -> Iterator[str]:
    """Wait until each server that data of the plan's images lie on answers, one after the other
    for at most the base timeout; then raise DataServerUnreachable. Yields what is waited for."""
    for at, layer in enumerate(plan.layers):
        if layer.storage[0] < 0:
            uri = uris.parse_uri(layer.storage[1])
            writable = at == 0 and not plan.options.read_only
            seconds = plan.options.base_timeout
            for reason in remote.wait_for_data_server(uri, seconds, writable=writable):
                yield f"the server {uri.shown}, which has the data, does not answer ({reason})"


def _finish_change(plan: OpenPlan) -> None:
    """Finish an update or a shrink that was cut short, once nothing can be found wrong with the
    image any more: the engine reads the header for itself."""
    image = editing.ImageFile(plan.layers[0].fd, plan.path)
    front = Header.unpack(image.read(0, HEADER_COPY_SIZE), plan.path)
    must_shrink = intent.is_shrinking(front) and not plan.options.takeover
    _save_bits(plan, image)
    if not (intent.is_renaming(front) or must_shrink):
        return
    storage, name = plan.layers[0].storage
    if plan.options.takeover:
        editing.finish_update(image)
        return
    header = intent.settled(front, image.fd, plan.path)
    length = paths.file_length(storage) if storage >= 0 else None
    loaded = metadata.load_metadata(image.fd, header, plan.path, length)
    editing.finish_update(image)
    if must_shrink:
        data = editing.ImageFile(storage, name) if storage >= 0 else ServerFile(name)
        shrink.finish(Files(image, image if storage == image.fd else data), header, loaded)


def _save_bits(plan: OpenPlan, image: editing.ImageFile) -> None:
    """Bring bits into the bitmap that only the journal has, where no base is needed any more:
    the engine keeps none there, and empties the journal. Ours are there before the claim is."""
    missing, _ = metadata.missing_bits(image.fd, plan.header, plan.path)
    if plan.options.takeover or not missing:
        return
    storage, name = plan.layers[0].storage
    data = editing.ImageFile(storage, name) if storage >= 0 else ServerFile(name)
    Files(image, image if storage == image.fd else data).flush()
    loaded = metadata.load_metadata(image.fd, plan.header, plan.path)
    image.write(plan.header.bitmap_offset, bytes(loaded.bitmap))
    image.flush()


def grow_device(plan: OpenPlan, size: int) -> None:
    """Grow the disk of a writable plan to `size` bytes; raise NoSpace, EngineFailed.

    After a failure the disk has its former size; if not even closing works, the image is as a dead
    process leaves it, and the next open settles it.
    """
    try:
        from fvdcore import EngineFault
    except ImportError as error:
        raise EngineMissing(reason=str(error)) from error
    device = open_device(plan)
    try:
        try:
            device.start()
            device.resize(size)
        finally:
            device.close()
    except EngineFault as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG):
            raise from_os_error(OSError(error.errno, str(error)), plan.path, "grow") from error
        raise EngineFailed(path=plan.path, reason=str(error), errno=error.errno) from error


def _engine_layer(layer: Layer) -> EngineLayer:
    if layer.remote is not None:
        return layer.remote.uri, "nbd", layer.remote.options
    if layer.data is None:
        return layer.fd, layer.format
    return layer.fd, layer.format, layer.data.source


def state_sizes(bitmap_size: int, table_size: int = 0) -> tuple[int, int]:
    """Return the bytes of the live file and of the statistics page of a device."""
    try:
        from fvdcore import Device
    except ImportError as error:
        raise EngineMissing(reason=str(error)) from error
    return Device.live_size(bitmap_size, table_size), Device.stats_size()


def _check_store(fd: int, path: str, writable: bool, warnings: list[str]) -> None:
    verdict, store = stores.judge_store(fd)
    if verdict is stores.Verdict.REFUSED and writable:
        raise UnsupportedStore(path=path, store=store)
    if verdict is not stores.Verdict.SUPPORTED:
        warnings.append(f"{path} lies on {store}, which is not a tested place for images")


def _data_options(options: OpenOptions) -> OpenOptions:
    """The options for the data file: a takeover waits for the dead process's I/O there, too."""
    wait = options.lock_wait_seconds
    return replace(
        options, lock_wait_seconds=max(wait, TAKEOVER_WAIT_SECONDS) if options.takeover else wait
    )


def _lock_image(fd: int, path: str, options: OpenOptions) -> None:
    wait = options.lock_wait_seconds
    if options.takeover:
        wait = max(wait, TAKEOVER_WAIT_SECONDS)
    ranges = (LockRange.WRITER,) if options.owner_held else BOTH
    locking.lock(fd, path, ranges, exclusive=not options.read_only, wait_seconds=wait)


@contextlib.contextmanager
def _closed_on_error(fd: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(fd)
        raise

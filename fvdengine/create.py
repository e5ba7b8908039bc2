# SPDX-License-Identifier: Apache-2.0
"""Make a new image in raw layout.

Order (FORMAT.md, create): bitmap, journal and the length of the file first, then the
header's backup copy, fsync; the header last, fsync; then the directory. An interrupted create
leaves a file without the magic, never an image that only looks whole. With --force the new image
is made beside the old one and takes its name at the very end, so a failure leaves the old one.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import struct
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

from fvdengine import chain, geometry, locking, paths, stores
from fvdengine import header as codec
from fvdengine.chain import Identity, Layer
from fvdengine.errors import (
    AmbiguousBaseFormat,
    BaseEmpty,
    BaseMissing,
    EngineError,
    ImageExists,
    ImageNotFound,
    InvalidHeader,
    InvalidOption,
    InvalidSize,
    LiveStateLeft,
    UnsupportedStore,
    from_os_error,
)
from fvdengine.geometry import SIZE_MAX, Layout, Wanted
from fvdengine.header import Extension, Header
from fvdengine.locking import BOTH
from fvdengine.options import CreateOptions, OpenOptions
from fvdengine.units import MIB, SECTOR, format_size, round_up
from fvdengine.validation import BASE_FORMATS, validate_header

_BLKZEROOUT = 0x127F
_URI = re.compile(r"[a-z][a-z0-9+.-]*://")
_LARGE_INTEGER_MAX = (1 << 63) - 1
_IMAGE_MODE = 0o666  # the umask decides, as with any file


@dataclass(frozen=True, slots=True)
class CreateResult:
    """What was made."""

    path: str
    header: Header
    base_path: str | None
    warnings: list[str] = field(default_factory=list)


def create_image(path: str | os.PathLike[str], options: CreateOptions) -> CreateResult:
    """Create the image; on any error nothing is left behind and nothing else has changed."""
    name = os.fspath(path)
    _check_options(options)
    _check_directory(name)
    warnings: list[str] = []
    layers = _open_bases(name, options, warnings) if options.base is not None else []
    try:
        size = _choose_size(options, layers)
        if layers and size < layers[0].length:
            warnings.append(
                f"the image shows only the first {format_size(size)} of the base's "
                f"{format_size(layers[0].length)}"
            )
        layout = geometry.choose_layout(
            Wanted(
                size, layers[0].length if layers else 0, options.block_size, options.journal_size
            )
        )
        stored = paths.stored_base_name(options.base, name) if options.base is not None else ""
        identity = chain.identity_of(layers[0]) if layers else None
        header, packed = _finish_header(
            _build_header(size, layout, options, stored, identity), name, layout
        )
        with _target(name, options.force, layers, warnings) as fd:
            _write_image(fd, layout, packed)
    except OSError as error:
        raise from_os_error(error, name, "create") from error
    finally:
        for layer in layers:
            layer.close()
    return CreateResult(
        name, header, layers[0].path if layers else None, list(dict.fromkeys(warnings))
    )


# What is asked for -------------------------------------------------------------------------


def _check_directory(path: str) -> None:
    directory = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(directory):
        raise ImageNotFound(path=f"the directory {directory}", hint="Make the directory first.")


def _check_options(options: CreateOptions) -> None:
    def need(holds: bool, option: str, reason: str) -> None:
        if not holds:
            raise InvalidOption(option=option, reason=reason)

    if options.size is not None:
        _check_size(options.size)
    elif options.base is None:
        raise InvalidSize(text="none at all", reason="an image without a base needs a size")
    block = options.block_size
    if block is not None:
        need(
            geometry.BLOCK_SIZE_MIN <= block <= geometry.BLOCK_SIZE_MAX and block.bit_count() == 1,
            "--block-size", "must be a power of two from 4k to 2M",
        )  # fmt: skip
    journal = options.journal_size
    if journal is not None:
        need(
            geometry.JOURNAL_SIZE_MIN <= journal <= geometry.METADATA_SIZE_MAX,
            "--journal-size", "must be from 64k to 1G",
        )  # fmt: skip
        need(options.base is not None, "--journal-size", "has no use in an image without a base")
    need(
        options.base_format in (None, *BASE_FORMATS), "--base-format",
        f"must be one of {', '.join(BASE_FORMATS)}",
    )  # fmt: skip
    need(
        options.base is not None or options.base_format is None, "--base-format",
        "needs a --base",
    )  # fmt: skip
    for option, number in _unsigned(options).items():
        need(0 <= number <= _LARGE_INTEGER_MAX, option, "must not be negative")


def _unsigned(options: CreateOptions) -> dict[str, int]:
    """The plain numbers by option; what is too large for its field is left to validation."""
    return {
        "--journal-buffer": options.journal_buffer or 0,
        "--journal-period": options.journal_period_ms,
        "--max-outstanding-copy-on-read": options.max_outstanding_copy_on_read,
        "--prefetch-slots": options.prefetch_slots,
        "--bytes-per-prefetch": options.bytes_per_prefetch or 0,
        "--prefetch-read-measure-time": options.prefetch_read_measure_ms,
        "--prefetch-write-measure-time": options.prefetch_write_measure_ms,
        "--prefetch-min-read": options.prefetch_min_read_kb,
        "--prefetch-min-write": options.prefetch_min_write_kb,
        "--prefetch-max-read": options.prefetch_max_read_kb,
        "--prefetch-max-write": options.prefetch_max_write_kb,
        "--prefetch-throttle-time": options.prefetch_throttle_ms,
    }


def _check_size(size: int) -> None:
    text = f"{size} bytes"
    if size <= 0:
        raise InvalidSize(text=text, reason="an image must have at least 512 bytes")
    if size % SECTOR:
        raise InvalidSize(
            text=text, reason="it is not a multiple of 512",
            hint=f"The next larger size that fits is {round_up(size, SECTOR)} bytes.",
        )  # fmt: skip
    if size > SIZE_MAX - (2 << 30):  # the metadata come on top
        raise InvalidSize(text=text, reason="it is larger than a file can be")


def _choose_size(options: CreateOptions, layers: list[Layer]) -> int:
    if options.size is not None:
        return options.size
    return round_up(layers[0].length, SECTOR)


# The base ----------------------------------------------------------------------------------


def _open_bases(path: str, options: CreateOptions, warnings: list[str]) -> list[Layer]:
    """Open the base and the chain under it, exactly as a later open of the image will."""
    assert options.base is not None
    if not options.base:
        raise InvalidOption(option="--base", reason="is empty")
    if _URI.match(options.base):
        raise InvalidOption(
            option="--base", reason=f"is a URI ({options.base}): this version has no remote bases",
            hint="Copy the base to a local raw file, or name a block device.",
        )
    open_options = OpenOptions(read_only=True, allow_dirs=options.allow_dirs)
    stored = paths.stored_base_name(options.base, path)
    try:
        base = chain.open_base_layer(stored, "raw", path, open_options, warnings)
    except BaseMissing as error:
        raise ImageNotFound(
            path=f"the base {options.base}", hint="Check the name given to --base."
        ) from error
    try:
        base_format = _decide_format(base, options)
        if base_format != "raw":
            base = chain.open_layer(base.fd, base.path, base_format, open_options)
            assert base.header is not None
            chain.check_not_left_live(base.header, base.path)
        if not base.length:
            raise BaseEmpty(base=options.base)
        return chain.open_chain(base, open_options, warnings)
    except BaseException:
        base.close()
        raise


def _decide_format(base: Layer, options: CreateOptions) -> str:
    """Return the format that was given, or raw.

    Content never decides. It may only stop: where nothing was given and a raw reading is most
    likely a mistake, the user has to say it.
    """
    if options.base_format is not None:
        return options.base_format
    start = os.pread(base.fd, 4, 0)
    if start == struct.pack("<I", codec.MAGIC):
        raise AmbiguousBaseFormat(
            base=options.base, format="an FVD image",
            remedy="Add --base-format fvd, or --base-format raw to clone its very bytes.",
        )  # fmt: skip
    if start == b"QFI\xfb":
        raise AmbiguousBaseFormat(
            base=options.base, format="a qcow2 image",
            remedy="Convert it with `qemu-img convert -O raw`, or add --base-format raw to clone "
            "its very bytes.",
        )  # fmt: skip
    return "raw"


# The header --------------------------------------------------------------------------------


def _build_header(
    size: int, layout: Layout, options: CreateOptions, base: str, identity: Identity | None
) -> Header:
    """Return the header of the new image, values that depend on each other made to fit."""
    block_size = layout.block_size
    per_prefetch = options.bytes_per_prefetch or max(MIB, block_size)
    if per_prefetch % block_size:
        raise InvalidOption(
            option="--bytes-per-prefetch",
            reason=f"must be a multiple of the block size, {format_size(block_size)}",
        )
    buffer = options.journal_buffer
    if buffer is None or not layout.journal_size:
        buffer = min(65536, layout.journal_size)
    chunk_size = layout.chunk_size
    return Header(
        magic=codec.MAGIC,
        header_size=codec.HEADER_SIZE_DEFAULT,
        create_version=codec.FORMAT_VERSION,
        last_open_version=codec.FORMAT_VERSION,
        virtual_disk_size=size,
        data_offset=layout.data_offset,
        data_file="",
        data_file_fmt="",
        base_img=base,
        base_img_fmt=(options.base_format or "raw") if base else "",
        base_img_size=layout.base_img_size,
        bitmap_offset=layout.bitmap_offset,
        bitmap_size=layout.bitmap_size,
        block_size=block_size,
        journal_offset=layout.journal_offset,
        journal_size=layout.journal_size,
        clean_shutdown=1,
        stable_journal_epoch=1,
        journal_buf_size=buffer,
        journal_clean_buf_period=options.journal_period_ms,
        table_offset=0,
        table_size=0,
        chunk_size=chunk_size,
        storage_grow_unit=max(100 * MIB, chunk_size),
        add_storage_cmd="",
        chunks_relocated=0,
        copy_on_read=int(options.copy_on_read),
        max_outstanding_copy_on_read_data=max(
            options.max_outstanding_copy_on_read, 2 * block_size
        ),
        prefetch_start_delay=options.prefetch_delay_seconds,
        base_img_fully_prefetched=0 if base else 1,
        num_prefetch_slots=options.prefetch_slots,
        bytes_per_prefetch=per_prefetch,
        prefetch_read_throughput_measure_time=options.prefetch_read_measure_ms,
        prefetch_write_throughput_measure_time=options.prefetch_write_measure_ms,
        prefetch_min_read_throughput=options.prefetch_min_read_kb,
        prefetch_min_write_throughput=options.prefetch_min_write_kb,
        prefetch_max_read_throughput=options.prefetch_max_read_kb,
        prefetch_max_write_throughput=options.prefetch_max_write_kb,
        prefetch_throttle_time=options.prefetch_throttle_ms,
        need_zero_init=0,
        extension=_build_extension(identity),
    )


# The options behind the fields that validation may find fault with.
_OPTION_OF_FIELD = {
    "base_img": "--base",
    "virtual_disk_size": "the size",
    "bitmap_size": "--block-size",
    "journal_buf_size": "--journal-buffer",
    "journal_clean_buf_period": "--journal-period",
    "prefetch_start_delay": "--prefetch-delay",
    "num_prefetch_slots": "--prefetch-slots",
    "bytes_per_prefetch": "--bytes-per-prefetch",
    "prefetch_read_throughput_measure_time": "--prefetch-read-measure-time",
    "prefetch_write_throughput_measure_time": "--prefetch-write-measure-time",
    "prefetch_max_read_throughput": "--prefetch-max-read",
    "prefetch_max_write_throughput": "--prefetch-max-write",
}


def _finish_header(header: Header, path: str, layout: Layout) -> tuple[Header, bytes]:
    """Return the header and its bytes, judged by the very rules of a later open."""
    try:
        validate_header(header, path, layout.file_size)
        return header, header.pack()
    except InvalidHeader as error:
        field_name = str(error.details["field"])
        option = _OPTION_OF_FIELD.get(field_name, field_name)
        raise InvalidOption(option=option, reason=error.details["reason"]) from error


def _build_extension(identity: Identity | None) -> Extension:
    identity = identity or Identity(codec.BASE_UNKNOWN, bytes(32), 0)
    return Extension(
        image_uuid=uuid.uuid4().bytes,
        open_session=secrets.token_bytes(16),
        boot_id=bytes(16),
        create_time=int(time.time()),
        compatible_features=codec.FEATURE_JOURNAL_TRAILERS,
        base_length=identity.length,
        base_kind=identity.kind,
        base_id=identity.id,
    )


# The file ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _target(
    path: str, force: bool, layers: list[Layer], warnings: list[str]
) -> Iterator[int]:
    """Give a descriptor to write the image to; on success the image has its name, durably."""
    real = os.path.realpath(path)
    if not os.path.lexists(real):
        with _new_file(real, _IMAGE_MODE, warnings) as fd:
            yield fd
            _sync_directory(real)
        return
    if not force:
        raise ImageExists(path=path)
    old = paths.open_file(real, writable=True, exclusive=True)
    try:
        if paths.file_identity(old) in {paths.file_identity(layer.fd) for layer in layers}:
            raise InvalidOption(
                option=path, reason="is the base or one of its bases", hint="Choose another name."
            )
        locking.lock(old, path, BOTH, exclusive=True)
        _check_old_image(old, path)
        status = os.fstat(old)
        if stat.S_ISBLK(status.st_mode):
            yield old
        else:
            beside = f"{real}.{secrets.token_hex(4)}.new"
            with _new_file(beside, stat.S_IMODE(status.st_mode), warnings) as fd:
                yield fd
                os.rename(beside, real)
                _sync_directory(real)
    finally:
        os.close(old)


def _check_old_image(fd: int, path: str) -> None:
    """Even --force does not throw away what a dead process had acknowledged and not merged."""
    try:
        header = chain.read_header(fd, path)
    except EngineError:
        return
    try:
        chain.check_not_left_live(header, path)
    except LiveStateLeft as error:
        raise LiveStateLeft(
            path=path,
            hint="Serve it once with the same --state directory, or remove the file first.",
        ) from error


@contextlib.contextmanager
def _new_file(path: str, mode: int, warnings: list[str]) -> Iterator[int]:
    """Make `path`, and remove it again unless the body succeeds."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, mode)
    except FileExistsError as error:
        raise ImageExists(path=path) from error
    try:
        verdict, store = stores.judge_store(fd)
        if verdict is stores.Verdict.REFUSED:
            raise UnsupportedStore(path=path, store=store)
        if verdict is stores.Verdict.UNTESTED:
            warnings.append(f"{path} lies on {store}, which is not a tested place for images")
        locking.lock(fd, path, BOTH, exclusive=True)
        yield fd
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        raise
    finally:
        os.close(fd)


def _write_image(fd: int, layout: Layout, packed_header: bytes) -> None:
    """Write everything but the header, make it durable, then write the header."""
    is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
    if is_device:
        length = paths.file_length(fd)
        if length < layout.file_size:
            raise InvalidOption(
                option="the image",
                reason=f"needs {layout.file_size} bytes and the device has {length}",
                hint="Choose a smaller size or a larger device.",
            )
        os.pwrite(fd, bytes(codec.HEADER_SIZE_DEFAULT), 0)
        os.fsync(fd)
        _zero_device(fd, layout)
    else:
        os.ftruncate(fd, layout.file_size)
        # Metadata get their space now: a full disk must never stop a commit.
        os.posix_fallocate(fd, 0, layout.metadata_end)
    _write_all(fd, packed_header, codec.BACKUP_OFFSET)
    os.fsync(fd)
    _write_all(fd, packed_header, 0)
    os.fsync(fd)


def _zero_device(fd: int, layout: Layout) -> None:
    """Zero the metadata and all data that no bitmap bit hides: old content is another's (I9)."""
    first_local = layout.data_offset + layout.base_img_size
    parts = (
        (codec.HEADER_SIZE_DEFAULT, layout.metadata_end - codec.HEADER_SIZE_DEFAULT),
        (first_local, layout.file_size - first_local),
    )
    for offset, length in parts:
        if not length:
            continue
        try:
            fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("=2Q", offset, length))
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP):
                raise
            _write_zeros(fd, offset, length)


def _write_zeros(fd: int, offset: int, length: int) -> None:
    piece = memoryview(bytes(MIB))
    end = offset + length
    while offset < end:
        offset += os.pwrite(fd, piece[: end - offset], offset)


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def _sync_directory(path: str) -> None:
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)



# SPDX-License-Identifier: Apache-2.0
"""Make a new image: judge what is asked for, choose the layout, and build the header.

All that can be refused is refused before the first file is touched; new_files.py then writes.
"""

import contextlib
import os
import secrets
import struct
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from fvdengine import chain, foreign, geometry, paths, remote, uris
from fvdengine import header as codec
from fvdengine.chain import Identity, Layer
from fvdengine.errors import (
    AmbiguousBaseFormat,
    BaseEmpty,
    BaseMissing,
    DataFileTooShort,
    DataServerInUse,
    ImageNotFound,
    InvalidHeader,
    InvalidOption,
    NotAnImage,
    from_os_error,
)
from fvdengine.geometry import Layout, Wanted
from fvdengine.header import Extension, Header
from fvdengine.holes import holes_of_base
from fvdengine.new_files import NewImage, data_target, image_target, new_file, write_image
from fvdengine.options import CreateOptions, OpenOptions, check_create_options
from fvdengine.units import MIB, PAGE, SECTOR, format_size, round_up
from fvdengine.validation import PREFETCH_MEMORY_MAX, validate_header

JOURNAL_BUFFER_DEFAULT_MIN = 64 << 10
JOURNAL_BUFFER_DEFAULT_MAX = 4 << 20


@dataclass(frozen=True, slots=True)
class CreateResult:
    """What was made. `hole_bytes` are the bytes of the base that became local zeros."""

    path: str
    header: Header
    base_path: str | None
    data_path: str | None = None
    hole_bytes: int = 0
    warnings: list[str] = field(default_factory=list)


def create_image(path: str | os.PathLike[str], options: CreateOptions) -> CreateResult:
    """Create the image; on any error nothing is left behind and nothing else has changed."""
    name = os.fspath(path)
    check_create_options(options)
    _check_directory(name)
    _refuse_folder(name, "the image")
    if options.data_file is not None:
        _refuse_folder(options.data_file, "--data-file")
    warnings: list[str] = []
    layers = _open_bases(name, options, warnings) if options.base is not None else []
    try:
        new = _plan_image(name, options, layers, warnings)
        header = _make_files(name, options, new, layers, warnings)
    except OSError as error:
        raise from_os_error(error, name, "create") from error
    finally:
        for layer in layers:
            layer.close()
    is_file = options.data_file is not None and options.data_format == "raw"
    return CreateResult(
        name, header, layers[0].path if layers else None,
        os.path.realpath(options.data_file or "") if is_file else options.data_file,
        sum(length for _, length in new.holes), list(dict.fromkeys(warnings)),
    )  # fmt: skip


def _plan_image(
    name: str, options: CreateOptions, layers: list[Layer], warnings: list[str]
) -> NewImage:
    size = _choose_size(options, layers)
    if layers and size < layers[0].length:
        warnings.append(
            f"the image shows only the first {format_size(size)} of the base's "
            f"{format_size(layers[0].length)}"
        )
    layout = _choose_layout(size, layers[0].length if layers else 0, options)
    if not layout.journal_size and (layout.bitmap_size or layout.table_size):
        warnings.append(
            "without a journal every flush of new data rewrites bitmap and table: it is slow"
        )
    if options.add_storage_cmd:
        warnings.append("--add-storage-cmd is kept and shown, but never run")
    stored = paths.stored_base_name(options.base, name) if options.base is not None else ""
    identity = chain.identity_of(layers[0]) if layers else None
    header = _build_header(size, layout, options, (stored, _stored_data(options, name)), identity)
    if options.like is not None:
        header = _run_like(header, options.like)
    _judge_header(header, name, layout)
    if options.detect_holes is None:
        return NewImage(layout, header)
    return NewImage(layout, header, *holes_of_base(layers, layout, options.detect_holes))


def _make_files(
    name: str,
    options: CreateOptions,
    new: NewImage,
    layers: list[Layer],
    warnings: list[str],
) -> Header:
    others = {paths.file_identity(layer.fd) for layer in layers}
    others |= {paths.file_identity(layer.storage[0]) for layer in layers if layer.storage[0] >= 0}
    with contextlib.ExitStack() as stack:
        data_fd = None
        if options.data_file is not None:
            data_fd = -1
            if options.data_format == "nbd":
                _check_server(options, name, new.header, warnings)
            else:
                data_fd = stack.enter_context(
                    data_target(options.data_file, name, options.allow_dirs, others, warnings)
                )
                others.add(paths.file_identity(data_fd))
        with image_target(name, options.force, others, warnings) as fd:
            return write_image(fd, data_fd, new)


# Over an image in use -----------------------------------------------------------------------


def create_over(real: str, options: CreateOptions, own: Callable[[int], object]) -> Header:
    """Create the image `real`, a real path, over an FVD image that somebody may be writing, of
    which nothing but the header is read: `is_as_created` says whether it may be used.

    `own` is told the descriptor of the complete image while nobody else could have opened it yet:
    a duplicate of that goes on holding the locks. On any error nothing is left behind."""
    check_create_options(options)
    base = options.base or ""
    fd = paths.open_file(base)
    try:
        header = chain.read_header(fd, base)
        layer = Layer(os.path.realpath(base), fd, "fvd", header, header.virtual_disk_size)
        new = _plan_image(real, options, [layer], [])
        with new_file(real, []) as target:
            made = write_image(target, None, new)
            own(target)
            return made
    except OSError as error:
        raise from_os_error(error, real, "create") from error
    finally:
        os.close(fd)


def is_as_created(made: Header, options: CreateOptions) -> bool:
    """Whether create_image would make, of the base that nobody writes any more, the very image
    `made`; EngineError where it would make none. Looks at the base and its bases alone."""
    base = options.base or ""
    layers = _open_bases(base, options, [])  # as in the directory of the base
    try:
        found = _plan_image(base, options, layers, []).header
    except OSError as error:
        raise from_os_error(error, base) from error
    finally:
        for layer in layers:
            layer.close()
    # Each image has others of these; where its base is to be found from there, its name says.
    ours, theirs = made.extension, found.extension
    assert ours is not None
    assert theirs is not None
    own = replace(
        theirs, image_uuid=ours.image_uuid, open_session=ours.open_session,
        create_time=ours.create_time,
    )  # fmt: skip
    return replace(found, base_img=made.base_img, extension=own) == made


def _check_server(options: CreateOptions, name: str, header: Header, warnings: list[str]) -> None:
    """Ask the server that shall hold the data whether it has room for them, and is empty."""
    uri = uris.parse_uri(header.data_file)
    length = remote.data_server_length(uri)
    needed = geometry.required_data_length(header)
    if length < needed:
        raise DataFileTooShort(path=name, data=uri.shown, actual=length, needed=needed)
    if not options.force and remote.data_server_holds_data(uri):
        raise DataServerInUse(data=uri.shown)
    if length < header.virtual_disk_size:
        warnings.append(
            f"the server {uri.shown} has room for {format_size(length)} of the disk's "
            f"{format_size(header.virtual_disk_size)}: writes beyond that will find no space"
        )


# What is asked for -------------------------------------------------------------------------


def _check_directory(path: str) -> None:
    directory = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(directory):
        raise ImageNotFound(path=f"the directory {directory}", hint="Make the directory first.")


def _choose_size(options: CreateOptions, layers: list[Layer]) -> int:
    if options.size is not None:
        return options.size
    return round_up(layers[0].length, SECTOR)


def _choose_layout(size: int, base_length: int, options: CreateOptions) -> Layout:
    """Return the layout, or say which option makes it impossible."""
    wanted = Wanted(
        size, base_length, options.block_size, options.journal_size, options.compact,
        options.chunk_size, has_data_file=options.data_file is not None,
    )  # fmt: skip
    layout = geometry.choose_layout(wanted)
    if not options.compact:
        return layout
    chunk = layout.chunk_size
    if layout.base_img_size and chunk % layout.block_size:
        raise InvalidOption(
            option="--chunk-size",
            reason=f"must be a multiple of the block size, {format_size(layout.block_size)}",
        )
    limit = geometry.METADATA_SIZE_MAX - layout.bitmap_size
    if layout.table_size > limit:
        while round_up(geometry.table_bytes(size, chunk), PAGE) > limit:
            chunk *= 2
        raise InvalidOption(
            option="the size",
            reason=f"needs a table of {format_size(layout.table_size)} for chunks of "
            f"{format_size(layout.chunk_size)}, which is above the memory limit of 1 GiB",
            hint=f"Give --chunk-size {format_size(chunk)} or more.",
        )  # fmt: skip
    return layout


def _stored_data(options: CreateOptions, path: str) -> str:
    """Return the name under which the image remembers its data file, "" if it has none."""
    if options.data_file is None:
        return ""
    if options.data_format == "nbd":
        return options.data_file
    return paths.stored_base_name(options.data_file, path)


# The base ----------------------------------------------------------------------------------


def _open_bases(path: str, options: CreateOptions, warnings: list[str]) -> list[Layer]:
    """Open the base and the chain under it, exactly as a later open of the image will."""
    assert options.base is not None
    _refuse_folder(options.base, "--base")
    if uris.is_uri(options.base):
        return [_open_remote_base(options.base, path, options, warnings)]
    open_options = OpenOptions(
        read_only=True, allow_dirs=options.allow_dirs, allow_uris=options.allow_uris,
        accept_changed_base=options.accept_changed_base,
    )  # fmt: skip
    stored = paths.stored_base_name(options.base, path)
    is_foreign = options.base_format in foreign.FORMATS
    if is_foreign and options.detect_holes is not None:
        raise _needs_plain_base()
    first_format = options.base_format if is_foreign and options.base_format else "raw"
    try:
        base = chain.open_base_layer(stored, first_format, path, open_options, warnings)
    except BaseMissing as error:
        raise ImageNotFound(
            path=f"the base {options.base}", hint="Check the name given to --base."
        ) from error
    try:
        base_format = first_format if is_foreign else _decide_format(base, options)
        if base_format == "fvd":
            base = _open_image(base, open_options)
            assert base.header is not None
            chain.check_not_left_live(base.header, base.path)
        if not base.length:
            raise BaseEmpty(base=options.base)
        return chain.open_chain(base, open_options, warnings, spare=1)  # the image itself
    except BaseException:
        base.close()
        raise


def _refuse_folder(name: str, option: str) -> None:
    """Say what is wrong before a question of permission: it can never be right."""
    if not name:
        raise InvalidOption(option=option, reason="is empty", hint="Give the name of a file.")
    if os.path.isdir(name):
        raise InvalidOption(
            option=option, reason=f"is {name}, a directory",
            hint="Name a file, such as a disk image in it, or a block device.",
        )  # fmt: skip


def _open_image(base: Layer, options: OpenOptions) -> Layer:
    """The file that was opened as raw, as the image that it is said to be."""
    try:
        return chain.open_layer(base.fd, base.path, "fvd", options)
    except NotAnImage as error:
        if "--repair" not in error.hint:
            error.hint = "Leave --base-format out if it is a raw image, or check the name."
        raise


def _needs_plain_base() -> InvalidOption:
    return InvalidOption(
        option="--detect-holes", reason="needs a base that is a raw file or an FVD image",
        hint="Leave it out: prefetch and copy-on-read store no zeros.",
    )  # fmt: skip


def _open_remote_base(base: str, path: str, options: CreateOptions, warnings: list[str]) -> Layer:
    """Open the base behind a URI: who spells it out on the command line allows it."""
    if options.detect_holes is not None:
        raise _needs_plain_base()
    given = OpenOptions(read_only=True, allow_uris=(*options.allow_uris, base))
    layer = chain.open_base_layer(base, options.base_format or "raw", path, given, warnings)
    if not layer.length:
        layer.close()
        raise BaseEmpty(base=base)
    return layer


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
            remedy="Add --base-format qcow2, or --base-format raw to clone its very bytes.",
        )  # fmt: skip
    return "raw"


# The header --------------------------------------------------------------------------------


def _build_header(
    size: int,
    layout: Layout,
    options: CreateOptions,
    names: tuple[str, str],
    identity: Identity | None,
) -> Header:
    """Return the header of the new image, values that depend on each other made to fit.

    `names` are those of the base and of the data file.
    """
    base, data = names
    block_size = layout.block_size
    return Header(
        magic=codec.MAGIC,
        header_size=codec.HEADER_SIZE_DEFAULT,
        create_version=codec.FORMAT_VERSION,
        last_open_version=codec.FORMAT_VERSION,
        virtual_disk_size=size,
        data_offset=layout.data_offset,
        data_file=data,
        data_file_fmt=options.data_format if data else "",
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
        journal_buf_size=_journal_buffer(options, layout),
        journal_clean_buf_period=options.journal_period_ms,
        table_offset=layout.table_offset,
        table_size=layout.table_size,
        chunk_size=layout.chunk_size,
        storage_grow_unit=options.storage_grow_unit
        or max(geometry.GROW_UNIT_DEFAULT, layout.chunk_size),
        add_storage_cmd=options.add_storage_cmd,
        chunks_relocated=0,
        copy_on_read=int(options.copy_on_read),
        max_outstanding_copy_on_read_data=max(options.max_outstanding_copy_on_read, 2 * block_size),
        prefetch_start_delay=options.prefetch_delay_seconds,
        base_img_fully_prefetched=0 if base else 1,
        num_prefetch_slots=options.prefetch_slots,
        bytes_per_prefetch=_bytes_per_prefetch(options, block_size),
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


_RUN_LIKE = (
    "journal_clean_buf_period",
    "copy_on_read",
    "prefetch_start_delay",
    "num_prefetch_slots",
    "prefetch_read_throughput_measure_time",
    "prefetch_write_throughput_measure_time",
    "prefetch_min_read_throughput",
    "prefetch_min_write_throughput",
    "prefetch_max_read_throughput",
    "prefetch_max_write_throughput",
    "prefetch_throttle_time",
)


def _run_like(header: Header, other: Header) -> Header:
    """The new image is run as the other one; what depends on the layout is made to fit."""
    block = header.block_size
    buffer = header.journal_buf_size
    if header.journal_size and other.journal_size:
        buffer = min(other.journal_buf_size, header.journal_size)
    most = PREFETCH_MEMORY_MAX // other.num_prefetch_slots // block * block
    return replace(
        header,
        journal_buf_size=buffer,
        storage_grow_unit=max(other.storage_grow_unit, header.chunk_size),
        max_outstanding_copy_on_read_data=max(other.max_outstanding_copy_on_read_data, 2 * block),
        bytes_per_prefetch=min(round_up(other.bytes_per_prefetch, block), most),
        **{name: getattr(other, name) for name in _RUN_LIKE},
    )


def _journal_buffer(options: CreateOptions, layout: Layout) -> int:
    if not layout.journal_size:
        return 0
    if options.journal_buffer is not None:
        return options.journal_buffer
    # A commit flushes all data, so one that no flush asked for is rare: every 262,144 changes of a
    # block where the journal is large enough. The period bounds what waits.
    half = min(layout.journal_size // 2 // PAGE * PAGE, JOURNAL_BUFFER_DEFAULT_MAX)
    return min(max(half, JOURNAL_BUFFER_DEFAULT_MIN), layout.journal_size)


def _bytes_per_prefetch(options: CreateOptions, block_size: int) -> int:
    number = options.bytes_per_prefetch or max(MIB, block_size)
    if number % block_size:
        raise InvalidOption(
            option="--bytes-per-prefetch",
            reason=f"must be a multiple of the block size, {format_size(block_size)}",
        )
    return number


# The options behind the fields that validation may find fault with.
_OPTION_OF_FIELD = {
    "base_img": "--base",
    "data_file": "--data-file",
    "storage_grow_unit": "--storage-grow-unit",
    "chunk_size": "--chunk-size",
    "add_storage_cmd": "--add-storage-cmd",
    "virtual_disk_size": "the size",
    "bitmap_size": "--block-size",
    "journal_buf_size": "--journal-buffer",
    "journal_clean_buf_period": "--journal-period",
    "prefetch_start_delay": "--prefetch-delay",
    "num_prefetch_slots": "--prefetch-slots",
    "bytes_per_prefetch": "--bytes-per-prefetch",
    "prefetch_read_throughput_measure_time": "--prefetch-read-measure-time",
    "prefetch_write_throughput_measure_time": "--prefetch-write-measure-time",
    "prefetch_min_read_throughput": "--prefetch-min-read",
    "prefetch_min_write_throughput": "--prefetch-min-write",
    "prefetch_max_read_throughput": "--prefetch-max-read",
    "prefetch_max_write_throughput": "--prefetch-max-write",
}


def _judge_header(header: Header, path: str, layout: Layout) -> None:
    """Judge the header by the very rules of a later open, and whether its names fit."""
    try:
        validate_header(header, path, layout.file_size)
        header.pack()
    except InvalidHeader as error:
        field_name = str(error.details["field"])
        option = _OPTION_OF_FIELD.get(field_name, field_name)
        reason = str(error.details["reason"])
        for name, other in _OPTION_OF_FIELD.items():
            if name in reason:
                value = getattr(header, name)
                raise InvalidOption(
                    option=option, reason=reason.replace(name, f"{other} ({value})"),
                    hint=f"Give values of {option} and {other} that fit together.",
                ) from error  # fmt: skip
        raise InvalidOption(option=option, reason=reason) from error


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

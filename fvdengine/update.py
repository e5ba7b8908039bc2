# SPDX-License-Identifier: Apache-2.0
"""Change fields of the header that only say how an image is to be run.

`plan_update` is pure: it turns KEY=VALUE texts into a new header or refuses all of them, by the
rules of create and open. `update_image` looks at the files that are newly named, and writes. The
base is never opened unless it is given a new name; then it must be the same base, by identity.
"""

import contextlib
import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace

from fvdengine import chain, editing, geometry, intent, metadata, paths, uris
from fvdengine import header as codec
from fvdengine.chain import Layer
from fvdengine.data_file import open_data_file
from fvdengine.editing import ImageFile
from fvdengine.errors import (
    BaseMissing,
    ChainLoop,
    ChainTooDeep,
    DataFileMissing,
    DataFileShared,
    DataFileTooShort,
    EngineError,
    InvalidHeader,
    InvalidOption,
    InvalidSize,
    InvalidUri,
    NotAnImage,
    UriNotAllowed,
)
from fvdengine.header import Header
from fvdengine.options import OpenOptions
from fvdengine.units import SECTOR, format_size, parse_size
from fvdengine.validation import (
    BASE_FORMATS,
    DATA_FORMATS,
    JOURNAL_BUFFER_MAX,
    JOURNAL_PERIOD_MAX_MS,
    PREFETCH_DELAY_MAX_S,
    PREFETCH_MEMORY_MAX,
    PREFETCH_SLOTS_MAX,
    SIZE_MAX,
    validate_header,
)

Value = int | str


@dataclass(frozen=True, slots=True)
class UpdateOptions:
    """allow_dirs: where newly named files may lie. unsafe: take them although nothing shows that
    they are the former ones; what a base is now becomes its recorded identity."""

    allow_dirs: tuple[str, ...] = ()
    unsafe: bool = False


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """The fields that have another value now: name to old and new one."""

    path: str
    header: Header
    changes: dict[str, tuple[Value, Value]]
    warnings: list[str] = field(default_factory=list)


# Values ------------------------------------------------------------------------------------


def _refused(key: str, text: str, rule: str) -> InvalidOption:
    return InvalidOption(
        option=key, reason=f"cannot be {text!r}", hint=f"Give {rule}; nothing was changed."
    )


def _number(low: int, high: int, unit: str) -> Callable[[str, str], Value]:
    rule = f"a whole number of {unit} from {low}"
    if high != SIZE_MAX:
        rule += f" to {high}"

    def parse(key: str, text: str) -> Value:
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise _refused(key, text, rule)
        if not low <= int(text) <= high:
            raise _refused(key, text, rule)
        return int(text)

    return parse


def _size(low: int, high: int) -> Callable[[str, str], Value]:
    rule = f"bytes, or a size such as 64k or 1M, from {format_size(low)}"
    if high != SIZE_MAX:
        rule += f" to {format_size(high)}"

    def parse(key: str, text: str) -> Value:
        try:
            size = parse_size(text)
        except InvalidSize as error:
            raise _refused(key, text, rule) from error
        if not low <= size <= high:
            raise _refused(key, text, rule)
        return size

    return parse


def _flag(key: str, text: str) -> Value:
    word = text.strip().lower()
    if word in ("on", "true", "yes", "1"):
        return 1
    if word in ("off", "false", "no", "0"):
        return 0
    raise _refused(key, text, "on or off")


def _reset(key: str, text: str) -> Value:
    if _flag(key, text):
        raise _refused(key, text, "off: the flag can only be taken back")
    return 0


def _delay(key: str, text: str) -> Value:
    if text.strip().lower() in ("off", "-1"):
        return -1
    try:
        return _number(0, PREFETCH_DELAY_MAX_S, "seconds")(key, text)
    except InvalidOption as error:
        raise _refused(
            key, text, f"seconds from 0 (at once) to {PREFETCH_DELAY_MAX_S}, or off"
        ) from error


def _text(key: str, text: str) -> Value:
    if any(ord(character) in range(1, 32) or ord(character) == 127 for character in text):
        raise _refused(key, text, "a text without control characters")
    try:
        codec.encode_name(text, key)
    except InvalidHeader as error:
        raise InvalidOption(
            option=key, reason=str(error.details["reason"]),
            hint="Give a shorter text without NUL characters; nothing was changed.",
        ) from error  # fmt: skip
    return text


def _name(key: str, text: str) -> Value:
    if not text:
        raise _refused(key, text, "the name of a file")
    if uris.is_uri(text):
        try:
            uris.parse_uri(text)
        except InvalidUri as error:
            raise InvalidOption(
                option=key, reason=f"cannot be {text!r}: {error.details['reason']}",
                hint=f"{error.hint} Nothing was changed.",
            ) from error  # fmt: skip
    return _text(key, text)


def _format(formats: tuple[str, ...]) -> Callable[[str, str], Value]:
    def parse(key: str, text: str) -> Value:
        if text not in formats:
            raise _refused(key, text, f"one of {', '.join(formats)}")
        return text

    return parse


_MILLISECONDS = _number(0, SIZE_MAX, "milliseconds")
_MEASURE = _number(1, SIZE_MAX, "milliseconds")
_RATE = _number(0, SIZE_MAX, "KB/s")

KEYS: dict[str, Callable[[str, str], Value]] = {
    "journal_buf_size": _size(0, JOURNAL_BUFFER_MAX),
    "journal_clean_buf_period": _number(0, JOURNAL_PERIOD_MAX_MS, "milliseconds"),
    "storage_grow_unit": _size(SECTOR, SIZE_MAX),
    "add_storage_cmd": _text,
    "copy_on_read": _flag,
    "max_outstanding_copy_on_read_data": _size(0, SIZE_MAX),
    "prefetch_start_delay": _delay,
    "num_prefetch_slots": _number(1, PREFETCH_SLOTS_MAX, "buffers"),
    "bytes_per_prefetch": _size(SECTOR, PREFETCH_MEMORY_MAX),
    "prefetch_read_throughput_measure_time": _MEASURE,
    "prefetch_write_throughput_measure_time": _MEASURE,
    "prefetch_min_read_throughput": _RATE,
    "prefetch_min_write_throughput": _RATE,
    "prefetch_max_read_throughput": _RATE,
    "prefetch_max_write_throughput": _RATE,
    "prefetch_throttle_time": _MILLISECONDS,
    "base_img": _name,
    "base_img_fmt": _format(BASE_FORMATS),
    "data_file": _name,
    "data_file_fmt": _format(DATA_FORMATS),
    "need_zero_init": _reset,
}
_INSTEAD = {
    "virtual_disk_size": "Use `fvdctl resize`.",
    "base_img_fully_prefetched": "Let it be set by `fvdctl prefetch`.",
    "clean_shutdown": "Use `fvdctl check --repair`.",
}


def _unknown(key: str) -> InvalidOption:
    if key in codec.HEADER_FIELD_NAMES:
        return InvalidOption(
            option=key, reason="is fixed when an image is made, or kept by fvd itself",
            hint=_INSTEAD.get(key, "Make a new image with `fvdctl create`; nothing was changed."),
        )  # fmt: skip
    close = difflib.get_close_matches(key, KEYS, 1)
    hint = f"Did you mean {close[0]}?" if close else "`fvdctl update --help` lists the fields."
    return InvalidOption(option=repr(key), reason="is no field of an image's header", hint=hint)


# The new header ----------------------------------------------------------------------------


def plan_update(header: Header, assignments: Mapping[str, str]) -> Header:
    """Return `header` with all `assignments` made, or raise InvalidOption; nothing is read.

    Whether a newly named file is the right one is for the caller to find out.
    """
    values = {}
    for key, text in assignments.items():
        if key not in KEYS:
            raise _unknown(key)
        values[key] = KEYS[key](key, text)
    for names, owner in ((("base_img", "base_img_fmt"), header.base_img),
                         (("data_file", "data_file_fmt"), header.data_file)):  # fmt: skip
        for key in names:
            if key in values and not owner:
                raise InvalidOption(
                    option=key, reason=f"cannot be set: the image was made without a {names[0]}",
                    hint="Make a new image with `fvdctl create`; nothing was changed.",
                )  # fmt: skip
    new = replace(header, **values)  # type: ignore[arg-type]
    _check_together(header, new)
    try:
        validate_header(new, "the image", geometry.required_length(new))
    except InvalidHeader as error:
        raise InvalidOption(
            option=str(error.details["field"]), reason=str(error.details["reason"]),
            hint="Give values that fit together; nothing was changed.",
        ) from error  # fmt: skip
    return new


def _check_together(old: Header, new: Header) -> None:
    """Check what create sees to and open tolerates; only where it is new."""

    def need(key: str, holds: bool, rule: str) -> None:
        if not holds and getattr(old, key) != getattr(new, key):
            raise _refused(key, str(getattr(new, key)), rule)

    need(
        "max_outstanding_copy_on_read_data",
        new.max_outstanding_copy_on_read_data >= 2 * new.block_size,
        f"at least two blocks, {format_size(2 * new.block_size)}",
    )
    need(
        "storage_grow_unit",
        new.storage_grow_unit >= new.chunk_size and new.storage_grow_unit % SECTOR == 0,
        f"a multiple of 512 of at least a chunk, {format_size(new.chunk_size)}",
    )
    need(
        "bytes_per_prefetch", new.bytes_per_prefetch % new.block_size == 0,
        f"a multiple of the block size, {format_size(new.block_size)}",
    )  # fmt: skip


def changes(old: Header, new: Header) -> dict[str, tuple[Value, Value]]:
    """Return the fields that differ, with both values."""
    return {
        item.name: (getattr(old, item.name), getattr(new, item.name))
        for item in fields(Header)
        if item.name != "extension" and getattr(old, item.name) != getattr(new, item.name)
    }


# The file ----------------------------------------------------------------------------------


def update_image(
    path: str | os.PathLike[str], assignments: Mapping[str, str],
    options: UpdateOptions | None = None,
) -> UpdateResult:  # fmt: skip
    """Make all `assignments`, or none; `base_img` is named as the caller sees it.

    Raises InvalidOption, ImageInUse, LiveStateLeft and whatever keeps the image from being read.
    """
    name = os.fspath(path)
    options = options or UpdateOptions()
    warnings: list[str] = []
    stored = dict(assignments)
    for key in ("base_img", "data_file"):
        if stored.get(key):
            if os.path.isdir(stored[key]):
                raise _refused(key, stored[key], "the name of a file: this is a directory")
            stored[key] = paths.stored_base_name(stored[key], name)
    with editing.open_for_change(name) as file:
        old = editing.read_free_header(file)
        new = plan_update(old, stored)
        if "base_img" in assignments or "base_img_fmt" in assignments:
            given = (stored["base_img"],) if stored.get("base_img") else ()
            new = _judge_base(file, new, options, given, warnings)
        if "data_file" in assignments or "data_file_fmt" in assignments:
            _judge_data_file(file, old, new, options)
        _check_one_step(old, new)
        editing.finish_update(file)
        if new != old:
            editing.write_update(file, old, new)
    return UpdateResult(name, new, changes(old, new), list(dict.fromkeys(warnings)))


def _check_one_step(old: Header, new: Header) -> None:
    """Raise InvalidOption where a crash could leave some of the fields changed and others not."""
    if editing.is_one_step(old, new):
        return
    hint = "Change one field at a time; nothing was changed."
    if intent.has_room(old):
        hint = "Open the image for writing once, or change one field at a time."
    raise InvalidOption(
        option="the update",
        reason="has several fields, which this image cannot take in one step: "
        + ("an older version wrote it last" if intent.has_room(old) else
           "its header has no backup copy"),
        hint=hint,
    )  # fmt: skip


def _judge_base(
    file: ImageFile, header: Header, options: UpdateOptions, given: tuple[str, ...],
    warnings: list[str],
) -> Header:
    """Return `header`, whose base has been looked at; with another identity only if asked for.

    A URI that was `given` on the command line is allowed by that.
    """  # fmt: skip
    if not header.needs_base:
        return header
    opening = OpenOptions(read_only=True, allow_dirs=options.allow_dirs, allow_uris=given)
    try:
        base = chain.open_base_layer(
            header.base_img, header.base_format, file.path, opening, warnings,
            {paths.file_identity(file.fd)},
        )  # fmt: skip
    except BaseMissing as error:
        raise InvalidOption(
            option="base_img", reason=f"names {error.details['base']}, which does not exist",
            hint="Check the name; nothing was changed.",
        ) from error  # fmt: skip
    except NotAnImage as error:
        if "--repair" not in error.hint:
            error.hint = "Check base_img and base_img_fmt; nothing was changed."
        raise
    try:
        problem = chain.identity_problem(header, base)
        if problem and not options.unsafe:
            raise InvalidOption(
                option="base_img",
                reason=f"names {base.path}, which is not the base of this image: {problem}",
                hint="Name the very base under its new name, or add --unsafe if you know "
                "that the content is the same; nothing was changed.",
            )
        image = Layer(file.path, file.fd, "fvd", header, header.virtual_disk_size)
        chain.check_base(image, base, accept_changed=True, warnings=warnings)
        if paths.file_identity(base.fd) in _own_data(image):
            raise InvalidOption(
                option="base_img", reason=f"names {base.path}, the data file of the image itself",
                hint="Name the base that the image was made from; nothing was changed.",
            )  # fmt: skip
        _refuse_loop(image, base, opening, warnings)
        return _with_identity(header, base) if options.unsafe else header
    finally:
        base.close()


def _own_data(image: Layer) -> Iterator[tuple[int, int, int]]:
    """The identity of the data file that the image names, if it is there."""
    assert image.header is not None
    name = image.header.data_file
    if not name or uris.is_uri(name):
        return
    with contextlib.suppress(OSError):
        fd = os.open(paths.resolve(name, image.path), os.O_PATH | os.O_CLOEXEC)
        try:
            yield paths.file_identity(fd)
        finally:
            os.close(fd)


def _refuse_loop(
    image: Layer, base: Layer, options: OpenOptions, warnings: list[str]
) -> None:
    """Raise if the chain under `base` leads back to the image or is too long to be opened; what
    else is wrong with it is a warning, as it can be mended later."""
    above = {paths.file_identity(image.fd), *_own_data(image)}
    options = replace(options, accept_changed_base=True)
    try:
        layers = chain.open_chain(base, options, [], above, spare=1)
    except (ChainLoop, ChainTooDeep) as error:
        why = f"whose own chain of bases has {chain.CHAIN_LENGTH_MAX} images or more"
        if isinstance(error, ChainLoop):
            why = f"which has {image.path} itself, or its data file, among its bases"
        raise InvalidOption(
            option="base_img", reason=f"names {base.path}, {why}",
            hint="Name the base that the image was made from; nothing was changed.",
        ) from error  # fmt: skip
    except UriNotAllowed:
        return  # what lies behind a server cannot lead back here
    except EngineError as error:
        warnings.append(error.message)
        return
    for layer in layers[1:]:
        layer.close()


_RIGHT_DATA = "Name the image's data file as it is called now; nothing was changed."


def _judge_data_file(
    file: ImageFile, old: Header, new: Header, options: UpdateOptions
) -> None:
    """Raise unless the newly named data file can be the former one: it has no identity of its own.

    It must be long enough for all that is mapped, and the former name must lead to no other file.
    """
    given = (new.data_file,) if new.data_file != old.data_file else ()
    opening = OpenOptions(allow_dirs=options.allow_dirs, allow_uris=given)
    try:
        data = open_data_file(new, file.fd, file.path, opening)
    except (DataFileMissing, DataFileShared, DataFileTooShort) as error:
        error.hint = _RIGHT_DATA
        raise
    assert data is not None
    try:
        doubt = ""
        if data.fd < 0:
            doubt = "is on a server, which cannot be asked whether it is the former data file"
        else:
            if _is_base(data.fd, new, file.path):
                raise DataFileShared(
                    path=file.path, data=data.path, other="its base", hint=_RIGHT_DATA
                )
            chain.refuse_data_below(file.fd, file.path, new, data.fd, opening)
            metadata.load_metadata(file.fd, new, file.path, paths.file_length(data.fd))
            former = paths.resolve(old.data_file, file.path)
            if old.data_format == "raw" and os.path.exists(former):
                same = os.path.samestat(os.stat(former), os.fstat(data.fd))
                doubt = "" if same else f"is another file than {former}, which is still there"
    finally:
        data.close()
    if doubt and not options.unsafe:
        raise InvalidOption(
            option="data_file", reason=doubt,
            hint="Move the former file away, or add --unsafe if you know that the content is the "
            "same; nothing was changed.",
        )


def _is_base(fd: int, header: Header, path: str) -> bool:
    """Whether the open file is the one that is written over if it becomes the data file."""
    if not header.needs_base or uris.is_uri(header.base_img):
        return False
    base = paths.resolve(header.base_img, path)
    return os.path.exists(base) and os.path.samestat(os.stat(base), os.fstat(fd))


def _with_identity(header: Header, base: Layer) -> Header:
    """Return `header` with what `base` is now recorded; not where older writers were at work."""
    if header.trusted_extension is None:
        return header
    found = chain.identity_of(base)
    extension = replace(
        header.trusted_extension, base_kind=found.kind, base_id=found.id, base_length=found.length
    )
    return replace(header, extension=extension)

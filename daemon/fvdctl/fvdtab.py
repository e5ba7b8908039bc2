# SPDX-License-Identifier: Apache-2.0
"""/etc/fvd/fvdtab: the devices that are attached at boot, one a line.

NAME IMAGE OPTIONS, separated by blanks; options are those of `fvdctl attach` without the dashes,
separated by commas ("-" for none). A "#" begins a comment. A line that is wrong costs its own
device alone: it is refused with the line's number, and who asks for another device is warned.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fvdapi.errors import ApiError
from fvdapi.models import AttachRequest, first_fault, is_device_name
from fvdengine import patience
from fvdengine.chain import images_below
from fvdengine.errors import InvalidSize
from fvdengine.units import parse_size

DEFAULT_PATH: Final = "/etc/fvd/fvdtab"
# More is no table, but a file that was named by mistake.
SIZE_MAX: Final = 4 << 20
# Inside a word it is a sign of a path like any other.
_COMMENT: Final = re.compile(rb"(^|(?<=\s))#.*")
_FLAGS: Final = ("read-only", "accept-changed-base", "copy-on-read", "no-copy-on-read")
# What is said of a value that cannot be, where a model's own words would not help.
_TAKES: Final = {"device": "it is a node of the nbd driver, such as /dev/nbd0"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One line: its device (if only by its first word), and what fvdd is asked for, or why not."""

    name: str
    request: AttachRequest | None = None
    fault: ApiError | None = None
    where: str = ""
    options: str = "-"


def find(name: str, path: str = DEFAULT_PATH) -> tuple[AttachRequest, list[str]]:
    """What fvdd is asked for by the entry called `name`, and what is wrong with other lines;
    ApiError when there is no such entry or it is wrong."""
    entries = load(path)
    others = [entry.fault.message for entry in entries if entry.fault and entry.name != name]
    for entry in entries:
        if entry.name == name and entry.fault is not None:
            raise entry.fault
    for entry in entries:
        if entry.name == name and entry.request is not None:
            return entry.request, others
    raise ApiError(
        "device_not_found",
        f"{path} has no device called '{name}'",
        hint=f"add a line: {name} /path/of/the/image.fvd -"
        + (f"; and what is wrong there: {', '.join(others)}" if others else ""),
    )


@dataclass(frozen=True, slots=True)
class Stale:
    """A line that would change a base of an image that a device is on: that, and what helps."""

    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.text}; {self.remedy}"


def moved_on(name: str, old: str, new: str, path: str = DEFAULT_PATH) -> list[Stale]:
    """What is to be said of the table as the device `name` continues on the image `new` over
    `old`: at the next boot a base of it would be written, and it would be lost."""
    return stale(name, new, path, (old,))


def stale(
    name: str, image: str, path: str = DEFAULT_PATH, bases: Sequence[str] = ()
) -> list[Stale]:
    """The lines that attach for writing what the image of the device `name` is over, whatever they
    call it: `bases`, and what is found below."""
    try:
        entries = load(path)
    except ApiError:  # there is no table, or none that names anything
        return []
    below = list(dict.fromkeys((*bases, *images_below(image)))) if entries else []
    found: list[Stale] = []
    silent: set[str] = set()
    for entry in entries if below else []:
        if entry.request is None or entry.request.read_only:
            continue
        if not _answers(entry.request.image, silent):
            continue  # what hangs is not below an image that could be followed
        base = next((base for base in below if _is_same(entry.request.image, base)), None)
        if base is None:
            continue
        is_own = name == entry.name or base == below[0]
        found.append(
            Stale(
                f"{entry.where}: '{entry.name}' is still on {base}, which the next boot would "
                f"attach and change; {image} is of no use after that",
                _line_for(entry, below, image) if is_own else f"{image} is over it: name that "
                "there, or add the option read-only",
            )
        )
    return found


def _answers(path: str, silent: set[str]) -> bool:
    """Whether the storage of a file answers; one folder that does not is asked once."""
    folder = os.path.dirname(path)
    try:
        if folder in silent or patience.answers(path):
            return folder not in silent
    except ValueError:  # no file can have that name
        return True
    silent.add(folder)
    return False


def _is_same(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except (OSError, ValueError):
        return os.path.realpath(path) == os.path.realpath(other)


def _line_for(entry: Entry, bases: Sequence[str], new: str) -> str:
    options = [] if entry.options == "-" else [entry.options]
    allowed = [os.path.dirname(new), *_request_of(entry).allow_dirs]
    for base in bases:
        place = os.path.dirname(os.path.realpath(base))
        if any(_is_inside(place, os.path.realpath(folder)) for folder in allowed):
            continue
        if "," in place or _breaks_line(place):
            return f"{place} cannot stand in the table: move {base} elsewhere before the next boot"
        options.append(f"allow-dir={place}")
        allowed.append(place)
    if _breaks_line(new):
        return f"{new} cannot stand in the table: give it a name without blanks"
    return f"write there: {entry.name} {new} {','.join(options) or '-'}"


def _is_inside(place: str, folder: str) -> bool:
    return os.path.commonpath((place, folder)) == folder


def _request_of(entry: Entry) -> AttachRequest:
    assert entry.request is not None
    return entry.request


def _breaks_line(path: str) -> bool:
    return any(sign.isspace() for sign in path)


def load(path: str = DEFAULT_PATH) -> list[Entry]:
    """All entries, in order, those that are wrong included; ApiError where no file can be read."""
    try:
        with open(path, "rb") as file:
            content = file.read(SIZE_MAX + 1)
    except OSError as error:
        raise _wrong(f"{path} cannot be read ({error.strerror})") from error
    if len(content) > SIZE_MAX:
        raise _wrong(f"{path} is no table of devices: it is larger than {SIZE_MAX >> 20} MiB")
    entries: list[Entry] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        words = _COMMENT.sub(b"", line).split()
        if not words:
            continue
        name, where = words[0].decode(errors="replace"), f"{path}, line {number}"
        try:
            if name in lines:
                raise _wrong(f"{where}: '{name}' is there already, on line {lines[name]}")
            lines[name] = number
            request = _parse(words, where)
            entries.append(Entry(name, request, where=where, options=words[2].decode()))
        except ApiError as error:
            entries.append(Entry(name, fault=error))
    return entries


def _parse(raw: list[bytes], where: str) -> AttachRequest:
    try:
        words = [word.decode() for word in raw]
    except UnicodeDecodeError as error:
        raise _wrong(f"{where}: it is not UTF-8") from error
    if len(words) != 3:
        raise _wrong(f"{where}: expected NAME IMAGE OPTIONS", "write - where there are no options")
    name, image, options = words
    if not is_device_name(name):
        raise _wrong(f"{where}: '{name}' cannot be the name of a device")
    if not image.startswith("/"):
        raise _wrong(f"{where}: the image must be an absolute path")
    found: dict[str, Any] = {}
    for text in [] if options == "-" else options.split(","):
        _option(found, text, where)
    try:
        return AttachRequest.model_validate({"name": name, "image": image, **found})
    except ValueError as error:
        option, value, reason = first_fault(error)
        known, takes = option.replace("_", "-"), _TAKES.get(option, reason)
        raise _wrong(f"{where}: {known}={value} cannot be: {takes}") from error


def _option(found: dict[str, Any], text: str, where: str) -> None:
    """Take one option over; the models of the API check what the values mean together."""
    name, equals, value = text.partition("=")
    if name in _FLAGS and not equals:
        found[name.removeprefix("no-").replace("-", "_")] = not name.startswith("no-")
        return
    if name not in _VALUES:
        known = ", ".join((*_FLAGS, *(f"{name}={takes}" for name, (takes, _) in _VALUES.items())))
        raise _wrong(f"{where}: the option '{text}' is not known", f"known: {known}")
    takes, parse = _VALUES[name]
    try:
        if not value:
            raise ValueError(text)
        parsed = parse(value)
    except (ValueError, InvalidSize) as error:
        raise _wrong(f"{where}: '{text}' cannot be", f"write {name}={takes}") from error
    key = name.replace("-", "_")
    if name == "profile":
        found[f"{parsed[0]}_profile"] = parsed[1]
    elif name in ("allow-dir", "allow-uri"):
        found[f"{key}s"] = (*found.get(f"{key}s", ()), parsed)
    else:
        found[key] = parsed


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError(text)
    return int(text)


def _delay(text: str) -> int:
    return -1 if text == "off" else _number(text)


def _path(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError(text)
    return text


def _profile(text: str) -> tuple[str, str]:
    what, _, path = text.partition(":")
    if what not in ("record", "replay"):
        raise ValueError(text)
    return what, _path(path)


# What is to be written behind the "=", and what reads it.
_VALUES: Final[dict[str, tuple[str, Callable[[str], Any]]]] = {
    "allow-dir": ("/DIR", _path),
    "allow-uri": ("URI", str),
    "connections": ("N", _number),
    "sector-size": ("512|4096", _number),
    "prefetch-delay": ("SECONDS|off", _delay),
    "prefetch-policy": ("polite|eager|fixed", str),
    "fetch-size": ("SIZE", parse_size),
    "profile": ("record:/FILE|replay:/FILE", _profile),
    "cache": ("writeback|writethrough|none", str),
    "on-full": ("error|wait", str),
    "wait": ("node|partitions|none", str),
    "device": ("/dev/nbdN", str),
    "transport": ("nbd", str),
}


def _wrong(message: str, hint: str = "a line is: NAME IMAGE OPTIONS, or - for none") -> ApiError:
    return ApiError("invalid_config", message, hint=hint)

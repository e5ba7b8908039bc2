# SPDX-License-Identifier: Apache-2.0
"""/etc/fvd/fvdtab: the devices that are attached at boot, one a line.

NAME IMAGE OPTIONS, separated by blanks; options are those of `fvdctl attach` without the dashes,
separated by commas ("-" for none). A "#" begins a comment. An error names the line: a device that
is quietly not attached would be found out by a file system that is not there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from fvdapi.errors import ApiError
from fvdapi.models import AttachRequest, is_device_name
from fvdengine.errors import InvalidSize
from fvdengine.units import parse_size

DEFAULT_PATH: Final = "/etc/fvd/fvdtab"
_FLAGS: Final = ("read-only", "accept-changed-base")
_WORDS: Final = ("wait", "device", "prefetch-policy")


@dataclass(frozen=True, slots=True)
class Entry:
    """One line, as far as an attach request needs it."""

    name: str
    image: str
    options: dict[str, Any] = field(default_factory=dict)


def find(name: str, path: str = DEFAULT_PATH) -> Entry:
    """The entry called `name`; ApiError when there is none or a line is wrong."""
    for entry in load(path):
        if entry.name == name:
            return entry
    raise ApiError(
        "device_not_found",
        f"{path} has no device called '{name}'",
        hint=f"add a line: {name} /path/of/the/image.fvd -",
    )


def request_of(entry: Entry) -> AttachRequest:
    """What fvdd is asked for; ApiError when the options' values cannot be."""
    try:
        return AttachRequest.model_validate(
            {"name": entry.name, "image": entry.image, **entry.options}
        )
    except ValueError as error:  # pydantic's, which says what and where in its first lines
        reason = " ".join(str(error).splitlines()[1:3])
        raise _wrong(f"the entry of '{entry.name}': {reason}") from error


def load(path: str = DEFAULT_PATH) -> list[Entry]:
    """All entries, in order."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise _wrong(f"{path} cannot be read ({reason})") from error
    entries: list[Entry] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        entry = _parse(words, f"{path}, line {number}")
        if entry.name in [known.name for known in entries]:
            raise _wrong(f"{path}, line {number}: '{entry.name}' is there already")
        entries.append(entry)
    return entries


def _parse(words: list[str], where: str) -> Entry:
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
    return Entry(name, image, found)


def _option(found: dict[str, Any], text: str, where: str) -> None:
    """Take one option over; the models of the API check what the values mean together."""
    name, equals, value = text.partition("=")
    key = name.replace("-", "_")
    numbers: dict[str, Callable[[str], int]] = {
        "connections": _number, "sector-size": _number, "prefetch-delay": _delay,
        "fetch-size": parse_size,
    }  # fmt: skip
    try:
        if name in _FLAGS and not equals:
            found[key] = True
        elif name in ("copy-on-read", "no-copy-on-read") and not equals:
            found["copy_on_read"] = name == "copy-on-read"
        elif name == "allow-dir" and value.startswith("/"):
            found["allow_dirs"] = (*found.get("allow_dirs", ()), value)
        elif name == "allow-uri" and value:
            found["allow_uris"] = (*found.get("allow_uris", ()), value)
        elif name in numbers:
            found[key] = numbers[name](value)
        elif name in _WORDS and value:
            found[key] = value
        else:
            raise ValueError(text)
    except (ValueError, InvalidSize):
        known = ", ".join(
            (*_FLAGS, "copy-on-read", "no-copy-on-read", "allow-dir=DIR",
             "allow-uri=URI", "connections=N", "sector-size=N", "prefetch-delay=S|off",
             "prefetch-policy=polite|eager|fixed", "fetch-size=SIZE", "wait=node|partitions|none",
             "device=/dev/nbdN")
        )  # fmt: skip
        raise _wrong(f"{where}: the option '{text}' is not known", f"known: {known}") from None


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError(text)
    return int(text)


def _delay(text: str) -> int:
    return -1 if text == "off" else _number(text)


def _wrong(message: str, hint: str = "a line is: NAME IMAGE OPTIONS, or - for none") -> ApiError:
    return ApiError("invalid_config", message, hint=hint)

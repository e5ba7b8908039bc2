# SPDX-License-Identifier: Apache-2.0
"""The arguments of an op, read out of its packet with their types checked."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fvdd.worker.failure import Failure


class Arguments:
    """Reads named arguments; one that is left out or null has its default."""

    def __init__(self, message: Mapping[str, object]) -> None:
        self._message = message

    def text(self, name: str, default: str | None = None) -> str:
        """Read a string; without a default it must be there."""
        value = self._message.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise _wrong(name, "a string")
        return value

    def optional_text(self, name: str) -> str | None:
        """Read a string that may be missing."""
        return None if self._message.get(name) is None else self.text(name)

    def flag(self, name: str) -> bool:
        """Read a truth value; false by default."""
        return bool(self.optional_flag(name))

    def optional_flag(self, name: str) -> bool | None:
        """Read a truth value that may be left to the image."""
        value = self._message.get(name)
        if value is None or isinstance(value, bool):
            return value
        raise _wrong(name, "true or false")

    def optional_number(self, name: str) -> int | None:
        """Read an integer that may be left to the image."""
        value = self._message.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise _wrong(name, "an integer")
        return value

    def numbers(self, name: str) -> tuple[int, ...]:
        """Read a list of integers that are not negative; empty by default."""
        value = self._message.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(
            isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
        ):
            raise _wrong(name, "a list of integers")
        return tuple(value)

    def pair(self, name: str) -> tuple[int, int] | None:
        """Read two integers that are not negative, and may be missing."""
        match self.numbers(name):
            case (first, second):
                return (first, second)
            case ():
                return None
        raise _wrong(name, "two numbers")

    def hex(self, name: str, count: int) -> str:
        """Read `count` bytes in hexadecimal digits; empty by default."""
        value = self.text(name, "")
        if value and not re.fullmatch(f"[0-9a-f]{{{2 * count}}}", value):
            raise _wrong(name, f"{count} bytes in hexadecimal digits")
        return value

    def seconds(self, name: str, default: float) -> float:
        """Read a positive time in seconds."""
        value = self._message.get(name)
        if value is None:
            return default
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return float(value)
        raise _wrong(name, "a positive number")

    def texts(self, name: str) -> tuple[str, ...]:
        """Read a list of strings; empty by default."""
        value = self._message.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise _wrong(name, "a list of strings")
        return tuple(value)

    def mapping(self, name: str) -> dict[str, str]:
        """Read an object of strings; it must be there."""
        value = self._message.get(name)
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise _wrong(name, "an object of strings")
        return dict(value)


def _wrong(name: str, kind: str) -> Failure:
    return Failure("bad_request", f"the argument {name} must be {kind}")

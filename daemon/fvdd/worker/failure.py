# SPDX-License-Identifier: Apache-2.0
"""What a worker says when something fails: on the control channel and on the terminal."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Final

from fvdd.attach.export import ExportError
from fvdengine.errors import EngineError

# Code: somebody else opened the image for writing since the device had it open.
OPENED_SINCE: Final = "image_opened_since"


class Failure(Exception):
    """Code, one sentence, the remedy, and the details the sentence was made from."""

    def __init__(
        self,
        code: str,
        message: str,
        hint: str = "",
        *,
        details: Mapping[str, object] | None = None,
        exit_status: int = 1,
        is_unexpected: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.details = dict(details or {})
        self.exit_status = exit_status
        self.is_unexpected = is_unexpected

    def as_message(self) -> dict[str, object]:
        """The form in which it crosses the control channel."""
        details = {
            name: value if isinstance(value, str | int | float | bool | None) else str(value)
            for name, value in self.details.items()
        }
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "details": details,
        }


def as_failure(error: Exception) -> Failure:
    """Turn whatever was raised into a Failure; what nobody foresaw is marked as unexpected."""
    match error:
        case Failure():
            return error
        case EngineError():
            return Failure(
                error.code,
                error.message,
                error.hint,
                details=error.details,
                exit_status=error.exit_status,
            )
        case ExportError():
            return Failure(error.code, error.message, error.hint, exit_status=error.exit_status)
        case OSError():
            number = error.errno or 0
            named = errno.errorcode.get(number, str(number))
            where = f"{error.filename}: " if error.filename else ""
            return Failure(
                "system_error",
                f"{where}{os.strerror(number) if number else error}",
                details={"errno": number, "name": named},
            )
    cause = getattr(error, "errno", None)
    if isinstance(cause, int):
        # The compiled engine's own exception: an errno, where it arose, and a finished sentence.
        details = {"errno": cause, "where": str(getattr(error, "where", ""))}
        return Failure("engine_failed", str(error), details=details)
    return Failure("internal_error", f"{type(error).__name__}: {error}", is_unexpected=True)

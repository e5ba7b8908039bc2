# SPDX-License-Identifier: Apache-2.0
"""Errors of the control API: the one table code <-> HTTP status <-> exit status.

Everything that can go wrong online has a snake_case code here. fvdd raises `ApiError` with such a
code, the wire carries code, message, hint and details, the client raises the same `ApiError`
again, and fvdctl exits with the status of the table. Errors of the engine cross the wire with
their own codes: those that are not listed are rows of the default kind, so a worker that is newer
than its client still gives a readable error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

EXIT_FAILED: Final = 1
EXIT_NOT_FOUND: Final = 4
EXIT_BUSY: Final = 5
EXIT_UNSUPPORTED: Final = 6
EXIT_UNREACHABLE: Final = 7
EXIT_TIMED_OUT: Final = 8


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """One row: a code, the HTTP status that carries it, the exit status that a script sees."""

    code: str
    http_status: int
    exit_status: int
    meaning: str


_ROWS: Final = (
    # The request itself.
    ErrorKind("invalid_request", 422, EXIT_FAILED, "a value in the request is not acceptable"),
    ErrorKind("invalid_name", 422, EXIT_FAILED, "the device name cannot be used"),
    ErrorKind("invalid_size", 422, EXIT_FAILED, "the size does not fit the sector size"),
    ErrorKind("request_too_large", 413, EXIT_FAILED, "no request is as long as that"),
    ErrorKind("not_found", 404, EXIT_NOT_FOUND, "no such address in the API"),
    ErrorKind("method_not_allowed", 405, EXIT_FAILED, "the address exists, the method does not"),
    # Devices.
    ErrorKind("device_not_found", 404, EXIT_NOT_FOUND, "no attached device of that name"),
    ErrorKind("device_exists", 409, EXIT_BUSY, "a device of that name is attached already"),
    ErrorKind("device_busy", 409, EXIT_BUSY, "the kernel device is used by somebody else"),
    ErrorKind("device_held", 409, EXIT_BUSY, "the device is mounted or open and stays attached"),
    ErrorKind("device_failed", 409, EXIT_FAILED, "the device has no working worker"),
    ErrorKind("device_orphaned", 409, EXIT_FAILED, "an earlier fvdd left the device behind"),
    ErrorKind("device_state", 409, EXIT_FAILED, "the device's state does not allow this now"),
    ErrorKind("device_not_released", 504, EXIT_TIMED_OUT, "the kernel did not let go in time"),
    ErrorKind("node_missing", 504, EXIT_TIMED_OUT, "the device node did not appear"),
    ErrorKind("too_many_devices", 409, EXIT_FAILED, "the configured limit is reached"),
    ErrorKind("prefetch_unavailable", 409, EXIT_FAILED, "there is nothing that could be fetched"),
    ErrorKind("prefetch_failed", 409, EXIT_FAILED, "prefetch gave up"),
    ErrorKind("timed_out", 504, EXIT_TIMED_OUT, "not done within the time allowed"),
    # Images (the engine's codes that deserve a status of their own).
    ErrorKind("image_not_found", 404, EXIT_NOT_FOUND, "no such image file"),
    ErrorKind("image_in_use", 409, EXIT_BUSY, "somebody else has the image open"),
    ErrorKind("image_replaced", 409, EXIT_FAILED, "the image's name leads to another file by now"),
    ErrorKind("image_opened_since", 409, EXIT_FAILED, "somebody else wrote to it meanwhile"),
    ErrorKind("storage_full", 409, EXIT_BUSY, "writes wait for space"),
    ErrorKind("storage_hangs", 504, EXIT_TIMED_OUT, "the storage does not answer"),
    ErrorKind("no_space", 409, EXIT_FAILED, "no space is left"),
    ErrorKind("read_only", 409, EXIT_FAILED, "the image is open for reading only"),
    ErrorKind("live_state_unknown", 409, EXIT_FAILED, "of a version that is not installed"),
    ErrorKind("engine_failed", 422, EXIT_FAILED, "the engine says why"),
    ErrorKind("system_error", 422, EXIT_FAILED, "a system call of the worker failed"),
    # The kernel and the host.
    ErrorKind("nbd_module_missing", 501, EXIT_UNSUPPORTED, "the kernel has no nbd driver"),
    ErrorKind("nbd_family_missing", 501, EXIT_UNSUPPORTED, "nbd is there, its netlink is not"),
    ErrorKind("nbd_no_permission", 403, EXIT_UNSUPPORTED, "no right to configure nbd"),
    ErrorKind("pyroute2_missing", 501, EXIT_UNSUPPORTED, "the netlink library is not installed"),
    ErrorKind("kernel_refused", 502, EXIT_FAILED, "the kernel refused a request"),
    # The worker.
    ErrorKind("worker_busy", 409, EXIT_BUSY, "requests of the device did not end in time"),
    ErrorKind("worker_outdated", 409, EXIT_FAILED, "the worker is older than fvdd"),
    ErrorKind("worker_failed", 502, EXIT_FAILED, "the worker process died or does not answer"),
    ErrorKind("map_busy", 503, EXIT_BUSY, "too many maps of the device are waited for"),
    ErrorKind("trace_busy", 409, EXIT_BUSY, "a trace of the device is being taken"),
    ErrorKind("cancelled", 409, EXIT_FAILED, "a copy of the disk was given up"),
    # What fvdd and its worker say to each other: a defect, or two versions that do not fit.
    ErrorKind("bad_request", 422, EXIT_FAILED, "the worker does not accept a request"),
    ErrorKind("bad_answer", 502, EXIT_FAILED, "the worker's answer makes no sense"),
    ErrorKind("unknown_op", 409, EXIT_FAILED, "the worker does not know this call"),
    ErrorKind("too_many_requests", 409, EXIT_BUSY, "the worker has too many requests at once"),
    ErrorKind("already_open", 409, EXIT_FAILED, "the worker has an image already"),
    ErrorKind("not_open", 409, EXIT_FAILED, "the worker has no image"),
    # The daemon, as its clients see it.
    ErrorKind("daemon_not_running", 503, EXIT_UNREACHABLE, "nobody listens on the socket"),
    ErrorKind("daemon_no_permission", 403, EXIT_UNREACHABLE, "the socket may not be opened"),
    ErrorKind("daemon_outdated", 501, EXIT_UNREACHABLE, "fvdd is older than its client"),
    ErrorKind("daemon_protocol", 502, EXIT_UNREACHABLE, "the answer is not fvdd's"),
    ErrorKind("daemon_running", 409, EXIT_BUSY, "another fvdd has the state directory"),
    ErrorKind("daemon_stopping", 503, EXIT_UNREACHABLE, "fvdd is about to stop"),
    ErrorKind("invalid_config", 422, EXIT_FAILED, "the configuration cannot be used"),
    ErrorKind("internal_error", 500, EXIT_FAILED, "a defect of fvdd; its log has more"),
)

KINDS: Final[Mapping[str, ErrorKind]] = {row.code: row for row in _ROWS}

# Engine errors are about what the caller named: an image, an option. 422 says so.
_DEFAULT_HTTP_STATUS: Final = 422


def kind_of(code: str) -> ErrorKind:
    """The row of `code`, or a row of the default kind."""
    known = KINDS.get(code)
    if known is not None:
        return known
    return ErrorKind(code, _DEFAULT_HTTP_STATUS, EXIT_FAILED, "an error of the engine")


class ApiError(Exception):
    """One sentence about what went wrong, a code for programs, a hint with the remedy."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        hint: str = "",
        details: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.details: dict[str, object] = dict(details or {})

    @property
    def http_status(self) -> int:
        return kind_of(self.code).http_status

    @property
    def exit_status(self) -> int:
        return kind_of(self.code).exit_status

    def __str__(self) -> str:
        return self.message

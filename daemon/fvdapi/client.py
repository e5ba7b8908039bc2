# SPDX-License-Identifier: Apache-2.0
"""Client of fvdd over its Unix socket: one method per call, errors as ApiError.

A daemon that does not run and a socket that may not be opened are ordinary situations: each has
its own code and a remedy. The client never retries: attaching twice is not the same as once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from types import TracebackType
from typing import Final, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from fvdapi.activity import ActivityList, DeviceMap, Extents
from fvdapi.errors import ApiError
from fvdapi.models import (
    AttachRequest,
    BackupAnswer,
    BackupRequest,
    DetachAnswer,
    DeviceList,
    DeviceStatus,
    DoctorReport,
    ErrorAnswer,
    Event,
    Health,
    MetricFamily,
    MetricList,
    PrefetchRequest,
    ReadOnlyRequest,
    ReclaimAnswer,
    RecoverRequest,
    ResizeAnswer,
    ResizeRequest,
    SnapshotAnswer,
    SnapshotRequest,
    UpdateAnswer,
    UpdateRequest,
    UpgradeAnswer,
    is_device_name,
)

DEFAULT_SOCKET: Final = "/run/fvd/fvdd.sock"
SOCKET_VARIABLE: Final = "FVDD_SOCKET"

# Attach waits for the base, the node and the partitions; fvdd has its own limits below this one.
ATTACH_LIMIT_SECONDS: Final = 600.0
# As long as reading a large disk from a base far away may take.
BACKUP_LIMIT_SECONDS: Final = 7 * 86400.0
CALL_LIMIT_SECONDS: Final = 30.0
CONNECT_LIMIT_SECONDS: Final = 5.0
KEEP_SECONDS: Final = 2.0  # an idle connection; fvdd closes it after five

_Model = TypeVar("_Model", bound=BaseModel)


def socket_path(explicit: str | None = None) -> str:
    """Where fvdd listens: the argument, else the environment, else the default."""
    return explicit or os.environ.get(SOCKET_VARIABLE) or DEFAULT_SOCKET


# What pydantic says about a field that a model does not have.
EXTRA_FIELD = "Extra inputs are not permitted"


def is_image(status: DeviceStatus, path: str) -> bool:
    """Whether `path` is the image of a device: the file counts, which may be called otherwise by
    now, and its name may be another one's. Without a file there is the name alone."""
    if status.image_id is not None:
        with contextlib.suppress(OSError, ValueError):
            found = os.stat(path)
            if stat.S_ISBLK(found.st_mode):
                return status.image_id == (0, found.st_rdev)
            return status.image_id == (found.st_dev, found.st_ino)
    return bool(status.image) and os.path.realpath(path) == os.path.realpath(status.image)


class Client:
    """Synchronous calls to one fvdd; use as a context manager."""

    def __init__(self, path: str | None = None) -> None:
        self.path = socket_path(path)
        # A connection that fvdd closes for being idle must not be chosen at that very moment.
        limits = httpx.Limits(keepalive_expiry=KEEP_SECONDS)
        transport = httpx.HTTPTransport(uds=self.path, limits=limits)
        self._http = httpx.Client(
            transport=transport,
            base_url="http://fvdd",
            timeout=httpx.Timeout(CALL_LIMIT_SECONDS, connect=CONNECT_LIMIT_SECONDS),
            trust_env=False,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # Devices

    def attach(self, request: AttachRequest) -> DeviceStatus:
        """Attach and wait until the device is ready as far as the request asks."""
        body = request.model_dump(mode="json", exclude_defaults=True)
        body["image"] = request.image
        answer = self._call("POST", "/v1/devices", body=body, limit=ATTACH_LIMIT_SECONDS)
        return _parse(answer, DeviceStatus)

    def devices(self) -> tuple[DeviceStatus, ...]:
        return _parse(self._call("GET", "/v1/devices"), DeviceList).devices

    def device(self, name: str) -> DeviceStatus:
        address = f"/v1/devices/{quote(os.fsencode(name), safe='')}"
        return _parse(self._call("GET", address), DeviceStatus)

    def detach(self, name: str, *, discard_unflushed: bool = False) -> DetachAnswer:
        """Flush, check for holders, disconnect, and wait until the kernel let go. With
        `discard_unflushed` a device that cannot be brought back for that is given up."""
        address = f"/v1/devices/{quote(os.fsencode(name), safe='')}"
        if discard_unflushed:
            address += "?discard_unflushed=true"
        return _parse(self._call("DELETE", address, limit=ATTACH_LIMIT_SECONDS), DetachAnswer)

    def recover(self, name: str, request: RecoverRequest) -> DeviceStatus:
        """Bring a failed device back."""
        address = f"/v1/devices/{quote(os.fsencode(name), safe='')}/recover"
        body = request.model_dump(mode="json", exclude_defaults=True)
        return _parse(
            self._call("POST", address, body=body, limit=ATTACH_LIMIT_SECONDS), DeviceStatus
        )

    def upgrade(self, name: str) -> UpgradeAnswer:
        """Replace the device's worker by one of the installed version."""
        address = f"/v1/devices/{quote(os.fsencode(name), safe='')}/upgrade"
        return _parse(self._call("POST", address, limit=ATTACH_LIMIT_SECONDS), UpgradeAnswer)

    def snapshot(self, name: str, request: SnapshotRequest) -> SnapshotAnswer:
        """Keep the device's image as it is; the device continues on a new one over it."""
        return _parse(self._order(name, "snapshot", request, ATTACH_LIMIT_SECONDS), SnapshotAnswer)

    def resize(self, name: str, request: ResizeRequest) -> ResizeAnswer:
        """Grow the device while it is in use."""
        return _parse(self._order(name, "resize", request, ATTACH_LIMIT_SECONDS), ResizeAnswer)

    def set_read_only(self, name: str, request: ReadOnlyRequest) -> DeviceStatus:
        """Make the device read-only or writable while it stays attached."""
        return _parse(self._order(name, "read-only", request, ATTACH_LIMIT_SECONDS), DeviceStatus)

    def backup(self, name: str, request: BackupRequest) -> BackupAnswer:
        """Copy the device's disk to a file; takes as long as reading it all."""
        return _parse(self._order(name, "backup", request, BACKUP_LIMIT_SECONDS), BackupAnswer)

    def update(self, name: str, request: UpdateRequest) -> UpdateAnswer:
        """Change how the image of a device is run, while it is in use."""
        address = f"/v1/devices/{quote(os.fsencode(name), safe='')}"
        return _parse(self._call("PATCH", address, body=request.model_dump()), UpdateAnswer)

    def prefetch(self, name: str, request: PrefetchRequest) -> DeviceStatus:
        address = f"/v1/devices/{quote(os.fsencode(name), safe='')}/prefetch"
        body = request.model_dump(exclude_none=True)
        return _parse(self._call("POST", address, body=body), DeviceStatus)

    def find(self, argument: str) -> DeviceStatus:
        """The device that NAME, a device path or an image path means.

        A name is looked for first: whatever files lie about does not matter then. `nbd3` is a
        device path as well, as the kernel and the metrics call it.
        """
        unknown: ApiError | None = None
        if is_device_name(argument):
            try:
                return self.device(argument)
            except ApiError as error:
                if error.code != "device_not_found":
                    raise
                unknown = error
        target = os.path.realpath(argument)
        node = f"/dev/{argument}" if unknown is not None else None
        found = [
            status
            for status in self.devices()
            if argument == status.name  # an orphan may have any name
            or target == status.device
            or (node is not None and node == status.device)
            or is_image(status, argument)
        ]
        if not found and unknown is not None and not os.path.lexists(argument):
            raise unknown
        if not found:
            raise ApiError(
                "device_not_found",
                f"no attached device belongs to '{argument}'",
                hint="fvdctl list shows what is attached",
            )
        if len(found) > 1:
            names = ", ".join(status.name for status in found)
            raise ApiError(
                "device_busy",
                f"'{argument}' is attached more than once ({names})",
                hint="give the name of the one that you mean",
            )
        return found[0]

    # System

    def health(self) -> Health:
        return _parse(self._call("GET", "/healthz"), Health)

    def reclaim(self) -> ReclaimAnswer:
        """Give leaked kernel devices back."""
        return _parse(self._call("POST", "/v1/reclaim", limit=ATTACH_LIMIT_SECONDS), ReclaimAnswer)

    def doctor(self) -> DoctorReport:
        return _parse(self._call("GET", "/v1/doctor"), DoctorReport)

    def metrics(self) -> str:
        """The exposition text that Prometheus would read."""
        return self._call("GET", "/metrics").text

    def activity(self) -> ActivityList:
        """What every device is doing; asks no worker."""
        return _parse(self._call("GET", "/v1/activity"), ActivityList)

    def map(self, name: str, cells: int) -> DeviceMap:
        """Where the parts of a disk are, in so many cells."""
        address = f"/v1/devices/{quote(os.fsencode(name), safe='')}/map?cells={cells}"
        return _parse(self._call("GET", address), DeviceMap)

    def extents(self, name: str) -> Iterator[tuple[int, int, str]]:
        """Start, length and kind of each extent of a disk that is in use, as they are found."""
        at: int | None = 0
        while at is not None:
            address = f"/v1/devices/{quote(os.fsencode(name), safe='')}/extents?offset={at}"
            found = _parse(self._call("GET", address), Extents)
            for length, kind in found.extents:
                yield at, length, kind
                at += length
            at = found.next

    def events(self, *, past: bool = False) -> Iterator[Event]:
        """What happens to devices, as it comes; ends with fvdd. `past`: the last ones first."""
        timeout = httpx.Timeout(None, connect=CONNECT_LIMIT_SECONDS)
        address = f"/v1/events?past={str(past).lower()}"
        try:
            with self._http.stream("GET", address, timeout=timeout) as answer:
                if not answer.is_success:
                    answer.read()
                    raise _error_of(answer)
                for line in answer.iter_lines():
                    if line.startswith("data: "):
                        yield Event.model_validate_json(line.removeprefix("data: "))
        except httpx.ConnectError as error:
            raise self._unreachable(error) from error
        except httpx.TransportError:
            return

    @contextlib.contextmanager
    def trace(self, name: str, seconds: float) -> Iterator[Iterator[bytes]]:
        """What a device does for so many seconds, as it comes: chunks for a TraceReader."""
        address = f"/v1/devices/{quote(os.fsencode(name), safe='')}/trace"
        timeout = httpx.Timeout(CALL_LIMIT_SECONDS, connect=CONNECT_LIMIT_SECONDS)
        body = {"seconds": seconds}
        try:
            with self._http.stream("POST", address, json=body, timeout=timeout) as answer:
                if not answer.is_success:
                    answer.read()
                    raise _error_of(answer)
                yield _chunks(answer)
        except httpx.ConnectError as error:
            raise self._unreachable(error) from error

    def metric_families(self) -> tuple[MetricFamily, ...]:
        return _parse(self._call("GET", "/v1/metrics"), MetricList).families

    # The wire

    def _order(self, name: str, verb: str, request: BaseModel, limit: float) -> httpx.Response:
        """Have something done to a device. What has its default is left out: an older fvdd may
        not know it."""
        address = f"/v1/devices/{quote(os.fsencode(name), safe='')}/{verb}"
        body = request.model_dump(mode="json", exclude_defaults=True)
        return self._call("POST", address, body=body, limit=limit)

    def _call(
        self, method: str, address: str, *, body: object = None, limit: float | None = None
    ) -> httpx.Response:
        timeout = httpx.Timeout(limit or CALL_LIMIT_SECONDS, connect=CONNECT_LIMIT_SECONDS)
        try:
            answer = self._http.request(method, address, json=body, timeout=timeout)
        except httpx.ConnectError as error:
            raise self._unreachable(error) from error
        except httpx.TimeoutException as error:
            raise ApiError(
                "timed_out",
                f"fvdd did not answer within {limit or CALL_LIMIT_SECONDS:g} s",
                hint="its log says what it waits for: journalctl -u fvdd",
            ) from error
        except httpx.TransportError as error:
            raise ApiError(
                "daemon_protocol",
                f"fvdd closed the connection before it answered ({error})",
                hint="its log says why: journalctl -u fvdd",
            ) from error
        if answer.is_success:
            return answer
        raise _error_of(answer)

    def _unreachable(self, error: httpx.ConnectError) -> ApiError:
        cause = _errno_below(error)
        if cause in (errno.EACCES, errno.EPERM):
            return ApiError(
                "daemon_no_permission",
                f"no permission to use fvdd's socket {self.path}",
                hint="run as root, or become a member of the group that owns the socket",
            )
        if cause == errno.ENOENT:
            message = f"fvdd is not running: there is no socket {self.path}"
        elif cause == errno.ECONNREFUSED and _is_socket(self.path):
            message = f"fvdd is not running: nobody listens on {self.path}"
        else:
            message = f"fvdd cannot be reached at {self.path} ({error})"
        return ApiError(
            "daemon_not_running",
            message,
            hint="start it with 'systemctl start fvdd' (or run 'fvdd' as root); "
            "another socket is chosen with --socket or FVDD_SOCKET",
        )


def _chunks(answer: httpx.Response) -> Iterator[bytes]:
    """The body as it comes; it ends also where the connection is lost, as a cut stream does."""
    with contextlib.suppress(httpx.TransportError):
        yield from answer.iter_raw()


def _errno_below(error: BaseException) -> int | None:
    """The errno of the system call that failed, however deep the libraries wrapped it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen.errno
        seen = seen.__cause__ or seen.__context__
    return None


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def _error_of(answer: httpx.Response) -> ApiError:
    try:
        detail = ErrorAnswer.model_validate_json(answer.content).error
    except ValidationError:
        return ApiError(
            "daemon_protocol",
            f"the daemon answered with HTTP status {answer.status_code} and no explanation",
            hint="is the socket really fvdd's?",
        )
    # Every address and field that we send exists in an fvdd of our version.
    if detail.code in ("not_found", "method_not_allowed") or (
        detail.code == "invalid_request" and EXTRA_FIELD in detail.message
    ):
        return ApiError(
            "daemon_outdated",
            "fvdd is older than fvdctl and does not know this call or one of its options",
            hint="restart it, which no device notices: systemctl restart fvdd",
            details={"message": detail.message},
        )
    return ApiError(detail.code, detail.message, hint=detail.hint, details=detail.details)


def _parse(answer: httpx.Response, model: type[_Model]) -> _Model:
    try:
        return model.model_validate_json(answer.content)
    except (ValidationError, json.JSONDecodeError) as error:
        raise ApiError(
            "daemon_protocol",
            f"the daemon's answer is not a {model.__name__}",
            hint="fvdctl and fvdd may be of different versions: restart fvdd",
        ) from error

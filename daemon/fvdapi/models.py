# SPDX-License-Identifier: Apache-2.0
"""Models of every request and answer of the control API; the OpenAPI document comes from them.

Requests refuse unknown fields (a typing error must not be silently ignored); answers accept them
(an older client reads a newer daemon). Units: bytes and seconds unless the name says otherwise.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
DEVICE_PATTERN: Final = r"^/dev/nbd[0-9]{1,6}$"
CONNECTIONS_MAX: Final = 16
PREFETCH_OFF: Final = -1
PREFETCH_DELAY_MAX: Final = 10 * 365 * 86400
FETCH_SIZE_MAX: Final = 2 << 20
RATE_MAX: Final = 1 << 40
# Of a value that is refused, how much is shown.
SHOWN_MAX: Final = 60

_NAME = re.compile(NAME_PATTERN)
_NO_TEXT = re.compile("[\\ud800-\\udfff]")
_PARTITION = re.compile(r"-part([0-9]+)$")


def is_device_name(text: str) -> bool:
    """Whether `text` can be the name of a device (it becomes a directory name)."""
    return _NAME.match(text) is not None and not text.endswith("\n")


def is_partition_name(text: str) -> bool:
    """Whether a device of this name would take the place of another's partition in /dev/fvd."""
    return _PARTITION.search(text) is not None


def name_from_image(path: str) -> str:
    """The name that a device gets when the user gives none: the image's file name, cleaned."""
    stem = path.rstrip("/").rsplit("/", 1)[-1]
    stem = stem.rsplit(".", 1)[0] or stem
    cleaned = re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-._")[:64]
    cleaned = _PARTITION.sub(r"_part\1", cleaned)
    return cleaned if is_device_name(cleaned) else "device"


def sendable(text: str) -> str:
    """The same without what no JSON can carry: a file name may be any bytes, and those that are no
    text come as U+FFFD."""
    return text if text.isascii() else _NO_TEXT.sub("\ufffd", text)


def _sendable(value: object) -> object:
    if isinstance(value, str):
        return sendable(value)
    if isinstance(value, dict):
        return {key: _sendable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_sendable(item) for item in value]
    return value


class Request(BaseModel):
    """Base of requests: strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Answer(BaseModel):
    """Base of answers: tolerant towards fields that a newer daemon adds, and able to tell of files
    whatever their names are."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _tells_any_name(cls, values: object) -> object:
        return _sendable(values)


class DeviceState(StrEnum):
    """The life of a device; the transitions are in fvdd.devices.states."""

    OPENING = "opening"
    READY = "ready"
    ATTACHED = "attached"
    RECOVERING = "recovering"
    DRAINING = "draining"
    CLOSED = "closed"
    FAILED = "failed"
    ORPHANED = "orphaned"


class PrefetchState(StrEnum):
    DISABLED = "disabled"
    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    FAILED = "failed"


WaitFor = Literal["node", "partitions", "none"]
CacheMode = Literal["writeback", "writethrough", "none"]
PrefetchPolicy = Literal["polite", "eager", "fixed"]
AbsolutePath = Annotated[str, Field(pattern=r"^/[^\x00]*$", max_length=4095)]
UriPattern = Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://[!-~]*$", max_length=1100)]


def first_fault(error: ValueError) -> tuple[str, object, str]:
    """The first field that a model refuses: its name, its value, and why it cannot be that."""
    if not isinstance(error, ValidationError):
        return "", "", str(error)
    first = error.errors()[0]
    where = str(first["loc"][0]) if first["loc"] else ""
    return where, first["input"], first["msg"][:1].lower() + first["msg"][1:]


def refusal(error: ValueError) -> str:
    """What a request cannot hold, and why; "" of any other error."""
    if not isinstance(error, ValidationError) or not error.title.endswith("Request"):
        return ""
    field, value, reason = first_fault(error)
    text = str(value)
    shown = text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}..."
    return f"{field.replace('_', ' ')} cannot be {shown}: {reason}"


class AttachRequest(Request):
    """Attach an image as a block device."""

    image: AbsolutePath
    name: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    device: Annotated[str, Field(pattern=DEVICE_PATTERN)] | None = None
    read_only: bool = False
    connections: Annotated[int, Field(ge=1, le=CONNECTIONS_MAX)] = 1
    transport: Literal["nbd"] = "nbd"
    sector_size: Literal[512, 4096] = 512
    wait: WaitFor = "partitions"
    allow_dirs: Annotated[tuple[AbsolutePath, ...], Field(max_length=64)] = ()
    allow_uris: Annotated[tuple[UriPattern, ...], Field(max_length=64)] = ()
    accept_changed_base: bool = False
    copy_on_read: bool | None = None
    prefetch_delay: Annotated[int, Field(ge=PREFETCH_OFF, le=PREFETCH_DELAY_MAX)] | None = None
    # None: as the daemon's configuration says.
    on_full: Literal["error", "wait"] | None = None
    cache: CacheMode | None = None
    prefetch_policy: PrefetchPolicy | None = None
    # Bytes that a read takes at once from a distant base.
    fetch_size: Annotated[int, Field(ge=0, le=FETCH_SIZE_MAX)] | None = None
    # A boot profile that is recorded until the device is detached, or followed.
    record_profile: AbsolutePath | None = None
    replay_profile: AbsolutePath | None = None


class PrefetchRequest(Request):
    """Control the background copy of a device. resume is another word for start. `rate` takes at
    least one of the bounds, in bytes a second, for reading and writing alike: below the minimum
    prefetch pauses now and then (0: never), the maximum is never exceeded (0: there is none).
    `policy` takes the policy."""

    action: Literal["start", "pause", "resume", "rate", "policy"]
    policy: PrefetchPolicy | None = None
    min_bytes_per_second: Annotated[int, Field(ge=0, le=RATE_MAX)] | None = None
    max_bytes_per_second: Annotated[int, Field(ge=0, le=RATE_MAX)] | None = None

    @model_validator(mode="after")
    def _has_what_the_action_takes(self) -> Self:
        rates = (self.min_bytes_per_second, self.max_bytes_per_second)
        if (self.action == "policy") != (self.policy is not None):
            raise ValueError("the action policy, and no other, takes a policy")
        if (self.action == "rate") != (rates != (None, None)):
            raise ValueError("the action rate, and no other, takes a minimum or a maximum")
        return self


class TraceRequest(Request):
    """Watch what a device does for so many seconds."""

    seconds: Annotated[float, Field(gt=0, le=3600)]


class RecoverRequest(Request):
    """Bring a failed device back; `image` says where its image was moved to. `discard_unflushed`
    gives up what was written after the last flush that succeeded. The rest is as for attach:
    what the device needs now besides, or what is lost with its record."""

    image: AbsolutePath | None = None
    discard_unflushed: bool = False
    allow_dirs: Annotated[tuple[AbsolutePath, ...], Field(max_length=64)] = ()
    allow_uris: Annotated[tuple[UriPattern, ...], Field(max_length=64)] = ()
    accept_changed_base: bool = False
    connections: Annotated[int, Field(ge=1, le=CONNECTIONS_MAX)] | None = None


class ResizeRequest(Request):
    """Grow a device; `size` as people write it: bytes, or with k, M, G, T, or +SIZE."""

    size: Annotated[str, Field(min_length=1, max_length=32)]


class ResizeAnswer(Answer):
    """The sizes before and after, of the image and of the kernel's device."""

    name: str
    device: str | None
    old_size_bytes: int
    size_bytes: int


class UpdateRequest(Request):
    """Change fields of the image's header: names and values as `fvdctl update` takes them."""

    fields: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=1024)]],
        Field(min_length=1, max_length=64),
    ]


class FieldChange(Answer):
    """A field before and after."""

    old: int | str
    new: int | str


class UpdateAnswer(Answer):
    """The fields that have another value now; those of `next_open` take effect when the image is
    opened next, the others have done so."""

    name: str
    device: str | None
    changes: dict[str, FieldChange]
    next_open: tuple[str, ...] = ()


class SnapshotRequest(Request):
    """Continue a device on the new image `target`, whose base the present image becomes."""

    target: AbsolutePath


class SnapshotAnswer(Answer):
    """The image that the device is on now, and the one that stays as it was."""

    name: str
    device: str | None
    image: str
    base: str
    pause_seconds: float


class ReadOnlyRequest(Request):
    """Make a device read-only, or writable again."""

    read_only: bool


class BackupRequest(Request):
    """Copy a device's disk to the new file `target`."""

    target: AbsolutePath


class BackupAnswer(Answer):
    """A finished copy: a raw image, and how often and long the device paused for it."""

    name: str
    device: str | None
    target: str
    written_bytes: int
    pause_seconds: tuple[float, ...] = ()


class PrefetchStatus(Answer):
    state: PrefetchState = PrefetchState.DISABLED
    bytes_fetched: int = 0
    rate_bytes_per_second: int = 0
    eta_seconds: float | None = None
    # Why it is paused; "base" where it is waiting for a base that does not answer.
    paused_reason: str | None = None
    policy: str | None = None
    # What may be in flight from the base: beside guests it shrinks.
    window_bytes: int = 0


class JournalStatus(Answer):
    used_bytes: int = 0
    size_bytes: int = 0
    epoch: int = 0


class Timeouts(Answer):
    """The four times that govern a device, in seconds, as they are in force."""

    resend_timeout: float
    base_timeout: float
    kernel_timeout: float
    dead_timeout: float


class Trouble(Answer):
    """Something that is wrong with a device: in words, and as a word while it is trouble of now."""

    topic: str
    text: str
    word: str = ""


class DeviceStatus(Answer):
    """Everything that `fvdctl status NAME` shows."""

    name: str
    device: str | None
    # Empty where an earlier fvdd left the device and nothing says which one it was.
    image: str
    # Which file that is, whatever it is called by now: device and inode, or 0 and the number of a
    # block device.
    image_id: tuple[int, int] | None = None
    state: DeviceState
    reason: str | None = None
    read_only: bool
    transport: str = "nbd"
    connections: int = 0
    connections_alive: int = 0
    worker_pid: int | None = None
    worker_version: str | None = None
    size_bytes: int = 0
    block_size: int = 0
    sector_size: int = 512
    # "writeback", "writethrough" or "none".
    cache: str = "writeback"
    local_bytes: int = 0
    base_bytes_left: int = 0
    in_flight: int = 0
    pending_blocks: int = 0
    # Changes that wait for space, and the bytes that storage is being made longer by.
    parked: int = 0
    growing_bytes: int = 0
    fault_errno: int = 0
    prefetch: PrefetchStatus = PrefetchStatus()
    journal: JournalStatus = JournalStatus()
    restarts: int = 0
    reconnects: int = 0
    upgrades: int = 0
    writeback_errors: int = 0
    last_pause_seconds: float = 0.0
    timeouts: Timeouts
    image_uuid: str | None = None
    attachment: str | None = None
    attached_at: float | None = None
    warnings: tuple[str, ...] = ()
    troubles: tuple[Trouble, ...] = ()


class DeviceList(Answer):
    devices: tuple[DeviceStatus, ...]


class DetachAnswer(Answer):
    """`discarded_unflushed`: the device could not be brought back, and was given up."""

    name: str
    device: str | None
    image: str
    discarded_unflushed: bool = False


class UpgradeAnswer(Answer):
    """How a worker was replaced: "handed over" (no reconnect) or "restarted" (an older worker)."""

    name: str
    device: str | None
    worker_pid: int | None
    method: str
    version_before: str
    version: str
    pause_seconds: float


class Finding(Answer):
    """One line of `fvdctl doctor`: what was looked at, what is there, what to do about it."""

    topic: str
    level: Literal["ok", "warning", "problem"]
    message: str
    remedy: str = ""
    code: str = ""


class DoctorReport(Answer):
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> int:
        return sum(1 for finding in self.findings if finding.level == "problem")


class ReclaimAnswer(Answer):
    """Leaked kernel devices: those that were given back, those that something holds; and files that
    were left over and are removed."""

    reclaimed: tuple[str, ...]
    left: tuple[str, ...]
    removed: tuple[str, ...] = ()


class Health(Answer):
    status: Literal["ok", "stopping"] = "ok"
    version: str
    pid: int
    devices: int = 0
    devices_failed: int = 0


class Event(Answer):
    """Something that happened to a device; `time` in seconds since 1970."""

    time: float
    level: str
    name: str
    message: str
    values: dict[str, str] = Field(default_factory=dict)


class MetricSample(Answer):
    """One value; None where the exposition has NaN (nobody knows)."""

    name: str
    labels: dict[str, str]
    value: float | None


class MetricFamily(Answer):
    name: str
    type: str
    help: str
    samples: tuple[MetricSample, ...]


class MetricList(Answer):
    families: tuple[MetricFamily, ...]


class ErrorDetail(Answer):
    code: str
    message: str
    hint: str = ""
    details: dict[str, object] = Field(default_factory=dict)


class ErrorAnswer(Answer):
    """The body of every answer that is not a success."""

    error: ErrorDetail

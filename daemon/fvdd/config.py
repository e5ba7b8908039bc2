# SPDX-License-Identifier: Apache-2.0
"""The daemon's configuration: a TOML file turned into checked, frozen dataclasses.

Every value has a default and the default has its reason beside it; the file may be absent. A
mistake is refused with the key's full name: a daemon that guesses what was meant would guess about
somebody's data. The four times are checked together, because only their order makes sense:
resend_timeout < base_timeout < kernel_timeout (when it is not 0) < dead_timeout.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Final, TypeVar

from fvdapi.errors import ApiError

DEFAULT_CONFIG: Final = "/etc/fvd/fvdd.toml"

# The kernel keeps the resend timer in milliseconds and looks at it about once a second.
RESEND_TIMEOUT_MIN: Final = 1.0
# With several connections a kernel timeout is not a choice (see Timeouts.for_connections): this
# much is added to base_timeout so that a base that just recovers is not cut off.
KERNEL_TIMEOUT_MARGIN: Final = 30.0


@dataclass(frozen=True, slots=True)
class Timeouts:
    """The four times of a device, in seconds."""

    # Requests that were in flight when a worker died are sent again when this timer fires; short,
    # because a file system waits for it, and harmless while kernel_timeout is 0.
    resend_timeout: float = 2.0
    # How long the engine tries again when the base does not answer, before a request fails.
    base_timeout: float = 60.0
    # The kernel cuts a connection off when a request takes longer. 0: never, the right choice for
    # a base that may be slow.
    kernel_timeout: float = 0.0
    # How long the kernel holds requests back while no worker is there; long, because giving up
    # means I/O errors in mounted file systems.
    dead_timeout: float = 12 * 3600.0

    def for_connections(self, connections: int) -> Timeouts:
        """The times in force for a device with that many connections.

        With more than one connection the driver cuts a connection off whenever its request timer
        fires, even with TIMEOUT 0; so the timer must not fire before the base had its time, and
        requests in flight are resent only then.
        """
        kernel = self.kernel_timeout
        if connections > 1 and kernel == 0:
            kernel = self.base_timeout + KERNEL_TIMEOUT_MARGIN
        if kernel == 0:
            return self
        return replace(self, kernel_timeout=kernel, resend_timeout=kernel)


@dataclass(frozen=True, slots=True)
class Restarts:
    """When a worker that keeps dying is given up."""

    # Five deaths a minute are no accident any more: the cause is in the image or in the program.
    count_max: int = 5
    window: float = 60.0


@dataclass(frozen=True, slots=True)
class Limits:
    # A bound against run-away callers; the kernel's own is far higher.
    devices_max: int = 1024
    # Attach gives up when the node or its partitions are not there by then. Reading the partition
    # table may need the base, hence longer than base_timeout.
    ready_timeout: float = 90.0
    # Detach gives up waiting for the kernel to let go; what is in flight then is not ours.
    release_timeout: float = 30.0
    # A worker that does not answer a control request by then is treated as dead.
    worker_timeout: float = 120.0
    # A worker that is asked whether it is there, and does not say so by then, hangs (stopped, or
    # stuck): it is killed and replaced. Nothing that it does for the device delays that answer.
    hang_timeout: float = 30.0


@dataclass(frozen=True, slots=True)
class Daemon:
    # In /run: a Unix socket does not survive a boot anyway.
    socket: str = "/run/fvd/fvdd.sock"
    # Must be a tmpfs: it holds the live state of attached devices, which ends with the boot.
    state_dir: str = "/run/fvd"
    # Local only: metrics name images. A port that no other exporter is known for; "off" for none.
    metrics: str = "127.0.0.1:9809"
    # Members may use the socket, which equals being root; ignored when the group does not exist.
    group: str = "fvd"
    log_level: str = "info"
    # Directories that images and their bases may lie in besides those that a request allows; a
    # base is always allowed beside the image that names it.
    allow_dirs: tuple[str, ...] = ()
    # URIs that bases may lie behind, as SCHEME://HOST[:PORT][/PATH] with * for any host: following
    # a URI makes this host connect somewhere, so by default none is followed.
    allow_uris: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prefetch:
    """The background copy of all devices."""

    # What a device does that was attached without --prefetch-policy: polite steps aside for guests.
    policy: str = "polite"
    # Bytes a second that all devices together may read for it, shared evenly by those that do. 0:
    # no limit.
    budget: int = 0


@dataclass(frozen=True, slots=True)
class Storage:
    """How the storage of images is used, and what happens when it is full."""

    # What a device does that was attached without --cache. "writeback": writes are answered when
    # the page cache has them, and a flush makes them durable. "writethrough": every write is
    # durable when it is answered. "none": data go past the page cache of the host.
    cache: str = "writeback"

    # "error": writes fail with ENOSPC, as on any full disk. "wait": they wait for space, for hosts
    # where somebody watches and adds some; programs that write then hang meanwhile.
    on_full: str = "error"
    # The program that makes a block device longer for a compact image: it is run with the bytes
    # to add and the device's path. An absolute path, "builtin:lvextend", or "off".
    grow_program: str = "off"
    # Whether an image may choose builtin:lvextend by its add_storage_cmd; nothing else in that
    # field ever counts.
    allow_builtin_grow: bool = False


@dataclass(frozen=True, slots=True)
class Config:
    daemon: Daemon = field(default_factory=Daemon)
    timeouts: Timeouts = field(default_factory=Timeouts)
    restarts: Restarts = field(default_factory=Restarts)
    limits: Limits = field(default_factory=Limits)
    storage: Storage = field(default_factory=Storage)
    prefetch: Prefetch = field(default_factory=Prefetch)


_Section = TypeVar("_Section", Daemon, Timeouts, Restarts, Limits, Storage, Prefetch)


def load(path: str | None) -> Config:
    """Read the file (the default one may be absent) and check everything."""
    name = path or DEFAULT_CONFIG
    try:
        with open(name, "rb") as file:
            tree = tomllib.load(file)
    except FileNotFoundError as error:
        if path is None:
            return Config()
        raise _invalid(f"there is no configuration file {name}") from error
    except OSError as error:
        raise _invalid(f"cannot read the configuration {name}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _invalid(f"{name} is not TOML: {error}") from error
    return parse(tree, name)


def parse(tree: Mapping[str, object], name: str = "configuration") -> Config:
    """Turn a parsed TOML tree into a Config."""
    known = {entry.name for entry in fields(Config)}
    for key in tree:
        if key not in known:
            raise _invalid(f"{name}: unknown section '{key}'", _suggest(known))
    config = Config(
        daemon=_section(Daemon(), tree, "daemon", name),
        timeouts=_section(Timeouts(), tree, "timeouts", name),
        restarts=_section(Restarts(), tree, "restarts", name),
        limits=_section(Limits(), tree, "limits", name),
        storage=_section(Storage(), tree, "storage", name),
        prefetch=_section(Prefetch(), tree, "prefetch", name),
    )
    check(config, name)
    return config


def check(config: Config, name: str = "configuration") -> None:
    """Refuse values that cannot work, alone or together."""
    times = config.timeouts
    if times.resend_timeout < RESEND_TIMEOUT_MIN:
        raise _invalid(f"{name}: timeouts.resend_timeout must be at least {RESEND_TIMEOUT_MIN:g} s")
    if times.kernel_timeout != int(times.kernel_timeout):
        raise _invalid(f"{name}: timeouts.kernel_timeout must be whole seconds")
    if times.dead_timeout != int(times.dead_timeout):
        raise _invalid(f"{name}: timeouts.dead_timeout must be whole seconds")
    order = [("resend_timeout", times.resend_timeout), ("base_timeout", times.base_timeout)]
    if times.kernel_timeout != 0:
        order.append(("kernel_timeout", times.kernel_timeout))
    order.append(("dead_timeout", times.dead_timeout))
    for (low_name, low), (high_name, high) in zip(order, order[1:], strict=False):
        if low >= high:
            raise _invalid(
                f"{name}: timeouts.{low_name} ({low:g} s) must be below "
                f"timeouts.{high_name} ({high:g} s)"
            )
    implied = times.for_connections(2)
    if implied.kernel_timeout >= times.dead_timeout:
        raise _invalid(
            f"{name}: timeouts.dead_timeout must be above {implied.kernel_timeout:g} s, "
            "which devices with several connections need for kernel_timeout"
        )
    if config.daemon.log_level not in ("debug", "info", "warning", "error"):
        raise _invalid(f"{name}: daemon.log_level must be debug, info, warning or error")
    paths = {"socket": config.daemon.socket, "state_dir": config.daemon.state_dir}
    for key, value in paths.items():
        if not value.startswith("/"):
            raise _invalid(f"{name}: daemon.{key} must be an absolute path")
    for directory in config.daemon.allow_dirs:
        if not directory.startswith("/"):
            raise _invalid(f"{name}: daemon.allow_dirs must hold absolute paths")
    metrics_address(config.daemon.metrics, name)
    if config.prefetch.policy not in ("polite", "eager", "fixed"):
        raise _invalid(f"{name}: prefetch.policy must be polite, eager or fixed")
    if config.storage.cache not in ("writeback", "writethrough", "none"):
        raise _invalid(f"{name}: storage.cache must be writeback, writethrough or none")
    if config.storage.on_full not in ("error", "wait"):
        raise _invalid(f"{name}: storage.on_full must be error or wait")
    program = config.storage.grow_program
    if program not in ("off", "builtin:lvextend") and not program.startswith("/"):
        raise _invalid(
            f"{name}: storage.grow_program must be an absolute path, builtin:lvextend, or off"
        )


def metrics_address(text: str, name: str = "configuration") -> tuple[str, int] | None:
    """HOST:PORT of the metrics listener as (host, port), or None for "off"."""
    if text == "off":
        return None
    host, colon, port = text.rpartition(":")
    host = host.strip("[]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise _invalid(
            f"{name}: metrics address '{text}' is not HOST:PORT",
            "write for instance 127.0.0.1:9809, or off",
        )
    return host, int(port)


def _section(defaults: _Section, tree: Mapping[str, object], section: str, name: str) -> _Section:
    values = tree.get(section, {})
    if not isinstance(values, Mapping):
        raise _invalid(f"{name}: '{section}' must be a section")
    known = {entry.name for entry in fields(defaults)}
    accepted: dict[str, object] = {}
    for key, value in values.items():
        if key not in known:
            raise _invalid(f"{name}: unknown key '{section}.{key}'", _suggest(known))
        accepted[key] = _value(getattr(defaults, key), value, f"{name}: {section}.{key}")
    return replace(defaults, **accepted)  # type: ignore[arg-type]


def _value(default: object, value: object, where: str) -> object:
    """Check one value against the type of its default; numbers must be positive (0 where it is)."""
    if isinstance(default, tuple):
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return tuple(value)
        raise _invalid(f"{where} must be a list of strings")
    if isinstance(default, str):
        if isinstance(value, str) and value and "\0" not in value:
            return value
        raise _invalid(f"{where} must be a string that is not empty")
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        raise _invalid(f"{where} must be true or false")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _invalid(f"{where} must be a number")
    if isinstance(default, int) and not isinstance(value, int):
        raise _invalid(f"{where} must be a whole number")
    if not 0 <= value <= 1e9 or (value == 0 and default != 0):
        raise _invalid(f"{where} is out of range")
    return type(default)(value) if isinstance(default, int | float) else value


def _suggest(known: set[str]) -> str:
    return "known here: " + ", ".join(sorted(known))


def _invalid(message: str, hint: str = "fvdd(8) describes every key") -> ApiError:
    return ApiError("invalid_config", message, hint=hint)

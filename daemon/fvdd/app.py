# SPDX-License-Identifier: Apache-2.0
"""The composition root: builds everything, owns signals, the listening sockets and the stop order.

Start: state directory locked, sockets bound, adoption of what an earlier fvdd left begun, ready.
Stop: no new requests, those under way finished, devices left running under their workers (fvdd may
come and go, attached file systems must not notice), sockets and lock given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import grp
import itertools
import logging
import os
import signal
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from fvdapi.errors import KINDS, ApiError
from fvdapi.models import ErrorAnswer, ErrorDetail
from fvdd.api.bodies import BODY_BYTES_MAX, TOO_LARGE, BodyLimit
from fvdd.api.devices import device_routes
from fvdd.api.prefetch import prefetch_routes
from fvdd.api.running import running_routes
from fvdd.api.system import event_routes, observation_routes, system_routes
from fvdd.api.tracing import Traces, trace_routes
from fvdd.attach.attachment import AttachError, Transport
from fvdd.attach.kernel_nbd import NbdTransport
from fvdd.attach.unix_socket import listen_at
from fvdd.config import Config, metrics_address
from fvdd.devices.prefetching import BudgetSharing
from fvdd.devices.registry import Registry, StateDirectory
from fvdd.devices.session import Services
from fvdd.devices.spares import Spares
from fvdd.devices.supervise import Spawn, spawn_worker
from fvdd.events import EventHub
from fvdd.log import fields
from fvdd.metrics.collect import Metrics, version
from fvdd.notify import Notifier, passed_sockets

log = logging.getLogger("fvdd")

SOCKET_MODE: Final = 0o660
SOCKET_DIRECTORY_MODE: Final = 0o755
BACKLOG: Final = 64
GRACE_SECONDS: Final = 20
OBSERVERS_MAX: Final = 64
LAG_PERIOD_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class Parts:
    """What tests replace; users get the real ones."""

    transport: Transport
    spawn: Spawn


class App:
    """One fvdd."""

    def __init__(self, config: Config, parts: Parts | None = None) -> None:
        self.config = config
        self._parts = parts or Parts(NbdTransport(), spawn_worker)
        self._state = StateDirectory(config.daemon.state_dir)
        self.spares = Spares(self._parts.spawn, self._state.devices)
        services = Services(config, self._parts.transport, self.spares.spawn)
        self.registry = Registry(services, self._state)
        self._budget = BudgetSharing(
            self.config.prefetch.budget, lambda: self.registry.devices
        )
        self.metrics = Metrics(self.registry)
        self._hub = EventHub()
        self._traces = Traces()
        self._notifier = Notifier()
        self._stop = asyncio.Event()

    @property
    def has_listener(self) -> bool:
        """Whether somebody waits for events."""
        return self._hub.has_listener

    async def run(self) -> None:
        """Serve until a signal or `stop`; ApiError when the start is not possible."""
        self._state.acquire()
        try:
            with contextlib.ExitStack() as undo:
                control = self._listen_control(undo)
                observation = self._listen_metrics(undo)
                self.registry.adopt_all()
                self._handle_signals()
                await self._serve(control, observation)
        finally:
            self._state.release()

    def stop(self) -> None:
        """Begin an orderly stop; harmless when repeated."""
        self._stop.set()

    async def _serve(self, control: socket.socket, observation: socket.socket | None) -> None:
        whole = control_app(self.registry, self.metrics, self._hub, self._traces)
        servers = [_Server(whole, control)]
        if observation is not None:
            watched = observation_app(self.registry, self.metrics)
            servers.append(_Server(watched, observation, ObserverProtocol))
        serving = [asyncio.create_task(server.serve([server.listening])) for server in servers]
        others = [
            asyncio.create_task(self._parts.transport.watch(_link_dead)),
            asyncio.create_task(self._measure_lag()),
            asyncio.create_task(self._notifier.watchdog()),
            asyncio.create_task(self._reclaim()),
            asyncio.create_task(self.spares.keep(lambda: bool(self.registry.devices))),
            asyncio.create_task(self._budget.run()),
        ]
        stopping = asyncio.create_task(self._stop.wait())
        try:
            self._notifier.ready(f"serving on {self.config.daemon.socket}")
            log.info(
                "ready",
                extra=fields(socket=self.config.daemon.socket, version=version(), pid=os.getpid()),
            )
            await asyncio.wait({stopping, *serving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._notifier.stopping("leaving devices to their workers")
            self._hub.close()
            self._traces.close()
            self.registry.begin_stop()
            for server in servers:
                server.should_exit = True
            await asyncio.gather(*serving, return_exceptions=True)
            for task in (stopping, *others):
                task.cancel()
            await asyncio.gather(stopping, *others, return_exceptions=True)
            await self.registry.close()
            await self._parts.transport.close()
            log.info("stopped", extra=fields(devices=len(self.registry.devices)))

    async def _reclaim(self) -> None:
        try:
            await self.registry.reclaim()
        except Exception:  # never a reason to be without a daemon
            log.exception("leaked devices were not reclaimed")

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            # Only the main thread may; tests run the app elsewhere and use stop().
            with contextlib.suppress(ValueError, RuntimeError):
                loop.add_signal_handler(number, self.stop)

    async def _measure_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            begin = loop.time()
            await asyncio.sleep(LAG_PERIOD_SECONDS)
            self.metrics.loop_lag(max(0.0, loop.time() - begin - LAG_PERIOD_SECONDS))

    def _listen_control(self, undo: contextlib.ExitStack) -> socket.socket:
        passed = passed_sockets()
        if passed:
            undo.callback(passed[0].close)
            return passed[0]
        path = self.config.daemon.socket
        sock = bind_control(path, self.config.daemon.group)
        undo.callback(sock.close)
        undo.callback(_unlink_quietly, path)
        return sock

    def _listen_metrics(self, undo: contextlib.ExitStack) -> socket.socket | None:
        address = metrics_address(self.config.daemon.metrics)
        if address is None:
            return None
        try:
            found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
            family, kind, proto, _, target = found[0]
            sock = socket.socket(family, kind, proto)
            undo.callback(sock.close)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(target)
        except OSError as error:
            raise ApiError(
                "invalid_config",
                f"cannot listen on the metrics address {self.config.daemon.metrics} ({error})",
                hint="choose another with --metrics HOST:PORT, or --metrics off",
            ) from error
        sock.listen(BACKLOG)
        return sock


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals to the App."""

    def __init__(
        self, app: FastAPI, listening: socket.socket, protocol: type[H11Protocol] | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol or PeerProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )
        self.listening = listening

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class PeerProtocol(H11Protocol):
    """HTTP with the peer's credentials, which the kernel vouches for, as the client's address."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family == socket.AF_UNIX:
            packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            pid, uid, gid = struct.unpack("3i", packed)
            self.client = (f"pid={pid},uid={uid},gid={gid}", 0)


class ObserverProtocol(H11Protocol):
    """HTTP for whoever can reach the metrics address: of too many the oldest makes room.

    So nobody takes the descriptors that fvdd needs for devices, and one who opens connections and
    says nothing keeps no scraper out.
    """

    _opened = itertools.count()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.number = next(self._opened)
        if len(self.connections) > OBSERVERS_MAX:
            oldest = min(self.connections, key=lambda one: getattr(one, "number", 0))
            self.connections.discard(oldest)
            oldest.transport.abort()


def control_app(
    registry: Registry, metrics: Metrics, hub: EventHub, traces: Traces
) -> FastAPI:
    """The whole API, for the Unix socket."""
    app = _new_app("fvd control API")
    app.include_router(device_routes(registry))
    app.include_router(prefetch_routes(registry))
    app.include_router(running_routes(registry))
    app.include_router(trace_routes(registry, traces))
    app.include_router(system_routes(registry, metrics))
    app.include_router(event_routes(hub))
    app.include_router(observation_routes(registry, metrics))
    return app


def observation_app(registry: Registry, metrics: Metrics) -> FastAPI:
    """Metrics and health alone, for the network."""
    app = _new_app("fvd metrics")
    app.include_router(observation_routes(registry, metrics, is_public=True))
    return app


def _new_app(title: str) -> FastAPI:
    app = FastAPI(
        title=title,
        version=version(),
        docs_url=None,
        redoc_url=None,
        responses={"default": {"model": ErrorAnswer, "description": "An error, with its remedy."}},
    )
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(AttachError, _answer_attach_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_defect)
    app.add_middleware(BodyLimit, answer=lambda: _error(_too_large()))
    return app


def _error(error: ApiError) -> JSONResponse:
    detail = ErrorDetail(
        code=error.code, message=error.message, hint=error.hint, details=error.details
    )
    body = ErrorAnswer(error=detail).model_dump(mode="json")
    return JSONResponse(body, status_code=error.http_status)


def _too_large() -> ApiError:
    return ApiError("request_too_large", f"the request has more than {BODY_BYTES_MAX} bytes")


async def _answer_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    log.info(
        "refused",
        extra=fields(path=request.url.path, code=error.code, reason=error.message),
    )
    return _error(error)


async def _answer_attach_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AttachError)
    made = ApiError(error.code, error.message, hint=error.hint)
    return await _answer_api_error(request, made)


async def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    message = f"{where}: {first['msg']}" if where else str(first["msg"])
    return _error(ApiError("invalid_request", f"the request is not valid: {message}"))


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == TOO_LARGE:
        return _error(_too_large())
    by_status = {404: "not_found", 405: "method_not_allowed"}
    code = by_status.get(error.status_code, "invalid_request")
    made = ApiError(code, f"{request.method} {request.url.path}: {KINDS[code].meaning}")
    answer = _error(made)
    if error.headers:
        answer.headers.update(error.headers)
    return answer


async def _answer_defect(request: Request, error: Exception) -> JSONResponse:
    log.error("a request failed", exc_info=error, extra=fields(path=request.url.path))
    return _error(
        ApiError(
            "internal_error",
            f"a defect of fvdd: {type(error).__name__}",
            hint="its log has the details: journalctl -u fvdd",
        )
    )


def bind_control(path: str, group: str) -> socket.socket:
    """Listen on the Unix socket: never reachable by others, not even for a moment."""
    owner = -1
    with contextlib.suppress(KeyError):
        owner = grp.getgrnam(group).gr_gid
    try:
        directory = os.path.dirname(path)
        if not os.path.isdir(directory):
            os.makedirs(directory, exist_ok=True)
            os.chmod(directory, SOCKET_DIRECTORY_MODE)
        return listen_at(path, BACKLOG, mode=SOCKET_MODE, group=owner)
    except OSError as error:
        raise ApiError(
            "daemon_running" if error.errno == errno.EADDRINUSE else "invalid_config",
            f"cannot listen on {path} ({error.strerror})",
            hint="run fvdd as root, or choose another path with --socket",
        ) from error


def _unlink_quietly(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _link_dead(index: int) -> None:
    log.debug("link dead", extra=fields(index=index))

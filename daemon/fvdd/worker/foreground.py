# SPDX-License-Identifier: Apache-2.0
"""`serve`: one image as an NBD server in the foreground, for as long as the user likes.

Prints the NBD URI when clients can connect. The first SIGTERM, SIGINT or SIGHUP is a clean stop:
no new clients, finish what is in flight, write everything, mark the image clean. The second ends
the process at once, which is as safe as a kill: with --state nothing that was acknowledged is lost,
without it what was flushed.

Meanwhile the image can grow: who connects from then on is told the new size. NBD cannot tell those
that are connected; they have to connect again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fvdd.attach.export import Address, Listener, ListenerLimits
from fvdd.attach.handshake import Export
from fvdd.attach.tls import TlsOptions, TlsServer
from fvdd.log import fields
from fvdd.worker.arguments import Arguments
from fvdd.worker.channel import Message
from fvdd.worker.confinement import confine_for
from fvdd.worker.control import Op, ServerControl
from fvdd.worker.metrics_server import MetricsSocket, Served, new_page
from fvdd.worker.opened import OpenedImage, OpenRequest, engine_version
from fvdd.worker.resizing import resize
from fvdd.worker.state import StateDirectory
from fvdd.worker.updating import update
from fvdengine.live import STATS_NAME

_log = logging.getLogger(__name__)

# Two signals so close are one wish: `timeout` and a terminal signal the process and its group.
SAME_SIGNAL_SECONDS = 1.0
# How long a stop waits for an image that is being opened.
OPEN_GRACE_SECONDS = 0.5
SECTOR = 512


@dataclass(frozen=True, slots=True)
class ServeRequest:
    """What to serve, where, and to how many."""

    opening: OpenRequest
    address: Address
    connections: int
    state_dir: str | None = None
    metrics: str | None = None
    tls: TlsOptions | None = None
    quiet: bool = False


async def serve(request: ServeRequest) -> int:
    """Open, serve until told to stop, close; returns the exit status."""
    stop = asyncio.Event()
    first = 0.0

    def signalled(number: signal.Signals) -> None:
        nonlocal first
        if stop.is_set() and time.monotonic() - first < SAME_SIGNAL_SECONDS:
            return
        if stop.is_set():
            _log.warning("killed while stopping", extra=fields(signal=number.name))
            os._exit(128 + number)
        _log.info("stopping", extra=fields(signal=number.name))
        first = time.monotonic()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, signalled, number)
    with contextlib.ExitStack() as held:
        opening = request.opening
        tls = request.tls.load() if request.tls is not None else None
        if tls is not None:
            held.callback(tls.close)
            if not tls.verifies:
                _log.warning("every client may connect: --tls-verify-peer asks for certificates")
        if request.state_dir is not None:
            state = StateDirectory(request.state_dir)
            held.callback(state.close)
            opening = _with_state(opening, state)
        if request.metrics is not None and opening.live_dir is None:
            opening = replace(opening, stats_fd=new_page())
            held.callback(os.close, opening.stats_fd)
        sockets = _Sockets(request, held)
        image = await _opened(opening, sockets, stop)
        if image is None:
            held.close()
            logging.shutdown()
            os._exit(0)  # a thread waits for what may never come
        try:
            with _scraped(sockets.metrics, image, opening):
                await _serve_image(request, image, sockets.clients, stop, tls)
        finally:
            await asyncio.to_thread(image.close)
    return 0


class _Sockets:
    """Where clients and scrapers come to, once all that can be waited for is there."""

    def __init__(self, request: ServeRequest, held: contextlib.ExitStack) -> None:
        self._request = request
        self._held = held
        self.metrics: MetricsSocket | None = None
        self.clients: socket.socket

    def listen(self) -> None:
        """Listen: the last thing before anything is written, so that a mistake costs nothing."""
        self.clients = self._held.enter_context(self._request.address.listen())
        self._held.callback(self._request.address.release)
        if self._request.metrics is not None:
            self.metrics = MetricsSocket(self._request.metrics)
            self._held.callback(self.metrics.close)


async def _opened(
    opening: OpenRequest, sockets: _Sockets, stop: asyncio.Event
) -> OpenedImage | None:
    """Open the image; None: told to stop while what it needs does not answer."""
    work = asyncio.ensure_future(
        asyncio.to_thread(OpenedImage.open, opening, confine_for, sockets.listen)
    )
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
        # It is nearly always a matter of moments, and then the image can be closed as it should.
        done, _ = await asyncio.wait((work,), timeout=OPEN_GRACE_SECONDS)
    finally:
        stopped.cancel()
    return work.result() if done else None


def _with_state(opening: OpenRequest, state: StateDirectory) -> OpenRequest:
    """Take over what a dead server left in the directory, unless told to give it up."""
    if opening.read_only:
        return opening
    takeover = state.has_live_state and not opening.discard_live_state
    return replace(opening, live_dir=state.path, takeover=takeover)


@contextlib.contextmanager
def _scraped(
    metrics: MetricsSocket | None, image: OpenedImage, opening: OpenRequest
) -> Iterator[None]:
    if metrics is None:
        yield
        return
    page = opening.live_dir / STATS_NAME if opening.live_dir is not None else opening.stats_fd
    base = image.plan.layers[1] if len(image.plan.layers) > 1 else None
    served = Served(
        opening.image, base.path if base else "", base.format if base else "", page,
        engine_version(), image.data, image.data_id, image.grows,
    )  # fmt: skip
    _log.info("metrics", extra=fields(url=metrics.url))
    with metrics.serving(served):
        yield


async def _serve_image(
    request: ServeRequest,
    image: OpenedImage,
    sock: socket.socket,
    stop: asyncio.Event,
    tls: TlsServer | None,
) -> None:
    loop = asyncio.get_running_loop()
    device = image.device
    export = Export(
        size=device.size,
        read_only=device.read_only,
        multi_conn=request.connections > 1,
        description=os.path.basename(request.opening.image),
    )
    limits = ListenerLimits(connections=request.connections)
    secure = tls.secure if tls is not None else None
    listener = Listener(sock, export, image.serve, limits, secure)

    def take_events() -> None:
        for event in image.take_events():
            connection = event.get("connection")
            if isinstance(connection, int):
                listener.connection_closed(connection)
            bad = ("failed", "fault", "failures_lost")
            is_bad = event["event"] in bad or event.get("state") == "failed"
            level = logging.ERROR if is_bad else logging.INFO
            if event.get("requests"):
                level = logging.WARNING
            _log.log(level, "engine event", extra=fields(**event))

    loop.add_reader(device.event_fd, take_events)
    listener.start()
    try:
        uri = request.address.uri(sock)
        async with ServerControl(request.opening.image, _ops(image, listener)):
            if not request.quiet:
                _say(uri)
            _log.info(
                "serving", extra=fields(uri=uri, size=device.size, read_only=device.read_only)
            )
            await stop.wait()
    finally:
        await listener.stop()
        loop.remove_reader(device.event_fd)


def _ops(image: OpenedImage, listener: Listener) -> dict[str, Op]:
    """What the server can be told while it runs; nothing where it only reads, as many may."""
    if image.device.read_only:
        return {}

    def grow(arguments: Arguments) -> Message:
        answer = resize(image, arguments.text("size"), SECTOR)
        listener.set_size(image.device.size)
        return {**answer, "name": os.path.basename(image.plan.path)}

    def change(arguments: Arguments) -> Message:
        answer = update(image, arguments.mapping("fields"))
        return {**answer, "name": os.path.basename(image.plan.path)}

    return {"ping": lambda arguments: {}, "resize": grow, "update": change}


def _say(line: str) -> None:
    """Print a line. Whoever started us may not read it; his clients know the address then."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        # What is left in the buffer goes nowhere: into a file that nobody can read.
        nowhere = os.memfd_create("nowhere", os.MFD_CLOEXEC)
        os.dup2(nowhere, 1)
        os.close(nowhere)

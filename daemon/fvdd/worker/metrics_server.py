# SPDX-License-Identifier: Apache-2.0
"""`serve --metrics`: the metrics of the one image that this process serves, over HTTP.

The same text as fvdd's for its devices, with the image's name in the place of the kernel's. It
runs on threads of its own and reads the statistics page alone, so a scraper cannot hold up a
client. The standard library does: a worker has no web framework.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from fvdd.attach.export import ExportError
from fvdd.metrics.exposition import Exposition, exposition_of
from fvdd.metrics.identity import Identity, write_build, write_identities
from fvdd.metrics.pages import write_pages
from fvdd.metrics.stores import Looker, Store, write_stores
from fvdengine.opening import state_sizes
from fvdengine.stats import read_stats

OPENMETRICS: Final = "application/openmetrics-text"
CONTENT_TYPES: Final = {
    False: "text/plain; version=0.0.4; charset=utf-8",
    True: f"{OPENMETRICS}; version=1.0.0; charset=utf-8",
}
PATIENCE_SECONDS: Final = 10.0
CONNECTIONS_MAX: Final = 16  # each is a thread


_looker, _looking = Looker(), threading.Lock()


@dataclass(frozen=True, slots=True)
class Served:
    """What is served: an image, its base, where its engine counts, and where its data lie."""

    image: str
    base: str
    base_format: str
    page: Path | int
    version: str = "-"
    data: str = ""
    data_id: tuple[int, int] | None = None
    grows: bool = False
    cookie: str = field(default_factory=lambda: f"serve:{secrets.token_hex(8)}")

    @property
    def name(self) -> str:
        """The value of the label `device`."""
        return Path(self.image).stem or "image"


def new_page() -> int:
    """A statistics page in memory, for an image that is served without a state directory."""
    fd = os.memfd_create("fvd-stats", os.MFD_CLOEXEC)
    os.ftruncate(fd, state_sizes(0)[1])
    return fd


def render(served: Served, *, openmetrics: bool) -> bytes:
    """The exposition; raises EngineError or OSError when the page cannot be read."""
    name = served.name
    out = Exposition(openmetrics=openmetrics)
    # A page that lasts goes on counting in the next process; one in memory begins anew.
    cookie = served.cookie if isinstance(served.page, int) else ""
    image = os.path.abspath(served.image)
    identity = Identity(
        name, "", name, image, "serve", served.base, served.base_format, cookie
    )
    write_build(out, served.version)
    write_identities(out, [identity])
    out.family("fvd_device_up", "gauge", "Whether the image is served.")
    out.sample("fvd_device_up", (("device", name),), 1)
    page = read_stats(served.page)
    out.family("fvd_device_connections", "gauge", "Connections that are served.")
    live = page.gauges.get("connections", 0)
    out.sample("fvd_device_connections", (("device", name),), live)
    used = page.gauges.get("store_used_bytes")
    store = Store(name, served.data, served.data_id, served.grows, used)
    with _looking:
        rooms = _looker.rooms([store])
    write_stores(out, rooms)
    write_pages(out, [(name, page)], time.monotonic_ns(), time.time())
    return exposition_of([out.text()], openmetrics=openmetrics)


class MetricsSocket:
    """The listening socket: bound before the image is opened, so that a mistake costs nothing."""

    def __init__(self, address: str) -> None:
        """Listen on HOST:PORT; raises ExportError."""
        host, colon, port = address.rpartition(":")
        host = host.strip("[]")
        if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise ExportError(
                "bad_address", f"{address!r} is not HOST:PORT", "for example 127.0.0.1:9809"
            )
        try:
            found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
            self.sock = socket.create_server(found[0][4], family=found[0][0])
        except (OSError, UnicodeError) as error:
            raise ExportError(
                "cannot_listen",
                f"cannot listen on the metrics address {address} ({error})",
                "choose another --metrics HOST:PORT",
            ) from error

    @property
    def url(self) -> str:
        host, port = self.sock.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"

    @contextlib.contextmanager
    def serving(self, served: Served) -> Iterator[None]:
        """Answer scrapes until the end of the context."""

        class Handler(_Handler):
            what = served

        server = _Server(self.sock.getsockname(), Handler, bind_and_activate=False)
        server.socket.close()
        server.socket = self.sock
        thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()

    def close(self) -> None:
        self.sock.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Of the socket that the library makes and we put ours in the place of: the process may make
    # no others by then.
    address_family = socket.AF_UNIX

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lock = threading.Lock()
        self._open: dict[Any, None] = {}

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a connection; of too many the oldest makes room, so that nobody is kept out."""
        with self._lock:
            self._open[request] = None
            if len(self._open) > CONNECTIONS_MAX:
                oldest = next(iter(self._open))
                del self._open[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A scraper that went away is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    what: Served
    timeout = PATIENCE_SECONDS

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "only /metrics is here")
            return
        openmetrics = OPENMETRICS in self.headers.get("Accept", "")
        try:
            body = render(self.what, openmetrics=openmetrics)
        except Exception as error:  # the scraper must hear of it, and the server go on
            self.send_error(500, "the statistics cannot be read", str(error))
            return
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPES[openmetrics])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are not worth a line each."""

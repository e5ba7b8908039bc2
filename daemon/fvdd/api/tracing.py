# SPDX-License-Identifier: Apache-2.0
"""The route of traces: what a worker writes into its pipe goes on to whoever asked.

Nothing is kept here: a client that does not read fills the pipe, and the worker counts what it has
to throw away. A client that leaves closes the pipe, which ends the trace.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from fvdapi.models import TraceRequest
from fvdd.api.audit import audit
from fvdd.devices.registry import Registry

CHUNK_BYTES = 1 << 18


class Traces:
    """The traces that are being taken, so that an end of the daemon ends them."""

    def __init__(self) -> None:
        self._open: set[asyncio.ReadTransport] = set()

    async def begin(self, pipe: int) -> AsyncIterator[bytes]:
        """Take the reading end of a pipe; its bytes as they come."""
        reader = asyncio.StreamReader(limit=CHUNK_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        file = os.fdopen(pipe, "rb", buffering=0)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, file)
        self._open.add(transport)
        return self._chunks(reader, transport)

    def close(self) -> None:
        """End all of them."""
        for transport in self._open:
            transport.close()

    async def _chunks(
        self, reader: asyncio.StreamReader, transport: asyncio.ReadTransport
    ) -> AsyncIterator[bytes]:
        try:
            while chunk := await reader.read(CHUNK_BYTES):
                yield chunk
        finally:
            transport.close()
            self._open.discard(transport)


def trace_routes(registry: Registry, traces: Traces) -> APIRouter:
    router = APIRouter(prefix="/v1/devices", tags=["traces"])

    @router.post("/{name}/trace", response_class=StreamingResponse)
    async def trace(request: Request, name: str, body: TraceRequest) -> StreamingResponse:
        """What the device does for so many seconds, as it does it (fvdapi/tracing.py)."""
        audit(request, "trace", name=name, seconds=body.seconds)
        pipe = await registry.device(name).trace(body.seconds)
        return StreamingResponse(await traces.begin(pipe), media_type="application/octet-stream")

    return router

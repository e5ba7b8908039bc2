# SPDX-License-Identifier: Apache-2.0
"""How long the body of a request may be: none of ours is long, and it is held in memory whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_BYTES_MAX: Final = 1 << 20
TOO_LARGE: Final = 413


class BodyLimit:
    """Refuses a longer one: by its length before it is read, or else as soon as it is too long."""

    def __init__(self, app: ASGIApp, answer: Callable[[], Response]) -> None:
        self._app = app
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        if any(value.isdigit() and int(value) > BODY_BYTES_MAX for value in lengths):
            await self._answer()(scope, receive, send)
            return
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > BODY_BYTES_MAX:
                raise HTTPException(TOO_LARGE)
            return message

        await self._app(scope, counted, send)

# SPDX-License-Identifier: Apache-2.0
"""A request that is too long is refused, whatever it says of its length."""

import asyncio

import pytest
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fvdd.api.bodies import BODY_BYTES_MAX, BodyLimit


def ask(chunks, headers=()):
    """What an app read through the limit, and the statuses that were answered."""
    read, sent = [], []
    left = list(chunks)

    async def app(scope, receive, send):
        while (message := await receive())["more_body"]:
            read.append(len(message["body"]))
        read.append(len(message["body"]))

    async def receive():
        body = left.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(left)}

    async def send(message):
        sent.append(message.get("status"))

    limit = BodyLimit(app, lambda: Response(status_code=413))
    asyncio.run(limit({"type": "http", "headers": list(headers)}, receive, send))
    return read, sent


def test_what_says_that_it_is_too_long_is_not_read():
    assert ask([b""], [(b"content-length", b"%d" % (BODY_BYTES_MAX + 1))]) == ([], [413, None])
    assert ask([b"x"], [(b"content-length", b"%d" % BODY_BYTES_MAX)]) == ([1], [])
    assert ask([b"x"], [(b"content-length", b"much")]) == ([1], [])


def test_what_does_not_say_it_is_read_as_far_as_may_be():
    half = bytes(BODY_BYTES_MAX // 2)
    assert ask([half, half]) == ([len(half)] * 2, [])
    with pytest.raises(HTTPException) as caught:
        ask([half, half, b"x", half])
    assert caught.value.status_code == 413

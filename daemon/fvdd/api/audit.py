# SPDX-License-Identifier: Apache-2.0
"""Who asked for what: a log line with the caller's credentials for every call that changes things.

The credentials are those that the kernel vouches for on the Unix socket; the server's protocol
class (fvdd.app) puts them where ASGI has the peer's address.
"""

from __future__ import annotations

import logging

from fastapi import Request

from fvdd.log import fields

log = logging.getLogger("fvdd.api")


def audit(request: Request, action: str, **values: object) -> None:
    caller = request.client.host if request.client is not None else "unknown"
    known = {key: value for key, value in values.items() if value is not None}
    log.info("request", extra=fields(action=action, caller=caller, **known))

# SPDX-License-Identifier: Apache-2.0
class EngineFault(Exception):
    errno: int
    where: str
    offset: int
    reason: str
    def __init__(self, errno: int, where: str, offset: int = ..., reason: str = ...) -> None: ...

# SPDX-License-Identifier: Apache-2.0
"""What was typed at once is several keys."""

import pytest

from fvdctl.commands.top import DOWN, UP, keys_of


@pytest.mark.parametrize(
    ("typed", "keys"),
    [
        ("", []), ("q", ["q"]), ("kkk", ["k", "k", "k"]), ("\r\n", ["\r", "\n"]),
        (UP[0] + UP[1] + "s" + DOWN[0], [UP[0], UP[1], "s", DOWN[0]]),
        ("\x1b", ["\x1b"]), ("\x1b[3~p", ["\x1b[3~", "p"]), ("\x1b\x1b", ["\x1b", "\x1b"]),
    ],
)  # fmt: skip
def test_keys_come_one_by_one(typed, keys):
    assert keys_of(typed) == keys

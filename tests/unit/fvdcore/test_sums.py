# SPDX-License-Identifier: Apache-2.0
"""The engine's sums as Python sees them: the same as Python's own, and nothing else is taken."""

import pytest

from fvdcore import crc32c
from fvdengine.crc32c import crc32c as plain


def test_it_is_the_same_as_pythons_own(rng):
    for size in (0, 1, 7, 512, 528, 4097):
        data, start = rng.randbytes(size), rng.randrange(1 << 32)
        assert crc32c(data) == plain(data)
        assert crc32c(data, start) == plain(data, start)


@pytest.mark.parametrize(
    ("data", "start", "error"),
    [("text", 0, TypeError), (None, 0, TypeError), (b"x", -1, OverflowError),
     (b"x", 1 << 32, OverflowError)],
)  # fmt: skip
def test_what_is_no_bytes_or_no_sum_is_refused(data, start, error):
    with pytest.raises(error):
        crc32c(data, start)

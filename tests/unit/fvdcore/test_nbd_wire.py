# SPDX-License-Identifier: Apache-2.0
"""Errors of the engine narrowed to those that NBD knows."""

import errno

import pytest

EIO, EPERM, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 5, 1, 12, 22, 28, 75, 95, 108


@pytest.mark.parametrize(
    ("error", "wire"),
    [("EIO", EIO), ("EPERM", EPERM), ("EROFS", EPERM), ("EACCES", EPERM), ("ENOMEM", ENOMEM),
     ("EINVAL", EINVAL), ("ENOSPC", ENOSPC), ("EDQUOT", ENOSPC), ("EFBIG", ENOSPC),
     ("EOVERFLOW", EOVERFLOW), ("EOPNOTSUPP", ENOTSUP), ("ESHUTDOWN", ESHUTDOWN),
     ("EUCLEAN", EIO), ("EAGAIN", EIO), ("ENODEV", EIO), ("ETIMEDOUT", EIO)],
)  # fmt: skip
def test_error_numbers_on_the_wire(probes, error, wire):
    assert probes.plain.wire_error(-getattr(errno, error)) == wire


def test_no_error_is_no_error(probes):
    assert probes.plain.wire_error(0) == 0

# SPDX-License-Identifier: Apache-2.0
"""EngineFault: fields and the sentence that it makes."""

import errno
import os

from fvdcore import EngineFault


def test_a_fault_is_one_sentence_with_its_place():
    fault = EngineFault(errno.EIO, "read", 4096)
    assert (fault.errno, fault.where, fault.offset, fault.reason) == (errno.EIO, "read", 4096, "")
    assert str(fault) == f"read at byte 4096: {os.strerror(errno.EIO)}"


def test_a_reason_stands_in_place_of_the_errno_s_text():
    fault = EngineFault(errno.EUCLEAN, "open", -1, "bad block_size")
    assert str(fault) == "open: bad block_size"

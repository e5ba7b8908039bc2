# SPDX-License-Identifier: Apache-2.0
"""Layer 0. invariant(): stop the process when the program's own state is impossible."""
cdef extern from "checks.h" nogil:
    void invariant "FVD_INVARIANT"(bint condition) noexcept

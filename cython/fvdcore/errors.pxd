# SPDX-License-Identifier: Apache-2.0
"""Layer 5. From a negative errno to an exception, in one place."""

cdef object fault(int rc, str where, object offset)

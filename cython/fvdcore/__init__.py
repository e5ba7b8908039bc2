# SPDX-License-Identifier: Apache-2.0
"""The engine of fvd: native threads that serve an FVD image. See ARCHITECTURE.md."""

from .device import Device
from .errors import EngineFault
from .remote import export_holds_data, export_length, zero_export
from .sums import crc32c

__all__ = [
    "Device", "EngineFault", "crc32c", "export_holds_data", "export_length", "zero_export",
]  # fmt: skip

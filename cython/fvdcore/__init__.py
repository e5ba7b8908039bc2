# SPDX-License-Identifier: Apache-2.0
"""The engine of fvd: native threads that serve an FVD image. See ARCHITECTURE.md."""

from .device import Device
from .errors import EngineFault
from .remote import export_length

__all__ = ["Device", "EngineFault", "export_length"]

# SPDX-License-Identifier: Apache-2.0
"""The data of an image on an NBD server, for offline changes: a device that is elsewhere.

What repair does to data is little: it asks their length and makes them durable.
"""

from fvdengine import remote
from fvdengine.editing import ImageFile
from fvdengine.uris import Uri, parse_uri


class ServerFile(ImageFile):
    """The export at the URI `path`; it has no descriptor and keeps its length.

    Every call connects anew and raises DataServerUnreachable.
    """

    def __init__(self, path: str) -> None:
        self._uri: Uri = parse_uri(path)
        self.fd = -1
        self.path = self._uri.shown
        self.is_device = True

    def length(self) -> int:
        return remote.data_server_length(self._uri)

    def zero(self, offset: int, length: int) -> None:
        remote.zero_data_server(self._uri, [(offset, length)])

    def flush(self) -> None:
        remote.zero_data_server(self._uri, ())

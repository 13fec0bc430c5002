"""Bytes of pictures, sounds and films that a request brings: within the request, or from hosts that the server allows.

Never from this machine's files. A host is asked under the very address that was checked: what its name means may
change between two look-ups.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import SplitResult, urljoin, urlsplit

from vllm_omni.entrypoints.server.http.api_error import ApiError
from vllm_omni.entrypoints.server.settings import MIB, ServerSettings
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media import source_files

MAX_REDIRECTS = 3
TIMEOUT_S = 20.0  # for all of a fetch
CHUNK = 65_536


def decode_base64(text: str, field: str) -> bytes:
    """ApiError 400 for what is no base64."""
    try:
        return source_files.decode_base64(text, field)
    except InvalidRequestError as error:
        raise ApiError(400, str(error), code="invalid_media", param=field) from None


def read_source(source: str, field: str, settings: ServerSettings) -> bytes:
    """The bytes behind a data URI or an allowed http(s) URL, or of plain base64. Blocks; ApiError 400 names `field`."""
    if source[:5].lower() == "data:":
        return _of_data_uri(source, field)
    scheme = source[:8].partition(":")[0].lower()
    if scheme in ("http", "https"):
        return _Fetch(field, settings).read(source)
    if ":" in source[:12]:
        raise _refused(field, f"got a URL of scheme {scheme!r}, expected a data URI, base64, or http(s)")
    return decode_base64(source, field)


def _of_data_uri(source: str, field: str) -> bytes:
    try:
        return source_files.decode_data_uri(source, field)
    except InvalidRequestError as error:
        raise ApiError(400, str(error), code="invalid_media", param=field) from None


def _refused(field: str, why: str) -> ApiError:
    return ApiError(400, f"{field}: {why}", code="invalid_media", param=field)


class _Fetch:
    """One input over the network, each redirect checked as the first address was."""

    def __init__(self, field: str, settings: ServerSettings) -> None:
        self._field = field
        self._hosts = tuple(host.lower().rstrip(".") for host in settings.media_hosts)
        self._max_bytes = int(settings.max_media_mb * MIB)
        self._deadline_s = time.monotonic() + TIMEOUT_S

    def read(self, url: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            parts = self._checked(url)
            try:
                found = self._get(parts)
            except (OSError, http.client.HTTPException) as error:
                raise self._refused(f"could not be fetched ({type(error).__name__})") from None
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        raise self._refused(f"got more than {MAX_REDIRECTS} redirects")

    def _checked(self, url: str) -> SplitResult:
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            raise self._refused("got a URL that cannot be read") from None
        if parts.scheme not in ("http", "https") or parts.username is not None or parts.password is not None:
            raise self._refused("got a URL that is not plain http(s)")
        if not self._hosts:
            raise self._refused(
                "got a URL, but this server fetches nothing (--allow-media-host); send the file as a data URI"
            )
        if not any(_allows(entry, host.lower(), port) for entry in self._hosts):
            where = host if port is None else f"{host}:{port}"
            raise self._refused(f"got a URL of host {where!r:.80}, which is none of the server's --allow-media-host")
        return parts

    def _get(self, parts: SplitResult) -> bytes | str:
        """The content, or where it has moved to."""
        host = parts.hostname or ""
        is_tls = parts.scheme == "https"
        port = parts.port or (443 if is_tls else 80)
        connection = _Pinned(host, port, self._public_address(host, port), is_tls, self._left_s())
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"accept": "*/*", "user-agent": "vllm-omni"})
            response = connection.getresponse()
            location = response.getheader("location")
            if response.status in (301, 302, 303, 307, 308) and location:
                return location
            if response.status != 200:
                raise self._refused(f"got status {response.status} from its host")
            return self._body(response, connection)
        finally:
            connection.close()

    def _body(self, response: http.client.HTTPResponse, connection: _Pinned) -> bytes:
        found = bytearray()
        while chunk := response.read1(CHUNK):
            found += chunk
            if len(found) > self._max_bytes:
                raise self._refused(f"got more than {self._max_bytes / MIB:g} MB (--max-media-mb)")
            if connection.sock is not None:
                connection.sock.settimeout(self._left_s())
        return bytes(found)

    def _public_address(self, host: str, port: int) -> str:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        for address in found:
            if not is_public(address):
                raise self._refused(f"host {host!r:.80} is at an address that is not public")
        return sorted(found)[0]

    def _left_s(self) -> float:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise self._refused(f"was not there within {TIMEOUT_S:g} s")
        return left_s

    def _refused(self, why: str) -> ApiError:
        return _refused(self._field, why)


def is_public(address: str) -> bool:
    """Whether an address is on the open internet, and does not stand for one that is not."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def _allows(entry: str, host: str, port: int | None) -> bool:
    """`example.org` allows itself, `*.example.org` what is below it, `example.org:8080` its port 8080 alone."""
    name, _, its_port = entry.partition(":")
    is_host = host == name or (name.startswith("*.") and host.endswith(name[1:]))
    return is_host and (str(port) == its_port if its_port else port in (None, 80, 443))


class _Pinned(http.client.HTTPConnection):
    """Connects to one address, whatever the name means by then; TLS is checked against the name."""

    def __init__(self, host: str, port: int, address: str, is_tls: bool, timeout_s: float) -> None:
        super().__init__(host, port, timeout=timeout_s)
        self._address = address
        self._context = ssl.create_default_context() if is_tls else None

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._context is not None:
            self.sock = self._context.wrap_socket(self.sock, server_hostname=self.host)

"""Requests of their own connections, as `httpx.get` makes them, without the certificates that it reads for each: on
loopback nobody shows one, and they take 20 ms.
"""

from __future__ import annotations

import httpx

http = httpx.Client(verify=False, limits=httpx.Limits(max_keepalive_connections=0))

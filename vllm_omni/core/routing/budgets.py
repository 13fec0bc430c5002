"""A memory budget: who has reserved how many bytes. Allocates nothing and knows no device."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_omni.errors import ResourceError

GIB = 2**30
MIB = 2**20


class MemoryBudget:
    """At most `limit_bytes` among all owners; an owner reserves once and releases once.

    `name` says whose memory it is, `fix` what a user may change when it does not suffice; both stand in errors.
    """

    def __init__(self, limit_bytes: int, name: str = "memory", fix: str = "") -> None:
        if limit_bytes < 0:
            raise ResourceError(f"{name}: got a limit of {limit_bytes} bytes, expected at least 0")
        self.limit_bytes = limit_bytes
        self.name = name
        self._fix = fix
        self._shares: dict[str, int] = {}
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def available_bytes(self) -> int:
        return self.limit_bytes - self._used_bytes

    @property
    def shares(self) -> Mapping[str, int]:
        """Owner -> bytes, in the order of reservation."""
        return dict(self._shares)

    def reserve(self, owner: str, num_bytes: int) -> None:
        """Reserves bytes for an owner; ResourceError, and nothing reserved, when they do not fit or it holds some."""
        self.reserve_all({owner: num_bytes})

    def reserve_all(self, shares: Mapping[str, int]) -> None:
        """Reserves bytes for several owners, or for none of them: as `reserve`, and the error names every share."""
        for owner, num_bytes in shares.items():
            if num_bytes < 0:
                raise ResourceError(f"{self.name}: {owner!r} asked for {num_bytes} bytes, expected at least 0")
            if owner in self._shares:
                held = self._shares[owner]
                raise ResourceError(f"{self.name}: {owner!r} already holds {held} bytes; release them first")
        if sum(shares.values()) > self.available_bytes:
            raise ResourceError(self._shortage({**self._shares, **shares}))
        self._shares.update(shares)
        self._used_bytes += sum(shares.values())

    def release(self, owner: str) -> int:
        """Gives back what `owner` holds and says how much it was; ResourceError when it holds nothing."""
        if owner not in self._shares:
            raise ResourceError(f"{self.name}: {owner!r} holds nothing that could be released")
        num_bytes = self._shares.pop(owner)
        self._used_bytes -= num_bytes
        return num_bytes

    def check_integrity(self) -> None:
        """Raises ResourceError when the shares do not add up to what is used."""
        total = sum(self._shares.values())
        if total != self._used_bytes or total > self.limit_bytes or min(self._shares.values(), default=0) < 0:
            raise ResourceError(
                f"{self.name}: owners hold {total} bytes, {self._used_bytes} are counted, at most {self.limit_bytes}"
            )

    def _shortage(self, wanted: Mapping[str, int]) -> str:
        shares = ", ".join(f"{name} {format_bytes(share)}" for name, share in wanted.items())
        total = format_bytes(sum(wanted.values()))
        message = f"{self.name}: got a need of {total} ({shares}), expected at most {format_bytes(self.limit_bytes)}"
        return f"{message}; {self._fix}" if self._fix else message


def format_bytes(num_bytes: int) -> str:
    """'1.50 GiB', '24.0 MiB' or '512 bytes'."""
    if num_bytes >= GIB:
        return f"{num_bytes / GIB:.2f} GiB"
    return f"{num_bytes / MIB:.1f} MiB" if num_bytes >= MIB // 10 else f"{num_bytes} bytes"

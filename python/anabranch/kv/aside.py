"""A branch's K and V on the host, while its pages serve others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class KVAside:
    """What `TreeCache.put_aside` copied, bit for bit as it was kept.

    Attributes:
        length: of the branch's first tokens, how many are here.
        positions: logical positions, int64 [length or more].
        planes: for each layer K, V (unless V is in K's rows) and, of quantised ones, their factors: [length or more, …]
            on the CPU.
    """

    length: int
    positions: Tensor
    planes: list[Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(plane.numel() * plane.element_size() for plane in self.planes)

    def cut(self, length: int) -> None:
        """Forget the tokens from index `length` on."""
        self.length = min(self.length, length)

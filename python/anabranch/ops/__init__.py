"""The torch operators ``torch.ops.anabranch.*``: schemas, fake implementations, dispatch to a backend."""

from anabranch.ops import branch, tree
from anabranch.ops.rotary import Rotary
from anabranch.ops.tree import NO_SOFTCAP, NO_WINDOW, attend, write

__all__ = ["NO_SOFTCAP", "NO_WINDOW", "Rotary", "attend", "branch", "tree", "write"]

"""Attention over a tree of branches (`tree_attention`), and under a `BranchMask` for training (`branch_attention`)."""

from anabranch.attention.branch import branch_attention
from anabranch.attention.mask import BranchMask
from anabranch.attention.tree import paged_tree_attention, tree_attention

__all__ = ["BranchMask", "branch_attention", "paged_tree_attention", "tree_attention"]

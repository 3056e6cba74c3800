"""The mask function registered beside the attention function: a mask that is not built until somebody needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from anabranch.kv.step import Step


# What training loops do to every tensor of a batch before the model has it.
_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.detach.default, torch.ops.aten.clone.default)


class DeferredMask(torch.Tensor):
    """A causal mask ``[1, 1, q_length, kv_length]`` (bool, True = may attend), built only if looked at.

    A mask function cannot know whether the forward it serves runs over a tree, where no mask is needed: a dense one
    would cost rows² bytes and time a step. To everyone but this module it is an ordinary bool tensor: any
    operation on it builds the mask first.
    """

    build: Callable[..., torch.Tensor | None] | None
    window: int | None
    keyword: str
    _built: list[torch.Tensor | None]

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], device: Any, build: Callable | None, window: int | None, keyword: str = "tree_step"
    ) -> DeferredMask:
        """build: None: there is nothing to build; it stands beside `keyword`, and only an attention that knows that one
        may be given it."""
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        self.build, self.window, self.keyword, self._built = build, window, keyword, []
        return self

    def resolve(self) -> torch.Tensor | None:
        """The mask as `sdpa_mask` makes it: bool ``[1, 1, q, kv]``, or None where ``is_causal`` says it all."""
        if self.build is None:
            raise ValueError(
                f"attention_mask: this one serves only forwards with {self.keyword}=… of a model on "
                f'attn_implementation="anabranch", which never reads it. Either {self.keyword} was left out, or the '
                "model uses another implementation: call anabranch.hf.enable(model) (save_pretrained does not keep it)"
            )
        if not self._built:
            self._built.append(self.build())
        return self._built[0]

    def dense(self) -> torch.Tensor:
        found = self.resolve()
        assert self.build is not None
        return self.build(allow_is_causal_skip=False) if found is None else found  # type: ignore[return-value]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        from torch.utils._pytree import tree_map_only

        first = args[0] if args else None
        if func in _MOVES and isinstance(first, DeferredMask) and first.build is None:
            device = (kwargs or {}).get("device") or first.device
            return DeferredMask(tuple(first.shape), device, None, None, first.keyword)
        args, kwargs = tree_map_only(DeferredMask, DeferredMask.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DeferredMask(shape={tuple(self.shape)}, window={self.window})"


def tree_mask(step: Step) -> torch.Tensor:
    """An ``attention_mask`` for a forward over a tree: saves Transformers its own mask preparation.

    Optional. Given as ``attention_mask=tree_mask(step)`` beside ``tree_step=step`` it stops Transformers from reading
    the position ids back from the device (a synchronisation a forward, which CUDA graph capture does not allow).
    """
    return DeferredMask((1, 1, step.num_rows, step.num_rows), step.position_ids.device, None, None)


def beside_branch_mask(num_tokens: int, device: torch.device) -> torch.Tensor:
    """An ``attention_mask`` for a forward with ``branch_mask=``: raises in a model that does not know that keyword."""
    return DeferredMask((1, 1, num_tokens, num_tokens), device, None, None, "branch_mask")


def mask(
    batch_size: int, q_length: Any = None, kv_length: Any = None, *args: Any, **kwargs: Any
) -> torch.Tensor | None:
    """The mask function registered beside the attention function: `sdpa_mask`, deferred where a tree may be at work."""
    from transformers.masking_utils import sdpa_mask

    def build(**overrides: Any) -> torch.Tensor | None:
        return sdpa_mask(batch_size, q_length, kv_length, *args, **{**kwargs, **overrides})

    # A forward over a tree has one packed sequence, no cache of Transformers' own and no mask from the user. Only then
    # are the arguments free of tensors that the forward may change before the mask is looked at.
    may_be_tree = (
        batch_size == 1
        and not args
        and isinstance(q_length, int)
        and q_length == kv_length
        and kwargs.get("attention_mask") is None
        and not kwargs.get("use_vmap")
        and _is_zero(kwargs.get("q_offset", 0))
        and _is_zero(kwargs.get("kv_offset", 0))
    )
    if not may_be_tree:
        return build()
    if torch.compiler.is_compiling():
        # What nobody reads of it, the compiler leaves out. It has to be there, though, to carry its window.
        built = build(allow_is_causal_skip=False)
        built.anabranch_window = kwargs.get("local_size")  # type: ignore[union-attr]
        return built
    return DeferredMask((1, 1, q_length, kv_length), kwargs.get("device", "cpu"), build, kwargs.get("local_size"))


def made_here(attention_mask: Any) -> bool:
    """Whether a mask that traced code meets is one that `mask` made, and not one of the caller's."""
    return hasattr(attention_mask, "anabranch_window")


def local_of(attention_mask: Any) -> int | None:
    """Tokens to which a mask of `mask`'s is local; None: all."""
    return attention_mask.window if isinstance(attention_mask, DeferredMask) else attention_mask.anabranch_window


def _is_zero(offset: Any) -> bool:
    return isinstance(offset, int) and offset == 0

"""vLLM's KV cache of a layer as pages of K and pages of V: views, nothing is copied."""

from __future__ import annotations

from torch import Tensor


def pages_of(kv_cache: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """K's and V's pages, [num_blocks, block_size, num_kv_heads, head_size] each, in the memory of `kv_cache`.

    Where what lies is decided as vLLM's own backends do for the device. On a CPU a block holds, for each head, K of all
    its tokens and then V of all; elsewhere every token has K and V side by side.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 · head_size]; elsewhere than on a CPU of any layout.

    Raises:
        ValueError: another shape, or a layout in which the numbers of a head do not lie together.
    """
    if kv_cache.dim() != 4 or kv_cache.shape[3] != 2 * head_size:
        raise ValueError(
            f"kv_cache: expected [num_blocks, num_kv_heads, block_size, {2 * head_size}] (K and V of {head_size} "
            f"numbers), got {list(kv_cache.shape)}"
        )
    blocks, heads, tokens, _ = kv_cache.shape
    of_block, of_head, of_token, of_number = kv_cache.stride()
    by_head = kv_cache.device.type == "cpu"
    if of_number != 1 or (by_head and tokens > 1 and of_token != 2 * head_size):
        raise ValueError(f"kv_cache: strides {list(kv_cache.stride())} are of a layout that the kernels cannot read")
    between = head_size if by_head else of_token  # one token and the next
    to_values = tokens * head_size if by_head else head_size
    shape, strides = (blocks, tokens, heads, head_size), (of_block, between, of_head, 1)
    begin = kv_cache.storage_offset()
    return kv_cache.as_strided(shape, strides, begin), kv_cache.as_strided(shape, strides, begin + to_values)

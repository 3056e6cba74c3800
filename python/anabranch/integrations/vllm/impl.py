"""A layer's attention: K and V written into its pages, then read by the step's plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl

from anabranch import backends
from anabranch.attention import paged_tree_attention
from anabranch.integrations.vllm import refusals
from anabranch.integrations.vllm.builder import TreeMetadata
from anabranch.integrations.vllm.pages import pages_of


class TreeAttentionImpl(AttentionImpl):
    """One layer. The arguments are vLLM's; what is not supported is a ValueError here, when the model is loaded."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **more: Any,
    ) -> None:
        device_type, dtype = current_platform.device_type, torch.get_default_dtype()
        refusals.check_layer(
            head_size=head_size,
            dtype=dtype,
            device_type=device_type,
            alibi_slopes=alibi_slopes,
            kv_cache_dtype=kv_cache_dtype,
            attn_type=attn_type,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            more=more,
        )
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads or num_heads, head_size
        self.scale = float(scale)
        self.window = sliding_window
        self.softcap = logits_soft_cap or None  # vLLM says 0 for none
        self.sinks = sinks  # loaded later: what is in it now does not count
        self.kv_cache_dtype = kv_cache_dtype
        self.kernels = refusals.KERNELS[device_type]
        self._write = backends.choose(self.kernels, torch.device(device_type), dtype, head_size).write_kv

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """key, value [tokens, num_kv_heads, head_size] into the slots (block · block_size + offset) of the pages.

        slot_mapping: int64, one a token; −1 for tokens that only fill up a batch, which are not written.
        """
        count = slot_mapping.shape[0]
        if kv_cache.numel() == 0 or count == 0:
            return
        k_pages, v_pages = pages_of(kv_cache, self.head_size)
        self._write(key[:count], value[:count], k_pages, v_pages, slot_mapping.to(torch.int32))

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TreeMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of a step's rows, written into `output`.

        Args:
            query, output: [tokens, num_heads, head_size]; there may be more tokens than the step has rows.
            key, value: not read; `do_kv_cache_update` has put them where they belong.
            attn_metadata: None while vLLM tries out how much memory a step takes.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                "--attention-backend CUSTOM (anabranch): outputs are not quantised; choose another"
            )
        if attn_metadata is None or attn_metadata.plan is None:
            return output.fill_(0)
        plan = attn_metadata.plan
        k_pages, v_pages = pages_of(kv_cache, self.head_size)
        paged_tree_attention(
            query[: plan.num_rows].contiguous(),
            k_pages,
            v_pages,
            plan,
            scale=self.scale,
            softcap=self.softcap,
            window=self.window,
            sinks=self.sinks,
            backend=self.kernels,
            out=output[: plan.num_rows],
        )
        return output

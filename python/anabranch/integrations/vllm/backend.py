"""What vLLM is told of the backend: its parts, and what it takes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout

from anabranch.integrations.vllm import refusals
from anabranch.integrations.vllm.builder import TreeMetadataBuilder
from anabranch.integrations.vllm.impl import TreeAttentionImpl


class TreeAttentionBackend(AttentionBackend):
    """Chosen with ``--attention-backend CUSTOM``."""

    supported_dtypes: ClassVar[list[torch.dtype]] = list(refusals.PLAIN.values())
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", *refusals.PLAIN]
    #: K and V are written by `TreeAttentionImpl.do_kv_cache_update`, before the forward
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        """A member of vLLM's table of backends: layers look themselves up there."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[TreeAttentionImpl]:
        return TreeAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeMetadataBuilder]:
        return TreeMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(1)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 1 <= head_size <= refusals.MAX_HEAD_SIZE

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...] | None:
        """On a CPU the one that its memory is read in (`pages_of`); elsewhere any."""
        return (KVCacheLayout.LBHNC,) if current_platform.is_cpu() else None

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Plans are made from the host's numbers."""
        return False

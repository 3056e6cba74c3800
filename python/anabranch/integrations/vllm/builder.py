"""What is computed once a step, for all layers of a kind: the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionMetadataBuilder

from anabranch.backends import threads
from anabranch.integrations.vllm import batch, refusals
from anabranch.integrations.vllm.mirror import Mirror
from anabranch.integrations.vllm.plugin import logger
from anabranch.plan import Plan

_said: set[str] = set()


@dataclass(frozen=True)
class TreeMetadata:
    """What a step's layers are given.

    plan: None where the step has no rows.
    """

    plan: Plan | None


class TreeMetadataBuilder(AttentionMetadataBuilder):
    """Makes one plan a step. Never under a captured CUDA graph, which would not see the tables change."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        refusals.check_model(vllm_config)
        width = getattr(kv_cache_spec, "head_size_v", None) or kv_cache_spec.head_size
        if width != kv_cache_spec.head_size:
            refusals.refuse(f"K and V of different sizes ({kv_cache_spec.head_size} and {width}) are not supported")
        self.block_size: int = kv_cache_spec.block_size
        self._plan: Plan | None = None  # the last one, kept: the next is made of it where only lengths have changed
        # vLLM's CPU platform has just said that it cannot use CUSTOM.
        logger.info("Attention of %d layers by anabranch, blocks of %d tokens", len(layer_names), self.block_size)
        if device.type == "cpu":
            threads.choose("openmp")  # bound to the worker's cores, and awake between layers
            self.tables: batch.Tables = batch.tables_on_host
        else:
            self.tables = Mirror.install().tables
            _say_once(
                "anabranch's attention backend is proven on CPUs. On a GPU it is untried: compare its answers with "
                "another backend's before you rely on them. Its copy of the block tables on the host is compared with "
                "the GPU's own in the first steps."
            )

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> TreeMetadata:
        """The plan of a step. Shared prefixes are found in the block tables, so `common_prefix_len` is not needed."""
        self._plan = batch.plan_of(common_attn_metadata, self.block_size, self.tables)
        return TreeMetadata(self._plan)


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        logger.warning(text)

"""As much of vLLM as its attention backends see: modules by the names that are imported, a server without a model."""

from __future__ import annotations

import enum
import random
import sys
import types
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

OURS = "anabranch.integrations.vllm"


class _Enum(enum.Enum):
    """As ``AttentionBackendEnum`` of vLLM 0.32, with two of its members."""

    CPU_ATTN = "vllm.own.CPUAttentionBackend"
    CUSTOM = None

    def get_path(self, include_classname: bool = True) -> str:
        path = OVERRIDES.get(self, self.value)
        if not path:
            raise ValueError(f"Backend {self.name} must be registered before use")
        return path if include_classname else path.rsplit(".", 1)[0]

    def is_overridden(self) -> bool:
        return self in OVERRIDES


OVERRIDES: dict[_Enum, str] = {}


class Stub:
    """The modules, put in place by `install`; ``config`` is what vLLM says is being loaded."""

    def __init__(self, version: str = "0.32.0") -> None:
        OVERRIDES.clear()
        for member in _Enum:
            member.__dict__.pop("get_path", None)
        self.enum, self.config = _Enum, None
        self.platform = SimpleNamespace(device_type="cpu", is_cpu=lambda: self.platform.device_type == "cpu")
        layout = enum.Enum("KVCacheLayout", ["LBHNC", "LBNHC"])
        builder = type("AttentionMetadataBuilder", (), {"__init__": lambda self, *given: None})
        parts = {name: type(name, (), {}) for name in ("AttentionBackend", "AttentionImpl")}
        self.modules = {
            "vllm": {"__version__": version},
            "vllm.config": {"get_current_vllm_config_or_none": lambda: self.config},
            "vllm.platforms": {"current_platform": self.platform},
            "vllm.v1.kv_cache_interface": {"KVCacheLayout": layout},
            "vllm.v1.attention.backend": {"AttentionMetadataBuilder": builder, "MultipleOf": tuple, **parts},
            "vllm.v1.attention.backends.registry": {
                "AttentionBackendEnum": _Enum,
                "register_backend": lambda member, path: OVERRIDES.__setitem__(member, path),
            },
            "vllm.v1.worker.gpu.block_table": {"BlockTables": type("BlockTables", (BlockTables,), {})},
        }

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Stub:
        for name in [m for m in sys.modules if m.startswith(f"{OURS}.")]:  # to be imported anew, beside this stub
            del sys.modules[name]
            vars(sys.modules[OURS]).pop(name.removeprefix(f"{OURS}."), None)
        for name in [m for m in sys.modules if m.startswith("vllm.") or m == "vllm"]:
            monkeypatch.delitem(sys.modules, name)
        names = {".".join(full.split(".")[: i + 1]) for full in self.modules for i in range(full.count(".") + 1)}
        for name in sorted(names):
            module = types.ModuleType(name)
            module.__path__ = []  # type: ignore[attr-defined]
            module.__dict__.update(self.modules.get(name, {}))
            monkeypatch.setitem(sys.modules, name, module)
        return self


class BlockTables:
    """As vLLM's of its newer runner, with everything on the host."""

    redirect_writes_to_null_block = False

    def __init__(self, requests: int, columns: list[int]) -> None:
        self.num_blocks = SimpleNamespace(np=np.zeros((len(columns), requests), dtype=np.int32))
        self.kept = [torch.zeros(requests, n, dtype=torch.int32) for n in columns]
        self.input_block_tables = [torch.full_like(x, 99) for x in self.kept]  # rows hold what was there before

    def append_block_ids(self, req_index: int, new_block_ids: Any, overwrite: bool) -> None:
        for i, ids in enumerate(new_block_ids):
            begin = 0 if overwrite else int(self.num_blocks.np[i, req_index])
            self.kept[i][req_index, begin : begin + len(ids)] = torch.tensor(ids, dtype=torch.int32)
            self.num_blocks.np[i, req_index] = begin + len(ids)

    def gather(self, order: list[int]) -> list[torch.Tensor]:
        for i, rows in enumerate(self.input_block_tables):
            for row, request in enumerate(order):
                count = self.num_blocks.np[i, request]
                rows[row, :count] = self.kept[i][request, :count]
        return [rows[: len(order)] for rows in self.input_block_tables]


def vllm_config(**changes: Any) -> SimpleNamespace:
    """A ``VllmConfig`` as far as it is looked at; changes by name, dots for depth."""
    config = SimpleNamespace(
        speculative_config=None,
        kv_transfer_config=None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        model_config=SimpleNamespace(is_mm_prefix_lm=False, rswa_window=None),
        attention_config=SimpleNamespace(backend=None, backend_per_kind={}, use_non_causal=False),
    )
    for name, value in changes.items():
        *path, last = name.split("__")
        at = config
        for part in path:
            at = getattr(at, part)
        setattr(at, last, value)
    return config


def common(tables: torch.Tensor, lengths: list[int], rows: list[int], slots: torch.Tensor | None = None, **more: Any):
    """A ``CommonAttentionMetadata`` as far as it is looked at."""
    starts = torch.tensor([0, *rows], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return SimpleNamespace(
        query_start_loc_cpu=starts, seq_lens=torch.tensor(lengths, dtype=torch.int32), seq_lens_cpu_upper_bound=None,
        num_reqs=len(lengths), num_actual_tokens=int(starts[-1]), block_table_tensor=tables.to(torch.int32),
        slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64) if slots is None else slots, causal=True,
        req_idx=None, **more,
    )  # fmt: skip


class Server:
    """Requests over a layer's pages, scheduled as vLLM does: prompts in chunks, whole blocks of equal prefixes shared.

    What attention is to give is known from K and V kept by token, apart from any page.
    """

    NULL = 0  # the block that vLLM puts in the place of those outside a window

    def __init__(
        self, block_size: int, heads: int = 4, kv_heads: int = 2, dim: int = 32, dtype: torch.dtype = torch.float32,
        blocks: int = 64, columns: int = 40, window: int | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.block_size, self.heads, self.kv_heads, self.dim, self.dtype = block_size, heads, kv_heads, dim, dtype
        self.window, self.columns = window, columns
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.cache = torch.full((blocks, kv_heads, block_size, 2 * dim), float("nan"), dtype=dtype)
        self.free = list(range(1, blocks))
        self.by_prefix: dict[tuple[int, ...], int] = {}
        self.requests: list[SimpleNamespace] = []
        self.kv_of: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}  # by the tokens up to its own

    def add(self, prompt: list[int]) -> None:
        self.requests.append(SimpleNamespace(tokens=list(prompt), done=0, blocks=[]))

    def schedule(self, budget: int) -> list[int]:
        """Rows of each request: decoding ones first, the rest in chunks, each with its blocks. What one fills in this
        step, another may find in the same."""
        rows, n = [0] * len(self.requests), self.block_size
        for i, request in sorted(enumerate(self.requests), key=lambda x: len(x[1].tokens) - x[1].done):
            if not request.done and budget:
                while (len(request.blocks) + 1) * n < len(request.tokens):  # the last token is always computed
                    block = self.by_prefix.get(tuple(request.tokens[: (len(request.blocks) + 1) * n]))
                    if block is None:
                        break
                    request.blocks.append(block)
                request.done = len(request.blocks) * n
            rows[i] = min(len(request.tokens) - request.done, budget)
            budget -= rows[i]
            end = request.done + rows[i]
            while len(request.blocks) * n < end:
                request.blocks.append(self.free.pop(0))
            for whole in range(n, end + 1, n):
                self.by_prefix.setdefault(tuple(request.tokens[:whole]), request.blocks[whole // n - 1])
        return rows

    def step(self, budget: int = 10**6, padding: int = 0) -> tuple[SimpleNamespace, torch.Tensor, torch.Tensor, Any]:
        """(metadata, K, V of the new rows, expected(q, scale, softcap, sinks)); then everybody has a token more."""
        rows = self.schedule(budget)
        tables = torch.full((len(rows), self.columns), 7777, dtype=torch.int32)
        slots, k, v, contexts = [], [], [], []
        for i, (request, count) in enumerate(zip(self.requests, rows, strict=True)):
            end = request.done + count
            seen = request.blocks
            if self.window is not None:
                hidden = max(0, request.done + 1 - self.window) // self.block_size
                seen = [self.NULL] * hidden + request.blocks[hidden:]
            tables[i, : len(seen)] = torch.tensor(seen)
            for at in range(request.done, end):
                keys, values = self._kv(tuple(request.tokens[: at + 1]))
                k.append(keys)
                v.append(values)
                slots.append(request.blocks[at // self.block_size] * self.block_size + at % self.block_size)
                contexts.append(tuple(request.tokens[: at + 1]))
            request.done = end
        for request in self.requests:
            if request.done == len(request.tokens):
                request.tokens.append(self.random.randrange(1000))
        lengths = [request.done for request in self.requests]
        mapping = torch.tensor(slots + [-1] * padding)
        empty = torch.full((padding, self.kv_heads, self.dim), float("nan"), dtype=self.dtype)
        meta = common(tables, lengths, rows, mapping)
        return meta, torch.cat([torch.stack(k), empty]), torch.cat([torch.stack(v), empty]), self._expected(contexts)

    def _kv(self, tokens: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        if tokens not in self.kv_of:
            shape = (self.kv_heads, self.dim)
            self.kv_of[tokens] = tuple(torch.randn(shape, generator=self.generator).to(self.dtype) for _ in "kv")  # type: ignore[assignment]
        return self.kv_of[tokens]

    def _expected(self, contexts: list[tuple[int, ...]]) -> Any:
        def dense(
            q: torch.Tensor, scale: float, softcap: float | None = None, sinks: torch.Tensor | None = None
        ) -> torch.Tensor:
            out = []
            for row, tokens in zip(q.double(), contexts, strict=False):
                first = 0 if self.window is None else max(0, len(tokens) - self.window)
                kv = [self._kv(tokens[: i + 1]) for i in range(first, len(tokens))]
                k, v = (
                    torch.stack(x).double().repeat_interleave(self.heads // self.kv_heads, 1)
                    for x in zip(*kv, strict=True)
                )
                s = torch.einsum("hd,thd->ht", row, k) * scale
                s = s if softcap is None else softcap * torch.tanh(s / softcap)
                s = s if sinks is None else torch.cat([s, sinks.double()[:, None]], 1)
                out.append(torch.einsum("ht,thd->hd", torch.softmax(s, 1)[:, : len(kv)], v))
            return torch.stack(out)

        return dense


__all__ = ["OVERRIDES", "BlockTables", "Server", "Stub", "common", "vllm_config"]

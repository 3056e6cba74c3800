"""``tree_attention`` and ``paged_tree_attention``: argument checks, then the torch op."""

from __future__ import annotations

import functools
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from anabranch import ops
from anabranch._check import index_of, layer_of, number, shape_of, told
from anabranch.backends.formats import QUANTISED_DTYPES, KVScales
from anabranch.plan.plan import Plan

if TYPE_CHECKING:
    from anabranch.kv.cache import TreeCache
    from anabranch.kv.step import Step


def tree_attention(
    q: Tensor,
    cache: TreeCache,
    layer: int,
    step: Step,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a step's rows over their own branches' contexts.

    Row i of branch b sees every token of b up to and including its own, in context order. Four branches forked from a
    three-token trunk, one new row each (rows 0–3), columns = trunk tokens and the four new ones::

        1 1 1   1 0 0 0
        1 1 1   0 1 0 0
        1 1 1   0 0 1 0
        1 1 1   0 0 0 1

    The trunk's KV is read once for all four. Decode, prefill and mixed steps are alike; it works under
    ``torch.compile(fullgraph=True)`` and has no backward.

    Args:
        q: [rows, num_q_heads, head_dim], contiguous, in the cache's dtype and on its device; rows in the step's order.
            Query head h reads KV head h // (num_q_heads // num_kv_heads). Over a latent cache (``v_in_k``) they are
            absorbed queries: see docs/guides/attention_shapes.md.
        cache: the cache whose ``write`` put this step's K and V in.
        layer: 0 … num_layers − 1.
        step: what ``cache.step`` returned.
        scale: factor on q·k; default head_dim ** -0.5. Over a latent cache it has to be given: it is the model's, not
            one that follows from the latent's size.
        softcap: scores become softcap · tanh(score / softcap), before the mask (Gemma 2).
        window: a key is visible when q_position − k_position < window (logical positions, as in Transformers).
        sinks: [num_q_heads], an extra logit a head that takes part in the softmax only (gpt-oss).
        backend: "auto", "cpu", "triton", "cuda" or "reference".
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        out [rows, num_q_heads, v_head_dim] in q's dtype; with ``return_lse`` also lse [rows, num_q_heads], float32,
        natural logarithm, sinks included.

    Raises:
        ValueError: a shape, dtype, device, layer or option that does not fit; nothing was computed.
        DeadBranch, ValueError: the step is stale because one of its branches moved on.

    >>> cache = ab.TreeCache(num_layers=1, num_kv_heads=2, head_dim=64, num_pages=16)
    >>> trunk = cache.branch()
    >>> step = cache.step({trunk: 3})
    >>> cache.write(0, torch.randn(3, 2, 64), torch.randn(3, 2, 64), step)
    >>> out, lse = ab.tree_attention(torch.randn(3, 8, 64), cache, 0, step, return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([3, 8, 64]), torch.Size([3, 8]))
    """
    made_by = getattr(step, "cache", None)
    if made_by is None:
        raise TypeError(f"step: expected the Step that TreeCache.step() returned, got {told(step)}")
    if made_by is not cache:
        raise ValueError(f"step: made by another cache, {made_by!r}, not by {told(cache)}; pass the one that made it")
    layer = layer_of(layer, cache.num_layers)
    if scale is None and cache.v_in_k:
        raise ValueError(
            "scale: has to be given over a cache with v_in_k=True: the model's own factor, that of its keys before "
            "they were absorbed ((qk_nope_head_dim + qk_rope_head_dim) ** -0.5, times what its rotary embeddings say)"
        )
    return _attend(
        q, cache.k_pages(layer), cache.v_pages(layer), step.plan, step.num_rows, layer, scale, softcap, window, sinks,
        backend, return_lse, cache.dtype, cache.kv_scales(layer),
    )  # fmt: skip


def paged_tree_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: Plan,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same attention over a page pool of the user's own.

    Args:
        q: [rows, num_q_heads, head_dim], contiguous; the rows of sequence 0, then of sequence 1, …
            (``query_lengths`` of the plan; one each by default).
        k_pages: [num_pages, page_size, num_kv_heads, head_dim], q's dtype and device; the last dimension must have
            stride 1, the others are free. With ``k_scales`` and ``v_scales`` they are int8 or float8_e4m3fn.
        v_pages: [num_pages, page_size, num_kv_heads, v_head_dim], likewise; v_head_dim may be another than head_dim,
            and they may be a view of k_pages: ``k_pages[..., :512]`` is V in a pool of latents (MLA).
        plan: ``Plan.from_block_tables(...)``; one plan serves all layers.
        scale, softcap, window, sinks, backend, return_lse: as for ``tree_attention``; positions count from 0 in each
            sequence.
        k_scales, v_scales: float32 [num_pages, page_size, num_kv_heads], any strides (0 for one factor a head, or one
            for all): what the numbers in quantised pages are to be multiplied by.
        out: where the result goes: [rows, num_q_heads, v_head_dim] in q's dtype, on its device, contiguous, sharing no
            memory with q or the pages. It is written in place, on every backend but the reference without a copy. Not
            differentiable.

    Returns:
        as ``tree_attention``; with ``out``, that very tensor. A sequence of length 0 has no rows unless
        ``query_lengths`` is left out: then its row is 0 and its lse −inf.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit; ``out`` is untouched.

    >>> tables = torch.tensor([[0, 1], [0, 2]])                      # two sequences that share their first page
    >>> plan = ab.Plan.from_block_tables(tables, lengths=[20, 17], page_size=16)
    >>> k_pages, v_pages = torch.randn(2, 3, 16, 2, 64)
    >>> q = torch.randn(2, 8, 64)
    >>> ab.paged_tree_attention(q, k_pages, v_pages, plan).shape
    torch.Size([2, 8, 64])
    >>> buffer = torch.empty_like(q)
    >>> ab.paged_tree_attention(q, k_pages, v_pages, plan, out=buffer) is buffer
    True
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan (Plan.from_block_tables), got {type(plan).__name__}")
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if not isinstance(pages, Tensor) or pages.dim() != 4:
            raise ValueError(
                f"{name}: expected a tensor [num_pages, page_size, num_kv_heads, head_dim], got {shape_of(pages)}"
            )
        if pages.stride(3) != 1:
            raise ValueError(
                f"{name}: the last dimension must have stride 1, got {pages.stride(3)}; call .contiguous()"
            )
    if k_pages.shape[:3] != v_pages.shape[:3] or v_pages.shape[3] == 0:
        expected = str(list(k_pages.shape[:3]))[:-1] + ", v_head_dim]"
        raise ValueError(f"v_pages: expected shape {expected} like k_pages, got {list(v_pages.shape)}")
    if v_pages.dtype != k_pages.dtype or v_pages.device != k_pages.device:
        raise ValueError(
            f"v_pages: expected {k_pages.dtype} on {k_pages.device} like k_pages, "
            f"got {v_pages.dtype} on {v_pages.device}"
        )
    kv_scales = _check_scales(k_scales, v_scales, k_pages)
    # float8 beside scales is no type for q; the caller's own then decides, and a backend refuses what it lacks.
    dtype = k_pages.dtype if kv_scales is None else getattr(q, "dtype", torch.float32)
    return _attend(
        q,
        k_pages,
        v_pages,
        plan,
        plan.num_rows,
        0,
        scale,
        softcap,
        window,
        sinks,
        backend,
        return_lse,
        dtype,
        kv_scales,
        out,
    )


def _check_scales(k_scales: Any, v_scales: Any, k_pages: Tensor) -> KVScales | None:
    """The factors of quantised pages; ValueError where pages and factors do not go together."""
    quantised = k_pages.dtype in QUANTISED_DTYPES
    for name, x in (("k_scales", k_scales), ("v_scales", v_scales)):
        if not quantised:
            if x is not None:
                raise ValueError(
                    f"{name}: only pages of {' or '.join(map(str, QUANTISED_DTYPES))} have factors, k_pages are "
                    f"{k_pages.dtype}; leave it out"
                )
            continue
        expected = list(k_pages.shape[:3])
        if not isinstance(x, Tensor) or list(x.shape) != expected or x.dtype != torch.float32:
            raise ValueError(
                f"{name}: k_pages are {k_pages.dtype}, so expected their factors, float32 {expected} (num_pages, "
                f"page_size, num_kv_heads), got {shape_of(x)}" + (f" {x.dtype}" if isinstance(x, Tensor) else "")
            )
        if x.device != k_pages.device:
            raise ValueError(f"{name}: expected device {k_pages.device} like the pages, got {x.device}; move it there")
    return KVScales(k_scales, v_scales) if quantised else None


def options_of(head_dim: int, scale: Any, softcap: Any, window: Any) -> tuple[float, float, int]:
    """``(scale, softcap, window)`` as the ops take them; ValueError names the one that is none of its kind."""
    factor = float(head_dim**-0.5) if scale is None else number(scale, "scale", hint=", or None for head_dim ** -0.5")
    cap = ops.NO_SOFTCAP if softcap is None else number(softcap, "softcap", positive=True, hint=", or None for none")
    if window is None:
        return factor, cap, ops.NO_WINDOW
    width = index_of(window)
    if width is None or width < 1:
        raise ValueError(
            f"window: must be at least 1 (the row's own token), a whole number, or None for none, got {told(window)}"
        )
    return factor, cap, min(width, 2**31 - 1)  # positions are below 2^31: a wider one hides nothing


def check_sinks(sinks: Any, q: Tensor) -> None:
    """Raise ValueError unless there is one floating-point sink a query head, or None."""
    if sinks is None:
        return
    if not isinstance(sinks, Tensor) or sinks.dim() != 1 or sinks.shape[0] != q.shape[1]:
        raise ValueError(f"sinks: expected shape [{q.shape[1]}] (one a query head), got {shape_of(sinks)}")
    if sinks.device != q.device:
        raise ValueError(f"sinks: expected device {q.device} like q, got {sinks.device}; move it there")
    if not sinks.is_floating_point():
        raise ValueError(f"sinks: expected floating-point numbers, got {sinks.dtype}")


def check_backend(backend: Any) -> None:
    if not isinstance(backend, str):
        raise ValueError(f"backend: expected a name such as 'auto', 'cpu' or 'triton', got {told(backend)}")


def _check_q(q: Any, k_pages: Tensor, num_rows: int, dtype: torch.dtype) -> None:
    """Raise ValueError unless q fits the rows and the pages."""
    num_kv_heads, head_dim = k_pages.shape[2], k_pages.shape[3]
    if not isinstance(q, Tensor) or q.dim() != 3:
        raise ValueError(f"q: expected a tensor [rows, num_q_heads, head_dim], got {shape_of(q)}")
    if q.shape[0] != num_rows or q.shape[2] != head_dim:
        raise ValueError(
            f"q: expected shape [{num_rows}, num_q_heads, {head_dim}] (the step's rows, the cache's head_dim), "
            f"got {list(q.shape)}"
        )
    if q.shape[1] == 0 or q.shape[1] % num_kv_heads != 0:
        raise ValueError(f"q: {q.shape[1]} query heads are not a multiple of the {num_kv_heads} KV heads")
    if q.dtype != dtype:
        like = "pages" if dtype == k_pages.dtype else "cache"
        raise ValueError(f"q: expected dtype {dtype} like the {like}, got {q.dtype}; call q.to({dtype})")
    if q.device != k_pages.device:
        raise ValueError(f"q: expected device {k_pages.device} like the pages, got {q.device}; move it there")
    if not q.is_contiguous():
        raise ValueError(f"q: must be contiguous, got strides {list(q.stride())}; call q.contiguous()")


def _check_out(out: Any, q: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    """Raise ValueError unless the result can be written into `out`, q being as it should."""
    shape = [*q.shape[:2], v_pages.shape[3]]
    if not isinstance(out, Tensor) or list(out.shape) != shape:
        raise ValueError(
            f"out: expected a tensor of shape {shape} ([rows, num_q_heads, v_head_dim]), got {shape_of(out)}"
        )
    if out.dtype != q.dtype or out.device != q.device:
        raise ValueError(f"out: expected {q.dtype} on {q.device} like q, got {out.dtype} on {out.device}")
    if not out.is_contiguous():
        raise ValueError(f"out: must be contiguous, got strides {list(out.stride())}; pass q.new_empty({shape})")
    if torch.is_grad_enabled() and (out.requires_grad or q.requires_grad):
        raise ValueError("out: writing in place has no gradients; call under torch.no_grad(), or leave it out")
    if is_compiling():
        return  # tensors without addresses
    begin, end = _extent(out)
    for name, other in (("q", q), ("k_pages", k_pages), ("v_pages", v_pages)):
        first, last = _extent(other)
        if begin < last and first < end:
            raise ValueError(f"out: shares memory with {name}, which is read while it is written; pass another tensor")


def _extent(x: Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte and of the byte behind its last; (0, 0) of an empty one."""
    if x.numel() == 0:
        return 0, 0
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


@functools.lru_cache(1024, typed=True)
def _known_options(head_dim: int, scale: Any, softcap: Any, window: Any) -> tuple[float, float, int]:
    return options_of(head_dim, scale, softcap, window)


_PLAIN = (float, int, NoneType)  # numbers that a cache may take for keys


def _attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: Plan,
    num_rows: int,
    layer: int,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
    backend: str,
    return_lse: bool,
    dtype: torch.dtype,
    kv_scales: KVScales | None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    _check_q(q, k_pages, num_rows, dtype)
    if out is not None:
        _check_out(out, q, k_pages, v_pages)
    plain = type(scale) in _PLAIN and type(softcap) in _PLAIN and type(window) in _PLAIN and not is_compiling()
    numbers = (_known_options if plain else options_of)(q.shape[2], scale, softcap, window)
    if sinks is not None:
        check_sinks(sinks, q)
        sinks = sinks.detach().to(torch.float32).contiguous()
    check_backend(backend)
    found, lse = ops.attend(
        q, k_pages, v_pages, plan, sinks, *numbers, layer, backend, bool(return_lse), kv_scales, out
    )
    if not return_lse:
        return found
    assert lse is not None
    return found, lse

"""A few small launches of every CUDA kernel, for compute-sanitizer to watch. Exit code 0: the results are right; 77:
there is nothing to watch here, and why."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kits"))
sys.path.append(str(Path(__file__).resolve().parents[2] / "python"))

from triton_cases import check, random_case, relative_error

import anabranch as ab
from anabranch import backends
from anabranch.backends import cuda

SKIPPED = 77


def kernels() -> None:
    """Attention with every option, the merge, page copies and KV writes, in each dtype."""
    for dtype, head_dim in ((torch.bfloat16, 128), (torch.float16, 256), (torch.float32, 64)):
        case = random_case(3, rows=9, segments=3, max_len=300, head_dim=head_dim, group=4, dtype=dtype, device="cuda")
        options = dict(scale=0.2, softcap=3.0, window=100, sinks=torch.ones(8, device="cuda"))
        got = cuda.run(case.q, case.k_pages, case.v_pages, case.arrays, **options)
        check(case, got, **options)
        pool = torch.zeros(4, 8, 2, 16, head_dim, device="cuda", dtype=dtype)
        cuda.copy_pages(pool, *(torch.tensor([n], dtype=torch.int32) for n in (1, 2, 7)))
        k = torch.ones(3, 2, head_dim, device="cuda", dtype=dtype)
        slots = torch.tensor([5, -1, 100], dtype=torch.int32, device="cuda")
        cuda.write_kv(k, k, pool[0].transpose(1, 2), pool[1].transpose(1, 2), slots)


def steps() -> None:
    """A fork and three decode steps through a cache: copy-on-write, and a plan that is advanced on the device."""
    cache = ab.TreeCache(1, 2, 64, num_pages=32, page_size=8, dtype=torch.bfloat16, device="cuda")
    cache._backend = cuda
    gen = torch.Generator("cuda").manual_seed(0)
    trunk = cache.branch()
    kids: list[ab.Branch] = []
    for _ in range(4):
        step = cache.step({kid: 1 for kid in kids} or {trunk: 21})
        q, k, v = (torch.randn(step.num_rows, n, 64, generator=gen, device="cuda").bfloat16() for n in (4, 2, 2))
        cache.write(0, k, v, step, backend="cuda")
        out = ab.tree_attention(q, cache, 0, step, backend="cuda")
        assert relative_error(out, ab.tree_attention(q, cache, 0, step, backend="reference").cpu()) <= 1e-2
        kids = kids or cache.fork(trunk, 3)


def main() -> int:
    reason = backends.unavailable("cuda")
    if reason is not None:
        print(f"nothing to watch: {reason}")
        return SKIPPED
    kernels()
    steps()
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())

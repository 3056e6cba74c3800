"""A few small launches of every CUDA kernel, for compute-sanitizer to watch. Exit code 0 when the results are right."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "python")]

from anabranch import backends  # noqa: E402
from anabranch.backends import cuda  # noqa: E402
from triton_cases import check, random_case  # noqa: E402


def main() -> int:
    reason = backends.unavailable("cuda")
    if reason is not None:
        print(f"nothing to watch: {reason}")
        return 0
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
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())

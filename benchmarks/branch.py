"""Training attention under a branch mask, forward and backward, ours beside dense masked SDPA, separate sequences and
FlexAttention.

Every contender's output and gradients are checked against float64 before it is timed. Layouts are built outside the
timed region; masks are too, and what making them takes is given beside the time (`mask_us`) and within the total.
Memory is the growth of the peak resident set over one forward and backward, each in a process of its own, for trees of
growing T.
"""

from __future__ import annotations

import gc
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

import anabranch as ab
from anabranch.attention.mask import BranchMask

from .environment import available_bytes
from .shapes import parse_heads
from .timing import Timing, flush_caches, now, once

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class BranchCase:
    """Segments and what each sees: `parents` for a tree, `context` for a fork/join graph."""

    name: str
    lengths: tuple[int, ...]
    parents: tuple[int, ...] | None = None
    context: tuple[tuple[int, ...], ...] | None = None
    note: str = ""

    def mask(self) -> BranchMask:
        if self.parents is not None:
            return BranchMask.from_tree(self.lengths, self.parents)
        assert self.context is not None
        return BranchMask.from_context(self.lengths, self.context)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def pairs(self) -> int:
        """(row, column) pairs that are visible."""
        mask = self.mask()
        per_interval = (mask.cols[:, 1] - mask.cols[:, 0]).long()
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), per_interval.cumsum(0)])[mask.row_ptr.long()]
        sizes = mask.lengths
        return int((sizes * (ends[1:] - ends[:-1]) + sizes * (sizes + 1) // 2).sum())


def group(prompt: int, answers: int, length: int, note: str = "") -> BranchCase:
    """One prompt and its answers: what GRPO trains on."""
    name = f"{prompt:,} + {answers} × {length:,}"
    return BranchCase(name, (prompt, *[length] * answers), (-1, *[0] * answers), note=note)


def fork_join(prompt: int, threads: int, length: int, rounds: int) -> BranchCase:
    """A prompt, then rounds of threads that see the trunk and not each other, each joined by a trunk segment."""
    lengths, context, trunk = [prompt], [()], [0]
    for _ in range(rounds):
        first = len(lengths)
        lengths += [length] * threads
        context += [tuple(trunk)] * threads
        trunk += list(range(first, first + threads))
        lengths.append(length // 2)
        context.append(tuple(trunk))
        trunk.append(first + threads)
    return BranchCase(
        f"fork and join {rounds} × {threads} × {length}", tuple(lengths), context=tuple(context), note="a graph"
    )


CASES = (
    group(2048, 8, 512, "the case of the headline"),
    group(512, 16, 256),
    BranchCase(
        "1, 2, 4, 8 / 1,024, 512, 256, 256",
        (1024, 512, 256, 256, 256, 256, 256, 256, 512, 256, 256, 256, 256, 256, 256),
        (-1, 0, 1, 2, 2, 1, 5, 5, 0, 8, 9, 9, 8, 12, 12),
    ),
    fork_join(1024, 4, 256, 3),
)
MEMORY_SCALES = (1, 2, 4)  # times (1,024 + 4 × 256)
MEMORY_CASES = tuple(group(1024 * n, 4, 256 * n) for n in MEMORY_SCALES)


class Work:
    """Random q, k, v and gradient of a case, packed [T, heads, D]."""

    def __init__(
        self, case: BranchCase, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, seed: int = 0
    ) -> None:
        self.case, self.heads, self.kv_heads, self.dim, self.dtype = case, heads, kv_heads, dim, dtype
        self.scale = dim**-0.5
        gen = torch.Generator().manual_seed(seed)
        shapes = [(case.tokens, heads, dim), (case.tokens, kv_heads, dim), (case.tokens, kv_heads, dim)]
        self.q, self.k, self.v = (torch.empty(s).normal_(generator=gen).to(dtype) for s in shapes)
        self.grad = torch.empty(shapes[0]).normal_(generator=gen).to(dtype)

    @cached_property
    def expected(self) -> list[torch.Tensor]:
        """out, dq, dk, dv in float64: dense, one KV head at a time."""
        visible = self.case.mask().dense()
        group = self.heads // self.kv_heads
        parts: list[list[torch.Tensor]] = [[], [], [], []]
        for h in range(self.heads):
            q, k, v = (
                x[:, i].double().requires_grad_() for x, i in ((self.q, h), (self.k, h // group), (self.v, h // group))
            )
            p = torch.softmax((q @ k.T * self.scale).masked_fill_(~visible, -math.inf), 1)
            out = p @ v
            out.backward(self.grad[:, h].double())
            for part, x in zip(parts, (out.detach(), q.grad, k.grad, v.grad), strict=True):
                part.append(x)
            del p, out
        out, dq, dk, dv = (torch.stack(part, 1) for part in parts)
        return [out, dq, *(x.unflatten(1, (self.kv_heads, group)).sum(2) for x in (dk, dv))]


class Unfit(RuntimeError):
    """A contender cannot run here; the message is the reason shown."""


class Way:
    """One way to compute a case. `forward` runs with gradients recorded; `backward` takes what it returned."""

    name: str
    title: str
    note = ""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.mask_us = 0.0
        self.inputs: list[torch.Tensor] = []

    def build(self) -> None:
        raise NotImplementedError

    def forward(self) -> torch.Tensor | list[torch.Tensor]:
        raise NotImplementedError

    def backward(self, out: torch.Tensor | list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError

    def results(self, out, grads) -> list[torch.Tensor]:
        """out, dq, dk, dv packed, for the check."""
        raise NotImplementedError

    def both(self) -> None:
        self.backward(self.forward())

    def flops(self) -> float:
        """Of a forward and backward: two products and five, two operations a multiply-add."""
        return 14.0 * self.pairs() * self.work.heads * self.work.dim

    def pairs(self) -> float:
        return self.work.case.pairs


class Ours(Way):
    name, title = "anabranch", "anabranch"

    def build(self) -> None:
        work = self.work
        self.mask_us = best(work.case.mask)
        self.mask = work.case.mask()
        self.inputs = [x.clone().requires_grad_() for x in (work.q, work.k, work.v)]

    def forward(self) -> torch.Tensor:
        return ab.branch_attention(*self.inputs, self.mask, scale=self.work.scale)

    def backward(self, out) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, self.inputs, self.work.grad)

    def results(self, out, grads) -> list[torch.Tensor]:
        return [out, *grads]


class HeadMajor(Way):
    """[1, heads, T, D], as SDPA and FlexAttention want it."""

    def build(self) -> None:
        work = self.work
        self.inputs = [x.transpose(0, 1).contiguous()[None].requires_grad_() for x in (work.q, work.k, work.v)]
        self.grad = work.grad.transpose(0, 1).contiguous()[None]

    def backward(self, out) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, self.inputs, self.grad)

    def results(self, out, grads) -> list[torch.Tensor]:
        return [x[0].transpose(0, 1) for x in (out, *grads)]


class Masked(HeadMajor):
    """One SDPA call under a dense boolean mask."""

    name, title = "masked", "dense masked SDPA"

    def build(self) -> None:
        super().build()
        sees = self.work.case.mask()
        self.mask_us = best(sees.dense)
        self.mask = sees.dense()

    def pairs(self) -> float:
        return float(self.work.case.tokens) ** 2

    def forward(self) -> torch.Tensor:
        group = self.work.heads > self.work.kv_heads
        return F.scaled_dot_product_attention(
            *self.inputs, attn_mask=self.mask, scale=self.work.scale, enable_gqa=group
        )


class Separate(Way):
    """Each root-to-leaf path as a causal sequence of its own, one after another; shared tokens repeat in each.

    A shared token's output gets its gradient in the first sequence that has it, and none in the others, so that the
    sum over all sequences is the gradient of the packed row.
    """

    name, title = "separate", "separate sequences"

    def build(self) -> None:
        case, work = self.work.case, self.work
        if case.parents is None:
            raise Unfit("a join sees several branches: no sequence is that graph")
        starts = [0]
        for n in case.lengths:
            starts.append(starts[-1] + n)
        leaves = [i for i in range(len(case.lengths)) if i not in case.parents]
        self.index, done = [], torch.zeros(case.tokens, dtype=torch.bool)
        self.sets, self.grads, self.first = [], [], []
        for leaf in leaves:
            path, node = [], leaf
            while node >= 0:
                path.append(torch.arange(starts[node], starts[node + 1]))
                node = case.parents[node]
            index = torch.cat(path[::-1])
            self.index.append(index)
            self.first.append(~done[index])
            grad = torch.where(done[index][:, None, None], 0, work.grad[index])
            done[index] = True
            self.sets.append(
                [x[index].transpose(0, 1).contiguous()[None].requires_grad_() for x in (work.q, work.k, work.v)]
            )
            self.grads.append(grad.transpose(0, 1).contiguous()[None])
        self.inputs = [x for s in self.sets for x in s]

    def pairs(self) -> float:
        return float(sum(len(i) * (len(i) + 1) // 2 for i in self.index))

    def forward(self) -> list[torch.Tensor]:
        group = self.work.heads > self.work.kv_heads
        return [
            F.scaled_dot_product_attention(*s, is_causal=True, scale=self.work.scale, enable_gqa=group)
            for s in self.sets
        ]

    def backward(self, out) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, self.inputs, self.grads)

    def both(self) -> None:
        for s, grad in zip(self.sets, self.grads, strict=True):  # one after another: no sequence waits for its backward
            group = self.work.heads > self.work.kv_heads
            out = F.scaled_dot_product_attention(*s, is_causal=True, scale=self.work.scale, enable_gqa=group)
            torch.autograd.grad(out, s, grad)

    def results(self, out, grads) -> list[torch.Tensor]:
        work = self.work
        sums = [torch.zeros(x.shape, dtype=torch.float64) for x in (work.q, work.q, work.k, work.v)]
        for i, index in enumerate(self.index):
            first = self.first[i]
            sums[0][index[first]] = out[i][0].transpose(0, 1)[first].double()
            for total, x in zip(sums[1:], grads[3 * i : 3 * i + 3], strict=True):
                total.index_add_(0, index, x[0].transpose(0, 1).double())
        return sums


class Flex(HeadMajor):
    """FlexAttention, compiled where that has a backward; the block mask is made once and its time shown apart."""

    name, title = "flex", "FlexAttention"

    def prepare(self) -> Callable[..., torch.Tensor]:
        """Inputs and block mask; the compiled operator."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        super().build()
        work = self.work
        sees = work.case.mask()
        total = work.case.tokens
        if work.case.parents is not None:
            ends = subtree_ends(work.case)

            def mask_mod(b, h, q, kv):
                return (kv <= q) & (q < ends[kv])
        else:
            segment = sees.segment_ids
            table = torch.eye(sees.num_segments, dtype=torch.bool)
            assert work.case.context is not None
            for s, context in enumerate(work.case.context):
                table[s, list(context)] = True

            def mask_mod(b, h, q, kv):
                return (kv <= q) & table[segment[q], segment[kv]]

        def make():
            return create_block_mask(mask_mod, None, None, total, total, device="cpu")

        self.mask = make()
        self.mask_us = best(make)
        self.options = dict(block_mask=self.mask, scale=work.scale, enable_gqa=work.heads > work.kv_heads)
        torch._dynamo.reset()
        return torch.compile(flex_attention, dynamic=False)

    def build(self) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = self.prepare()
        try:
            self.attend = lambda q, k, v: compiled(q, k, v, **self.options)
            self.backward(self.forward())
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
            self.note = f"compiled forward and backward do not run here ({reason}); uncompiled, as PyTorch offers it"
            self.attend = lambda q, k, v: flex_attention(q, k, v, **self.options)
            self.backward(self.forward())

    def pairs(self) -> float:
        return float(self.work.case.tokens) ** 2 if self.note else self.work.case.pairs

    def forward(self) -> torch.Tensor:
        return self.attend(*self.inputs)


class FlexForward(Flex):
    """The forward alone, compiled, for where the backward is not to be had (CPUs)."""

    name, title = "flex_forward", "FlexAttention, forward alone"

    def build(self) -> None:
        compiled = self.prepare()
        self.inputs = [x.detach() for x in self.inputs]
        self.attend = lambda q, k, v: compiled(q, k, v, **self.options)

    def backward(self, out) -> tuple[torch.Tensor, ...]:
        return ()

    def results(self, out, grads) -> list[torch.Tensor]:
        return [out[0].transpose(0, 1)]


ALL: dict[str, type[Way]] = {w.name: w for w in (Ours, Masked, Separate, Flex, FlexForward)}


def subtree_ends(case: BranchCase) -> torch.Tensor:
    """[T] one past the last token below each token's segment: a tree in DFS preorder as one integer a column."""
    assert case.parents is not None
    starts = [0]
    for n in case.lengths:
        starts.append(starts[-1] + n)
    ends = starts[1:]
    for i in reversed(range(len(case.lengths))):
        if case.parents[i] >= 0:
            ends[case.parents[i]] = max(ends[case.parents[i]], ends[i])
    return torch.repeat_interleave(torch.tensor(ends), torch.tensor(case.lengths))


def best(call: Callable[[], object], tries: int = 3) -> float:
    """Microseconds of the fastest of a few calls."""
    return min(once(call) for _ in range(tries)) * 1e6


def worst_error(way: Way) -> float:
    """The largest relative error ‖x − expected‖ / ‖expected‖ among output and gradients."""
    out = way.forward()
    found = way.results(out, way.backward(out))
    return max(
        float((x.detach().double() - y).norm() / y.norm()) for x, y in zip(found, way.work.expected, strict=False)
    )


def run_case(
    case: BranchCase,
    heads: str,
    dim: int,
    dtype: torch.dtype,
    *,
    names: tuple[str, ...] = tuple(ALL),
    rounds: int = 7,
    budget: float = 20.0,
    report: Callable[[str], None] = lambda _: None,
) -> dict:
    """Check, then time in interleaved rounds; the dict goes into the results as it is."""
    q_heads, kv_heads = parse_heads(heads)
    label = str(dtype).removeprefix("torch.")
    entry: dict = {
        "case": case.name, "note": case.note, "heads": heads, "head_dim": dim, "dtype": label, "tokens": case.tokens,
        "segments": len(case.lengths), "pairs": case.pairs, "dense_pairs": case.tokens**2, "contenders": {},
    }  # fmt: skip
    work = Work(case, q_heads, kv_heads, dim, dtype)
    ready: list[Way] = []
    for name in names:
        report(f"{case.name} · {heads} · D{dim} · {label}: {ALL[name].title}")
        way = ALL[name](work)
        try:
            way.build()
            error = worst_error(way)
        except Unfit as reason:
            entry["contenders"][name] = {"left_out": str(reason)}
            continue
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else ""
            entry["contenders"][name] = {"left_out": f"does not run here: {type(error).__name__}: {reason}"}
            continue
        if not error <= TOLERANCE[dtype]:
            entry["contenders"][name] = {"left_out": f"wrong: relative error {error:.1e} against float64"}
            continue
        entry["contenders"][name] = {"relative_error": error, "mask_us": round(way.mask_us, 1)}
        if way.note:
            entry["contenders"][name]["note"] = way.note
        ready.append(way)
    report(f"{case.name} · {heads} · D{dim} · {label}: timing")
    timings = _interleaved(ready, rounds, budget)
    for way, (forward, both) in zip(ready, timings, strict=True):
        found = entry["contenders"][way.name]
        found["forward_us"] = round(forward.median * 1e6, 1)
        if way.name != "flex_forward":
            found.update(both.as_dict())
            found["gflops"] = round(way.flops() / both.median / 1e9, 1)  # of the work that it does, wasted or not
    gc.collect()
    return entry


def _interleaved(ways: list[Way], rounds: int, budget: float) -> list[tuple[Timing, Timing]]:
    """A round calls every contender twice, forward alone and forward with backward; caches are cold before each."""
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in ways]
    end = now() + budget * len(ways)
    for r in range(rounds):
        if r >= 3 and now() > end:
            break
        for way, (forward, both) in zip(ways, times, strict=True):
            flush_caches()
            forward.append(once(way.forward))
            flush_caches()
            both.append(once(way.both))
    return [(Timing(f), Timing(b)) for f, b in times]


# ------------------------------------------------------------------------------------------------ masks, memory


def construction(segments: int = 1000, tokens: int = 100) -> list[dict]:
    """Making a `BranchMask` of 1,000 segments and some 100,000 tokens: a random tree, the same one by its contexts, and
    200 forks of four, each joined, so that the last segments name a thousand others."""
    rng = random.Random(0)
    parents, path, contexts = [-1], [0], [()]
    for i in range(1, segments):
        del path[rng.randint(1, len(path)) :]
        parents.append(path[-1])
        contexts.append(tuple(path))
        path.append(i)
    lengths, joined = [tokens] * segments, fork_join(tokens, 4, tokens, segments // 5)
    assert joined.context is not None
    makers = {
        "from_tree": (lambda: BranchMask.from_tree(lengths, parents), segments),
        "from_context, a tree": (lambda: BranchMask.from_context(lengths, contexts), sum(map(len, contexts))),
        "from_context, forks and joins": (joined.mask, sum(map(len, joined.context))),
    }
    found = []
    for name, (make, named) in makers.items():
        mask, timing = make(), Timing([once(make) for _ in range(21)])
        shape = {"case": name, "segments": mask.num_segments, "tokens": mask.num_tokens, "named": named}
        found.append({**shape, "intervals": len(mask.cols), **timing.as_dict()})
    return found


def memory(names: tuple[str, ...] = ("anabranch", "masked")) -> list[dict]:
    """Growth of the peak resident set over one forward and backward, for trees of growing T."""
    entries = []
    for name in names:
        for case in MEMORY_CASES:
            entry = {"contender": name, "case": case.name, "tokens": case.tokens}
            need = 24.0 * case.tokens**2 if name == "masked" else 0.0
            if need > 0.6 * available_bytes():
                entry["left_out"] = f"needs some {need / 1e9:.0f} GB"
            else:
                command = [sys.executable, "-m", "benchmarks.branch", name, str(case.lengths[0] // 1024)]
                done = subprocess.run(
                    command, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent
                )
                if done.returncode:
                    entry["left_out"] = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:160]
                else:
                    entry.update(json.loads(done.stdout.splitlines()[-1]))
            entries.append(entry)
    return entries


def _resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most. (getrusage would count the parent before exec.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(re.findall(r"\d+", line)[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _memory_here(name: str, scale: int) -> dict:
    """In a fresh process: the inputs are there, the code is warm, then one forward and backward."""
    small = ALL[name](Work(group(64, 2, 16), 8, 2, 64, torch.float32))
    small.build()
    small.both()
    way = ALL[name](Work(group(1024 * scale, 4, 256 * scale), 8, 2, 64, torch.float32))
    if not isinstance(way, Masked):
        way.build()
    else:  # the mask belongs to what it needs; the layout does not
        HeadMajor.build(way)
    before = _resident("VmRSS")
    if isinstance(way, Masked):
        way.mask = way.work.case.mask().dense()
    way.both()
    peak = _resident("VmHWM")
    tokens = way.work.case.tokens
    return {"peak_growth_bytes": peak - before, "bytes_per_token": round((peak - before) / tokens)}


if __name__ == "__main__":
    print(json.dumps(_memory_here(sys.argv[1], int(sys.argv[2]))))

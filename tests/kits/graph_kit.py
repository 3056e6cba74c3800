"""A CUDA graph without a GPU: records a forward's operations and replays them on the same memory, without Python."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What would have to hand a value, or a shape that depends on values, to the host.
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2"}


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def place(x):
    return x.data_ptr(), x.shape, x.stride(), x.dtype


class Tape(TorchDispatchMode):
    """Records every operation in its block. They run (shapes have to be known), but what they wrote is put back: a
    capture computes nothing."""

    def __init__(self):
        super().__init__()
        self.calls, self._undo = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        for given, told in zip(args, func._schema.arguments, strict=False):
            if told.alias_info is not None and told.alias_info.is_write:
                self._undo.append((given, given.clone()))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out, [place(x) for x in tensors((args, kwargs))]))
        return out

    def undo(self):
        for where, was in reversed(self._undo):
            where.copy_(was)
        self._undo.clear()


class TapeCapture:
    """`anabranch.runner.graph.Capture` for tests: counts, and checks that nothing moves between two replays."""

    def __init__(self, notices=()):
        self.captures = self.replays = 0
        self.active = False  # inside a capture
        self.busy = False  # inside a capture or a replay: not the host's own work
        self.notices = list(notices)
        self.watched = 0

    @contextmanager
    def watch(self):
        self.watched += 1
        yield self.notices

    def __call__(self, forward):
        tape = Tape()
        self.active = self.busy = True
        try:
            with tape:
                scores = forward()
        finally:
            self.active = self.busy = False
            tape.undo()
        scores.fill_(float("nan"))  # nobody may read it before the first replay
        self.captures += 1
        home = place(scores)

        def replay():
            assert place(scores) == home
            self.busy = True
            try:
                for func, args, kwargs, out, places in tape.calls:
                    assert [place(x) for x in tensors((args, kwargs))] == places, func
                    for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                        assert (old.shape, old.stride(), old.dtype) == (new.shape, new.stride(), new.dtype), func
                        if old.data_ptr() != new.data_ptr():
                            old.copy_(new)
            finally:
                self.busy = False
            self.replays += 1

        return replay, scores


class HostWork(TorchDispatchMode):
    """The operations that the host issues itself, in its block, each with its tensors' shapes."""

    def __init__(self, capture):
        super().__init__()
        self.capture, self.calls = capture, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # lift_fresh: torch.from_numpy, a tensor around memory that is there already.
        if not self.capture.busy and func is not torch.ops.aten.lift_fresh.default:
            self.calls.append((str(func), [tuple(x.shape) for x in tensors((args, kwargs or {}))]))
        return func(*args, **(kwargs or {}))

    def take(self):
        calls, self.calls = self.calls, []
        return calls


@contextmanager
def counted_reads(capture, monkeypatch):
    """Every call that would make the host wait for the device: names, as they come."""
    seen = []
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__"):
            real = getattr(torch.Tensor, name)

            def wrapped(self, *args, _real=real, _name=name, **kwargs):
                if not capture.busy:
                    seen.append(_name)
                return _real(self, *args, **kwargs)

            patch.setattr(torch.Tensor, name, wrapped)
        patch.setattr(torch.cuda, "synchronize", lambda *args: seen.append("synchronize"))
        yield seen


def as_on_a_device(cache):
    """The cache keeps its plans as it does on a GPU: copied once a topology, advanced there."""
    cache.planner.on_host = False
    return cache

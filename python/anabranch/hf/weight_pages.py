"""Weights in memory of large pages. A decode step reads all of them, and with pages of 4 KB much of its time goes
into finding where they are.

Weights that Transformers loads lie in the pages of their file. On two cores of a Zen 5, SmolLM2 in bfloat16, a compiled
step of 16 rows took a quarter less time with the weights in pages of 2 MB, one of 64 rows a sixteenth less.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from anabranch.backends import cpu

__all__ = ["large_pages"]

PAGE = 2 << 20  # bytes of a large page, and where they begin
LEAST = 32 << 20  # bytes of weights below which caches, not pages, are what matters
_LINE = 64  # bytes: where each parameter begins
_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def large_pages(model: nn.Module) -> int:
    """Copies a model's weights into memory that the system backs with large pages, if it can; how many bytes it copied.

    The parameters stay the objects that they are, tied ones tied; their ``data`` is new memory, and the old is freed
    once nobody else holds it. While the largest parameter is copied, both are there. Weights that were mapped from a
    file become memory of the process, which the system cannot drop and read again. `models.load` and the command line
    do it; for a model of your own call it once, before ``Engine(model, …)``.

    Nothing happens, and 0 is returned: not on Linux, where the administrator switched large pages off, for less than
    32 MB on the CPU, and for parameters of other kinds (quantised, sharded, on a GPU).

    >>> model = AutoModelForCausalLM.from_pretrained("…", attn_implementation="anabranch")
    >>> ab.hf.large_pages(model)
    269030400
    """
    groups = _by_place(model)
    total = sum(_padded(tied[0].data) for tied in groups)
    if total < LEAST or "[never]" in _setting():
        return 0
    size = -(-total // PAGE) * PAGE
    memory = torch.empty(size + PAGE, dtype=torch.uint8)
    at = -memory.data_ptr() % PAGE
    memory = memory[at : at + size]
    if not cpu.large_pages(memory):
        return 0
    begin, copied = 0, 0
    for tied in groups:
        old = tied[0].data
        count = old.numel() * old.element_size()
        new = memory[begin : begin + count].view(old.dtype).view(old.shape)
        new.copy_(old)
        begin, copied = begin + _padded(old), copied + count
        for parameter in tied:
            parameter.data = new
    return copied


def _by_place(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters that can be moved; those in one place, tied by their memory, together."""
    found: list[tuple[int, int, nn.Parameter]] = []
    for parameter in model.parameters():
        x = parameter.data
        if type(parameter) is not nn.Parameter or type(x) is not Tensor or x.layout is not torch.strided:
            continue
        if x.device.type == "cpu" and x.is_contiguous() and x.numel():
            found.append((x.data_ptr(), x.data_ptr() + x.numel() * x.element_size(), parameter))
    groups: list[list[nn.Parameter]] = []
    end = 0
    for first, last, parameter in sorted(found, key=lambda entry: entry[:2]):
        if first >= end:
            groups.append([])
        groups[-1].append(parameter)
        end = max(end, last)
    # Parameters that are different views of the same numbers stay where they are.
    return [g for g in groups if len({(p.data_ptr(), p.dtype, p.shape) for p in g}) == 1]


def _padded(x: Tensor) -> int:
    return -(-x.numel() * x.element_size() // _LINE) * _LINE


def _setting() -> str:
    """The system's, as "always [madvise] never"; "[never]" where there are no large pages."""
    try:
        return _SYSTEM.read_text()
    except OSError:
        return "[never]"

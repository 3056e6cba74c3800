"""What this machine can do at most, measured in the same run as everything else.

The floor of a case is max(bytes / bandwidth, operations / rate): no kernel, however clever, gets under it.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from .timing import now, once


@dataclass
class Floor:
    """Best rates seen so far; `measure` only ever raises them, since a floor must not move up with noise.

    Bytes a second: `copy` counts the read and the write, `read` the read alone. FLOP/s: a multiply-add is two.
    """

    copy: float = 0.0
    read: float = 0.0
    gemm: dict[str, float] = field(default_factory=dict)
    fma: float = 0.0
    note: str = ""

    @property
    def bandwidth(self) -> float:
        return max(self.copy, self.read)

    def rate(self, dtype: torch.dtype) -> float:
        """The best multiply-add rate for operands of `dtype`: registers, or the best matrix product seen."""
        name = str(dtype).removeprefix("torch.")
        return max(self.fma, self.gemm.get("float32", 0.0), self.gemm.get(name, 0.0))

    def seconds(self, nbytes: float, flops: float, dtype: torch.dtype) -> tuple[float, str]:
        """Seconds at the floor, and which of the two bounds it: "memory" or "compute"."""
        memory, compute = nbytes / self.bandwidth, flops / self.rate(dtype)
        return max(memory, compute), "memory" if memory >= compute else "compute"

    def as_dict(self) -> dict[str, object]:
        out = asdict(self)
        return {**out, "bandwidth": self.bandwidth, "rate_float32": self.rate(torch.float32)}

    def measure(self, dtypes: tuple[torch.dtype, ...] = (torch.float32,), tries: int = 10) -> Floor:
        """Measure copy and read bandwidth, matrix products and the register loop, on torch's thread count."""
        source = torch.ones(64 << 20)  # 256 MB: no cache holds it
        target = torch.zeros_like(source)
        for _ in range(tries):
            self.copy = max(self.copy, 2.0 * source.nbytes / once(lambda: target.copy_(source)))
        for dtype in dtypes:
            self._gemm(dtype, tries)
        self._loops(source, tries)
        return self

    def _gemm(self, dtype: torch.dtype, tries: int) -> None:
        name = str(dtype).removeprefix("torch.")
        for n in (512, 1024, 2048):
            a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
            once(lambda a=a, b=b: a @ b)
            for _ in range(tries):
                seconds = once(lambda a=a, b=b: a @ b)
                self.gemm[name] = max(self.gemm.get(name, 0.0), 2.0 * n**3 / seconds)
                if seconds > 0.5:  # a type without instructions of its own: larger ones tell nothing new
                    return

    def _loops(self, source: torch.Tensor, tries: int) -> None:
        """The two C loops, on all threads at once; short and often, since other programs may be running."""
        library = _roof_library()
        if isinstance(library, str):
            self.note = library
            return
        threads = torch.get_num_threads()
        sinks = [ctypes.c_float() for _ in range(threads)]
        part = source.numel() // threads
        with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the interpreter lock during a call

            def multiply(thread: int) -> float:
                return library.fma_run(2_000_000, ctypes.byref(sinks[thread]))

            def read(thread: int) -> float:
                return library.read_run(source.data_ptr() + 4 * part * thread, part, ctypes.byref(sinks[thread]))

            def rate(loop: Callable[[int], float]) -> float:
                start = now()
                done = sum(pool.map(loop, range(threads)))
                return done / (now() - start)

            self.fma = max(self.fma, *(rate(multiply) for _ in range(4 * tries)))
            if not self.fma:  # neither AVX2 nor AVX-512: the read loop is AVX2 too
                self.note = "no AVX2: copy bandwidth and matrix products alone"
                return
            self.read = max(self.read, *(rate(read) for _ in range(tries)))
        self.note = "copy, read loop, matrix products, register loop"


_LIBRARY: ctypes.CDLL | str | None = None


def _roof_library() -> ctypes.CDLL | str:
    """The loops of roof.c, compiled once a process; without a C compiler the reason as a sentence."""
    global _LIBRARY
    if _LIBRARY is not None:
        return _LIBRARY
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        _LIBRARY = "no C compiler: copy bandwidth and matrix products alone"
        return _LIBRARY
    folder = Path(tempfile.mkdtemp(prefix="anabranch-roof-"))
    try:
        target = folder / "roof.so"
        source = Path(__file__).with_name("roof.c")
        done = subprocess.run(
            [compiler, "-O2", "-shared", "-fPIC", "-o", str(target), str(source)], capture_output=True, text=True
        )
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1][:120]
            _LIBRARY = f"roof.c did not compile ({last}): copy bandwidth and matrix products alone"
            return _LIBRARY
        library = ctypes.CDLL(str(target))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    library.fma_run.restype = ctypes.c_double
    library.fma_run.argtypes = [ctypes.c_size_t, ctypes.c_void_p]
    library.read_run.restype = ctypes.c_double
    library.read_run.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    _LIBRARY = library
    return library

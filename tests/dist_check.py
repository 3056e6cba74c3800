"""`make dist-check`: the sdist and the wheel made from it both install and work from a folder outside the checkout.

Not a pytest file: it builds with isolation (as users do) and takes a minute or two.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = "anabranch/data/multiplication/model.safetensors"
SMOKE = """
import torch, anabranch as ab, anabranch.kernels
cache = ab.TreeCache(num_layers=1, num_kv_heads=1, head_dim=32, num_pages=8)
trunk = cache.branch()
step = cache.step({trunk: 5}); cache.write(0, torch.ones(5, 1, 32), torch.ones(5, 1, 32), step)
kids = cache.fork(trunk, 2)
step = cache.step({k: 1 for k in kids}); cache.write(0, torch.ones(2, 1, 32), torch.ones(2, 1, 32), step)
out = ab.tree_attention(torch.ones(2, 2, 32), cache, 0, step, backend="cpu")
assert torch.allclose(out, torch.ones(2, 2, 32)), out
engine = ab.Engine(*ab.models.load("multiplication", device="cpu"), num_pages=64)
answer = engine.generate("12 * 34", strategy=ab.ThreadWeaver())
assert answer.text.endswith("=408"), answer.text
print("works from", ab.__file__)
"""


def run(*command: str, cwd: Path, **env: str) -> None:
    print("+", " ".join(command), flush=True)
    subprocess.run(command, cwd=cwd, env={**os.environ, **env}, check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
        run(*pip, "install", "build", cwd=folder)
        run(sys.executable, "-m", "build", "-q", "--sdist", "--outdir", str(folder), str(ROOT), cwd=folder)
        sdist = next(folder.glob("*.tar.gz"))
        with tarfile.open(sdist) as archive:
            names = archive.getnames()
        for part in (
            "CMakeLists.txt",
            "csrc/tree/tree.cpp",
            "csrc/cpu/kernels.cpp",
            "kernels/attention.py",
            "LICENSE",
            MODEL,
        ):
            assert any(n.endswith("/" + part) for n in names), f"the sdist lacks {part}"
        run(*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(sdist), cwd=folder)
        wheel = next(folder.glob("*.whl"))
        inside = zipfile.ZipFile(wheel).namelist()
        for part in (
            "anabranch/_core",
            "anabranch/_cpu",
            "anabranch/kernels/attention.py",
            "anabranch/py.typed",
            MODEL,
        ):
            assert any(n.startswith(part) for n in inside), f"the wheel lacks {part}"
        assert not any(n.startswith(("tests/", "benchmarks/")) for n in inside), "the wheel holds tests or benchmarks"
        for what in (wheel, sdist):
            target = folder / f"site-{what.suffix.strip('.')}"
            run(*pip, "install", "--no-deps", "--target", str(target), str(what), cwd=folder)
            run(sys.executable, "-c", SMOKE, cwd=folder, PYTHONPATH=str(target))
        run("ldd", str(next((folder / "site-whl/anabranch").glob("_cpu*.so"))), cwd=folder)
        linked = subprocess.run(
            ["ldd", str(next((folder / "site-whl/anabranch").glob("_cpu*.so")))],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert "torch" not in linked and "gomp" not in linked, f"_cpu links a torch or OpenMP library:\n{linked}"
    print("sdist and wheel are good")


if __name__ == "__main__":
    main()

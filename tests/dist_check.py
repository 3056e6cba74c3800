"""`make dist-check`: what `make wheels` made works on a machine that has Python and nothing else.

    python tests/dist_check.py FOLDER LOG   # the folder of the sdist and the wheel; the log of their build

Not a pytest file: it makes a fresh venv and downloads the package's dependencies into it. Nothing is compiled there: no
compiler is on PATH, HOME is empty, and the checkout is out of reach.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = [f"anabranch/data/{p}" for p in ("multiplication/model.safetensors", "smollm2_adaptive/adapter_config.json")]
PAGE = [f"anabranch/viz/page/{name}" for name in ("view.html", "view.css", "page.js", "d3.min.js")]
PAGE += ["anabranch/serve/page.html"]
SOURCES = (
    "CMakeLists.txt",
    "csrc/tree/tree.cpp",
    "csrc/cpu/kernels.cpp",
    "kernels/attention.py",
    "LICENSE",
    *DATA,
    *PAGE,
)
# Said of where the build runs: a shallow clone may lack the tag (setuptools-scm); PYTHONDONTWRITEBYTECODE is set.
HARMLESS = ("shallow", "byte-compiling is disabled")
SMOKE = """
import sys
import torch, anabranch as ab, anabranch.kernels
from anabranch.backends import unavailable
assert unavailable("cpu") is None, unavailable("cpu")
cache = ab.TreeCache(num_layers=1, num_kv_heads=1, head_dim=32, num_pages=8)
trunk = cache.branch()
step = cache.step({trunk: 5}); cache.write(0, torch.ones(5, 1, 32), torch.ones(5, 1, 32), step)
children = cache.fork(trunk, 2)
step = cache.step({c: 1 for c in children}); cache.write(0, torch.ones(2, 1, 32), torch.ones(2, 1, 32), step)
out = ab.tree_attention(torch.ones(2, 2, 32), cache, 0, step, backend="cpu")
assert torch.allclose(out, torch.ones(2, 2, 32)), out
torch.set_num_threads(2)
engine = ab.Engine(*ab.models.load("multiplication", device="cpu"), num_pages=64)
answer = engine.generate("12 * 34", strategy=ab.ThreadWeaver())
assert answer.text.endswith("=408"), answer.text
mapped = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
openmp = {path for path in mapped if any(name in path for name in ("libgomp", "libomp", "libiomp"))}
assert len(openmp) == 1, f"one OpenMP runtime expected, torch's; loaded: {openmp}"
print("works from", ab.__file__, "with", *openmp)
"""


def run(*command: str, cwd: Path, **env: str) -> str:
    """The command's output, with exactly these environment variables; it is printed where the command fails."""
    print("+", *(repr(c)[:60] if "\n" in c else c for c in command), flush=True)
    done = subprocess.run(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{done.stdout}\nexit status {done.returncode}")
    return done.stdout


def check_log(log: Path) -> None:
    lines = log.read_text(encoding="utf-8").splitlines()
    warnings = [line for line in lines if re.search(r"warning\b", line, re.I) and not any(h in line for h in HARMLESS)]
    assert not warnings, "the build warns:\n" + "\n".join(warnings)


def check_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    for part in SOURCES:
        assert any(name.endswith("/" + part) for name in names), f"the sdist lacks {part}"


def check_wheel(wheel: Path) -> None:
    """Every Python file of the package, its data and its modules; nothing else, and no shared library from outside."""
    assert "manylinux" in wheel.name, f"{wheel.name}: not repaired by auditwheel"
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if not n.endswith("/")}
    wanted = {f"anabranch/{p.relative_to(ROOT / 'python/anabranch')}" for p in (ROOT / "python").rglob("*.py")}
    wanted |= {f"anabranch/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    wanted |= {"anabranch/py.typed", "anabranch/_core.pyi", *DATA, *PAGE}
    assert not wanted - inside, f"the wheel lacks {sorted(wanted - inside)}"
    rest = sorted(n for n in inside - wanted if not re.match(r"anabranch/(data/|viz/page/|_c[a-z]+\.[^/]*so$)", n))
    rest = [n for n in rest if ".dist-info/" not in n and not n.endswith(".pyi")]
    assert not rest, f"the wheel holds what is no part of the package: {rest}"
    for module in ("_core", "_cpu"):
        assert any(n.startswith(f"anabranch/{module}.") for n in inside), f"the wheel lacks the module {module}"


def check_bare(wheel: Path, folder: Path) -> None:
    """A fresh venv: the wheel and what it declares, then a generation, the command line and `doctor`."""
    (home := folder / "home").mkdir()
    bare = folder / "venv"
    venv.create(bare, with_pip=True)
    bin = bare / "bin"
    lock = ("-c", str(ROOT / "requirements.lock"))
    # Installed with the caller's pip settings (an index may be configured), run without any of them.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(bin / "python"), "install", "-q"]
    print("+ pip install", wheel.name, flush=True)
    subprocess.run([*pip, "--only-binary", "anabranch", *lock, str(wheel)], cwd=folder, check=True)
    clean = {"PATH": str(bin), "HOME": str(home), "LANG": "C.UTF-8"}
    print(run(str(bin / "python"), "-c", SMOKE, cwd=home, **clean).strip())
    version = run(str(bin / "anabranch"), "--version", cwd=home, **clean).split()[-1]
    assert wheel.name.startswith(f"anabranch-{version}-"), f"--version says {version}, the wheel is {wheel.name}"
    report = json.loads(run(str(bin / "anabranch"), "doctor", "--json", cwd=home, **clean))
    assert not report["problems"], report["problems"]


def main(dist: str, log: str) -> None:
    (sdist,), (wheel,) = Path(dist).resolve().glob("*.tar.gz"), Path(dist).resolve().glob("*.whl")
    check_log(Path(log))
    check_sdist(sdist)
    check_wheel(wheel)
    with tempfile.TemporaryDirectory() as name:
        check_bare(wheel, Path(name))
    print("sdist and wheel are good")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What all commands share: how a mistake, a broken pipe and Ctrl-C end, consoles, and loading a model."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
from anabranch.viz.console import cpu

INTERRUPTED = 128 + signal.SIGINT  # 130, as shells count

FAILED, USAGE = 1, 2

DTYPES = ("auto", "float32", "bfloat16", "float16")

# bfloat16 matrix products in hardware. Without them the CPU converts, and a step of 16 rows of SmolLM2 takes 2.2 times
# as long as in float32 (AVX2, one thread), though one of a single row, which only reads weights, takes 0.7 times.
BF16_FEATURES = ("avx512_bf16", "amx_bf16", "bf16", "svebf16")

_debug = False


class Mistake(Exception):
    """Something the user can put right; printed as it is, without a traceback."""

    def __init__(self, message: str, code: int = FAILED):
        super().__init__(message)
        self.code = code


def set_debug(value: bool) -> bool:
    """--debug: from now on mistakes show their traceback."""
    global _debug
    _debug = _debug or value
    return value


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command: mistakes become one message on stderr and exit code 1, Ctrl-C one line and exit code 130."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        import typer

        try:
            function(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            print(f"anabranch: interrupted{'; ' + str(interrupt) if str(interrupt) else ''}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # `anabranch … | head`: the reader has what it wanted
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except Exception as error:
            code = _mistake(error)
            if _debug or code is None:
                raise
            print(f"anabranch: {error}", file=sys.stderr)
            raise typer.Exit(code) from None

    # Help pages keep line breaks as they are; a paragraph is to be wrapped to the terminal instead.
    wrapped.__doc__ = "\n\n".join(" ".join(part.split()) for part in (function.__doc__ or "").split("\n\n"))
    return wrapped


def _mistake(error: Exception) -> int | None:
    """Exit code of an error whose message was written for the user; None for a defect, which shows its traceback."""
    if isinstance(error, Mistake):
        return error.code
    # The library's own errors name the argument and the remedy; only its modules are asked for them, once loaded.
    known = [("anabranch.models", "ModelUnavailable"), ("anabranch.hf.probe", "UnsupportedModel")]
    known += [("anabranch.errors", name) for name in ("OutOfPages", "BackendUnavailable")]
    classes = [getattr(sys.modules[module], name) for module, name in known if module in sys.modules]
    return FAILED if isinstance(error, (ValueError, OSError, *classes)) else None  # OSError: files, a full disk


def check_save(path: Path | None, option: str = "--save") -> None:
    """Before minutes of work: a file can be written there."""
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise Mistake(f"{option} {str(path)!r}: there is no folder {str(folder)!r}", USAGE)
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise Mistake(f"{option} {str(path)!r}: cannot write a file there", USAGE)


def choose_dtype(wish: str = "auto") -> tuple[torch.dtype, str]:
    """(dtype of the weights, why): bfloat16 on a GPU and on CPUs that multiply it in hardware, float32 elsewhere."""
    import torch

    if wish not in DTYPES:
        raise Mistake(f"--dtype {wish!r}: expected one of {', '.join(DTYPES)}", USAGE)
    if wish != "auto":
        return getattr(torch, wish), "asked for"
    if torch.cuda.is_available():
        return torch.bfloat16, "there is a GPU"
    found = [f for f in BF16_FEATURES if f in cpu()[1]]
    if found:
        return torch.bfloat16, f"the CPU has {found[0]}"
    return torch.float32, (
        "the CPU has no bfloat16 arithmetic: float32 reads prompts faster; --dtype bfloat16 decodes faster"
    )


def load_model(name: str, dtype: str = "auto", tp: int = 1) -> tuple[Any, Any, torch.dtype]:
    """(model, tokenizer, dtype) of a model by name, or of a Transformers folder on this machine; with `tp` processes
    this one's part of it."""
    from anabranch import models

    kind, _ = choose_dtype(dtype)
    _warn_if_slow()
    if name in models.names():
        try:
            models.path(name)  # converts on the first call, with a bar of its own on stderr
        except OSError as error:
            place = models.cache_folder()
            raise Mistake(
                f"cannot convert {name} into the cache folder {str(place)!r} ({error}); set ANABRANCH_CACHE"
            ) from error
        if tp == 1:
            return (*models.load(name, dtype=kind), kind)
        return (*_load_folder(models.path(name), kind, tp), kind)
    folder = Path(name).expanduser()
    if not folder.exists():
        known = ", ".join(models.names())
        raise Mistake(
            f"--model {name!r}: neither a model's name ({known}) nor a folder here. Pass one of these names, or the "
            "path of a folder that holds a Transformers model (config.json, safetensors, tokenizer)"
        )
    if not (folder / "config.json").is_file():
        raise Mistake(f"--model {name!r}: this folder has no config.json, so it is not a Transformers model")
    return (*_load_folder(folder, kind, tp), kind)


def load_tokenizer(name: str) -> Any:
    """The tokenizer alone, of a model by name or of a folder on this machine."""
    from transformers import AutoTokenizer

    from anabranch import models

    folder = models.path(name) if name in models.names() else Path(name).expanduser()
    if not folder.is_dir():
        raise Mistake(
            f"--model {name!r}: neither a model's name ({', '.join(models.names())}) nor a folder here; with a server "
            "it names the tokenizer of the model that the server runs"
        )
    return AutoTokenizer.from_pretrained(folder)


def _warn_if_slow() -> None:
    """Without its kernels the package still answers, through the slow reference; that should not go unnoticed."""
    import torch

    from anabranch import backends

    name = backends.PREFERRED["cuda" if torch.cuda.is_available() else "cpu"][0]
    reason = backends.unavailable(name)
    if reason is not None:
        print(f"anabranch: the {name} kernels do not work here, so this will be slow: {reason}", file=sys.stderr)


def _load_folder(folder: Path, kind: torch.dtype, tp: int = 1) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from anabranch import hf

    hf.register()
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=kind, attn_implementation="anabranch", local_files_only=True, **_shared_out(tp)
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise Mistake(f"--model {str(folder)!r}: Transformers cannot load it: {error}") from error
    if tp == 1:
        model = model.to(device)
        hf.large_pages(model)
    return model.eval(), tokenizer


def _shared_out(tp: int) -> dict[str, Any]:
    """What from_pretrained takes to share a model out among `tp` processes."""
    if tp == 1:
        return {}
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=tp, tp_plan="auto")}
    except (ImportError, TypeError):  # before Transformers had it
        return {"tp_plan": "auto"}

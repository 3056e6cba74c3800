"""Who else serves requests that arrive at random: Transformers in two ways, and vLLM.

Each is called with requests (`serve.Request`), branches and new tokens, notes each token's time in the requests, and
returns the seconds until all were answered and the share of the prompts' tokens that it found in its cache.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .e2e import SAMPLING
from .programs import Program

PROGRAM = Path(__file__).with_name("vllm_arrivals.py")
PAGES, PAGE = 4096, 16  # of a KV cache: the room that everybody has


def _how(branches: int) -> dict[str, Any]:
    return {"do_sample": False} if branches == 1 else {**SAMPLING, "num_return_sequences": branches}


class _Times(LogitsProcessor):
    """Notes when the scores of each token arrive."""

    def __init__(self, times: list[float], start: float) -> None:
        self.times, self.start = times, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter() - self.start)
        return scores


class OneAfterAnother:
    """`generate`, one request after another in the order of arrival: a server without continuous batching."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, requests: list[Any], branches: int, new_tokens: int) -> tuple[float, float]:
        start = time.perf_counter()
        for request in requests:
            time.sleep(max(0.0, request.at - (time.perf_counter() - start)))
            times: list[float] = []
            ids = torch.tensor([request.ids])
            self.model.generate(
                ids, attention_mask=torch.ones_like(ids), logits_processor=LogitsProcessorList([_Times(times, start)]),
                max_new_tokens=new_tokens, min_new_tokens=new_tokens, **_how(branches),
            )  # fmt: skip
            request.times = {str(i): times for i in range(branches)}
        return time.perf_counter() - start, 0.0


class ContinuousBatching:
    """Transformers' continuous batching, with its paged cache, prefix sharing and attention (SDPA)."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, requests: list[Any], branches: int, new_tokens: int) -> tuple[float, float]:
        from transformers import ContinuousBatchingConfig

        # No end-of-sequence token: everybody writes as many tokens.
        config = GenerationConfig(max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=0, **_how(branches))
        room = ContinuousBatchingConfig(
            num_blocks=PAGES * PAGE // ContinuousBatchingConfig.page_size, max_batch_tokens=512,
            auto_switch_to_flash=False,
        )  # fmt: skip
        with self.model.continuous_batching_context_manager(config, continuous_batching_config=room) as manager:
            start = time.perf_counter()
            names: dict[str, Any] = {}
            for request in requests:
                time.sleep(max(0.0, request.at - (time.perf_counter() - start)))
                names[manager.add_request(request.ids, record_timestamps=True)] = request
            outputs = []
            while len(outputs) < branches * len(requests):
                output = manager.get_result(timeout=1)
                if output is None and not manager.is_running():
                    raise RuntimeError("Transformers' continuous batching ended before all were answered")
                if output is not None and output.is_finished():
                    if output.error:
                        raise RuntimeError(f"Transformers' continuous batching: {output.error}")
                    outputs.append(output)
            seconds = time.perf_counter() - start
        self._note(outputs, names, start)
        return seconds, 0.0  # it does not tell what it found

    @staticmethod
    def _note(outputs: list[Any], names: dict[str, Any], start: float) -> None:
        first: dict[str, float] = {}
        for output in sorted(outputs, key=lambda output: len(output.request_id)):  # children behind their parents
            parent = output.request_id.split("__child#")[0]
            times = [at - start for at in output.timestamps]
            if parent == output.request_id:
                first[parent] = times[0]
            elif len(times) < len(output.generated_tokens):
                times.insert(0, first[parent])  # its first token is its parent's
            names[parent].times[output.request_id] = times


class VLLMArrivals:
    """vLLM in a process of its own, loaded once, with its prefix cache."""

    def __init__(self, python: Path, model: Path, dtype: str, longest: int, compiled: bool = False) -> None:
        options = {
            "model": str(model), "dtype": dtype, "enforce_eager": not compiled, "enable_prefix_caching": True,
            "max_model_len": longest + 8,
        }  # fmt: skip
        self._program = Program([python, PROGRAM, json.dumps(options)], OMP_NUM_THREADS=str(torch.get_num_threads()))
        version = self._program.about["versions"]["vllm"]
        self.title = f"vLLM {version}, CPU build" + ", compiled" * compiled
        short = [{"at": 0.0, "ids": list(range(5, 13))}]
        for branches in (1, 2):  # as the others, it has computed something before it is timed
            self._program.ask({"requests": short, "n": branches, "new_tokens": 8})

    def __call__(self, requests: list[Any], branches: int, new_tokens: int) -> tuple[float, float]:
        job = {"requests": [{"at": r.at, "ids": r.ids} for r in requests], "n": branches, "new_tokens": new_tokens}
        answer = self._program.ask(job)
        for request, times in zip(requests, answer["times"], strict=True):
            request.times = times
        return answer["seconds"], answer["hit_rate"]

    def close(self) -> None:
        self._program.close()

"""A vLLM that generates when told to: a program for the Python of vLLM's own environment; imports nothing of ours.

    python benchmarks/vllm_turns.py '{"model": FOLDER, "attention_backend": "CUSTOM", …what vllm.LLM takes…}'

It says {"versions": …} when it is ready. Then for each line {"prompts": [[ids], …], "n": 16, "new_tokens": 60} it
answers with one: {"wall": seconds, "cpu": this process's, "tokens": [[ids], …]}, of every sample exactly so many.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    options = json.loads(sys.argv[1])
    answers, sys.stdout = sys.stdout, sys.stderr  # vLLM writes its log to what it finds under that name
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in one process: no message passing between loop and model is timed
        "HF_HUB_OFFLINE": "1",
    }.items():
        os.environ.setdefault(name, value)

    import torch
    import vllm

    llm = vllm.LLM(**{"skip_tokenizer_init": True, "disable_log_stats": True, "enforce_eager": True, **options})

    def say(what: dict) -> None:
        print("ANSWER " + json.dumps(what), file=answers, flush=True)

    say({"versions": {"vllm": vllm.__version__, "torch": torch.__version__}, "threads": torch.get_num_threads()})
    for line in sys.stdin:
        job = json.loads(line)
        params = vllm.SamplingParams(
            n=job["n"], temperature=1.0, seed=0, max_tokens=job["new_tokens"], min_tokens=job["new_tokens"],
            ignore_eos=True, detokenize=False,
        )  # fmt: skip
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        begin = time.perf_counter(), time.process_time()
        done = llm.generate(prompts, params, use_tqdm=False)
        wall, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
        tokens = [list(one.token_ids) for request in done for one in request.outputs]
        say({"wall": wall, "cpu": cpu, "tokens": tokens})


if __name__ == "__main__":
    main()

"""Runs vLLM on given prompts and prints what it answered: a program for the Python of vLLM's own environment.

python vllm_run.py '{"model": FOLDER, "engine": {…of vllm.LLM…}, "waves": [{"prompts": [[ids], …], "params": {…}}, …]}'

Waves follow one another, so that later ones find earlier ones' prefixes in the cache. It prints "ANSWER " and JSON, in
the middle of vLLM's log: "answers" (for each wave and prompt the token ids of each sample) and "cached" (prompt tokens
found in the prefix cache, by wave).
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    job = json.loads(sys.argv[1])
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if job["engine"].get("tensor_parallel_size", 1) == 1:  # one process: no queues between the loop and the model
        defaults |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)

    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    options = {"enforce_eager": True, "skip_tokenizer_init": True, "disable_log_stats": True, **job["engine"]}
    llm = LLM(model=job["model"], **options)
    answers, cached = [], []
    for wave in job["waves"]:
        params = SamplingParams(detokenize=False, **wave["params"])
        done = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in wave["prompts"]], params, use_tqdm=False)
        answers.append([[list(sample.token_ids) for sample in request.outputs] for request in done])
        cached.append(sum(request.num_cached_tokens or 0 for request in done))
    print("ANSWER " + json.dumps({"answers": answers, "cached": cached}), flush=True)


if __name__ == "__main__":
    main()

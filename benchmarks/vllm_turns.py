"""A vLLM that generates when told to: a program for the Python of vLLM's own environment; imports nothing of ours.

    python benchmarks/vllm_turns.py '{"model": FOLDER, "attention_backend": "CUSTOM", …what vllm.LLM takes…}'

It says {"versions": …} when it is ready. Then for each line {"prompts": [[ids], …], "n": 16, "new_tokens": 60} it
answers with one: {"wall": seconds, "cpu": this process's, "tokens": [[ids], …]}, of every sample exactly so many.
"""

from __future__ import annotations

import time

from vllm_program import answer_jobs


def answer(llm, job: dict) -> dict:
    from vllm import SamplingParams

    params = SamplingParams(
        n=job["n"], temperature=1.0, seed=0, max_tokens=job["new_tokens"], min_tokens=job["new_tokens"],
        ignore_eos=True, detokenize=False,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    begin = time.perf_counter(), time.process_time()
    done = llm.generate(prompts, params, use_tqdm=False)
    wall, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
    tokens = [list(one.token_ids) for request in done for one in request.outputs]
    return {"wall": wall, "cpu": cpu, "tokens": tokens}


if __name__ == "__main__":
    answer_jobs(answer, enforce_eager=True)

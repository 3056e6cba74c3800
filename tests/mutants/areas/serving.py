"""Mistakes in serving: who comes first, interrupts, errors of one, and what the prefix cache hands out."""

from __future__ import annotations

from entry import Mutant

ENGINE = "python/anabranch/engine/"
SERVE = "tests/engine/test_continuous.py::test_"
PREFIX = "tests/engine/test_prefix_cache.py::test_"

MUTANTS = [
    Mutant(
        "a small request passes one that waits for room", f"{ENGINE}loop.py",
        "(self.active and not self.scheduler.has_room(self.waiting[0]))", "False",
        f"{SERVE}room_is_counted_in_pages_that_are_needed",
    ),
    Mutant(
        "decoding takes all rows", f"{ENGINE}scheduler.py",
        "if room <= (kept if pending[kv] <= 1 else 0):", "if room <= 0:",
        f"{SERVE}decoding_leaves_a_row_for_prompts",
    ),
    Mutant(
        "priority counts for nothing", f"{ENGINE}loop.py",
        "(number - call.priority * HEAD_START, number)", "(number, number)", f"{SERVE}priorities_begin_first",
    ),
    Mutant(
        "a uniform is drawn again when its token is chosen again", f"{ENGINE}stepper.py",
        "if running.drawn is None:", "if True:", f"{SERVE}ctrl_c_between_the_tokens_of_two_threads_draws_none_anew",
    ),
    Mutant(
        "rows of an interrupted forward stay", f"{ENGINE}stepper.py",
        "                self.cache.truncate(branch, length)\n", "                pass\n",
        f"{SERVE}ctrl_c_in_a_step_leaves_the_others_whole",
    ),
    Mutant(
        "an interrupted step is not settled", f"{ENGINE}loop.py",
        "self._settle(new if settled else self.active)", "self._settle(new)",
        f"{SERVE}ctrl_c_in_a_step_leaves_the_others_whole",
    ),
    Mutant(
        "an error in a group fails the whole group", f"{ENGINE}stepper.py",
        "if len(calls) == 1:", "if True:", f"{SERVE}an_error_of_one_of_many_that_are_sampled_together",
    ),
    Mutant(
        "joined siblings are served as one sequence", "python/anabranch/threads/state.py",
        "if segment.spliced is not None or segment.position != length:", "if False:",
        f"{PREFIX}joined_siblings_are_no_dense_prefix",
    ),
    Mutant(
        "what is scored is found", f"{ENGINE}thread_kv.py",
        "return most if thread.score is None else min(most, thread.score.begin)", "return most",
        f"{PREFIX}what_is_scored_is_computed_though_it_could_be_found",
    ),
    Mutant(
        "the last token is found as well", f"{ENGINE}thread_kv.py",
        "most = min(thread.dense_length, thread.length - 1)", "most = min(thread.dense_length, thread.length)",
        f"{PREFIX}a_prompt_of_less_than_a_page",
    ),
    Mutant(
        "what other weights computed is kept", f"{ENGINE}thread_kv.py",
        "self.opened and request.epoch == request.prefixes.epoch", "self.opened",
        f"{PREFIX}what_was_computed_with_other_weights_is_not_kept",
    ),
    Mutant(
        "weights are not looked at", f"{ENGINE}loop.py",
        "if now != self._computed_with:", "if False:", f"{PREFIX}changed_weights_are_noticed",
    ),
    Mutant(
        "the most recently used goes first", "python/anabranch/kv/prefix.py",
        "return self._leaves[0][2] if self._leaves else None", "return self._leaves[-1][2] if self._leaves else None",
        f"{PREFIX}what_was_used_longest_ago_goes_first",
    ),
    Mutant(
        "all of a context goes where a page is needed", "python/anabranch/kv/prefix.py",
        "if length > parent.end:", "if False:", f"{PREFIX}the_end_of_a_context_goes_before_its_beginning",
    ),
    Mutant(
        "requests at the same time compute the same", f"{ENGINE}scheduler.py",
        "if any(alike(kv, other) >= found + WORTH_WAITING for other in coming.values()):", "if False:",
        f"{PREFIX}requests_at_the_same_time_share_what_one_computes",
    ),
]  # fmt: skip

"""What a listing says of each strategy: one line each, by the name of its class."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ABOUT", "About"]


@dataclass(frozen=True)
class About:
    """What forks, when, and what a join does. name: where it is not the class's in kebab case."""

    forks: str
    when: str
    join: str
    name: str | None = None


SPLICED = "spliced side by side; nothing is computed again"
VOTED = "the winner of a vote is kept"

# A strategy that has no line here is listed all the same, with the first line of its docstring.
ABOUT = {
    "Plain": About("nothing", "never: one thread to the end", "–"),
    "Sequential": About("what the strategy in it forks", "as that one, its threads one after another", "as that one"),
    # The model asks for threads, by tags or in words.
    "ThreadWeaver": About(
        "one thread for each outline",
        "when the model writes </Outlines>",
        "one behind another; the later ones are computed again and see those before",
        "threadweaver",
    ),
    "Multiverse": About("one path for each outline, nested", "when the model writes </Goal>", SPLICED),
    "NPR": About("one step for each plan", "when the model writes </guideline>", SPLICED),
    "MedVerse": About(
        "one step for each outline",
        "when the steps that it depends on are done",
        SPLICED,
        "medverse",
    ),
    "ParallelR1": About(
        "a given number of paths",
        "when the model writes <Parallel>",
        "one behind another, or spliced; then a summary",
        "parallel-r1",
    ),
    "ParaThinker": About(
        "a given number of paths", "right behind the prompt", f"{SPLICED}; then a summary", "parathinker"
    ),
    "PASTA": About(
        "one thread for each promise", "when the model writes one", "in the order of the promises, at a sync"
    ),
    "AsyncThink": About(
        "a worker with a context of its own for each query",
        "at </FORK-i>; the organizer writes on",
        "the worker's answer is inserted at <JOIN-i>",
        "asyncthink",
    ),
    "SPRINT": About(
        "an executor for each prompt of the planner",
        "at </prompt>; the planner writes on",
        "one behind another at the end of the plan, computed again",
    ),
    "SSFT": About("a given number of paths", "right behind the prompt", VOTED),
    "APR": About(
        "a search with a fresh context for each call",
        "when the model calls sub-searches",
        "the call is replaced by what was found",
    ),
    # The runtime decides.
    "Aspects": About("one thread for each header", "at the end of the first line or sentence", SPLICED),
    "SkeletonOfThought": About(
        "a new prompt for each point of an outline",
        "when the outline is written",
        "points follow one another",
    ),
    "SelfConsistency": About("n sampled answers", "right behind the prompt", VOTED),
    "BestOfN": About("n sampled answers", "right behind the prompt", "the one with the best score is kept"),
    "EntropyFork": About(
        "n sampled copies from there on",
        "where the next token's entropy passes the threshold",
        "the winner of a vote, or the likeliest, is kept",
    ),
    "DeepConf": About(
        "n sampled answers, the unsure ones ended early",
        "right behind the prompt",
        "a vote weighted by confidence",
        "deepconf",
    ),
    "ParallelProbe": About(
        "n sampled answers, and a probe of each",
        "every so many tokens",
        "all stop on consensus; deviants are killed; the first with the winning answer is kept",
    ),
    "SlimSC": About("n sampled chains", "thought by thought; one of two that are alike is killed", VOTED),
    "STEP": About("n sampled branches", "right behind the prompt; the worst are killed step by step", VOTED),
    "PruneRefork": About(
        "the best of a pool, in place of the worst",
        "every so many tokens",
        "the winner of a vote, or the best, is kept",
    ),
    "LeaP": About(
        "sampled paths that share summaries",
        "right behind the prompt; summaries every so many tokens",
        VOTED,
        "leap",
    ),
    "PaCoRe": About(
        "new prompts that hold the answers of the round before",
        "at the end of each round",
        "the last round's answer is the result",
        "pacore",
    ),
    "SelectPassages": About(
        "a new context for each passage of a long prompt",
        "right away",
        "the passages that make the question likelier stay; the answer is written from those",
    ),
    "RunningSummary": About(
        "a new context for each passage of a long prompt, one after another",
        "when the passage before is summarised",
        "the passage is discarded, its summary goes on",
    ),
    "TreeOfThoughts": About("thoughts of each kept state", "at each level", "the best states go on; the best is kept"),
    "BeamSearch": About("the likeliest texts", "at every token", "the best text is kept"),
    "StepBeamSearch": About(
        "sampled next steps of each beam", "at every step", "the best texts go on; the best is kept"
    ),
    # Threads that see one another while they write, and drafts.
    "GroupThink": About(
        "workers that see one another's tokens", "right behind the prompt", "their texts follow one another"
    ),
    "Hogwild": About(
        "workers that see one another's text, their own last",
        "right behind the prompt",
        "the first answer is kept",
    ),
    "DraftTree": About("guesses of the next tokens", "in every step", "what the model would have written is kept"),
}

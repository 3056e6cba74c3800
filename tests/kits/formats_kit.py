"""Every tag-driven system, with what a model that half knows its format writes: the format, and all that breaks it.

A script is what may follow an opening tag. Among them are truncated tags, tags in tags, ids unordered, twice and by the
thousand; limits then cut any of them. (What stands for a thousand ids is one token, so that small limits let it by.)
"""

from __future__ import annotations

from dataclasses import dataclass

from malformed_kit import Habits, bad_outlines, thousand

import anabranch as ab
from anabranch.strategies import Strategy


@dataclass(frozen=True)
class Format:
    """A strategy of small limits, its model's habits, and the limits of tokens to run it with.

    prompt: a number goes in; good: how many of the habits' scripts, from the first on, are well-formed.
    """

    strategy: Strategy
    habits: Habits
    limits: tuple[int, ...] = (8, 20, 40, 90)
    prompt: str = "{:04d}q"
    good: int = 2


def _outlined(strategy, opening: str, outline: str, close: str, usual) -> Format:
    """A format whose outlines stand between `opening` and `close`."""
    many = thousand(outline)
    habits = Habits(strategy.tags, [opening], bad_outlines(outline, close), usual, rare=[many + close], pieces=[many])
    return Format(strategy, habits, good=6)


def _threadweaver(strategy) -> Format:
    usual = {
        "q": ["<Parallel>"],
        "<Parallel>": ["<Outlines>"],
        ":": ["a", "b"],
        "a": ["a", "</Thread>", "<Outlines>"],
        "b": ["</Thread>"],
        "\n": ["</Parallel>", "a", "</Conclusion>"] if strategy.conclusion else ["</Parallel>", "a"],
        "</Conclusion>": ["</Parallel>"],
        "</Parallel>": ["a", "<Parallel>"],
    }
    return _outlined(strategy, "<Outlines>", "<Outline>{id}: a</Outline>", "</Outlines>", usual)


MULTIVERSE = {
    "q": ["<Parallel>"],
    "<Parallel>": ["<Goal>"],
    ":": ["a", "b"],
    "a": ["a", "</Path>", "<Parallel>"],
    "b": ["</Path>"],
    "\n": ["a", "</Conclusion>"],
    "</Conclusion>": ["</Parallel>"],
    "</Parallel>": ["a", "<Parallel>"],
}
NPR = {
    "q": ["<guideline>"],
    ":": ["a", "b"],
    "a": ["a", "</step>", "<guideline>"],
    "b": ["</step>"],
    "</step>": ["\n"],
    "\n": ["a", "</takeaway>"],
    "</takeaway>": ["a", "<guideline>"],
}


def _steps(*steps: tuple[object, str]) -> str:
    return "".join(f"<Outline> Transient Step {n}: a; Dependency: [{on}] </Outline>" for n, on in steps)


MANY_STEPS = _steps(*((i, "") for i in range(1000)))
CHAIN = _steps(*((i, i - 1) for i in range(60)))
MEDVERSE = Habits(
    ab.MedVerse().tags,
    ["<Plan>"],
    [
        _steps((1, ""), (2, ""), (3, "1"), (4, "2, 3")) + "</Plan>",
        _steps((1, ""), (2, "1")) + "</Plan>",
        _steps((2, "1"), (1, "")) + "</Plan>",  # unordered
        _steps((1, "2"), (2, "3"), (3, "1")) + "</Plan>",  # a circle
        _steps((1, "1"), (1, ""), (2, "9, x,,")) + "</Plan>",
        _steps(("", ""), ("x", "1")) + "</Plan>",
        _steps((1, "")) + "<Outline> Transient Step 2: </Plan></Plan>",
        _steps((1, ""))[:-12] + _steps((2, "1")) + "</Plan>",
        "</Plan>",
        _steps((1, "")),
    ],
    {
        "q": ["<Plan>"],
        "\n": ["a", "b"],
        "a": ["a", "</Step>", "<Plan>"],
        "b": ["</Step>", "b"],
        "</Conclusion>": ["a", "<Plan>"],
    },
    rare=[MANY_STEPS + "</Plan>", CHAIN + "</Plan>"],
    pieces=[MANY_STEPS, CHAIN, *(f" Transient Step {n}: a; Dependency: [" for n in range(1, 5))],
)

LENGTHS = ('tokens="7"', 'tokens="-3"', 'tokens="99999999999"', 'tokens="')
PASTA = Habits(
    ("<promise ", *LENGTHS, "/>", "<sync/>", "<async>", "</async>"),
    ["<promise "],
    [
        'tokens="7"/>',
        'topic="a"/>',
        "/>",
        'tokens="-3"/>',
        "<promise />",
        'tokens="99999999999"/><sync/>',
        "a" * 9,
        'topic="<async></async>"/>',
    ],
    {
        "q": ["<promise ", "a"],
        "<async>": ["a", "b"],
        "/>": ["a", "<sync/>", "<promise "],
        "a": ["b", "</async>", "<sync/>", "<promise "],
        "b": ["a", "</async>"],
    },
    rare=["/>" + "<promise />" * 1000 + "<sync/>"],
    pieces=["<promise />" * 1000],
)

PARALLEL_R1 = Habits(
    ("<Parallel>", "</Parallel>", "<Path>", "</Path>", "<Summary>", "</Summary>"),
    ["<Path>", "<Summary>"],
    [
        "ab</Path>",
        "b</Summary>",
        "a</Path></Path>",
        "<Path>a</Path>",  # tags in tags
        "<Parallel><Path>b</Path></Parallel>",
        "</Parallel><Summary>",
        "a" * 40,  # never closed
        "</Path",  # truncated
        "</Summary></Summary>",
    ],
    {
        "q": ["<Parallel>", "a"],
        "a": ["a", "b", "</Path>", "</Summary>", "<Parallel>"],
        "b": ["</Path>", "</Summary>", "<Parallel>"],
        "</Summary>": ["<Parallel>", "a"],
    },
    rare=["<Path>" * 1000 + "</Path>"],
)


def _thoughts(count: int, *more: str) -> Habits:
    """Numbered thoughts: `count` tags of them that open, their closing ones if `more` has any."""
    opening = [f"<think{i}>" for i in range(1, count + 1)]
    closing = [tag.replace("<", "</") for tag in opening] if more else []
    return Habits(
        (*opening, *closing, *more),
        [*opening, *more[:1]],
        [
            r"a\boxed{1}",
            r"\boxed{2}b",
            "a" + "".join(closing[:1]),
            "".join(closing[:2]),
            "<think3>a<think1>b",  # tags in tags, unordered
            r"\boxed{1",
            "<think",
            "a" * 40,
            *more[-1:] * 2,
            *(f"<think{i}>a" for i in (1, 1)),
        ],
        {"a": ["a", "b", *closing], "b": [*closing[:2], *more, "a"], "}": ["<eos>"], "q": ["a"]},
        rare=["<think2>" * 1000],
        words="12:. \\boxed{}ab",
    )


NODE = "Moving to Node #"
CALL = "<Start Sub Search {} at level 1> " + NODE + "{}\n"
CALLING, END_CALLING = "<Calling Sub Searches>", "<End Calling Sub Searches>"
CALLS = "".join(CALL.format(i, "0,1") for i in range(1000))
APR = Habits(
    (
        *(CALLING, END_CALLING, "<Sub Searches>", "<End Sub Searches>"),
        *("<Sub", "Goal Reached", NODE, "0,1", "0,2", "<Start Sub Search 0 at level 1> "),
        "Generated Node #0,1: 27:[1] Operation: ",
    ),
    [CALLING],
    [
        "\n" + CALL.format(0, "0,1") + END_CALLING,
        "\n" + CALL.format(0, "0,1") + CALL.format(1, "0,1") + END_CALLING,
        "\n" + CALL.format(1, "0,1") + CALL.format(0, "0,1") + END_CALLING,
        "\n" + CALL.format(0, "9,9") + END_CALLING,  # a node never written
        "\n" + CALL.format(0, "x") + END_CALLING,
        "\n" + END_CALLING,
        END_CALLING,
        "\n<Start Sub Search 0 at level 1> \n" + END_CALLING,  # truncated
        "\n" + CALL.format(0, "0,1"),  # never closed
        "\n" + CALLING + "\n" + CALL.format(0, "0,1") + END_CALLING,  # tags in tags
        "<Sub Searches>\n" + CALL.format(0, "0,1") + END_CALLING,
        "\n" + CALL.format(0, "0,1") + END_CALLING + END_CALLING,
    ],
    {
        "a": ["Generated Node #0,1: 27:[1] Operation: ", CALLING, "a", "Goal Reached", "<Sub"],
        "\n": ["a", CALLING, "Goal Reached", "z"],
        "z": [CALLING],
        "]": ["\n"],
        "<Sub": [" "],
        NODE: ["0,1", "0,2"],
        "0,1": ["\n"],
        "<End Sub Searches>": ["\n"],
        "Generated Node #0,1: 27:[1] Operation: ": ["a", "\n"],
    },
    words="12:. \nabz",
    rare=["\n" + CALLS + END_CALLING],
    pieces=[CALLS],
)
BEGUN = (
    "{:04d}\n" + NODE + "0,1\nCurrent State: 9:[1, 2], Operations: []\nGenerated Node #0,1,1: 9:[3] Operation: 1+2=3z"
)

FORKS = "".join(f"<FORK-{i}>a</FORK-{i}>" for i in range(1000))
ASYNCTHINK = Habits(
    ("<FORK-", "</FORK-", "<JOIN-", "<RETURN>", "</RETURN>"),
    ["<FORK-"],
    [
        "1>a</FORK-1>b<JOIN-1>",
        "1>a</FORK-1><FORK-2>b</FORK-2><JOIN-2><JOIN-1>",
        "2>a</FORK-2><FORK-1>b</FORK-1><JOIN-1><JOIN-2>",
        "1>a</FORK-1><FORK-1>b</FORK-1><JOIN-1><JOIN-1>",
        "1>a</FORK-2>",
        "1><FORK-2>a</FORK-2></FORK-1>",  # tags in tags
        "1>a",
        ">a</FORK->",
        "x>a</FORK-x><JOIN-x>",
        "9" * 60 + ">a</FORK-" + "9" * 60 + ">",
        "1</FORK-1",
        "1>a</FORK-1><JOIN-",
    ],
    {
        **{mark: ["1", "2"] for mark in ("<FORK-", "</FORK-", "<JOIN-")},
        **{digit: [">"] * 8 + [".", "1"] for digit in "12"},
        ">": ["a", "a", "</FORK-", "<JOIN-"],
        "a": ["a", "</FORK-", "<JOIN-", "</RETURN>", "<FORK-"],
        "<RETURN>": ["a", "</RETURN>"],
        "</RETURN>": ["<JOIN-", "<FORK-", "a"],
        "\n": ["<RETURN>", "a"],
        "q": ["<FORK-"],
    },
    words="12>. \nab",
    rare=[FORKS + "</FORK-1><JOIN-999>"],
    pieces=[FORKS],
)

PROMPTS = "".join(f"<prompt_1.{i}>a</prompt_1.{i}>" for i in range(1000))
SPRINT = Habits(
    (
        *("<Plan_1>", "</Plan_1>", "<prompt_1.1>", "</prompt_1.1>", "<prompt_2>", "</prompt_2>"),
        *("</execution_1.1>", "</prompt_"),
    ),
    ["<Plan_1>"],
    [
        "<prompt_1.1>a</prompt_1.1></Plan_1>",
        "<prompt_1.1>a</prompt_1.1>b<prompt_1.2>b</prompt_1.2></Plan_1>",
        "<prompt_2>a</prompt_2><prompt_1.1>a</prompt_1.1></Plan_1>",
        "<prompt_1.1>a</prompt_1.1><prompt_1.1>b</prompt_1.1></Plan_1>",
        "<prompt_1.1><prompt_2>a</prompt_2></prompt_1.1></Plan_1>",  # tags in tags
        "<prompt_1.1>a</Plan_1>",
        "a</prompt_1.1></Plan_1>",
        "<prompt_1.1>a</prompt_1.1>",  # never closed
        "<prompt_1.1>a</prompt_</Plan_1>",  # truncated
        "</prompt_></Plan_1>",
        "<Plan_1></Plan_1>",
    ],
    {
        "q": ["<Plan_1>"],
        "a": ["a", "b", "<prompt_1.1>", "<prompt_2>", "</Plan_1>", "</execution_1.1>"],
        "b": ["</execution_1.1>", "</prompt_1.1>", "a"],
        "</prompt_": ["1", ">"],
        ">": ["a", "</execution_1.1>"],
        "</Plan_1>": ["a", "<Plan_1>"],
    },
    rare=[PROMPTS + "</prompt_1.1></Plan_1>"],
    pieces=[PROMPTS],
)

FORMATS = {
    "threadweaver": _threadweaver(ab.ThreadWeaver()),
    "threadweaver with conclusion": _threadweaver(ab.ThreadWeaver(conclusion=True)),
    "multiverse": _outlined(ab.Multiverse(min_left=5), "<Goal>", "<Outline>{id}: a</Outline>", "</Goal>", MULTIVERSE),
    "multiverse as released": _outlined(
        ab.Multiverse(min_left=5, released=True), "<Goal>", "<Outline>{id}: a</Outline>", "</Goal>", MULTIVERSE
    ),
    "npr": _outlined(ab.NPR(min_left=5, reserve=4), "<guideline>", "<plan>{id}: a</plan>", "</guideline>", NPR),
    "npr as trained": _outlined(
        ab.NPR(min_left=5, reserve=4, positions="training"),
        *("<guideline>", "<plan>{id}: a</plan>", "</guideline>", NPR),
    ),
    "medverse": Format(ab.MedVerse(), MEDVERSE, limits=(8, 40, 90)),
    "pasta": Format(ab.PASTA(), PASTA),
    "parallel-r1": Format(ab.ParallelR1(paths=3, path_tokens=12), PARALLEL_R1),
    "parallel-r1, shared": Format(ab.ParallelR1(paths=3, positions="shared", path_tokens=12), PARALLEL_R1),
    "parathinker": Format(ab.ParaThinker(paths=4, biased=False), _thoughts(4, "<summary>", "</summary>")),
    "ssft": Format(ab.SSFT(paths=4, vote="number"), _thoughts(6)),
    "sprint": Format(ab.SPRINT(execution_tokens=12), SPRINT),
    "asyncthink": Format(ab.AsyncThink(workers=2, worker_request="W {query}\n", reuse_ids=True), ASYNCTHINK, good=3),
    "apr": Format(ab.APR(depth=2), APR, limits=(20, 60, 120), prompt=BEGUN, good=3),
}

"""Draws the masks of the systems' pages from real traces: ``PYTHONPATH=python python docs/pictures/draw_masks.py``.

A tiny random model is made to write one well-formed answer in each format; the mask is that of the answer's training
row (`anabranch.training.from_trace`), so what is drawn is what the engine computed.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tests" / "kits"))

MULTIVERSE = "<Parallel><Goal><Outline>1: x</Outline><Outline>2: y</Outline></Goal>"
NPR = "<guideline><plan>1: x</plan><plan>2: y</plan></guideline>"
PASTA = 'a<promise topic="x" tokens="20"/>', 'b<promise topic="y"/>', "c<sync/>"
STEP = "<Outline> Transient Step {}: A -> {}; Dependency: [{}] </Outline>"
MEDVERSE = "<Plan>" + STEP.format(1, "B", "") + STEP.format(2, "C", "") + STEP.format(3, "D", "1") + "</Plan>"


def answers() -> dict:
    """Of each system: its strategy and the lines of a model, (all that stands before, what it then says)."""
    import anabranch as ab

    paths = ["\n<Path>\n1: a is 4.</Path>", "\n<Path>\n2: b is 25.</Path>"]
    steps = ["<step>\n1: a is 4.</step>\n", "<step>\n2: b is 25.</step>\n"]
    texts = ["<async>first</async>", "<async>second</async>"]
    begin = MEDVERSE + "\n<Execution>\n"
    acts = {n: f"<Step> Transient Step {n}: A -> {to}\n" for n, to in (("1", "B"), ("2", "C"), ("3", "D"))}
    done = {n: head + "text</Step>" for n, head in acts.items()}
    return {
        "multiverse": (
            ab.Multiverse(),
            [
                ("q", MULTIVERSE),
                *(("q" + MULTIVERSE + p[:10], p[10:]) for p in paths),
                ("q" + MULTIVERSE + "".join(paths) + "<Conclusion>\n", "29</Conclusion></Parallel><eos>"),
            ],
        ),
        "npr": (
            ab.NPR(),
            [
                ("q", NPR),
                *(("q" + NPR + "\n" + s[:9], s[9:]) for s in steps),
                ("q" + NPR + "\n" + "".join(steps) + "<takeaway>\n", "29</takeaway><eos>"),
            ],
        ),
        "pasta": (
            ab.PASTA(),
            [
                ("q", "".join(PASTA)),
                ("q" + PASTA[0] + "<async>", texts[0][7:]),
                ("q" + PASTA[0] + PASTA[1] + "<async>", texts[1][7:]),
                ("q" + "".join(PASTA) + "".join(texts) + "\n", "end<eos>"),
            ],
        ),
        "medverse": (
            ab.MedVerse(),
            [
                ("q", MEDVERSE),
                ("q" + begin + acts["1"], "text</Step>"),
                ("q" + begin + acts["2"], "text</Step>"),
                ("q" + begin + done["1"] + acts["3"], "text</Step>"),
                ("q" + begin + "".join(done.values()) + "</Execution>\n<Conclusion>\n", "so</Conclusion><eos>"),
            ],
        ),
    }


def layouts() -> dict:
    """Of each system the packed row of its answer."""
    from tagged_kit import Stage

    from anabranch.training import from_trace

    found = {}
    for name, (strategy, lines) in answers().items():
        stage = Stage(getattr(strategy, "tags", ()))
        found[name] = from_trace(stage.play("q", *lines, strategy=strategy, exact=False))
    return found


if __name__ == "__main__":
    for name, layout in layouts().items():
        layout.mask.plot(HERE / f"mask_{name}.svg", title=f"{name}: row sees column")

"""Each row of the table of parallel-reasoning systems as a small strategy: the protocol holds them, to the position.

What a child sees, what the parent gets at the join, the child's first position, the position after the join, and what
becomes of the KV. Every sampled row's scores are compared with a dense recomputation of what the row may see.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from engine_kit import (
    EOS,
    Dense,
    Recorder,
    assert_dense,
    assert_nothing_held,
    byte_tokenizer,
    make_engine,
)
from threadweaver_kit import TAGS, play
from threadweaver_kit import ids as tag_ids
from transformers import LogitsProcessor

from anabranch.strategies import Strategy, Tagged, first


def ids(text: str) -> tuple[int, ...]:
    return tuple(byte_tokenizer()(text)["input_ids"])


class Lines(LogitsProcessor):
    """Makes the model say what is written: `lines` are (all that stands before, what it then says); EOS is "$"."""

    def __init__(self, *lines: tuple[str, str]):
        self.next: dict[tuple[int, ...], int] = {}
        for before, says in lines:
            context = ids(before)
            for char in says:
                token = EOS if char == "$" else ids(char)[0]
                assert self.next.setdefault(context, token) == token, "the script contradicts itself"
                context += (token,)

    def __call__(self, input_ids, scores):
        token = self.next[tuple(input_ids[0].tolist())]
        return torch.full_like(scores, -torch.inf).index_fill(-1, torch.tensor(token), 0.0)


def act(strategy, prompt, *lines, engine=None):
    """Generate from a script; every row's scores that stand in the final tree are compared with the dense ones."""
    recorder = Recorder()
    engine = engine or make_engine(tokenizer=byte_tokenizer(), num_pages=400)
    result = engine.generate(
        prompt, strategy=strategy, logits_processor=[recorder, Lines(*lines)], max_new_tokens=400, seed=0
    )
    assert_nothing_held(engine)
    dense = Dense(result, "llama")
    compared = 0
    for context, scores in recorder.seen:
        if context in dense.by_context:  # not what a rewriting join has deleted
            torch.testing.assert_close(scores, dense.by_context[context], atol=2e-4, rtol=2e-4)
            compared += 1
    return result, compared


# ------------------------------------------------------------------------------------------------ APR


@dataclass(frozen=True)
class Apr(Strategy):
    """Fresh contexts; the calling block is rewritten by what the children found."""

    def run(self, trunk):
        while True:
            begin = trunk.length
            end = yield trunk.decode(stop="<End Calling Sub Searches>")
            if end.reason != "stop":
                return
            calls = re.findall(r"<Start Sub Search (\d+) at level (\d+)> (Moving to Node (#[\d,]+))", end.text)
            start = begin + len(trunk.encode(end.text[: end.text.index("<Calling")]))
            kids = [trunk.spawn(f"{move}\nState: {name}\n") for _, _, move, name in calls]
            found = yield [kid.decode() for kid in kids]
            lines = ["<Sub Searches>"]
            for (number, level, _, name), ended in zip(calls, found, strict=True):
                good = "Goal Reached" in ended.text
                lines.append(
                    f"<{'Goal Reached' if good else 'No Solution'} in Sub Search {number} at {level} at {name}>"
                )
                lines += [ended.text] * good
            trunk.join(kids, "summary", text="\n".join([*lines, "<End Sub Searches>\n"]), keep=start)


def test_apr_fresh_contexts_and_a_join_that_rewrites():
    calls = "<Calling Sub Searches>\n" + "".join(
        f"<Start Sub Search {i} at level 1> Moving to Node #0,{i}\n" for i in (0, 1)
    )
    calls += "<End Calling Sub Searches>"
    fresh = [f"Moving to Node #0,{i}\nState: #0,{i}\n" for i in (0, 1)]
    after = (
        "<Sub Searches>\n<No Solution in Sub Search 0 at 1 at #0,0>\n<Goal Reached in Sub Search 1 at 1 at #0,1>\n"
        "2,2 equal: Goal Reached\n<End Sub Searches>\n"
    )
    result, compared = act(
        Apr(),
        "27: ",
        ("27: ", "try " + calls),
        (fresh[0], "No solution found.$"),
        (fresh[1], "2,2 equal: Goal Reached$"),
        ("27: try " + after, "done$"),
    )
    assert result.text == "try " + after + "done"  # the calling block is gone, what stood before it is not
    assert [(k.role, k.start, k.forked_at) for k in result.tree.children] == [("fresh", 0, 0)] * 2
    assert len(result.tree.forgotten) == 1
    runs = result.tree.runs  # dense in the parent
    assert [r.position for r in runs] == [sum(len(q.token_ids) for q in runs[:i]) for i in range(len(runs))]
    # All rows but those inside the deleted block (two of it are still there: both blocks begin with "<").
    assert compared == result.metrics.sampled_tokens - len(ids(calls)) + 2
    assert (
        result.metrics.critical_path_tokens == len(ids("try " + calls + "2,2 equal: Goal Reached" + after + "done")) + 2
    )


# ------------------------------------------------------------------------------------------------ Multiverse, NPR

MULTIVERSE = Tagged(
    tags=TAGS,
    opening="<Outlines>",  # here: <Goal>
    trigger="</Outlines>",  # </Goal>
    outline=r"<Outline>\s*([0-9]+(?:\.[0-9]+)*)\s*:",
    header="<Thread>{id}:",  # <Path>
    stop="</Thread>",
    unclosed="</Thread>",
    after="</Parallel>",  # <Conclusion>
    closing="",
    shape="(<Parallel>)?(<Outlines>(<Outline></Outline>)+</Outlines>(<Thread></Thread>)+</Parallel>)*",
    join="concat",
)


def test_multiverse_and_npr_siblings_stay_blind_and_share_positions():
    goal = "<Parallel><Outlines><Outline>1: a</Outline><Outline>2: b</Outline></Outlines>"
    paths = ["<Thread>1: ab</Thread>", "<Thread>2: a long one</Thread>"]
    recorder = Recorder()
    result = play(
        "p",
        ("p", goal),
        *((f"p{goal}{path[:10]}", path[10:]) for path in paths),
        ("p" + goal + "".join(paths) + "</Parallel>", "so<eos>"),
        strategy=MULTIVERSE,
        recorder=recorder,
    )
    g = len(tag_ids("p" + goal)) - 1  # position of </Goal>
    assert [kid.start for kid in result.tree.children] == [g + 1] * 2
    m = max(kid.stop - 1 - g for kid in result.tree.children)
    conclusion = next(run for run in result.tree.runs if run.kind == "inserted")
    assert conclusion.position == g + m + 1
    assert [run.spliced for run in result.tree.runs] == [False, False, True, True, False, False]
    assert assert_dense(result, recorder, "llama") == result.metrics.sampled_tokens and result.malformed == ()
    # Nothing is computed again: each token once, but for the last, never needed.
    assert result.metrics.rows == 1 + result.metrics.total_tokens - 1


@dataclass(frozen=True)
class Nested(Strategy):
    """Multiverse nests: a path forks and joins inside itself."""

    def run(self, trunk):
        yield from self.block(trunk, 2)
        yield trunk.decode()

    def block(self, thread, depth):
        yield thread.decode(stop="/")
        kids = thread.fork(["1", "2"])
        yield [self.block(kid, depth - 1) if depth > 1 else kid.decode(stop=";") for kid in kids]
        thread.join(kids)
        thread.insert("=")
        if depth < 2:
            yield thread.decode(stop=";")


def test_multiverse_nests():
    lines = [("p", "a/"), ("pa/1", "b/"), ("pa/2", "cc/")]
    lines += [("pa/1b/1", "x;"), ("pa/1b/2", "yy;"), ("pa/2cc/1", "z;"), ("pa/2cc/2", "w;")]
    lines += [("pa/1b/1x;2yy;=", "s;"), ("pa/2cc/1z;2w;=", "t;")]
    lines += [("pa/1b/1x;2yy;=s;2cc/1z;2w;=t;=", "end$")]
    result, compared = act(Nested(), "p", *lines)
    assert result.text == "a/1b/1x;2yy;=s;2cc/1z;2w;=t;=end"
    assert compared == result.metrics.sampled_tokens and result.metrics.num_forks == 3
    left, right = result.tree.children
    # base 3; inside: header 1, two sampled, then the longer of the two paths, "=" and what follows.
    assert (left.start, left.stop, right.stop) == (3, 3 + 3 + 4 + 1 + 2, 3 + 4 + 3 + 1 + 2)
    assert result.tree.runs[-2].position == max(left.stop, right.stop)


# ------------------------------------------------------------------------------------------------ Parallel-R1


@dataclass(frozen=True)
class ParallelR1(Strategy):
    """The model opens, the runtime fixes the number of paths and asks for the summary."""

    paths: int = 2
    most: int = 4
    joined: str = "reprefill"  # released inference: dense; "concat": as in training, siblings masked

    def run(self, trunk):
        for _ in range(self.most):
            end = yield trunk.decode(stop="<Parallel>")
            if end.reason != "stop":
                return
            kids = trunk.fork(["<Path>"] * self.paths)
            yield [kid.decode(stop="</Path>") for kid in kids]
            trunk.join(kids, self.joined)
            trunk.insert("</Parallel>\n<Summary>")


@pytest.mark.parametrize("joined", ["reprefill", "concat"])
def test_parallel_r1_the_runtime_asks_for_the_summary(joined):
    open_ = "p: <Parallel><Path>"

    class Both(Lines):
        """Two paths with one header have the same context: each says what it drew first."""

        def __call__(self, input_ids, scores):
            if tuple(input_ids[0].tolist()) == ids(open_):
                allowed = torch.tensor(ids("ab"))
                return torch.full_like(scores, -torch.inf).index_copy(-1, allowed, scores[:, allowed])
            return super().__call__(input_ids, scores)

    recorder, engine = Recorder(), make_engine(tokenizer=byte_tokenizer(), num_pages=400)
    orders = {"aa": ("a", "a"), "ab": ("a", "b"), "ba": ("b", "a"), "bb": ("b", "b")}
    text = {"a": "a.</Path>", "b": "bbb.</Path>"}
    lines = [("p", ": <Parallel>"), (open_ + "a", ".</Path>"), (open_ + "b", "bb.</Path>")]
    for x, y in orders.values():
        lines.append((f"{open_}{text[x]}<Path>{text[y]}</Parallel>\n<Summary>", "so</Summary>$"))
    result = engine.generate(
        "p",
        strategy=ParallelR1(joined=joined),
        logits_processor=[recorder, Both(*lines)],
        max_new_tokens=200,
        seed=1,
        do_sample=True,
        top_k=0,
    )
    assert_nothing_held(engine)
    kids = result.tree.children
    base = len("p: <Parallel>")
    assert [k.start for k in kids] == [base, base] and kids[0].text != kids[1].text
    assert result.text == ": <Parallel>" + kids[0].text + kids[1].text + "</Parallel>\n<Summary>so</Summary>"
    summary = next(r for r in result.tree.runs if r.kind == "inserted")
    longest, total = max(len(k.token_ids) for k in kids), sum(len(k.token_ids) for k in kids)
    assert summary.position == base + (total if joined == "reprefill" else longest)
    assert [r.spliced for r in result.tree.runs if r.kind == "joined"] == [True, joined == "concat"]
    # (Two contexts are alike up to the first letter, so the recorder has them twice.)
    assert assert_dense(result, recorder, "llama") == result.metrics.sampled_tokens


# ------------------------------------------------------------------------------------------------ ParaThinker


@dataclass(frozen=True)
class ParaThinker(Strategy):
    """The caller chooses how many; each path has its own tag; a summary is forced with all in sight."""

    paths: int = 3

    def run(self, trunk):
        kids = trunk.fork([f"<think{i}>" for i in range(1, self.paths + 1)])
        yield [kid.decode(stop=f"</think{i}>") for i, kid in enumerate(kids, 1)]
        trunk.join(kids)
        trunk.insert("<summary>")
        yield trunk.decode()


def test_parathinker_reuses_the_paths_kv_and_goes_on_from_the_longest():
    thoughts = ["<think1>a</think1>", "<think2>bb bb</think2>", "<think3>cc</think3>"]
    result, compared = act(
        ParaThinker(),
        "why",
        *(("why" + t[:8], t[8:]) for t in thoughts),
        ("why" + "".join(thoughts) + "<summary>", "ok$"),
    )
    assert {kid.start for kid in result.tree.children} == {3}
    assert result.tree.runs[-2].position == max(kid.stop for kid in result.tree.children)
    assert compared == result.metrics.sampled_tokens and result.metrics.threads_per_block == (3,)
    assert result.metrics.rows == 3 + result.metrics.total_tokens - 1
    # What the protocol does not hold: the learned K and V bias of each path (a change to the model, not to the loop).


# ------------------------------------------------------------------------------------------------ PASTA


@dataclass(frozen=True)
class Pasta(Strategy):
    """The main thread goes on after a promise; it blocks only at <sync/>."""

    def run(self, trunk):
        pending = []
        while True:
            end = yield trunk.decode(stop=["<promise/>", "<sync/>"])
            if end.stop == "<promise/>":
                pending += trunk.fork(["<async>"])
                pending[-1].decode(stop="</async>")
            elif end.stop == "<sync/>" and pending:
                yield trunk.join(pending, "reprefill")
                pending = []
            else:
                return


def test_pasta_forks_without_blocking():
    begin = "a<promise/>"
    main = begin + "bb<promise/>" + "c<sync/>"
    asyncs = ["<async>first, long and slow</async>", "<async>2</async>"]
    result, compared = act(
        Pasta(),
        "p",
        ("p", main),
        ("p" + begin + "<async>", asyncs[0][7:]),
        ("p" + begin + "bb<promise/><async>", asyncs[1][7:]),
        ("p" + main + "".join(asyncs), "end$"),
    )
    assert result.text == main + "".join(asyncs) + "end" and compared == result.metrics.sampled_tokens
    assert [kid.forked_at for kid in result.tree.children] == [1 + len(begin), 1 + len(begin) + len("bb<promise/>")]
    metrics = result.metrics
    # The trunk and both threads wrote at the same time; the first thread is the longest way to the join.
    assert metrics.max_concurrency >= 2 and metrics.threads_per_block == (1, 1)
    assert metrics.critical_path_tokens == len(begin) + len(asyncs[0]) + len("end$")


# ------------------------------------------------------------------------------------------------ AsyncThink


@dataclass(frozen=True)
class AsyncThink(Strategy):
    """<FORK-i> hands worker i a sub-query and the organizer goes on; <JOIN-i> waits for its <RETURN>."""

    workers: int = 2

    def run(self, trunk):
        busy = {}
        while True:
            end = yield trunk.decode(stop=[*(f"{t}-{i}>" for t in ("</FORK", "<JOIN") for i in range(9))])
            if end.reason != "stop":
                return list(busy)
            kind, number = end.stop.strip("</>").split("-")
            if kind == "FORK" and (number in busy or len(busy) == self.workers):
                trunk.malformed(f"fork of {number}: given twice, or more than {self.workers}")
            elif kind == "FORK":
                query = end.text.rpartition(f"<FORK-{number}>")[2].removesuffix(end.stop)
                busy[number] = trunk.spawn(f"Work: {query}\n")
                busy[number].decode(stop="</RETURN>")
            elif number not in busy:
                trunk.malformed(f"join of {number}, which was never forked")
            else:
                worker = busy.pop(number)
                yield worker
                answer = worker.ended.text.rpartition("<RETURN>")[2].removesuffix("</RETURN>")
                trunk.join(worker, "summary", text=f"<RETURN>{answer}</RETURN>")


def test_asyncthink_workers_of_fresh_contexts_joined_where_asked_for():
    forks = "<FORK-1>a?</FORK-1>hm<FORK-2>b?</FORK-2>"
    mid = "<JOIN-2><RETURN>B</RETURN>"
    tail = "<JOIN-7>x<JOIN-1>"
    result, compared = act(
        AsyncThink(),
        "q",
        ("q", forks + "<JOIN-2>"),
        ("Work: a?\n", "long long long thought<RETURN>A</RETURN>"),
        ("Work: b?\n", "t<RETURN>B</RETURN>"),
        ("q" + forks + mid, tail),
        ("q" + forks + mid + tail + "<RETURN>A</RETURN>", "AB$"),
    )
    assert result.text == forks + mid + tail + "<RETURN>A</RETURN>AB" and result.answers == []
    assert result.malformed == ("thread 0: join of 7, which was never forked",)
    assert [(k.role, k.start, k.fate) for k in result.tree.children] == [("fresh", 0, "joined")] * 2
    assert compared == result.metrics.sampled_tokens  # the organizer's rows and the workers'
    runs = result.tree.runs
    assert [r.position for r in runs] == [sum(len(q.token_ids) for q in runs[:i]) for i in range(len(runs))]


# ------------------------------------------------------------------------------------------------ live sharing


@dataclass(frozen=True)
class TakeTurns(Strategy):
    """Group Think as far as the protocol goes: workers that see each other's words a round later, not a token later."""

    workers: int = 2
    rounds: int = 3

    def run(self, trunk):
        for _ in range(self.rounds):
            kids = trunk.fork([f"[{i}]" for i in range(self.workers)])
            yield [kid.decode(2) for kid in kids]
            trunk.join(kids)
        trunk.insert("=")
        yield trunk.decode(2)


def test_workers_that_share_by_rounds_are_exact():
    recorder, engine = Recorder(), make_engine(tokenizer=byte_tokenizer(), num_pages=400)
    result = engine.generate("go", strategy=TakeTurns(), logits_processor=[recorder], eos_token_id=None)
    assert_nothing_held(engine)
    assert assert_dense(result, recorder, "llama") == 3 * 2 * 2 + 2
    by_round = [[k.start for k in result.tree.children[i : i + 2]] for i in (0, 2, 4)]
    assert by_round == [[2, 2], [7, 7], [12, 12]]
    seen = [k.forked_at for k in result.tree.children]
    assert seen == [2, 2, 12, 12, 22, 22]  # from the second round on, all that all have written


def test_the_race_of_two_workers_ends_with_the_first():
    """Hogwild!'s and Group Think's way to end: the answer of whoever has it first."""

    @dataclass(frozen=True)
    class Race(Strategy):
        def run(self, trunk):
            kids = trunk.fork(["a", "b"])
            index, _ = yield first(*(kid.decode(stop="!") for kid in kids))
            trunk.join([kids[1 - index]], "discard")
            yield trunk.join(kids[index])
            return index

    result, _ = act(Race(), "p", ("pa", "1234567!"), ("pb", "12!"))
    assert result.answers == 1 and result.text == "b12!" and result.tree.children[0].fate == "discarded"

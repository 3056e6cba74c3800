"""A strategy of one's own: fork where the model is unsure, keep the branch it is surest of.

    python examples/custom_strategy.py "What makes bread rise?"

A strategy is a small frozen dataclass with a generator `run(trunk)`. It asks threads for things (decode, fork, join, …)
and yields what it wants to wait for; it never meets a tensor or the model, and all its threads share their steps.
"""

import sys
from dataclasses import dataclass

import anabranch as ab
from anabranch.strategies import Strategy


@dataclass(frozen=True)
class ForkWhereUnsure(Strategy):
    """Decode until the next token's entropy passes `threshold` (nats); try `n` ways on; go on with the likeliest."""

    n: int = 4
    threshold: float = 2.0
    look_ahead: int = 12
    most_forks: int = 3

    def run(self, trunk):
        for _ in range(self.most_forks):
            ended = yield trunk.decode(stats=True, until=lambda d: d.stats[-1].entropy > self.threshold)
            if ended.reason != "until":
                return  # finished without (further) doubt
            trunk.truncate(trunk.length - 1)  # the doubtful token: every branch draws its own
            kids = trunk.fork(self.n)
            sampling = {"do_sample": True, "temperature": 1.0}
            ends = yield [kid.decode(self.look_ahead, sampling=sampling, stats=True) for kid in kids]
            sure = [sum(s.logprob for s in end.stats) / max(1, len(end.stats)) for end in ends]
            best = kids[sure.index(max(sure))]
            trunk.join([kid for kid in kids if kid is not best], mode="discard")
            trunk.join(best)
            if best.ended.reason == "eos":
                return
        yield trunk.decode()


def main(question: str) -> None:
    model, tokenizer = ab.models.load("smollm2")
    engine = ab.Engine(model, tokenizer)
    result = engine.generate([{"role": "user", "content": question}], strategy=ForkWhereUnsure(), max_new_tokens=120)
    print(result.text, "\n")
    print(result.tree.pretty(), "\n")
    m = result.metrics
    print(f"{m.num_forks} forks, {m.total_tokens} tokens ({m.critical_path_tokens} in a row), {m.wall_seconds:.1f} s")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "What makes bread rise?")

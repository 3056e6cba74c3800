"""The public names, and the README's code as a reader would run it."""

from __future__ import annotations

import copy
import re
from pathlib import Path

from engine_kit import byte_tokenizer, make_model

import anabranch as ab

README = Path(__file__).resolve().parents[1] / "README.md"


def test_every_public_name_is_there() -> None:
    for name in ab.__all__:
        assert getattr(ab, name) is not None
    assert set(ab.__all__) <= set(dir(ab))
    assert ab.Sequential(ab.Aspects()).strategy == ab.Aspects()


def test_the_readme_runs(monkeypatch) -> None:
    """With a tiny random model in SmolLM2's place."""
    model, tokenizer = make_model("llama"), copy.deepcopy(byte_tokenizer())  # its template is changed
    monkeypatch.setattr("anabranch.models.load", lambda name: (model, tokenizer))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 1
    names: dict = {"__name__": "readme"}
    for block in blocks:
        exec(block, names)  # one namespace: later blocks use what earlier ones made
    result = names["engine"].generate("abc\n", strategy=names["ProsAndCons"](), max_new_tokens=70)
    assert result.metrics.num_threads == 2

"""How many steps a run may still take: what hangs fails."""

from __future__ import annotations

from anabranch.engine.stepper import Stepper


class Steps:
    """Set `left` before a run; `watch` counts it down for the length of a test."""

    left = 0

    @classmethod
    def watch(cls, monkeypatch, left: int = 0) -> None:
        cls.left, step = left, Stepper.step

        def counted(self) -> None:
            cls.left -= 1
            assert cls.left > 0, "far too many steps: it does not get on"
            step(self)

        monkeypatch.setattr(Stepper, "step", counted)

"""How long a thread's next guess may be: longer where guesses come true, down to none where they do not."""

from __future__ import annotations

FIRST = 3  # tokens of a thread's first guess
PATIENCE = 4  # guesses in a row that may fail
LONGEST_WAIT = 16  # steps without a guess, at most


class Pace:
    """Of one thread. A guess that comes true to its end doubles the next one, one that fails at once shortens it; after
    more than `PATIENCE` of those in a row there is none for 1, 2, 4 … steps."""

    def __init__(self, most: int):
        self.most, self.length = most, min(FIRST, most)
        self._wait = self._failed = 0

    def next_length(self) -> int:
        """Most tokens of the guess for this step."""
        if self._wait:
            self._wait -= 1
            return 0
        return self.length

    def told(self, longest: int, accepted: int) -> None:
        """A guess was verified whose first path had `longest` tokens; `accepted` came true, on whatever path."""
        if accepted:
            self._failed = 0
            self.length = min(self.most, 2 * self.length if accepted >= longest else accepted + 1)
            return
        self._failed += 1
        self.length = max(1, self.length - 1)
        if self._failed > PATIENCE:
            self._wait = min(LONGEST_WAIT, 2 ** (self._failed - PATIENCE - 1))

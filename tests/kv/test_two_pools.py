"""A cache whose K and V have pools of their own, and one whose V is a part of K: against the naive twin."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test
from programs import Twins
from test_cache import CacheMachine


@pytest.mark.parametrize("kv_format", ["auto", "int8"])
@pytest.mark.parametrize("v_in_k", [False, True])
def test_the_cache_against_its_twin(v_in_k, kv_format):
    """Copy-on-write, joins, truncation, shortage, as for a cache whose K and V are alike."""

    class Machine(CacheMachine):
        @initialize(page_size=st.sampled_from([1, 3, 16]), pages=st.sampled_from([24, 400]), seed=st.integers(0, 99))
        def start(self, page_size: int, pages: int, seed: int) -> None:
            self.twins = Twins(pages, page_size, 2, 1, 12, seed=seed, v_dim=5, v_in_k=v_in_k, kv_format=kv_format)
            self.twins.branch()

    run_state_machine_as_test(Machine, settings=settings(max_examples=6, stateful_step_count=30, deadline=None))

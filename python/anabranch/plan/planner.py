"""The plans of one cache: their parameters, their arrays on the host and on the device, in one place.

The C++ planner keeps a plan while the topology of its tree stays and advances it in place; each build has a number of
its own. Here that number decides whether arrays that are already wrapped (host) or resident (device) can be used again.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from anabranch import _core
from anabranch.errors import TopologyChanged
from anabranch.plan.arrays import PlanArrays, capturing, split_buffers, upload
from anabranch.plan.resident import AdvanceKernel, ResidentPlan
from anabranch.plan.tile_config import TileConfig, core_params

#: group (query heads per KV head) and how the backend wants its work cut
PlanKey = tuple[int, TileConfig]


class Planner:
    """Answers for the plans of every step of one cache.

    Args:
        plan: the C++ planner's call, ``plan(step, params) -> PlanResult``.
        device: where arrays are needed.
        advance_kernel: a backend's ``advance`` for arrays on that device; None: PyTorch's operators.
    """

    def __init__(
        self,
        plan: Callable[[_core.Step, _core.PlanParams], _core.PlanResult],
        device: torch.device,
        advance_kernel: AdvanceKernel | None = None,
    ) -> None:
        self.device = device
        self.advance_kernel = advance_kernel
        self._plan = plan
        #: arrays are views of the planner's buffers; False: resident, as on a GPU (tests set it to try that on a CPU)
        self.on_host = device.type == "cpu"
        self._params: dict[PlanKey, _core.PlanParams] = {}
        self._wrapped: dict[PlanKey, tuple[int, PlanArrays]] = {}  # on the host: (build, arrays)
        self._resident: dict[PlanKey, ResidentPlan] = {}  # on a device

    def result(self, step: _core.Step, key: PlanKey) -> _core.PlanResult:
        """What the C++ planner says for this step: a plan built anew or advanced in place. Ask once per step."""
        params = self._params.get(key)
        if params is None:
            params = self._params[key] = core_params(*key)
        return self._plan(step, params)

    def arrays(self, result: _core.PlanResult, key: PlanKey, places: Callable[[], tuple[Tensor, Tensor]]) -> PlanArrays:
        """The arrays of a result, the planner's latest, on the device: there already, a step behind, or sent anew.

        Args:
            places: gives the step's slots (int32 [rows]) and positions (int64 [rows]) on the device.

        Raises:
            TopologyChanged: in a CUDA graph capture, for arrays that are not on the device yet.
        """
        if self.on_host:
            build, arrays = self._wrapped.get(key, (-1, None))
            if arrays is None or build != result.build:
                arrays = split_buffers(result, self.device)
                self._wrapped[key] = (result.build, arrays)
            return arrays  # else advanced in place: the same memory, already wrapped
        resident = self._resident.get(key)
        at = None if resident is None or resident.build != result.build else result.advances - resident.advances
        if resident is not None and at == 1:
            resident.advance(*places(), self.advance_kernel)
        elif resident is not None and at == 0:
            return resident.arrays
        else:
            if capturing(self.device):
                raise TopologyChanged(
                    "step: this plan is not on the GPU yet, or the tree's topology changed, which a captured CUDA "
                    "graph cannot follow; run one step of this topology eagerly, then capture the next one"
                )
            resident = self._resident[key] = ResidentPlan(result, self.device)
        return resident.arrays

    def upload(self, array: np.ndarray) -> Tensor:
        """Numbers of a step on the device.

        Raises:
            TopologyChanged: in a CUDA graph capture, whose replays would all read the same numbers.
        """
        if not self.on_host and capturing(self.device):
            raise TopologyChanged(
                "step: it is not on the GPU yet, and what a captured CUDA graph copies there stays the same in every "
                "replay; make and use steps outside the capture, or let anabranch.DecodeGraph capture the forward"
            )
        return upload(array, self.device)

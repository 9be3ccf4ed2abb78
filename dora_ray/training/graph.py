"""CUDA graphs: the views, forward and backward of a slot as one launch.

A step of ViT-S/16 has 2,800 kernels, of 40 microseconds each on average on an H100, and PyTorch takes longer than that
to launch one: the GPU would idle for over a third of the step. A CUDA graph records the launches once and repeats them
without Python. They are the same kernels, so a slot has the same bits with and without it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Calls without a graph, which compile, choose kernels and allocate what they keep.
WARM_UP_CALLS = 2

Inputs = Mapping[str, Tensor]
Compute = Callable[[Inputs], list[Tensor]]


@dataclass(frozen=True)
class _Recorded:
    """A recorded computation, with the fixed memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    outputs: list[Tensor]

    def repeat(self, inputs: Inputs) -> list[Tensor]:
        for name, fixed in self.inputs.items():
            fixed.copy_(inputs[name])
        self.graph.replay()
        # The next repetition overwrites the outputs.
        return [output.clone() for output in self.outputs]


@dataclass
class Graphs:
    """The graphs of a process: one for each kind of slot.

    They keep the memory of a slot's forward and backward, which all of them share.
    """

    _recorded: dict[Hashable, _Recorded] = field(default_factory=dict)
    _calls: dict[Hashable, int] = field(default_factory=dict)
    _weights: tuple[int, ...] = ()

    def run(self, kind: Hashable, compute: Compute, inputs: Inputs, weights: Sequence[Tensor]) -> list[Tensor]:
        """Compute a slot, from the third one of its kind on by a graph.

        Args:
            kind: what decides the operations and shapes, apart from the inputs.
            compute: a function of the inputs and the weights which only queues work on the GPU: it neither copies from
                the host nor waits, and draws random numbers from the GPU's default generator alone.
            inputs: tensors of the same names and shapes for every slot of a kind.
            weights: every other tensor that `compute` reads. Graphs refer to their memory: if one has moved, all are
                recorded anew.
        """
        addresses = tuple(tensor.data_ptr() for tensor in weights)
        if addresses != self._weights:
            self.release()
            self._weights = addresses
        if kind not in self._recorded:
            self._calls[kind] = self._calls.get(kind, 0) + 1
            if self._calls[kind] <= WARM_UP_CALLS:
                return compute(inputs)
            self._recorded[kind] = self._record(compute, inputs)
        return self._recorded[kind].repeat(inputs)

    @property
    def number(self) -> int:
        """Number of graphs recorded at present."""
        return len(self._recorded)

    def release(self) -> None:
        """Free the memory of all graphs. Later slots record them again."""
        self._recorded.clear()

    def _record(self, compute: Compute, inputs: Inputs) -> _Recorded:
        fixed = {name: tensor.clone() for name, tensor in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        pool = next((other.graph.pool() for other in self._recorded.values()), None)
        # Other threads may use the GPU meanwhile: NCCL's watchdog asks for its events.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = compute(fixed)
        return _Recorded(graph, fixed, outputs)

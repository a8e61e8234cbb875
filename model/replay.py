"""Loss and gradients recorded once as a CUDA graph and replayed: kernels that start without Python.

Must not know networks, recipes or data.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html, "Whole-network capture".
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

N_WARM_UP = 3
"""Runs before recording: cuDNN chooses its algorithms in them."""


class Replay:
    """One step's loss and gradients, as many times as there are batches.

    Args:
        loss: Of tensors; does the same operations each time, whatever they hold, and never asks for a value.
        module: Its trained parameters get the gradients. Its buffers are as before when this returns.
        example: Tensors as every call will bring them, of the same shapes, types and device.

    Cost: a few steps. Memory for all that one step keeps is taken now and held, for each recording by itself.
    """

    def __init__(self, loss: Callable[..., Tensor], module: nn.Module, example: Sequence[Tensor]) -> None:
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._inputs = [tensor.clone() for tensor in example]
        device = self._inputs[0].device
        before = [buffer.clone() for buffer in module.buffers()]
        random = torch.cuda.get_rng_state(device)

        def run() -> tuple[Tensor, tuple[Tensor | None, ...]]:
            value = loss(*self._inputs)
            return value.detach(), torch.autograd.grad(value, self._parameters, allow_unused=True)

        beside = torch.cuda.Stream(device)
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            for _ in range(N_WARM_UP):
                run()
        torch.cuda.current_stream(device).wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        # A stream of the device itself: the default is one of whichever device is current.
        with torch.cuda.device(device), torch.cuda.graph(self._graph, stream=beside):
            self._loss, self._gradients = run()
        for buffer, kept in zip(module.buffers(), before, strict=True):
            buffer.copy_(kept)
        torch.cuda.set_rng_state(random, device)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Leave the gradients in the parameters, None where a parameter took no part; returns the loss.

        Raises:
            ValueError: a tensor has another shape than the one that was recorded with.
        """
        for place, value in zip(self._inputs, inputs, strict=True):
            if place.shape != value.shape:
                raise ValueError(
                    f"recorded with shape {tuple(place.shape)}, called with {tuple(value.shape)}"
                )
            place.copy_(value)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._loss.clone()

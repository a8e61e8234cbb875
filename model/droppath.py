"""Drop-path: which paths of a fractal network live through one batch.

Pure sampling from a generator: must not know the network, only how many inputs its joins have.

Source: Larsson et al., arXiv 1605.07648, section 3; a mask per join and batch, the mean over the survivors
alone and one survivor revived at random where all were dropped, as in `fractal_join_layer.cpp` of
https://github.com/gustavla/fractalnet.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.fractalnet import JoinMasks, join_sizes


@dataclass(frozen=True)
class Local:
    """The joined net, with some inputs of its joins dropped; the masks may be numbers: `join_weights`."""

    masks: JoinMasks | Tensor


@dataclass(frozen=True)
class Global:
    """One column through the whole network (1 = shallowest)."""

    column: int


Paths = Local | Global


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


def _choice(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=generator))


def sample_join(n_inputs: int, drop: float, generator: torch.Generator) -> tuple[bool, ...]:
    """Drop each input of one join with probability `drop`, but never all: then a random one survives."""
    keep = [_uniform(generator) >= drop for _ in range(n_inputs)]
    if not any(keep):
        keep[_choice(n_inputs, generator)] = True
    return tuple(keep)


def sample_local(n_blocks: int, n_columns: int, drop: float, generator: torch.Generator) -> Local:
    """Masks for every join of the network, independently.

    Raises:
        ValueError: if `drop` is not a probability below 1.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"the drop rate must be at least 0 and below 1, not {drop}")
    sizes = join_sizes(n_columns)
    return Local(tuple(tuple(sample_join(n, drop, generator) for n in sizes) for _ in range(n_blocks)))


def sample_global(n_columns: int, generator: torch.Generator) -> Global:
    """One column for the whole network, uniformly."""
    return Global(1 + _choice(n_columns, generator))


def sample(
    n_blocks: int, n_columns: int, drop: float, local_share: float, generator: torch.Generator
) -> Paths:
    """Local drop-path with probability `local_share`, else global. The paper mixes half and half."""
    if not 0 <= local_share <= 1:
        raise ValueError(f"the local share must be a probability, not {local_share}")
    if _uniform(generator) < local_share:
        return sample_local(n_blocks, n_columns, drop, generator)
    return sample_global(n_columns, generator)

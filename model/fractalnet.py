"""FractalNet: the expansion rule, the join, and every column as a plain network of its own.

Must not know how masks are drawn (`droppath`), how the network is trained or how it is exported: which paths
are alive comes in as an argument, so that a forward pass is a function of its inputs and its weights alone.

Source: Larsson, Maire, Shakhnarovich, "FractalNet: Ultra-Deep Neural Networks without Residuals", ICLR 2017,
arXiv 1605.07648; the details (flat mean at a join, a pool on each column before the block's last join, one
classifier for all columns) as the authors' Caffe generator has them, https://github.com/gustavla/fractalnet.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

JoinMasks = tuple[tuple[tuple[bool, ...], ...], ...]
"""Which inputs of which join survive: [block][join, in row order][input, shallow column first]."""


@dataclass(frozen=True)
class Stem:
    """What stands before the first block and is shared by all columns.

    Attributes:
        kind: "whiten" is a fixed linear filter bank fitted to the training images (`whitening_filters`), as
            in https://github.com/KellerJordan/cifar10-airbench; "conv" is a trained convolution with
            BatchNorm and ReLU.
        width: Channels out.
        kernel: Height and width of the filter [pixels].
        stride: Step of the filter [pixels].
        pool: Step of the 3x3 max pool behind it; 1 is none.
    """

    kind: Literal["whiten", "conv"]
    width: int
    kernel: int
    stride: int
    pool: int = 1


@dataclass(frozen=True)
class Architecture:
    """A fractal network, fully described.

    Attributes:
        widths: Channels of each block; their number is the number of blocks B.
        n_columns: C; column k has 2**(k-1) convolutions in each block.
        n_classes: K.
        size: Height and width of an image [pixels].
        channels: Channels of an image.
        dropout: Element-wise dropout rate of each block, behind each convolution; empty is none.
        stem: What stands before the first block, if anything.
        affine: Whether BatchNorm has a learned scale and bias. The authors' has none.

    Raises:
        ValueError: if a number is out of range or the lists disagree.
    """

    widths: tuple[int, ...]
    n_columns: int
    n_classes: int = 10
    size: int = 32
    channels: int = 3
    dropout: tuple[float, ...] = ()
    stem: Stem | None = None
    affine: bool = True

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ValueError(
                f"widths must name at least one block of at least one channel, not {self.widths}"
            )
        if self.n_columns < 1 or self.n_classes < 2 or self.channels < 1:
            raise ValueError("n_columns and channels must be at least 1, n_classes at least 2")
        if self.dropout and len(self.dropout) != len(self.widths):
            raise ValueError(f"dropout needs one rate per block: {len(self.widths)}, not {len(self.dropout)}")
        step = (self.stem.stride * self.stem.pool if self.stem else 1) * 2 ** len(self.widths)
        if self.size < step:
            raise ValueError(
                f"images of {self.size} pixels are halved away: use at least {step}, or fewer blocks"
            )

    def depth(self, column: int) -> int:
        """Trained convolutions on the path through one column."""
        return len(self.widths) * (1 << (column - 1)) + (self.stem is not None and self.stem.kind == "conv")


_CIFAR_DROPOUT = (0.0, 0.1, 0.2, 0.3, 0.4)

# With a learned scale and bias, unlike the authors': the published parameter counts include them.
PRESETS: dict[str, Architecture] = {
    "cifar-20": Architecture((64, 128, 256, 512, 512), 3, dropout=_CIFAR_DROPOUT),
    **{
        f"cifar-deep-{c}": Architecture((16, 32, 64, 128, 128), c, dropout=_CIFAR_DROPOUT)
        for c in range(1, 7)
    },
    # Stem, blocks and columns as the paper gives them (4*8 + 2 = 34 layers); it does not state the widths,
    # which are those that the third-party prototxts of this net use.
    "imagenet-34": Architecture(
        (128, 256, 512, 1024), 4, n_classes=1000, size=224, stem=Stem("conv", 64, kernel=7, stride=2, pool=2)
    ),
    # Ours, for a good answer at little cost: the stem keeps all of a 4x4 patch at half the resolution, so
    # that no convolution runs at 32x32, where a deadline is spent on the least.
    "cifar-anytime": Architecture((64, 128, 192, 192), 3, stem=Stem("whiten", 48, kernel=4, stride=2)),
}


def preset(name: str, *, n_classes: int, size: int, channels: int = 3) -> Architecture:
    """A named architecture, fitted to a dataset.

    Raises:
        ValueError: if there is no such preset, or the images are too small for it.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    return replace(PRESETS[name], n_classes=n_classes, size=size, channels=channels)


def columns_at(row: int, n_columns: int) -> range:
    """The columns (1 = shallowest) whose outputs meet below a row of a block; rows count from 1 to 2**(C-1).

    Column c spans 2**(C-c) rows with each of its convolutions, so the deepest column ends below every row and
    the shallowest below the last alone.
    """
    return range(n_columns - ((row & -row).bit_length() - 1), n_columns + 1)


def join_sizes(n_columns: int) -> tuple[int, ...]:
    """How many inputs each join of a block has, in row order: for C=3, (2, 3)."""
    sizes = (len(columns_at(row, n_columns)) for row in range(1, 2 ** (n_columns - 1) + 1))
    return tuple(size for size in sizes if size > 1)


def join_weights(masks: JoinMasks | Tensor) -> Tensor:
    """The masks as what each input of each join counts: [B, joins of a block, C], 0 where it is dropped.

    A forward pass under these is one sequence of operations for every mask, as a recorded one must be.

    Raises:
        ValueError: if a join is left without input.
    """
    if isinstance(masks, Tensor):
        return masks
    if not all(any(mask) for block in masks for mask in block):
        raise ValueError("a join lost all its inputs: keep at least one in every mask")
    n_inputs = max((len(mask) for block in masks for mask in block), default=0)
    rows = [
        [[keep / sum(mask) for keep in mask] + [0.0] * (n_inputs - len(mask)) for mask in b] for b in masks
    ]
    return torch.tensor(rows)


class ConvUnit(nn.Module):
    """Convolution 3x3, dropout, BatchNorm, ReLU: one box of the fractal.

    The statistics of its input differ between the joined net (where it sees means of several columns) and its
    column alone, so it keeps two sets: a column alone and the joined net each find their own. Scale and bias,
    where there are any, are shared. The authors' Caffe graph separates the statistics in the same way.
    """

    def __init__(self, n_in: int, n_out: int, dropout: float, *, affine: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.norm_alone = nn.BatchNorm2d(n_out, affine=affine)
        self.norm_joined = nn.BatchNorm2d(n_out, affine=affine)
        self.norm_joined.weight, self.norm_joined.bias = self.norm_alone.weight, self.norm_alone.bias
        self.relu = nn.ReLU(inplace=True)

    def alone(self) -> list[nn.Module]:
        """The unit as its column has it, for a plain `nn.Sequential`."""
        dropout = [self.dropout] if self.dropout.p else []
        return [self.conv, *dropout, self.norm_alone, self.relu]

    def forward(self, x: Tensor) -> Tensor:
        """The unit as the joined net has it: [N, n_in, H, W] -> [N, n_out, H, W]."""
        y: Tensor = self.relu(self.norm_joined(self.dropout(self.conv(x))))
        return y


class FractalBlock(nn.Module):
    """f_C of the expansion rule f_{c+1}(z) = (f_c . f_c)(z) joined with conv(z), laid out as columns.

    Each column is pooled by itself before the last join: for max pooling this is not the same as pooling the
    mean, and it is what lets a column be cut out as a plain network.
    """

    def __init__(self, n_in: int, n_out: int, n_columns: int, dropout: float, *, affine: bool) -> None:
        super().__init__()
        self.n_columns = n_columns
        unit = partial(ConvUnit, dropout=dropout, affine=affine)
        self.columns = nn.ModuleList(
            nn.ModuleList(unit(n_in if i == 0 else n_out, n_out) for i in range(2**c))
            for c in range(n_columns)
        )
        self.pool = nn.MaxPool2d(2)

    def units(self, column: int) -> list[ConvUnit]:
        """The units of one column (1 = shallowest), first to last."""
        return [u for u in self.columns[column - 1].children() if isinstance(u, ConvUnit)]

    def forward(self, x: Tensor, masks: Sequence[Sequence[bool]] | Tensor) -> Tensor:
        """Joined output under masks: [N, n_in, H, W] -> [N, n_out, H/2, W/2].

        Evaluated from the last join backwards, so that whatever no surviving path needs is never computed: a
        dropped path costs nothing and its BatchNorm statistics see nothing. Under weights (`join_weights`)
        every path is computed, as the authors' graph does.
        """
        last = 2 ** (self.n_columns - 1)
        surviving = self._surviving(None if isinstance(masks, Tensor) else masks)
        joins = [row for row, columns in surviving.items() if len(columns_at(row, self.n_columns)) > 1]
        at_row: dict[int, Tensor] = {0: x}

        def mean(row: int, inputs: list[Tensor]) -> Tensor:
            if len(inputs) == 1:
                return inputs[0]
            if not isinstance(masks, Tensor):
                return torch.stack(inputs).mean(0)
            weights = masks[joins.index(row)]
            return torch.stack([weights[i] * each for i, each in enumerate(inputs)]).sum(0)

        def output(column: int, row: int) -> Tensor:
            span = last >> (column - 1)
            y: Tensor = self.units(column)[row // span - 1](joined(row - span))
            return self.pool(y) if row == last else y

        def joined(row: int) -> Tensor:
            if row not in at_row:
                at_row[row] = mean(row, [output(column, row) for column in surviving[row]])
            return at_row[row]

        return joined(last)

    def _surviving(self, masks: Sequence[Sequence[bool]] | None) -> dict[int, list[int]]:
        """Row -> the columns whose outputs are averaged below it; None drops nothing."""
        rows = {row: columns_at(row, self.n_columns) for row in range(1, 2 ** (self.n_columns - 1) + 1)}
        alive = {row: list(columns) for row, columns in rows.items()}
        if masks is None:
            return alive
        joins = [row for row, columns in rows.items() if len(columns) > 1]
        for row, mask in zip(joins, masks, strict=True):
            alive[row] = [column for column, keep in zip(rows[row], mask, strict=True) if keep]
        if not all(alive.values()):
            raise ValueError("a join lost all its inputs: keep at least one in every mask")
        return alive


class FractalNet(nn.Module):
    """The whole network. Its columns share no convolution, but the stem and the classifier.

    Cost: the joined net takes as many multiply-accumulates as all its columns one after the other.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = a = architecture
        self.stem, n_in = _stem(a)
        rates = a.dropout or (0.0,) * len(a.widths)
        blocks = []
        for width, rate in zip(a.widths, rates, strict=True):
            blocks.append(FractalBlock(n_in, width, a.n_columns, rate, affine=a.affine))
            n_in = width
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, a.n_classes))

    def column(self, k: int) -> nn.Sequential:
        """Column k (1 = shallowest) as a plain network over the same weights: images_NCHW -> logits_NK.

        Raises:
            ValueError: if there is no such column.
        """
        if not 1 <= k <= self.architecture.n_columns:
            raise ValueError(f"column must be 1 to {self.architecture.n_columns}, not {k}")
        layers: list[nn.Module] = [*self.stem]
        for block in self._blocks():
            for unit in block.units(k):
                layers += unit.alone()
            layers.append(block.pool)
        column = nn.Sequential(*layers, *self.head)
        column.training = self.training  # a new module says True, whatever mode its layers are in
        return column

    def forward(self, images_NCHW: Tensor, masks: JoinMasks | Tensor | None = None) -> Tensor:
        """Logits_NK of the joined net, or of what is left of it under local drop-path.

        Args:
            images_NCHW: Normalised images, float.
            masks: Which inputs survive at each join; None keeps all (as at test time). As numbers
                (`join_weights`), the same operations run whatever is dropped.

        Raises:
            ValueError: if the masks do not fit the joins, or leave a join without input.
        """
        x: Tensor = self.stem(images_NCHW)
        masks = masks if masks is not None else self.all_alive()
        for block, block_masks in zip(self._blocks(), masks, strict=True):
            x = block(x, block_masks)
        logits: Tensor = self.head(x)
        return logits

    def all_alive(self) -> JoinMasks:
        """The masks that drop nothing."""
        block = tuple((True,) * size for size in join_sizes(self.architecture.n_columns))
        return (block,) * len(self.architecture.widths)

    def networks(self) -> dict[str, nn.Module]:
        """Everything that can be served, shallow first: "1" .. "C", and "full", the joined net."""
        columns = {str(k): self.column(k) for k in range(1, self.architecture.n_columns + 1)}
        return {**columns, "full": self}

    def _blocks(self) -> list[FractalBlock]:
        return [block for block in self.blocks if isinstance(block, FractalBlock)]


def _stem(a: Architecture) -> tuple[nn.Sequential, int]:
    if a.stem is None:
        return nn.Sequential(), a.channels
    s = a.stem
    # An even kernel is padded one short, so that a stride of 2 halves the image exactly.
    conv = nn.Conv2d(a.channels, s.width, s.kernel, stride=s.stride, padding=(s.kernel - 1) // 2, bias=False)
    if s.kind == "whiten":
        conv.weight.requires_grad_(False)
        layers: list[nn.Module] = [conv]
    else:
        layers = [conv, nn.BatchNorm2d(s.width, affine=a.affine), nn.ReLU(inplace=True)]
    if s.pool > 1:
        layers.append(nn.MaxPool2d(3, stride=s.pool, padding=1))
    return nn.Sequential(*layers), s.width


def whitening_filters(images_NCHW: Tensor, width: int, kernel: int, epsilon: float = 5e-4) -> Tensor:
    """Filters that turn the patches of these images into uncorrelated channels of variance 1.

    Args:
        images_NCHW: Normalised images, float; a few thousand are enough.
        width: Number of filters: the `width` directions of the largest variance.
        kernel: Height and width of a patch [pixels].
        epsilon: Added to each variance, so that the weakest directions are not blown up.

    Returns:
        Weights [width, channels, kernel, kernel].

    Raises:
        ValueError: if more filters are asked for than a patch has numbers.

    Source: https://github.com/KellerJordan/cifar10-airbench (there with the filters' negatives, for ReLU).
    """
    n_numbers = images_NCHW.shape[1] * kernel * kernel
    if width > n_numbers:
        raise ValueError(f"a {kernel}x{kernel} patch has {n_numbers} numbers: no more than that many filters")
    patches = nn.functional.unfold(images_NCHW, kernel, stride=2).transpose(1, 2).reshape(-1, n_numbers)
    variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
    strongest: Tensor = directions.T.flip(0)[:width] / (variances.flip(0)[:width, None] + epsilon).sqrt()
    return strongest.reshape(width, images_NCHW.shape[1], kernel, kernel)


Initialisation = Literal["xavier", "dirac"]


@torch.no_grad()
def initialise(net: FractalNet, how: Initialisation, images_NCHW: Tensor | None = None) -> None:
    """Give fresh weights from torch's generator, in place.

    Args:
        net: The network.
        how: "xavier" as the authors', whose framework scales by what comes in alone; "dirac" makes each
            convolution begin as the identity on its first channels
            (https://github.com/KellerJordan/cifar10-airbench).
        images_NCHW: Normalised training images, needed where the stem whitens.

    Raises:
        ValueError: if the stem whitens and no images are given.
    """
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and how == "xavier":
            nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")
        elif isinstance(module, nn.Conv2d):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    if how == "dirac":
        for unit in (m for m in net.modules() if isinstance(m, ConvUnit)):
            nn.init.dirac_(unit.conv.weight[: unit.conv.in_channels])
    stem = net.architecture.stem
    if stem is not None and stem.kind == "whiten":
        if images_NCHW is None:
            raise ValueError("this stem whitens: give it training images to fit its filters to")
        net.stem[0].get_parameter("weight").copy_(whitening_filters(images_NCHW, stem.width, stem.kernel))


@dataclass(frozen=True)
class Cost:
    """What one image costs in one network.

    Attributes:
        macs: Multiply-accumulates of convolutions and classifier.
        parameters: Learned and fixed numbers, BatchNorm's scale and bias counted.
    """

    macs: int
    parameters: int


@torch.no_grad()
def cost(network: nn.Module, architecture: Architecture) -> Cost:
    """Count the cost of one image in a column or in the joined net by running one."""
    macs = 0
    used: dict[int, int] = {}  # a parameter's id -> its numbers: scale and bias of BatchNorm are shared

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal macs
        if isinstance(module, nn.Conv2d | nn.Linear):
            macs += module.weight[0].numel() * output[0].numel()
        used.update((id(parameter), parameter.numel()) for parameter in module.parameters(recurse=False))

    was_training = network.training
    network.eval()
    hooks = [m.register_forward_hook(count) for m in network.modules() if not list(m.children())]
    try:
        network(torch.zeros(1, architecture.channels, architecture.size, architecture.size))
    finally:
        for hook in hooks:
            hook.remove()
        network.train(was_training)
    return Cost(macs, sum(used.values()))

"""From a trained net to answers to rely on: BatchNorm statistics, ensembles, temperatures, confidence.

    python -m model.calibrate --checkpoint runs/latest/checkpoint.pt --data data

prints what the choices rest on: columns under three sets of BatchNorm statistics, and the joined net
beside the ensembles of the same cost. Everything is fitted and compared on the held-out split. Must not
know ONNX or the artifact.
"""

import argparse
import copy
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations as subsets
from pathlib import Path

import torch
from torch import Tensor, nn

from model import data
from model.fractalnet import ConvUnit, FractalNet, cost
from model.train import Checkpoint, TrainingError, logits

N_RECALIBRATION_IMAGES = 10_000  # five times as many as once-for-all takes (Cai et al., ICLR 2020)
RECALIBRATION_BATCH = 500
N_FOLDS = 5
BIAS_PENALTY = 1e-2  # keeps the class biases, of which there may be hundreds, near 0 unless the data insists
CONFIDENCE_EDGES = (0.0, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99, 1.0)
N_ECE_BINS = 15
LEAST_GAIN = 1e-3  # of a combination over its parts [nats]; two fits of the same differ by some 1e-5

Logits = Mapping[str, Tensor]
"""Logits_NK of each network by its name, on the same images."""


@dataclass(frozen=True)
class Combination:
    """How the logits of the columns that have run become one answer: a geometric ensemble.

    p = softmax( sum_j weights[j] log p_j / temperature + bias ), with p_j the softmax of column j.

    Source: the geometric ensemble of "Zero Time Waste" (Wolczyk et al., NeurIPS 2021, arXiv 2106.05409),
    whose exponentiated weights are written here as weights that sum to 1 over a temperature.
    """

    columns: tuple[str, ...]
    weights: tuple[float, ...]
    temperature: float
    bias: tuple[float, ...]

    @property
    def key(self) -> str:
        """The columns in one word: "1+2"."""
        return key(self.columns)

    def log_probabilities(self, of: Logits) -> Tensor:
        """Log of p, [N, K]."""
        weights = torch.tensor(self.weights) / self.temperature
        return _combine(weights, torch.tensor(self.bias), [of[name] for name in self.columns])


def key(columns: Iterable[str]) -> str:
    """The name of a combination of columns."""
    return "+".join(columns)


def _combine(weights_C: Tensor, bias_K: Tensor, logits_CNK: Sequence[Tensor]) -> Tensor:
    log_p_CNK = torch.stack([each.log_softmax(1) for each in logits_CNK]).to(weights_C.dtype)
    return (torch.einsum("c,cnk->nk", weights_C, log_p_CNK) + bias_K).log_softmax(1)


def fit(columns: tuple[str, ...], of: Logits, labels_N: Tensor) -> Combination:
    """Weights, temperature and bias of least negative log-likelihood on these images.

    Args:
        columns: Which networks, shallow first.
        of: Their logits.
        labels_N: The images' labels.
    """
    members = [of[name].double() for name in columns]
    # Exponentiated, so that no column can count against its own answer.
    log_weights_C = torch.full((len(members),), -float(torch.tensor(len(members)).log()), dtype=torch.double)
    bias_K = torch.zeros(members[0].shape[1], dtype=torch.double)
    parameters = [log_weights_C.requires_grad_(), bias_K.requires_grad_()]
    optimiser = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimiser.zero_grad()
        log_p_NK = _combine(log_weights_C.exp(), bias_K, members)
        value = nn.functional.nll_loss(log_p_NK, labels_N) + BIAS_PENALTY * bias_K.square().mean()
        value.backward()
        return float(value.detach())

    optimiser.step(loss)
    weights_C = log_weights_C.detach().exp()
    total = float(weights_C.sum())
    return Combination(
        columns, tuple((weights_C / total).tolist()), 1 / total, tuple(bias_K.detach().tolist())
    )


def cross_fitted(columns: tuple[str, ...], of: Logits, labels_N: Tensor) -> Tensor:
    """Log of p, [N, K], of each image by parameters that were fitted without it.

    What is measured on these is honest although the same split serves to fit: no image judges what it has
    shaped.
    """
    fold_N = torch.arange(len(labels_N)) % N_FOLDS
    log_p_NK = torch.empty_like(of[columns[0]])
    for fold in range(N_FOLDS):
        inside = fold_N == fold
        fitted = fit(columns, {name: of[name][~inside] for name in columns}, labels_N[~inside])
        log_p_NK[inside] = fitted.log_probabilities({name: of[name][inside] for name in columns})
    return log_p_NK


@dataclass(frozen=True)
class Measured:
    """How good probabilities are: accuracy, negative log-likelihood [nats], expected calibration error."""

    accuracy: float
    nll: float
    ece: float


def measure(log_p_NK: Tensor, labels_N: Tensor) -> Measured:
    """Accuracy, NLL and ECE over equal bins of confidence.

    Source of the ECE: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599, 15
    bins.
    """
    confidence_N, index_N = log_p_NK.exp().max(1)
    correct_N = (index_N == labels_N).float()
    bin_N = (confidence_N * N_ECE_BINS).long().clamp(max=N_ECE_BINS - 1)
    gaps = [(correct_N[bin_N == b] - confidence_N[bin_N == b]).sum().abs() for b in range(N_ECE_BINS)]
    return Measured(
        accuracy=float(correct_N.mean()),
        nll=float(nn.functional.nll_loss(log_p_NK, labels_N)),
        ece=float(torch.stack(gaps).sum() / len(labels_N)),
    )


@dataclass(frozen=True)
class ConfidenceTable:
    """What can be expected of more columns, given how sure the answer in hand is.

    Attributes:
        columns: Those that have run.
        n: Held-out images in each bin of `CONFIDENCE_EDGES`.
        accuracy: By combination (this one, and each that contains it): the share of right answers in each
            bin; 0 where the bin is empty.
    """

    columns: tuple[str, ...]
    n: tuple[int, ...]
    accuracy: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Calibration:
    """All that is known of the answers of a set of columns; measured cross-fitted on the held-out split."""

    combinations: tuple[Combination, ...]
    measured: dict[str, Measured]
    confidence: tuple[ConfidenceTable, ...]
    n_held_out: int


def calibrate(of: Logits, labels_N: Tensor) -> Calibration:
    """Fit and measure every combination worth serving.

    A single column always is one; several are if their probabilities are better (in NLL) than those of every
    combination inside them, so that the column added earns its time, or if refinement passes through them to
    such ones. By NLL, since accuracies that differ by two images in five thousand say nothing.

    Args:
        of: Logits of the columns on the held-out split, shallow first.
        labels_N: Its labels.
    """
    every = [columns for size in range(1, len(of) + 1) for columns in subsets(of, size)]
    all_log_p = {columns: cross_fitted(columns, of, labels_N) for columns in every}
    measured = {columns: measure(log_p_NK, labels_N) for columns, log_p_NK in all_log_p.items()}
    kept = _worth_serving({columns: result.nll for columns, result in measured.items()})
    log_p = {columns: all_log_p[columns] for columns in kept}
    return Calibration(
        combinations=tuple(fit(columns, of, labels_N) for columns in log_p),
        measured={key(columns): measured[columns] for columns in kept},
        confidence=tuple(_confidence_table(columns, log_p, labels_N) for columns in log_p),
        n_held_out=len(labels_N),
    )


def _worth_serving(nll: Mapping[tuple[str, ...], float]) -> list[tuple[str, ...]]:
    better = [
        columns
        for columns, own in nll.items()
        if all(own < nll[part] - LEAST_GAIN for part in nll if set(part) < set(columns))
    ]
    on_the_way = {columns[:n] for columns in better for n in range(1, len(columns))}
    return [columns for columns in nll if columns in better or columns in on_the_way]


def _confidence_table(
    columns: tuple[str, ...], log_p: Mapping[tuple[str, ...], Tensor], labels_N: Tensor
) -> ConfidenceTable:
    edges = torch.tensor(CONFIDENCE_EDGES[1:-1])
    bin_N = torch.bucketize(log_p[columns].exp().amax(1), edges, right=True)
    n_bins = len(CONFIDENCE_EDGES) - 1
    n_per_bin = torch.bincount(bin_N, minlength=n_bins)
    accuracy = {}
    for other, log_p_NK in log_p.items():
        if set(other) >= set(columns):
            correct_N = (log_p_NK.argmax(1) == labels_N).float()
            right = torch.bincount(bin_N, weights=correct_N, minlength=n_bins)
            accuracy[key(other)] = tuple((right / n_per_bin.clamp(min=1)).tolist())
    return ConfidenceTable(columns, tuple(n_per_bin.tolist()), accuracy)


# --- BatchNorm
# -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def recalibrate(network: nn.Module, dataset: data.Dataset, seed: int = 0) -> None:
    """Set the BatchNorm statistics of one network to plain averages over training images, in place.

    While training they trail behind weights that move; afterwards they need not.

    Source: Yu and Huang, "Universally Slimmable Networks", ICCV 2019, arXiv 1903.05134, section 3.3.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    used: set[nn.BatchNorm2d] = set()
    hooks = [norm.register_forward_pre_hook(lambda module, _: used.add(module)) for norm in norms]
    network.eval()
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(seed))
    images_NCHW = dataset.train.images_NCHW[order[:N_RECALIBRATION_IMAGES]]
    # Parts of one size: each counts alike in the average, so a remainder of one image would weigh like 500.
    chosen = images_NCHW.tensor_split(-(-len(images_NCHW) // RECALIBRATION_BATCH))
    network(
        dataset.normalise(chosen[0])
    )  # finds which of them this network uses: the joined net holds others too
    for hook in hooks:
        hook.remove()
    momentum = {norm: norm.momentum for norm in used}
    for norm in used:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over batches
        norm.train()
    for images in chosen:
        network(dataset.normalise(images))
    for norm in used:
        norm.momentum = momentum[norm]
    network.eval()


def recalibrated(net: FractalNet, dataset: data.Dataset) -> FractalNet:
    """A copy with every column's and the joined net's own statistics set by `recalibrate`."""
    net = copy.deepcopy(net)
    for network in net.networks().values():
        recalibrate(network, dataset)
    return net


def _with_the_joined_nets_statistics(net: FractalNet) -> FractalNet:
    """A copy whose columns use the joined net's statistics, as where there is one set of them."""
    net = copy.deepcopy(net)
    for unit in (module for module in net.modules() if isinstance(module, ConvUnit)):
        unit.norm_alone.load_state_dict(unit.norm_joined.state_dict())
    return net


# --- the command
# -----------------------------------------------------------------------------------------------------


def report(net: FractalNet, dataset: data.Dataset) -> str:
    """The numbers behind the choice of BatchNorm statistics and of the last rung, in Markdown."""
    labels_N = dataset.held_out.labels_N
    variants = {
        "the joined net's": _with_the_joined_nets_statistics(net),
        "its own, as training left them": net,
        "its own, recalibrated": recalibrated(net, dataset),
    }
    by_variant = {
        title: {
            name: logits(network, dataset.held_out, dataset.normalise)
            for name, network in of.networks().items()
        }
        for title, of in variants.items()
    }
    names = list(net.networks())
    lines = [
        f"Held-out images: {len(labels_N)}. Accuracy, %.",
        "",
        f"| BatchNorm statistics | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for title, of in by_variant.items():
        cells = (f"{100 * float((of[name].argmax(1) == labels_N).float().mean()):.2f}" for name in names)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    of = by_variant["its own, recalibrated"]
    macs = {name: cost(network, net.architecture).macs for name, network in net.networks().items()}
    lines += ["", "| networks run | MMACs together | accuracy | NLL | ECE |", "|---|---|---|---|---|"]
    for size in range(1, len(names) + 1):
        for columns in subsets(names, size):
            m = measure(cross_fitted(columns, of, labels_N), labels_N)
            total = sum(macs[name] for name in columns) / 1e6
            lines.append(
                f"| {key(columns)} | {total:.1f} | {100 * m.accuracy:.2f} | {m.nll:.4f} | {m.ece:.4f} |"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the report; the exit code is 0, or 1 with a sentence."""
    parser = argparse.ArgumentParser(prog="python -m model.calibrate", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/latest/checkpoint.pt"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    options = parser.parse_args(argv)
    try:
        kept = Checkpoint.load(options.checkpoint)
        dataset = kept.load_data(options.data)
    except (TrainingError, data.DataError) as error:
        print(f"model.calibrate: {error}", file=sys.stderr)
        return 1
    print(report(kept.network(), dataset))
    return 0


if __name__ == "__main__":
    sys.exit(main())

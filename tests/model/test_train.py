"""Training on toy data: what one step trains, what a run leaves behind, and every way in which it can end."""

import copy
import dataclasses
import itertools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional

from model.calibrate import recalibrate
from model.data import Dataset, load
from model.droppath import Global, Local, Paths
from model.fractalnet import PRESETS, preset
from model.recipe import RECIPES, Recipe, learning_rate
from model.train import (
    Checkpoint,
    Objective,
    Run,
    TrainingError,
    accuracy,
    answers_of,
    build,
    logits,
    main,
    sample_parts,
    train,
)
from tests.model.limits import no_file_larger_than

QUICK = Recipe("cifar-deep-2", 2, 12, 0.05, "triangle", flip="alternate")


def a_run(
    dataset: Dataset,
    out: Path,
    recipe: Recipe = QUICK,
    *,
    seed: int = 0,
    bf16: bool = False,
    teacher: Checkpoint | None = None,
) -> Run:
    return Run(recipe, dataset, out, seed=seed, bf16=bf16, device="cpu", teacher=teacher)


def a_teacher(dataset: Dataset, out: Path) -> Checkpoint:
    """A network of another run on this data, untrained."""
    run = a_run(dataset, out / "teacher", dataclasses.replace(QUICK, batch_size=2))
    run.out.mkdir()
    run.save()
    return Checkpoint.load(run.checkpoint)


def assert_equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Bit for bit."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def state(run: Run) -> dict[str, Any]:
    """Everything that decides how the run goes on, as a copy."""
    momentum = run.optimiser.state_dict()["state"]
    kept = {"epoch": run.epoch, "model": run.net.state_dict()} | {
        f"momentum {i}": values["momentum_buffer"] for i, values in momentum.items()
    }
    return copy.deepcopy(kept)


# ---- recipes ----


def test_the_papers_rate_falls_at_epochs_200_300_350_and_375() -> None:
    expected = {
        0: 0.02,
        199: 0.02,
        200: 2e-3,
        299: 2e-3,
        300: 2e-4,
        349: 2e-4,
        350: 2e-5,
        375: 2e-6,
        399: 2e-6,
    }

    assert RECIPES["paper"].epochs == 400
    for epoch, rate in expected.items():
        assert learning_rate(RECIPES["paper"], epoch / 400) == pytest.approx(rate), epoch


def test_the_triangle_rises_for_a_fifth_and_falls_to_nothing() -> None:
    recipe = RECIPES["anytime"]

    rates = [learning_rate(recipe, progress) / recipe.learning_rate for progress in (0, 0.1, 0.2, 0.6, 1)]

    assert rates == pytest.approx([0.2, 0.6, 1, 0.5, 0])


@given(st.sampled_from(list(RECIPES.values())), st.floats(0, 1))
def test_a_rate_is_never_negative_nor_above_its_peak(recipe: Recipe, progress: float) -> None:
    assert 0 <= learning_rate(recipe, progress) <= recipe.learning_rate


def test_the_rate_of_the_schedule_is_the_one_that_is_used(toy: Dataset, tmp_path: Path) -> None:
    run = a_run(toy, tmp_path, dataclasses.replace(QUICK, schedule="steps"))
    seen: list[float] = []

    for _ in range(2):
        run.train_epoch(lambda _loss: seen.extend(group["lr"] for group in run.optimiser.param_groups[:1]))

    assert seen == pytest.approx([0.05] * 4 + [5e-3] * 2 + [5e-4] + [5e-5])


@pytest.mark.parametrize(
    "how",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": 1e42},
    ],
)
def test_a_recipe_that_cannot_be_is_refused(how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        dataclasses.replace(QUICK, **how)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"distillation": 1.5, "teacher": "given"}, "is a share"),
        ({"distillation": -0.1, "teacher": "given"}, "is a share"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"cutout": -1}, "cutout at least 0"),
        ({"averaging": 1.0}, "share of the run"),
        ({"averaging": -0.1}, "share of the run"),
        ({"distillation": 0.5, "teacher": "joined", "passes": "coin"}, "joined net teaches only"),
    ],
)
def test_a_way_to_learn_that_cannot_be_is_refused(how: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        dataclasses.replace(QUICK, **how)


def drawn_parts(recipe: Recipe, n: int) -> list[list[Paths]]:
    architecture = preset("cifar-deep-3", n_classes=10, size=32)
    generator = torch.Generator().manual_seed(0)
    return [sample_parts(recipe, architecture, generator) for _ in range(n)]


def kind(parts: Sequence[Paths]) -> str:
    return " ".join("L" if isinstance(part, Local) else str(part.column) for part in parts)


def test_tied_trains_the_joined_net_and_every_column_on_each_batch() -> None:
    parts = drawn_parts(dataclasses.replace(QUICK, passes="tied"), 50)

    assert {kind(part) for part in parts} == {"L 1 2 3"}
    assert len({str(part[0]) for part in parts}) > 10  # the masks are drawn anew


def test_coin_trains_the_joined_net_or_one_column() -> None:
    counts = Counter(kind(part) for part in drawn_parts(dataclasses.replace(QUICK, local_share=0.4), 3000))

    assert counts.keys() == {"L", "1", "2", "3"}
    assert counts["L"] / 3000 == pytest.approx(0.4, abs=0.04)
    assert all(counts[column] / 3000 == pytest.approx(0.2, abs=0.035) for column in "123")


def test_columns_trains_the_joined_net_or_all_columns() -> None:
    recipe = dataclasses.replace(QUICK, passes="columns", local_share=0.25)
    counts = Counter(kind(part) for part in drawn_parts(recipe, 3000))

    assert counts.keys() == {"L", "1 2 3"}
    assert counts["L"] / 3000 == pytest.approx(0.25, abs=0.035)


def test_the_local_drop_rate_is_the_recipes() -> None:
    local = [parts[0] for parts in drawn_parts(dataclasses.replace(QUICK, passes="tied", local_drop=0), 20)]

    everything = Local((((True, True), (True, True, True)),) * 5)
    assert local == [everything] * 20


# ---- one step ----


def test_the_network_is_built_from_the_recipe_the_data_and_the_seed(toy: Dataset) -> None:
    first, again, other = (build(RECIPES["anytime"], toy, seed) for seed in (0, 0, 1))

    assert first.architecture.n_classes == 3
    assert first.architecture.dropout == ()  # the recipe says so
    assert build(QUICK, toy, 0).architecture.dropout == PRESETS["cifar-deep-2"].dropout
    for recipe in (RECIPES["paper"], QUICK):
        small = dataclasses.replace(recipe, architecture="cifar-deep-2")
        norms = [m for m in build(small, toy, 0).modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms
        assert {norm.affine for norm in norms} == {recipe is QUICK}  # the authors' has neither scale nor bias
    assert_equal(first.state_dict(), again.state_dict())
    key = "blocks.0.columns.0.0.conv.weight"
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])


def test_the_loss_weighs_the_joined_net_and_each_column(toy: Dataset) -> None:
    recipe = dataclasses.replace(QUICK, column_weight=0.25, label_smoothing=0.1, dropout=False)
    net = build(recipe, toy, 0)
    images_NCHW, labels_N = toy.normalise(toy.test.images_NCHW), toy.test.labels_N
    masks = (((True, False),), *[((False, True),)] * 4)

    def loss(logits_NK: Tensor) -> Tensor:
        log_p_NK = logits_NK - logits_NK.exp().sum(1, keepdim=True).log()
        target_NK = 0.9 * functional.one_hot(labels_N, 3) + 0.1 / 3
        return -(target_NK * log_p_NK).sum(1).mean()

    value = Objective(net, recipe)(images_NCHW, labels_N, [Local(masks), Global(1), Global(2)])

    of_columns = loss(net.column(1)(images_NCHW)) + loss(net.column(2)(images_NCHW))
    torch.testing.assert_close(value, loss(net(images_NCHW, masks)) + 0.25 * of_columns)

    shared = Objective(net, dataclasses.replace(recipe, column_weight=None))
    torch.testing.assert_close(shared(images_NCHW, labels_N, [Global(1), Global(2)]), of_columns / 2)


def distance(logits_NK: Tensor, taught_NK: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened answers, times the square of the temperature."""
    ours, theirs = ((each / temperature).softmax(1) for each in (logits_NK, taught_NK))
    return temperature**2 * (theirs * (theirs / ours).log()).sum(1).mean()


def test_the_joined_net_teaches_the_columns_and_is_not_taught(toy: Dataset) -> None:
    recipe = dataclasses.replace(
        QUICK, passes="tied", column_weight=1.0, dropout=False, distillation=0.25, temperature=2.0
    )
    net = build(recipe, toy, 0)
    images_NCHW, labels_N = toy.normalise(toy.test.images_NCHW), toy.test.labels_N
    masks = net.all_alive()
    joined_NK, column_NK = net(images_NCHW, masks), net.column(1)(images_NCHW)

    value = Objective(net, recipe)(images_NCHW, labels_N, [Local(masks), Global(1)])

    entropy = functional.cross_entropy
    of_column = 0.75 * entropy(column_NK, labels_N) + 0.25 * distance(column_NK, joined_NK, 2.0)
    torch.testing.assert_close(value, entropy(joined_NK, labels_N) + of_column)
    only_column = dataclasses.replace(recipe, distillation=1.0)
    of_teacher = Objective(net, only_column)(images_NCHW, labels_N, [Local(masks), Global(1)]) - entropy(
        net(images_NCHW, masks), labels_N
    )
    net.zero_grad()
    of_teacher.backward()
    unit = (
        net.blocks[0].get_submodule("columns.1.0.conv").weight
    )  # of column 2, which only the joined net has
    assert float(unit.grad.abs().max()) == pytest.approx(0, abs=1e-6)  # type: ignore[union-attr, operator]


def test_a_given_teacher_teaches_all(toy: Dataset, tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        QUICK, passes="tied", dropout=False, distillation=0.5, teacher="given", temperature=3.0
    )
    net, teacher = build(recipe, toy, 0), a_teacher(toy, tmp_path)
    images_NCHW, labels_N = toy.normalise(toy.test.images_NCHW), toy.test.labels_N
    of_teacher = teacher.network()
    taught_NK = sum(of_teacher.column(k)(images_NCHW).log_softmax(1) for k in (1, 2)) / 2

    objective = Objective(net, recipe, answers_of(teacher, torch.device("cpu")))
    value = objective(images_NCHW, labels_N, [Local(net.all_alive()), Global(2)])

    expected = torch.tensor(0.0)
    for logits_NK in (net(images_NCHW), net.column(2)(images_NCHW)):
        of_labels = functional.cross_entropy(logits_NK, labels_N)
        expected = expected + 0.5 * of_labels + 0.5 * distance(logits_NK, torch.as_tensor(taught_NK), 3.0)
    torch.testing.assert_close(value, expected)
    assert {id(p) for p in objective.parameters()} == {id(p) for p in net.parameters()}


def test_a_teacher_is_there_exactly_where_one_is_wanted(toy: Dataset, tmp_path: Path) -> None:
    taught = dataclasses.replace(RECIPES["distilled"], batch_size=12)
    teacher = a_teacher(toy, tmp_path)

    with pytest.raises(TrainingError, match="name its checkpoint with --teacher"):
        a_run(toy, tmp_path, taught)
    with pytest.raises(TrainingError, match="leave --teacher out"):
        a_run(toy, tmp_path, QUICK, teacher=teacher)
    other = dataclasses.replace(toy, mean_C=toy.mean_C + 0.1)
    with pytest.raises(TrainingError, match="not the data that the checkpoint was trained on"):
        a_run(other, tmp_path, taught, teacher=teacher)
    for other in (dataclasses.replace(toy, split_seed=1), dataclasses.replace(toy, n_held_out=6)):
        with pytest.raises(TrainingError, match="hold out the same ones"):
            a_run(other, tmp_path, taught, teacher=teacher)
    a_run(toy, tmp_path, taught, teacher=teacher, seed=1)  # other weights, and the same images held out


def test_compiling_is_refused_where_each_mask_would_be_compiled_anew(toy: Dataset, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="needs one GPU"):
        Run(QUICK, toy, tmp_path, seed=0, bf16=False, device="cpu", is_compiled=True)


def test_a_run_goes_on_with_its_own_teacher_alone(toy: Dataset, tmp_path: Path) -> None:
    taught = dataclasses.replace(RECIPES["distilled"], batch_size=12)
    teacher = a_teacher(toy, tmp_path)
    run = a_run(toy, tmp_path / "run", taught, teacher=teacher)
    run.out.mkdir()
    run.save()
    told = Checkpoint.load(run.checkpoint).made_with["teacher"]
    assert re.fullmatch(r"cifar-deep-2, 0 epochs, seed 0, weights [0-9a-f]{12}", told)

    a_run(toy, tmp_path / "run", taught, teacher=teacher).resume()
    weights = {name: tensor + 1 for name, tensor in teacher.model.items()}
    taught_by_another = a_run(
        toy, tmp_path / "run", taught, teacher=dataclasses.replace(teacher, model=weights)
    )
    with pytest.raises(TrainingError, match="other teacher"):
        taught_by_another.resume()


def test_a_run_holds_out_the_same_images_as_its_teacher(pictures: Path, tmp_path: Path) -> None:
    teacher = a_run(load("folder", pictures, n_held_out=4, seed=5), tmp_path / "teacher", seed=2)
    teacher.out.mkdir()
    teacher.save()
    how = {
        "recipe": "distilled",
        "seed": 1,
        "epochs": 1,
        "learning_rate": 0.01,
        "teacher": teacher.checkpoint,
    }

    assert main(command(pictures, tmp_path / "run", **how)) == 0

    kept = Checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert (kept.seed, kept.split_seed, kept.n_held_out) == (1, 5, 4)


def test_a_square_is_cut_out_of_what_is_trained_on(toy: Dataset, tmp_path: Path) -> None:
    run = a_run(toy, tmp_path, dataclasses.replace(QUICK, cutout=8))

    images_NCHW, _ = run._batch(torch.arange(12), torch.Generator().manual_seed(0))

    hidden_N = (images_NCHW == 0).all(1).sum((1, 2))
    assert int(hidden_N.max()) == 64
    assert int(hidden_N.min()) >= 16


def test_averaged_weights_are_what_a_run_is_for(toy: Dataset, tmp_path: Path) -> None:
    recipe = dataclasses.replace(QUICK, averaging=0.25)  # of 2 epochs of 4 steps: 2 steps
    run = a_run(toy, tmp_path, recipe)
    expected: dict[str, Tensor] = {}

    def average(_loss: float) -> None:
        now = {name: tensor.detach().clone() for name, tensor in run.net.named_parameters()}
        expected.update({name: (expected.get(name, tensor) + tensor) / 2 for name, tensor in now.items()})

    run.out.mkdir(exist_ok=True)
    for _ in range(2):
        run.train_epoch(average)
    run.save()

    kept = Checkpoint.load(run.checkpoint)
    for net in (run.trained, kept.network()):
        torch.testing.assert_close(dict(net.named_parameters()), expected)
    assert not torch.equal(kept.model["head.2.weight"], expected["head.2.weight"])
    assert kept.title != dataclasses.replace(kept, averaged={}).title
    held_out = toy.held_out
    assert run.evaluate()["1"] == accuracy(
        logits(kept.network().column(1), held_out, toy.normalise), held_out.labels_N
    )


def test_what_no_batch_trained_is_no_result(toy: Dataset, tmp_path: Path) -> None:
    columns_alone = dataclasses.replace(QUICK, passes="columns", local_share=0.0)

    assert a_run(toy, tmp_path, columns_alone).networks().keys() == {"1", "2"}
    assert a_run(toy, tmp_path, QUICK).networks().keys() == {"1", "2", "full"}


def test_weight_decay_spares_batchnorm_and_biases(toy: Dataset, tmp_path: Path) -> None:
    run = a_run(toy, tmp_path, dataclasses.replace(RECIPES["anytime"], batch_size=12))
    decayed, spared = run.optimiser.param_groups

    assert (decayed["weight_decay"], spared["weight_decay"]) == (5e-4, 0)
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in spared["params"]} == {1}
    trained = {id(p) for p in run.net.parameters()} - {id(run.net.stem[0].weight)}  # the filters are fixed
    assert {id(p) for group in run.optimiser.param_groups for p in group["params"]} == trained


def test_global_drop_path_trains_one_column_and_touches_no_other(toy: Dataset, tmp_path: Path) -> None:
    run = a_run(toy, tmp_path, dataclasses.replace(QUICK, local_share=0.0, weight_decay=0.0, batch_size=48))
    before = state(run)["model"]

    run.train_epoch()  # one step, of one column

    moved = {key for key, value in run.net.state_dict().items() if not torch.equal(value, before[key])}
    assert len({key[:18] for key in moved if key.startswith("blocks.0.columns.")}) == 1
    assert not any(re.search(r"norm_joined\.(running|num)", key) for key in moved)
    assert {"head.2.weight", "head.2.bias"} < moved


def test_accuracy_is_the_share_of_images_named_rightly(toy: Dataset, tmp_path: Path) -> None:
    assert accuracy(torch.tensor([[2.0, 1], [0, 1], [3, 4], [1, 0]]), torch.tensor([0, 1, 0, 1])) == 0.5

    run = a_run(toy, tmp_path)
    before = state(run)["model"]
    reached = run.evaluate()

    assert_equal(run.net.state_dict(), before)
    run.net.eval()
    images_NCHW, labels_N = toy.normalise(toy.held_out.images_NCHW), toy.held_out.labels_N
    for name, network in run.net.networks().items():
        right = (network(images_NCHW).argmax(1) == labels_N).sum() / len(labels_N)
        assert reached.pop(name) == pytest.approx(float(right))
    assert not reached


@pytest.mark.parametrize("training", [False, True])
def test_logits_are_taken_in_evaluation_mode_and_the_mode_is_given_back(toy: Dataset, training: bool) -> None:
    net = build(QUICK, toy, 0).train(training)

    first, again = (logits(net.column(1), toy.test, toy.normalise) for _ in range(2))

    assert torch.equal(first, again)
    assert {module.training for module in net.modules()} == {training}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains(toy: Dataset, tmp_path: Path, name: str) -> None:
    few = dataclasses.replace(toy, train=toy.train[:4], held_out=toy.held_out[:2])
    recipe = dataclasses.replace(RECIPES[name], batch_size=2)
    run = a_run(
        few, tmp_path, recipe, bf16=True, teacher=a_teacher(few, tmp_path) if name == "distilled" else None
    )

    assert run.train_epoch() > 0
    assert list(run.evaluate()) == ["1", "2", "3", *([] if name == "distilled" else ["full"])]
    assert run.epoch == 1


@pytest.mark.parametrize("bf16", [False, True])
def test_all_networks_learn_in_either_precision(toy: Dataset, tmp_path: Path, bf16: bool) -> None:
    run = a_run(toy, tmp_path, Recipe("cifar-deep-2", 8, 16, 0.01, "triangle", passes="tied"), bf16=bf16)

    losses = [run.train_epoch() for _ in range(8)]

    assert losses[-1] < losses[0]
    for network in run.networks().values():  # so few steps leave statistics far behind the weights
        recalibrate(network, toy)
    assert all(value >= 0.9 for value in run.evaluate().values()), run.evaluate()
    assert {p.dtype for p in run.net.parameters()} == {torch.float32}


# ---- the same again ----


@pytest.mark.parametrize("passes", ["coin", "tied"])
def test_a_run_repeats_bit_for_bit_from_its_seed(toy: Dataset, tmp_path: Path, passes: Any) -> None:
    recipe = dataclasses.replace(QUICK, passes=passes)
    assert any(PRESETS[recipe.architecture].dropout)
    assert recipe.dropout
    runs = [a_run(toy, tmp_path, recipe, seed=seed) for seed in (0, 0, 1)]

    losses = [[run.train_epoch() for _ in range(2)] for run in runs]

    assert losses[0] == losses[1] != losses[2]
    assert_equal(state(runs[0]), state(runs[1]))


def test_every_epoch_has_an_order_of_its_own(toy: Dataset, tmp_path: Path) -> None:
    run = a_run(toy, tmp_path)
    labels: list[list[int]] = []
    run.objective.register_forward_pre_hook(lambda _module, arguments: labels.append(arguments[1].tolist()))

    for _ in range(2):
        run.train_epoch()

    assert labels[:4] != labels[4:]
    for epoch in (labels[:4], labels[4:]):  # and every image once
        assert Counter(itertools.chain(*epoch)) == {0: 16, 1: 16, 2: 16}


@pytest.mark.parametrize("name", ["paper", "anytime", "wide", "wide, averaged"])
def test_a_resumed_run_ends_like_an_unbroken_one(toy: Dataset, tmp_path: Path, name: str) -> None:
    name, _, averaged = name.partition(", ")
    recipe = dataclasses.replace(
        RECIPES[name],
        architecture="cifar-deep-2",
        batch_size=12,
        epochs=3,
        averaging=0.5 if averaged else 0.0,
    )
    expected = {"paper": (True, "tied"), "anytime": (False, "columns"), "wide": (False, "tied")}
    assert (recipe.dropout, recipe.passes) == expected[name]
    unbroken = a_run(toy, tmp_path / "unbroken", recipe, bf16=True)
    train(unbroken)

    broken = a_run(toy, tmp_path, recipe, bf16=True)
    for _ in range(2):
        broken.train_epoch()
        broken.save()
        broken = a_run(toy, tmp_path, recipe, bf16=True)  # a new process would begin like this ...
        torch.rand(7)  # ... after it has drawn whatever
        broken.resume()
    train(broken)

    assert_equal(state(broken), state(unbroken))
    ours, theirs = (Checkpoint.load(run.checkpoint) for run in (broken, unbroken))
    assert ours.epoch == theirs.epoch == 3
    assert_equal(ours.model, theirs.model)
    assert bool(ours.averaged) == bool(averaged)
    assert_equal(ours.averaged, theirs.averaged)


def test_checkpoints_are_as_far_apart_as_asked_and_one_is_at_the_end(toy: Dataset, tmp_path: Path) -> None:
    run = a_run(toy, tmp_path, dataclasses.replace(QUICK, epochs=5))
    train(run, every=2)

    lines = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [2, 4, 5]
    assert Checkpoint.load(run.checkpoint).epoch == 5


def test_a_run_that_diverges_names_the_epoch_that_is_kept(toy: Dataset, tmp_path: Path) -> None:
    run = a_run(toy, tmp_path, dataclasses.replace(QUICK, epochs=4))
    stopped = iter([None] * 12)  # in the fourth epoch

    def break_it(_module: object, _arguments: object) -> None:
        if next(stopped, "now") == "now":
            run.net.head[2].get_parameter("bias").data.fill_(float("nan"))

    run.objective.register_forward_pre_hook(break_it)
    with pytest.raises(TrainingError, match=r"in epoch 4: .* still holds epoch 2"):
        train(run, every=2)


# ---- what a run leaves behind ----


def record(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()]


def command(pictures: Path, out: Path, **how: object) -> list[str]:
    """Arguments of a run on a folder of pictures that takes a moment."""
    options = {
        "dataset": "folder",
        "data": pictures,
        "out": out,
        "architecture": "cifar-deep-1",
        "epochs": 2,
        "batch-size": 16,
        "device": "cpu",
    }
    given = options | {name.replace("_", "-"): value for name, value in how.items()}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


def test_the_command_trains_on_a_folder_of_pictures(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "first"

    assert main(command(pictures, out, seed=3, architecture="cifar-deep-2")) == 0

    kept = Checkpoint.load(out / "checkpoint.pt")
    dataset = load("folder", pictures, seed=3)
    assert (kept.epoch, kept.seed, kept.dataset, kept.labels) == (2, 3, "folder", ("blue", "green", "red"))
    assert (kept.recipe.architecture, kept.recipe.momentum) == ("cifar-deep-2", RECIPES["anytime"].momentum)
    torch.testing.assert_close((kept.mean_C, kept.std_C), (dataset.mean_C, dataset.std_C))
    settings, *epochs = record(out)
    assert settings["recipe"] == dataclasses.asdict(kept.recipe)
    assert {key: settings[key] for key in ("seed", "dataset", "n_train", "resumed_at", "precision")} == {
        "seed": 3,
        "dataset": "folder",
        "n_train": 44,
        "resumed_at": 0,
        "precision": "bf16",
    }
    assert settings["packages"]["torch"] == torch.__version__
    assert settings["commit"]
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert all(line["held_out_accuracy"].keys() == {"1", "2", "full"} for line in epochs)
    assert 0 < epochs[0]["seconds"] < epochs[1]["seconds"]

    board = EventAccumulator(str(out)).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2]
    assert [event.value for event in board.Scalars("loss")] == pytest.approx(
        [line["loss"] for line in epochs]
    )
    assert "held_out_accuracy/full" in board.Tags()["scalars"]

    shown = capsys.readouterr().err
    assert "epoch 2/2" in shown
    assert re.search(r"loss \d\.\d+ 1:\d+\.\d 2:\d+\.\d full:\d+\.\d", shown)


def test_a_checkpoint_reads_the_split_that_it_was_trained_on(pictures: Path, tmp_path: Path) -> None:
    dataset = load("folder", pictures, n_held_out=3, seed=5)
    run = a_run(dataset, tmp_path / "run", seed=2)  # the seed of the run says nothing of the split
    run.out.mkdir()
    run.save()

    again = Checkpoint.load(run.checkpoint).load_data(pictures)

    assert torch.equal(again.held_out.images_NCHW, dataset.held_out.images_NCHW)


def test_the_checkpoint_is_the_network(toy: Dataset, tmp_path: Path) -> None:
    run = a_run(toy, tmp_path, Recipe("cifar-anytime", 1, 24, 0.01, "triangle"))
    train(run)

    kept = Checkpoint.load(tmp_path / "checkpoint.pt")
    net = kept.network()

    assert not net.training
    assert kept.architecture == run.net.architecture
    assert kept.architecture.stem is not None
    images_NCHW = toy.normalise(toy.test.images_NCHW)
    for ours, theirs in zip(net.networks().values(), run.net.eval().networks().values(), strict=True):
        torch.testing.assert_close(ours(images_NCHW), theirs(images_NCHW))


def test_only_the_first_images_are_used_where_a_limit_is_given(pictures: Path, tmp_path: Path) -> None:
    assert main(command(pictures, tmp_path / "out", limit=17, epochs=1)) == 0
    assert record(tmp_path / "out")[0]["n_train"] == 17


# ---- every other way in which a run can end ----


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said by a command that cannot do what it is asked."""
    assert main(arguments) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("model.train: ")
    return said


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 1}, "batch size at least 2"),
        ({"batch_size": 1000}, "do not fill one batch of 1000"),
        ({"learning_rate": -1}, "learning rate must be above 0"),
        ({"architecture": "resnet"}, "there are cifar-20"),
        ({"size": 16}, "images of 16 pixels are halved away"),
        ({"device": "cuda:99"}, "--device cuda:99 cannot be used here"),
        ({"device": "abacus"}, "--device abacus cannot be used here"),
        ({"resume": True}, "there is no checkpoint"),
        ({"data": "/nowhere"}, "/nowhere must hold at least two folders"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: dict[str, object], said: str
) -> None:
    assert said in error_of(command(pictures, tmp_path / "out", **how), capsys)
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "wrong",
    ["--epochs=many", "--recipe=secret", "--dataset=mnist", "--size=0", "--limit=-5", "--unknown"],
)
def test_bad_usage_is_refused_before_anything_is_done(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command(pictures, tmp_path / "out"), wrong])
    assert ended.value.code == 2
    assert wrong.partition("=")[0] in capsys.readouterr().err


def test_a_file_in_the_way_of_the_run_is_an_error(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("in the way")

    assert str(tmp_path / "out") in error_of(command(pictures, tmp_path / "out"), capsys)


def test_a_run_is_not_overwritten_and_not_mixed_with_another(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command(pictures, out)) == 0
    before = (out / "checkpoint.pt").read_bytes()

    assert "exists: --resume to go on with it" in error_of(command(pictures, out), capsys)
    for how, what in (
        ({"learning_rate": 0.1}, "other recipe:"),
        ({"seed": 1}, "other seed:"),
        ({"architecture": "cifar-deep-2"}, "other recipe, architecture:"),
        ({"size": 48}, "other architecture:"),
    ):
        assert what in error_of(command(pictures, out, resume=True, **how), capsys)
    (pictures / "red").rename(pictures / "scarlet")
    assert "other labels:" in error_of(command(pictures, out, resume=True), capsys)
    assert (out / "checkpoint.pt").read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(pictures: Path, tmp_path: Path) -> None:
    assert main(command(pictures, tmp_path / "out", epochs=1)) == 0
    before = (tmp_path / "out" / "checkpoint.pt").read_bytes()

    assert main([*command(pictures, tmp_path / "out", epochs=1), "--resume"]) == 0
    assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == before


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([1]), pickle.dumps({"epoch": 1})])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(content)

    with pytest.raises(TrainingError, match="is no checkpoint that can be read here"):
        Checkpoint.load(tmp_path / "checkpoint.pt")


def test_a_malicious_checkpoint_calls_nothing(tmp_path: Path) -> None:
    torch.save({"recipe": _Malicious(tmp_path / "called")}, tmp_path / "checkpoint.pt")

    with pytest.raises(TrainingError, match="is no checkpoint that can be read here"):
        Checkpoint.load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "called").exists()


def test_a_checkpoint_holds_nothing_but_plain_values_and_tensors(toy: Dataset, tmp_path: Path) -> None:
    run = a_run(toy, tmp_path)
    run.save()

    fields = torch.load(run.checkpoint, weights_only=True)

    assert set(fields) == {f.name for f in dataclasses.fields(Checkpoint)}
    assert fields["recipe"] == dataclasses.asdict(QUICK)


# ---- it ends badly, and the last good epoch stays ----


def one_good_epoch(toy: Dataset, out: Path) -> bytes:
    run = a_run(toy, out)
    run.train_epoch()
    run.save()
    return run.checkpoint.read_bytes()


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_good_epoch(
    toy: Dataset, tmp_path: Path
) -> None:
    good = one_good_epoch(toy, tmp_path)
    run = a_run(toy, tmp_path)
    run.resume()
    toy.train.labels_N.fill_(0)
    with torch.no_grad():
        run.net.head[2].get_parameter("bias")[1] = float("inf")  # a right answer has log probability -inf

    with pytest.raises(
        TrainingError, match=r"loss became (nan|inf) in epoch 2: lower .* still holds epoch 1"
    ):
        train(run)
    assert run.checkpoint.read_bytes() == good
    assert Checkpoint.load(run.checkpoint).network().state_dict()


def test_a_rate_far_too_high_is_an_error_that_says_so(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = error_of(command(pictures, tmp_path / "out", learning_rate=1e30), capsys)

    assert re.search(r"in epoch 1: lower --learning-rate; none is kept", said)
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_weights_that_the_last_step_has_broken_are_not_kept(toy: Dataset, tmp_path: Path) -> None:
    one_step = dataclasses.replace(QUICK, batch_size=48, learning_rate=3e38, weight_decay=100.0)
    run = a_run(toy, tmp_path, one_step)

    with pytest.raises(TrainingError, match="a weight is no longer a number in epoch 1: lower"):
        train(run)
    assert not run.checkpoint.exists()


def test_a_full_disk_is_an_error_and_keeps_the_last_good_epoch(toy: Dataset, tmp_path: Path) -> None:
    good = one_good_epoch(toy, tmp_path)
    run = a_run(toy, tmp_path)
    run.resume()

    with (
        no_file_larger_than(len(good) // 2),
        pytest.raises(TrainingError, match=r"checkpoint\.pt cannot be written; .* before it is untouched"),
    ):
        train(run)

    assert run.checkpoint.read_bytes() == good
    assert not run.checkpoint.with_suffix(".part").exists()
    resumed = a_run(toy, tmp_path)
    resumed.resume()
    train(resumed)
    assert Checkpoint.load(resumed.checkpoint).epoch == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_record_that_cannot_be_written_is_an_error(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "record.jsonl").symlink_to("/dev/full")

    said = error_of(command(pictures, tmp_path / "out"), capsys)

    assert re.search(r"record\.jsonl cannot be written .*No space left", said)


# ---- Ctrl-C ----


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # Pillow, when interrupted in opening one
def test_ctrl_c_before_the_first_epoch_says_that_nothing_is_kept(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = pictures / "red" / "slow.png"
    os.mkfifo(pipe)

    def press_ctrl_c_while_it_is_read() -> None:
        # Opens when the picture is. The close lets a read go on that began just before the signal was seen.
        with pipe.open("wb"):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    user = threading.Thread(target=press_ctrl_c_while_it_is_read)
    # A shell starts its background jobs with Ctrl-C ignored; these tests may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    user.start()
    try:
        code = main(command(pictures, tmp_path / "out"))
    finally:
        user.join()
        signal.signal(signal.SIGINT, before)

    assert code == 130
    assert "stopped; no checkpoint had been kept yet" in capsys.readouterr().err


@contextmanager
def child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process of its own, which ends with the block."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()  # else leaving Popen's block would wait for what may never come


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not is_so():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_goes_on(pictures: Path, tmp_path: Path) -> None:
    arguments = command(pictures, tmp_path / "out", epochs=30)
    with child("-m", "model.train", *arguments) as process:
        wait_until((tmp_path / "out" / "checkpoint.pt").exists, process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()

    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert f"--resume goes on from {tmp_path / 'out' / 'checkpoint.pt'}" in said
    stopped_at = Checkpoint.load(tmp_path / "out" / "checkpoint.pt").epoch
    assert 1 <= stopped_at < 30

    assert main([*arguments, "--resume"]) == 0

    assert Checkpoint.load(tmp_path / "out" / "checkpoint.pt").epoch == 30
    lines = record(tmp_path / "out")
    assert [line["epoch"] for line in lines if "epoch" in line] == list(range(1, 31))
    assert [line["resumed_at"] for line in lines if "epoch" not in line] == [0, stopped_at]


# ---- several processes ----


SCRIPT = """
import dataclasses
import os
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from model.train import Recipe, Run, TrainingError, main, train
from model.data import load

pictures, out = map(Path, sys.argv[1:3])
torch.manual_seed(17)  # nothing may depend on it
code = main(sys.argv[3:])
assert code == 0, code

# The first group's keys are still in torchrun's store.
store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", store=dist.PrefixStore("second", store), rank=rank, world_size=2)
recipe = Recipe("cifar-deep-2", 1, 12, 0.05, "triangle", dropout=False, passes="coin")
dataset = load("folder", pictures)
try:
    Run(dataclasses.replace(recipe, batch_size=13), dataset, out, seed=0, bf16=False, device="cpu")
except TrainingError as error:
    assert "13 does not divide among 2 processes" in str(error)
else:
    raise AssertionError("a batch that does not divide must be refused")
run = Run(recipe, dataset, out / "mine", seed=0, bf16=False, device="cpu")
train(run)
torch.save(run.net.state_dict(), out / f"{run.rank}.pt")
dist.destroy_process_group()
"""


def trained_on_shares_in_turn(dataset: Dataset, out: Path) -> dict[str, Tensor]:
    """What two processes should reach, by one: the mean of the gradients of the halves of each batch.

    Each half is normalised by its own statistics, as in each process; the first keeps the running ones.
    """
    recipe = Recipe("cifar-deep-2", 1, 12, 0.05, "triangle", dropout=False, passes="coin")
    run = a_run(dataset, out, recipe)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(dataset.train), generator=generator)
    buffers = dict(run.net.named_buffers())
    for step in range(run.n_steps):
        for group in run.optimiser.param_groups:
            group["lr"] = learning_rate(recipe, step / run.n_steps)
        images_NCHW, labels_N = run._batch(order[12 * step : 12 * step + 12], generator)
        parts = sample_parts(recipe, run.net.architecture, generator)
        before = {name: value.clone() for name, value in buffers.items()}
        run.optimiser.zero_grad()
        for rank in (1, 0):
            for name, value in buffers.items():
                value.copy_(before[name])
            (run.objective(images_NCHW[rank::2], labels_N[rank::2], parts) / 2).backward()
        run.optimiser.step()
    return run.net.state_dict()


def test_two_processes_train_as_one(pictures: Path, tmp_path: Path) -> None:
    """By torchrun over gloo: first the command itself, then a run whose every process shows its weights."""
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    arguments = command(pictures, tmp_path / "first", epochs=2, architecture="cifar-deep-2")
    with child(*launcher, str(tmp_path / "script.py"), str(pictures), str(tmp_path), *arguments) as process:
        _, said = process.communicate()
    assert process.returncode == 0, said

    lines = record(tmp_path / "first")  # written by one process alone
    assert lines[0]["n_processes"] == 2
    assert [line.get("epoch") for line in lines] == [None, 1, 2]
    assert Checkpoint.load(tmp_path / "first" / "checkpoint.pt").epoch == 2

    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    learned = {
        key for key in first if "running_" not in key
    }  # of the last batch's statistics each has its own
    assert_equal({key: first[key] for key in learned}, {key: second[key] for key in learned})
    assert_equal(Checkpoint.load(tmp_path / "mine" / "checkpoint.pt").model, first)
    expected = trained_on_shares_in_turn(load("folder", pictures), tmp_path / "alone")
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)

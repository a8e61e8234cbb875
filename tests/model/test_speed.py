"""The benchmark of training: what it counts, and all of it once at toy size."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from model import speed
from model.fractalnet import FractalNet, preset
from model.recipe import RECIPES, Recipe
from model.speed import FLOPS_PER_MAC, PlainLoop, Speed, flops_per_image, measure, noise, table


@pytest.mark.parametrize(
    ("how", "millions"),
    [
        ({"passes": "tied"}, 845.2 + 67.8 + 228.3 + 549.1),
        ({"passes": "coin", "local_share": 0.5}, 845.2 / 2 + 845.2 / 6),
        ({"passes": "columns", "local_share": 0.0}, 67.8 + 228.3 + 549.1),
    ],
)
def test_a_steps_operations_are_those_of_the_networks_it_trains(
    how: dict[str, object], millions: float
) -> None:
    recipe = Recipe("cifar-20", 1, 8, 0.1, "steps", **how)  # type: ignore[arg-type] # a mixed dict
    net = FractalNet(preset("cifar-20", n_classes=10, size=32))

    assert flops_per_image(recipe, net) / FLOPS_PER_MAC / 1e6 == pytest.approx(millions, rel=1e-3)


def test_every_way_has_its_turns_and_the_first_is_not_counted() -> None:
    order: list[str] = []
    ways = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}

    speeds = measure(ways, 100, 3, torch.device("cpu"))

    assert order == ["a", "b"] * 4
    assert [(one.way, len(one.images_hz)) for one in speeds] == [("a", 3), ("b", 3)]


def test_the_table_compares_with_the_first_way_and_the_large_product() -> None:
    speeds = [Speed("plain loop", (90.0, 110.0)), Speed("other", (300.0, 300.0))]

    text = table(RECIPES["wide"], speeds, flops=1e9, peak=1e12)

    assert "| plain loop | 100 ± 14 | 1.00 | 10.0 |" in text
    assert "| other | 300 ± 0 | 3.00 | 30.0 |" in text


def test_the_plain_loop_learns() -> None:
    recipe = dataclasses.replace(
        RECIPES["wide"], architecture="cifar-deep-2", batch_size=8, learning_rate=0.01
    )
    loop = PlainLoop(recipe, noise(16), torch.device("cpu"))
    before = loop.net.column(1)[0].get_parameter("weight").clone()

    assert loop.train_epoch() > 0
    assert not torch.equal(before, loop.net.column(1)[0].get_parameter("weight"))


def test_all_of_it_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--recipes",
        "anytime",
        "--batch-size",
        "4",
        "--steps",
        "1",
        "--turns",
        "2",
        "--device",
        "cpu",
    ]

    assert speed.main([*arguments, "--out", str(tmp_path / "speed")]) == 0

    page = (tmp_path / "speed.md").read_text()
    assert "cifar-anytime, batches of 4" in page
    assert page.count("| plain loop |") == page.count("| bfloat16") == 1
    assert "CUDA graphs" not in page
    assert page.strip() in capsys.readouterr().out
    assert speed.main([*arguments, "--batch-size", "1"]) == 1
    assert "batch size at least 2" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--recipes", "other"), ("--recipes", "distilled"), ("--turns", "1")])
def test_what_cannot_be_measured_is_said(
    arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        speed.main(list(arguments))
    assert re.search(f"at least 2|{arguments[1]!r} is no recipe", capsys.readouterr().err)

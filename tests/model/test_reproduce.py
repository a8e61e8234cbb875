"""The paper's table: runs that go on, are not repeated, and are what the page says."""

import dataclasses
import json
from pathlib import Path

import pytest

from model import reproduce
from model.data import Dataset
from model.recipe import RECIPES
from model.reproduce import BEGIN, END, STUDIES, Study, by, each_finished, fill, table, toy
from model.train import Checkpoint, Run, TrainingError
from tests.model.test_data import write_cifar10

TOY = dataclasses.replace(toy(STUDIES[0]), name="toy", dataset="folder")
TOY = dataclasses.replace(TOY, recipe=dataclasses.replace(TOY.recipe, batch_size=8, epochs=2))


def run(study: Study, dataset: Dataset, out: Path, seed: int = 0) -> reproduce.Result:
    return reproduce.finished(study.recipe, dataset, out, seed=seed, bf16=False, device="cpu")


def test_the_recipe_is_the_papers() -> None:
    recipe = STUDIES[0].recipe
    assert (recipe.architecture, recipe.epochs, recipe.batch_size, recipe.learning_rate) == (
        "cifar-20",
        400,
        100,
        0.02,
    )
    assert (recipe.local_drop, recipe.passes, recipe.dropout, recipe.affine) == (0.15, "tied", True, False)


def test_another_recipe_keeps_the_network_and_the_papers_numbers() -> None:
    deep = STUDIES[2]
    wide = by("wide", deep)
    assert by("paper", deep) is deep
    assert (wide.name, wide.published) == ("cifar100-deep-4-wide", deep.published)
    assert wide.recipe == dataclasses.replace(RECIPES["wide"], architecture="cifar-deep-4")


def test_every_network_is_measured_on_the_test_split(toy: Dataset, tmp_path: Path) -> None:
    result = run(TOY, toy, tmp_path / "run")
    assert result["error"].keys() == {"1", "2", "full"}
    thirds = [round(error * 12 / 100, 6) for error in result["error"].values()]
    assert all(wrong.is_integer() and 0 <= wrong <= 12 for wrong in thirds)
    assert (result["n_train"], result["n_measured"], result["seed"]) == (48, 12, 0)


def test_the_test_split_is_what_is_measured_and_not_what_is_held_out(toy: Dataset, tmp_path: Path) -> None:
    def errors(labels_shift: int, name: str) -> dict[str, float]:
        test = dataclasses.replace(toy.test, labels_N=(toy.test.labels_N + labels_shift) % 3)
        error: dict[str, float] = run(TOY, dataclasses.replace(toy, test=test), tmp_path / name)["error"]
        return error

    in_all = [sum(of) for of in zip(*(errors(k, f"run-{k}").values() for k in range(3)), strict=True)]
    assert in_all == pytest.approx([200.0] * 3)  # each image is right under exactly one shift of the labels


def test_a_run_that_was_cut_off_goes_on_and_one_that_is_done_is_not_repeated(
    toy: Dataset, tmp_path: Path
) -> None:
    whole = run(TOY, toy, tmp_path / "whole")
    cut = Run(TOY.recipe, toy, tmp_path / "cut", seed=0, bf16=False, device="cpu")
    cut.out.mkdir()
    cut.train_epoch()
    cut.save()
    assert run(TOY, toy, tmp_path / "cut")["error"] == whole["error"]
    lines = (tmp_path / "cut" / "record.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [2]
    assert run(TOY, toy, tmp_path / "whole") == whole
    with pytest.raises(TrainingError, match="another run"):
        run(TOY, toy, tmp_path / "whole", seed=1)
    with pytest.raises(TrainingError, match="another run"):
        run(TOY, dataclasses.replace(toy, name="other"), tmp_path / "whole")


def test_a_round_of_all_comes_before_the_next_and_what_fails_keeps_no_other_back(
    toy: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = {"one": TOY.recipe, "diverges": dataclasses.replace(TOY.recipe, learning_rate=1e30)}
    recipes["two"] = TOY.recipe
    seen: list[dict[str, int]] = []

    with pytest.raises(TrainingError, match="not made: diverges-seed-0, diverges-seed-1"):
        seen.extend(
            {name: len(of) for name, of in results.items()}
            for results in each_finished(
                recipes, lambda _: toy, tmp_path, n_seeds=2, bf16=False, device="cpu"
            )
        )

    assert [(at["one"], at["diverges"], at["two"]) for at in seen] == [
        (1, 0, 0),
        (1, 0, 1),
        (2, 0, 1),
        (2, 0, 2),
    ]
    assert "diverges-seed-0: " in capsys.readouterr().err
    assert (tmp_path / "two-seed-1" / "result.json").exists()


def test_sections_that_are_not_made_anew_stay_on_the_page(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text(f"# Before\n{BEGIN}\n### one\n\nstale words\n\n### two\n\nof a GPU\n{END}\nAfter\n")

    fill(page, "### three\n\nnew\n\n### one\n\nfresh\n")
    fill(page, "### three\n\nnewer\n")

    inside = "### one\n\nfresh\n\n### two\n\nof a GPU\n\n### three\n\nnewer\n\n"
    assert page.read_text() == f"# Before\n{BEGIN}\n{inside}{END}\nAfter\n"


def test_the_command_fills_the_page_by_its_own_recipe(tmp_path: Path) -> None:
    write_cifar10(tmp_path, n=10)
    page = tmp_path / "results.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    how = ["--studies", "cifar10-20", "--recipes", "wide", "--seeds", "2", "--held-out", "3"]
    how += ["--architecture", "cifar-deep-2", "--epochs", "1", "--batch-size", "8", "--learning-rate", "0.05"]
    how += [
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "runs"),
        "--precision",
        "fp32",
        "--device",
        "cpu",
    ]

    assert reproduce.main([*how, "--page", str(page)]) == 0

    run = tmp_path / "runs" / "cifar10-20-wide-seed-1"
    result = json.loads((run / "result.json").read_text())
    assert (result["recipe"]["learning_rate"], result["recipe"]["distillation"]) == (0.05, 0.5)
    again = Checkpoint.load(run / "checkpoint.pt").load_data(tmp_path)  # to be exported, or to teach
    assert len(again.held_out) == 3
    assert "### cifar10-20-wide" in page.read_text()
    assert "2 seeds" in page.read_text()


def test_the_table_is_of_all_seeds() -> None:
    one = {"n_train": 9, "n_measured": 8, "hardware": "a machine", "precision": "fp32", "seconds": 3600.0}
    one |= {"packages": {"torch": "2"}, "date": "2026-11-27T00:00:00"}
    results = [one | {"error": {"2": 4.0, "full": 3.0}}, one | {"error": {"2": 6.0, "full": 3.0}}]
    text = table(dataclasses.replace(TOY, published={"2": 4.68}), results)
    assert "| column 2 | 5.00 ± 1.41 | 4.68 |" in text
    assert "| joined | 3.00 ± 0.00 |  |" in text
    assert "1.00 h a run" in text
    assert "recipe `another`" in text
    shorter = dataclasses.replace(STUDIES[0], recipe=dataclasses.replace(STUDIES[0].recipe, epochs=7))
    assert "recipe `paper`, 7 epochs" in table(shorter, results)


def test_a_page_without_a_place_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="no place"):
        fill(page, "text")
    assert page.read_text() == "nothing"


def test_what_cannot_be_done_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reproduce.main(["--studies", "cifar10-20,other"])
    assert "no study is called 'other'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        reproduce.main(["--recipes", "paper,anytime"])
    assert "use paper, wide" in capsys.readouterr().err

"""The paper's table: runs that go on, are not repeated, and are what the page says."""

import dataclasses
import json
from pathlib import Path

import pytest

from model import reproduce
from model.data import Dataset
from model.reproduce import BEGIN, END, STUDIES, Study, by, fill, run_all, table, toy
from model.train import RECIPES, Run, TrainingError

TOY = dataclasses.replace(toy(STUDIES[0]), name="toy", dataset="folder")
TOY = dataclasses.replace(TOY, recipe=dataclasses.replace(TOY.recipe, batch_size=8, epochs=2))


def run(study: Study, dataset: Dataset, out: Path, seed: int = 0) -> reproduce.Result:
    return reproduce.reproduce(study, dataset, out, seed=seed, bf16=False, device="cpu")


def test_the_recipe_is_the_papers() -> None:
    recipe = STUDIES[0].recipe
    assert (recipe.architecture, recipe.epochs, recipe.batch_size, recipe.learning_rate) == (
        "cifar-20",
        400,
        100,
        0.02,
    )
    assert (recipe.local_drop, recipe.passes, recipe.dropout) == (0.15, "tied", True)


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
    assert (result["n_train"], result["n_test"], result["seed"]) == (48, 12, 0)


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


def test_the_page_has_means_deviations_and_the_papers_numbers(toy: Dataset, tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text(f"# Before\n{BEGIN}\nstale words\n{END}\nAfter\n")
    arguments = {"n_seeds": 2, "bf16": False, "device": "cpu", "page": page}
    run_all([TOY], lambda _: toy, tmp_path / "runs", **arguments)  # type: ignore[arg-type] # a mixed dict
    text = page.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith("After\n")
    assert "stale words" not in text
    assert "2 seeds" in text
    assert "| joined |" in text
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["toy-seed-0", "toy-seed-1"]


def test_the_table_is_of_all_seeds() -> None:
    one = {"n_train": 9, "n_test": 8, "hardware": "a machine", "precision": "fp32", "seconds": 3600.0}
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

"""What parts of a recipe are worth: one change at a time, told against the run of the same seed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from model import ablate
from model.ablate import AS_IT_IS, changes, table, variants
from model.recipe import RECIPES
from model.reproduce import BEGIN, END


def results(*errors: tuple[int, float, float]) -> list[dict[str, Any]]:
    return [{"seed": seed, "error": {"1": one, "2": two}} for seed, one, two in errors]


@pytest.mark.parametrize("name", ["distilled", "anytime", "wide"])
def test_every_variant_is_the_recipe_but_for_what_it_names(name: str) -> None:
    recipe = RECIPES[name]
    made = variants(recipe)

    assert made.pop(AS_IT_IS) == recipe
    for variant, other in made.items():
        change = changes(recipe)[variant]
        assert other != recipe, variant
        assert dataclasses.replace(recipe, **change) == other


def test_what_cannot_be_is_no_variant() -> None:
    of_distilled, of_wide, of_anytime = (
        variants(RECIPES[name]).keys() for name in ("distilled", "wide", "anytime")
    )

    assert of_distilled == {AS_IT_IS, *changes(RECIPES["distilled"])}
    assert of_distilled - of_wide == {"one-column-a-batch", "taught-by-joined"}
    assert of_distilled - of_anytime == {"untaught", "no-cutout", "joined-net-too"}


def test_what_a_change_adds_is_told_against_the_run_of_the_same_seed() -> None:
    text = table(
        {
            AS_IT_IS: results((0, 10.0, 8.0), (1, 20.0, 9.0), (2, 12.0, 10.0)),
            "no-cutout": results((2, 13.0, 9.5), (1, 22.0, 8.5)),  # that of the first seed failed
            "averaged": results((0, 9.0, 8.0)),
            "untaught": [],
        }
    )

    assert "| nothing: error, % | 3 | 14.00 ± 5.29 | 9.00 ± 1.00 |" in text
    assert "| no cutout: points added | 2 | +1.50 ± 0.71 | -0.50 ± 0.00 |" in text
    assert "| averaged: points added | 1 | -1.00 | +0.00 |" in text
    assert "untaught" not in text


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page with a place."""
    page = tmp_path / "ablation.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    return page


def arguments(page: Path, pictures: Path, *more: str) -> list[str]:
    how = ["--architecture", "cifar-deep-2", "--epochs", "1", "--batch-size", "12", "--learning-rate", "0.01"]
    how += ["--precision", "fp32", "--device", "cpu", "--out", str(page.parent / "runs"), "--page", str(page)]
    return [*how, "--dataset", "folder", "--data", str(pictures), *more]


def test_the_command_measures_on_held_out_images_and_fills_the_page(page: Path, pictures: Path) -> None:
    assert (
        ablate.main(
            arguments(page, pictures, "--seeds", "2", "--only", "no-cutout,averaged", "--limit", "24")
        )
        == 0
    )

    folders = sorted(folder.name for folder in (page.parent / "runs").iterdir())
    assert folders == [
        f"{name}-seed-{seed}" for name in (AS_IT_IS, "averaged", "no-cutout") for seed in (0, 1)
    ]
    result = json.loads((page.parent / "runs" / folders[0] / "result.json").read_text())
    assert (result["split"], result["n_measured"], result["n_train"]) == ("held_out", 4, 24)
    assert result["error"].keys() == {"1", "2"}  # no batch of this recipe trains the joined net
    text = page.read_text()
    assert "### distilled: cifar-deep-2 on folder, 1 epochs of 24 images, no teacher" in text
    assert "; 4 held-out images" in text
    assert "| no cutout: points added | 2 |" in text


def test_a_teacher_teaches_all_but_the_untaught(page: Path, pictures: Path) -> None:
    assert ablate.main(arguments(page, pictures, "--seeds", "1", "--only", "averaged")) == 0
    teacher = page.parent / "runs" / f"{AS_IT_IS}-seed-0" / "checkpoint.pt"

    more = ["--seeds", "2", "--only", "untaught", "--teacher", str(teacher)]
    assert ablate.main([*arguments(page, pictures), "--out", str(page.parent / "taught"), *more]) == 0

    def recipe(name: str) -> dict[str, Any]:
        kept: dict[str, Any] = json.loads((page.parent / "taught" / name / "result.json").read_text())
        return kept

    assert recipe("as-it-is-seed-1")["teacher"].startswith("cifar-deep-2, 1 epochs, seed 0, weights ")
    assert recipe("as-it-is-seed-1")["recipe"]["distillation"] == 0.9
    assert recipe("untaught-seed-1")["teacher"] is None
    headings = [line for line in page.read_text().splitlines() if line.startswith("### ")]
    assert len(headings) == 2  # that without a teacher has stayed
    assert "taught by cifar-deep-2" in headings[1]


def test_what_cannot_be_done_is_said(page: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for only in ("other", "no-cutout,untaught"):  # there is no teacher
        assert ablate.main(arguments(page, pictures, "--only", only)) == 1
        assert f"{only.split(',')[-1]!r} changes nothing here" in capsys.readouterr().err
    assert (
        ablate.main(arguments(page, pictures, "--seeds", "1", "--teacher", str(page.parent / "none.pt"))) == 1
    )
    assert "there is no checkpoint" in capsys.readouterr().err

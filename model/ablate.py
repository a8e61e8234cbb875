"""What each part of a recipe is worth: one thing changed at a time, over several seeds, on held-out images.

    python -m model.ablate --data data --out runs/ablate --page docs/ablation.md --teacher PATH/checkpoint.pt

Runs of one seed see the same images in the same order and, but for another initialisation, begin with the
same weights; crops are the same where a change draws nothing at random. Measured on images held out of train;
the test split is not looked at. Every run goes on where it was interrupted; one that is done is not repeated.
Must not know calibration of answers, export or serving.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from model import data
from model.recipe import RECIPES, Recipe, add_overrides, overridden
from model.reproduce import Result, each_finished, shown, spread
from model.train import Checkpoint, add_way, at_least_1, way_of

AS_IT_IS = "as-it-is"


def changes(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What is changed of it, by the name of its folder and its row."""
    return {
        "untaught": {"distillation": 0.0},
        "taught-by-joined": {"passes": "tied", "teacher": "joined", "distillation": 0.5, "temperature": 1.0},
        "one-column-a-batch": {"passes": "coin"},
        "joined-net-too": {"local_share": 0.25},
        "no-cutout": {"cutout": 0},
        "random-flip": {"flip": "random"},
        "xavier": {"initialisation": "xavier"},
        "averaged": {"averaging": 0.03},
        "twice-the-rate": {"learning_rate": 2 * recipe.learning_rate},
        "half-the-rate": {"learning_rate": recipe.learning_rate / 2},
    }


def variants(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe itself, and with each change that makes another one of it and leaves one that can be."""
    made = {AS_IT_IS: recipe}
    for name, change in changes(recipe).items():
        with suppress(ValueError):  # columns by lot cannot be taught by a joined net that is not run
            if (other := dataclasses.replace(recipe, **change)) != recipe:
                made[name] = other
    return made


def table(results: Mapping[str, Sequence[Result]]) -> str:
    """Errors of the recipe, and what each change adds to those of the same seed, as Markdown.

    Args:
        results: By variant, some of the recipe itself among them.
    """
    base = {result["seed"]: result["error"] for result in results[AS_IT_IS]}
    columns = [name for name in results[AS_IT_IS][0]["error"] if name != "full"]
    lines = [
        f"| changed | n | {' | '.join(f'column {column}' for column in columns)} |",
        f"|---|---:|{'---:|' * len(columns)}",
    ]
    for name, of_variant in results.items():
        pairs = [(one["error"], base[one["seed"]]) for one in of_variant if one["seed"] in base]
        if not pairs:
            continue
        if name == AS_IT_IS:
            title, cells = "nothing: error, %", [spread([one[c] for one, _ in pairs]) for c in columns]
        else:
            title = f"{name.replace('-', ' ')}: points added"
            cells = [spread([one[c] - before[c] for one, before in pairs], sign="+") for c in columns]
        lines.append(f"| {title} | {len(pairs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def section(name: str, results: Mapping[str, Sequence[Result]]) -> str:
    """The table below what it is about; `name` is the recipe's."""
    first = results[AS_IT_IS][0]
    recipe = first["recipe"]
    taught = f"taught by {first['teacher']}" if first["teacher"] else "no teacher"
    title = (
        f"{name}: {recipe['architecture']} on {first['dataset']}, {recipe['epochs']} epochs of "
        f"{first['n_train']} images, {taught}"
    )
    about = (
        f"Batches of {recipe['batch_size']}, rate {recipe['learning_rate']}; "
        f"{first['n_measured']} held-out images. {first['hardware']}, {first['precision']}, "
        f"torch {first['packages']['torch']}, {first['date'][:10]}. Mean ± deviation over seeds."
    )
    return "\n".join([f"### {title}", "", about, "", table(results), ""])


def _chosen(recipe: Recipe, only: str | None) -> dict[str, Recipe]:
    made = variants(recipe)
    names = {AS_IT_IS, *(only.split(",") if only else made)}
    if unknown := sorted(names - made.keys()):
        raise ValueError(f"{unknown[0]!r} changes nothing here, or leaves no recipe: leave it out of --only")
    return {name: variant for name, variant in made.items() if name in names}


def _sections(options: argparse.Namespace) -> Iterator[str]:
    recipe = overridden(RECIPES[options.recipe], options)
    if recipe.is_taught_by_another and not options.teacher:
        recipe = dataclasses.replace(recipe, distillation=0.0)
    chosen = _chosen(recipe, options.only)
    teacher = Checkpoint.load(options.teacher) if options.teacher else None
    dataset = data.load(options.dataset, options.data, **(teacher.split if teacher else {}))
    dataset = dataclasses.replace(dataset, train=dataset.train[: options.limit])
    for results in each_finished(
        chosen,
        lambda _: dataset,
        options.out,
        n_seeds=options.seeds,
        every=options.every,
        teacher=teacher,
        split="held_out",
        **way_of(options),
    ):
        if results[AS_IT_IS]:
            yield section(options.recipe, results)


def main(argv: list[str] | None = None) -> int:
    """Do as the command line says; the exit code is 0, 1 with a sentence, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m model.ablate", description=__doc__.splitlines()[0])
    names = tuple(changes(RECIPES["distilled"]))
    parser.add_argument("--recipe", choices=RECIPES, default="distilled")
    parser.add_argument("--dataset", choices=("cifar10", "cifar100", "svhn", "folder"), default="cifar10")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where the data is, or shall be")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"), help="folder of all runs")
    parser.add_argument("--page", type=Path, help="put the table between the marks of this page")
    parser.add_argument("--seeds", type=at_least_1, default=3, help="runs of each variant")
    parser.add_argument("--only", help=f"with commas, of {', '.join(names)}; all if not given")
    parser.add_argument("--limit", type=at_least_1, help="use only the first so many training images")
    parser.add_argument(
        "--teacher", type=Path, help="checkpoint of another network; without one the recipe has none"
    )
    add_way(parser, every=10)
    add_overrides(parser)
    options = parser.parse_args(argv)
    return shown("model.ablate", _sections(options), options.page)


if __name__ == "__main__":
    sys.exit(main())

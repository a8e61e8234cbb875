"""The paper's numbers, beside ours: trains its networks by its recipe over several seeds and fills the page.

    python -m model.reproduce --data data --out runs/reproduce --page docs/results.md

Every run goes on where it was interrupted; one that is done is not repeated. The test split is looked at
once, when a run has ended; a few training images are held out to watch it, and nothing is chosen by them.
`--toy` does all of it within a minute on a CPU, shows nothing but that it works, and leaves the page alone.
Must not know calibration of answers, export or serving.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, Unpack

import torch

from model import data
from model.calibrate import recalibrate
from model.recipe import RECIPES, Recipe, add_overrides, overridden
from model.train import (
    Checkpoint,
    Run,
    TrainingError,
    Way,
    accuracy,
    add_way,
    at_least_1,
    logits,
    train,
    way_of,
)

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
RESULT = "result.json"
N_HELD_OUT = 1000
"""The paper trains on all images. Larger shows more of a run that goes wrong, and leaves less to train on."""
TOY_LIMIT = 256

Result = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A row of the paper.

    Attributes:
        name: Of the folder of its runs.
        dataset: As `data.load` calls it.
        recipe: What to do.
        published: Test error of a column or of "full", the joined net, in the paper [%].
        source: Where the paper has it.
    """

    name: str
    dataset: str
    recipe: Recipe
    published: Mapping[str, float]
    source: str


PAPER = RECIPES["paper"]
STUDIES = (
    Study("cifar10-20", "cifar10", PAPER, {"3": 4.68, "full": 4.60}, "table 1, C10+"),
    Study("cifar100-20", "cifar100", PAPER, {"3": 24.32, "full": 23.73}, "table 1, C100+"),
    Study(
        "cifar100-deep-4",
        "cifar100",
        dataclasses.replace(PAPER, architecture="cifar-deep-4"),
        {"1": 37.23, "2": 32.85, "3": 31.31, "4": 31.75, "full": 27.38},
        "tables 3 and 4, C100++; as remembered, not read again",
    ),
)


def by(recipe: str, study: Study) -> Study:
    """The study by another recipe than the paper's, under a name of its own."""
    if recipe == "paper":
        return study
    same_net = dataclasses.replace(RECIPES[recipe], architecture=study.recipe.architecture)
    return dataclasses.replace(study, name=f"{study.name}-{recipe}", recipe=same_net)


def toy(study: Study) -> Study:
    """The same in a few seconds, worth nothing."""
    small = dataclasses.replace(study.recipe, architecture="cifar-deep-2", epochs=1, batch_size=32)
    return dataclasses.replace(study, recipe=small, published={"2": study.published["full"]})


def finished(
    recipe: Recipe,
    dataset: data.Dataset,
    out: Path,
    *,
    seed: int,
    every: int = 1,
    teacher: Checkpoint | None = None,
    split: Literal["test", "held_out"] = "test",
    **way: Unpack[Way],
) -> Result:
    """Train one network, or go on with it, and measure it; what is done is only read.

    Args:
        recipe: What to do.
        dataset: On which images.
        out: Folder of the run.
        seed: As `Run`.
        every: As `train`.
        teacher: As `Run`, where the recipe asks for one.
        split: On which images it is measured, after recalibration.
        way: As `Run`.

    Returns:
        `error` by network [%], and how that was made.

    Raises:
        TrainingError: as `Run` and `train`, or the run that is there is another one.
        KeyboardInterrupt: after Ctrl-C; the same call goes on.
    """
    teacher = teacher if recipe.is_taught_by_another else None
    plan = {
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "dataset": dataset.name,
        "n_train": len(dataset.train),
        "held_out": [dataset.n_held_out, dataset.split_seed],
        "split": split,
        "teacher": teacher.title if teacher else None,
    }
    if (out / RESULT).exists():
        done: Result = json.loads((out / RESULT).read_text())
        if {name: done.get(name) for name in plan} != json.loads(json.dumps(plan)):
            raise TrainingError(f"{out} holds another run: remove it, or give another --out")
        return done
    run = Run(recipe, dataset, out, seed=seed, teacher=teacher, **way)
    if run.checkpoint.exists():
        run.resume()
    train(run, every=every)
    networks, measured = run.networks(), getattr(run.dataset, split)
    for network in networks.values():
        recalibrate(network, run.dataset)
    error = {
        name: 100 * (1 - accuracy(logits(network, measured, run.dataset.normalise), measured.labels_N))
        for name, network in networks.items()
    }
    result: Result = {
        **plan,
        "error": error,
        "n_measured": len(measured),
        "seconds": round(run.seconds, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **run.made_with,
    }
    (out / RESULT).write_text(json.dumps(result, indent=1) + "\n")
    return result


def table(study: Study, results: Sequence[Result]) -> str:
    """The errors beside the paper's, as Markdown."""
    first = results[0]
    recipe = study.recipe
    name = next((name for name, other in RECIPES.items() if _alike(other, recipe)), "another")
    hours = mean(result["seconds"] for result in results) / 3600
    about = (
        f"{recipe.architecture} on {study.dataset}, recipe `{name}`, {recipe.epochs} epochs "
        f"of {first['n_train']} images, {first['n_measured']} test images, {len(results)} seeds; "
        f"paper: {study.source}. {first['hardware']}, {first['precision']}, "
        f"torch {first['packages']['torch']}, {hours:.2f} h a run, {first['date'][:10]}."
    )
    lines = ["| network | test error, % | paper, % |", "|---|---:|---:|"]
    for network in first["error"]:
        errors = [result["error"][network] for result in results]
        published = study.published.get(network)
        title = "joined" if network == "full" else f"column {network}"
        paper = "" if published is None else f"{published:.2f}"
        lines.append(f"| {title} | {spread(errors)} | {paper} |")
    return "\n".join([f"### {study.name}", "", about, "", *lines, ""])


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and, where there are several, deviation, for people to read."""
    return f"{mean(values):{sign}.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _alike(one: Recipe, other: Recipe) -> bool:
    """Whether they differ in network and length alone."""
    return dataclasses.replace(one, architecture=other.architecture, epochs=other.epochs) == other


def fill(page: Path, text: str) -> None:
    """Put sections between the marks of a page; those that are there and are not given stay.

    Raises:
        ValueError: it lacks the marks.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no place for the results: put {BEGIN} and {END} into it")
    sections = "\n\n".join((_sections(inside) | _sections(text)).values())
    page.write_text(f"{before}{BEGIN}\n{sections}\n\n{END}{after}")


def _sections(text: str) -> dict[str, str]:
    """By heading, each from its heading on."""
    parts = re.split(r"^(?=### )", text, flags=re.MULTILINE)[1:]
    return {part.splitlines()[0]: part.strip() for part in parts}


def _load(study: Study, folder: Path, n_held_out: int, *, is_toy: bool) -> data.Dataset:
    dataset = data.load(study.dataset, folder, n_held_out=n_held_out)
    if not is_toy:
        return dataset
    few = {name: getattr(dataset, name)[:TOY_LIMIT] for name in ("train", "held_out", "test")}
    return dataclasses.replace(dataset, **few)


def each_finished(
    recipes: Mapping[str, Recipe],
    load: Callable[[str], data.Dataset],
    out: Path,
    *,
    n_seeds: int,
    every: int = 1,
    teacher: Checkpoint | None = None,
    split: Literal["test", "held_out"] = "test",
    **way: Unpack[Way],
) -> Iterator[dict[str, list[Result]]]:
    """Train all recipes with one seed before any has two: an interrupted call shows something of each.

    Args:
        recipes: By name; a run's folder has its recipe's name and its seed.
        load: Gives the data of a recipe, by its name.
        out: Folder of all runs.
        n_seeds: Runs of each, with seeds from 0 on.
        every: As `finished`; so are the others.
        teacher: Likewise.
        split: Likewise.
        way: Likewise.

    Yields:
        The results so far, after each run.

    Raises:
        TrainingError: at the end, if runs failed: they keep no other from being made.
    """
    results: dict[str, list[Result]] = {name: [] for name in recipes}
    failed = []
    for seed, (name, recipe) in product(range(n_seeds), recipes.items()):
        folder = out / f"{name}-seed-{seed}"
        try:
            result = finished(
                recipe, load(name), folder, seed=seed, every=every, teacher=teacher, split=split, **way
            )
        except (TrainingError, torch.OutOfMemoryError) as error:
            print(f"{folder.name}: {error}", file=sys.stderr, flush=True)
            failed.append(folder.name)
            continue
        results[name].append(result)
        yield results
    if failed:
        raise TrainingError(f"not made: {', '.join(failed)}; the same command tries again")


def shown(program: str, texts: Iterator[str], page: Path | None) -> int:
    """Print each text as it comes, and put it on the page; the exit code is as `main` says."""
    try:
        for text in texts:
            print(text, flush=True)
            if page:
                fill(page, text)
    except (TrainingError, data.DataError, ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _chosen(options: argparse.Namespace, names: Sequence[str], recipes: Sequence[str]) -> list[Study]:
    studies = [by(recipe, study) for recipe in recipes for study in STUDIES if study.name in names]
    shrunk = [toy(study) for study in studies] if options.toy else studies
    return [dataclasses.replace(one, recipe=overridden(one.recipe, options)) for one in shrunk]


def _tables(options: argparse.Namespace, names: Sequence[str], recipes: Sequence[str]) -> Iterator[str]:
    by_name = {study.name: study for study in _chosen(options, names, recipes)}
    for results in each_finished(
        {name: study.recipe for name, study in by_name.items()},
        lambda name: _load(by_name[name], options.data, options.held_out, is_toy=options.toy),
        options.out,
        n_seeds=options.seeds,
        every=options.every,
        **way_of(options),
    ):
        yield "\n".join(table(study, results[name]) for name, study in by_name.items() if results[name])


def main(argv: list[str] | None = None) -> int:
    """Do as the command line says; the exit code is 0, 1 with a sentence, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m model.reproduce", description=__doc__.splitlines()[0])
    names = [study.name for study in STUDIES]
    parser.add_argument("--studies", default=",".join(names), help="with commas; all if not given")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where the data is, or shall be")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="folder of all runs")
    parser.add_argument("--page", type=Path, help="put the tables between the marks of this page")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each")
    parser.add_argument(
        "--recipes",
        default="paper",
        help='with commas: "paper", or "wide", a modern one of a quarter of its epochs',
    )
    parser.add_argument(
        "--held-out",
        type=at_least_1,
        default=N_HELD_OUT,
        help="training images to watch a run by; 5000 if it is to be exported, or to teach",
    )
    add_way(parser, every=10)
    add_overrides(parser)
    parser.add_argument("--toy", action="store_true", help="a tiny network, a few images, one epoch")
    options = parser.parse_args(argv)
    chosen = options.studies.split(",")
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"no study is called {unknown[0]!r}: use {', '.join(names)}")
    recipes = options.recipes.split(",")
    if unknown := [name for name in recipes if name not in ("paper", "wide")]:
        parser.error(f"no recipe for this is called {unknown[0]!r}: use paper, wide")
    texts = _tables(options, chosen, recipes)
    return shown("model.reproduce", texts, None if options.toy else options.page)


if __name__ == "__main__":
    sys.exit(main())

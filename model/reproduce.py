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
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from model import data
from model.calibrate import recalibrated
from model.train import RECIPES, Recipe, Run, TrainingError, accuracy, at_least_1, logits, train

BEGIN, END = "<!-- written by model.reproduce -->", "<!-- end of what model.reproduce wrote -->"
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


def reproduce(
    study: Study,
    dataset: data.Dataset,
    out: Path,
    *,
    seed: int,
    bf16: bool,
    device: str,
    every: int = 1,
    is_compiled: bool = False,
) -> Result:
    """Train one network, or go on with it, and measure it on the test split; what is done is only read.

    Args:
        study: What to train.
        dataset: On which images.
        out: Folder of the run.
        seed: As `Run`.
        bf16: As `Run`.
        device: As `Run`.
        every: As `train`.
        is_compiled: As `Run`.

    Returns:
        `error` by network [%], and how that was made.

    Raises:
        TrainingError: as `Run` and `train`, or the run that is there is another one.
        KeyboardInterrupt: after Ctrl-C; the same call goes on.
    """
    plan = {"recipe": dataclasses.asdict(study.recipe), "seed": seed, "n_train": len(dataset.train)}
    if (out / RESULT).exists():
        done: Result = json.loads((out / RESULT).read_text())
        if {name: done[name] for name in plan} != json.loads(json.dumps(plan)):
            raise TrainingError(f"{out} holds another run: remove it, or give another --out")
        return done
    run = Run(study.recipe, dataset, out, seed=seed, bf16=bf16, device=device, is_compiled=is_compiled)
    if run.checkpoint.exists():
        run.resume()
    train(run, every=every)
    test = run.dataset.test
    with torch.no_grad():
        networks = recalibrated(run.net, run.dataset).networks()
    error = {
        name: 100 * (1 - accuracy(logits(network, test, run.dataset.normalise), test.labels_N))
        for name, network in networks.items()
    }
    result: Result = {
        **plan,
        "error": error,
        "n_test": len(test),
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
        f"of {first['n_train']} images, {first['n_test']} test images, {len(results)} seeds; "
        f"paper: {study.source}. {first['hardware']}, {first['precision']}, "
        f"torch {first['packages']['torch']}, {hours:.2f} h a run, {first['date'][:10]}."
    )
    lines = ["| network | test error, % | paper, % |", "|---|---:|---:|"]
    for network in first["error"]:
        errors = [result["error"][network] for result in results]
        spread = f" ± {stdev(errors):.2f}" if len(errors) > 1 else ""
        published = study.published.get(network)
        title = "joined" if network == "full" else f"column {network}"
        paper = "" if published is None else f"{published:.2f}"
        lines.append(f"| {title} | {mean(errors):.2f}{spread} | {paper} |")
    return "\n".join([f"### {study.name}", "", about, "", *lines, ""])


def _alike(one: Recipe, other: Recipe) -> bool:
    """Whether they differ in network and length alone."""
    return dataclasses.replace(one, architecture=other.architecture, epochs=other.epochs) == other


def fill(page: Path, text: str) -> None:
    """Put a text between the marks of a page.

    Raises:
        ValueError: it lacks them.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no place for the results: put {BEGIN} and {END} into it")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def _load(study: Study, folder: Path, n_held_out: int, *, is_toy: bool) -> data.Dataset:
    dataset = data.load(study.dataset, folder, n_held_out=n_held_out)
    if not is_toy:
        return dataset
    few = {name: getattr(dataset, name)[:TOY_LIMIT] for name in ("train", "held_out", "test")}
    return dataclasses.replace(dataset, **few)


def run_all(
    studies: Sequence[Study],
    load: Callable[[Study], data.Dataset],
    out: Path,
    *,
    n_seeds: int,
    bf16: bool,
    device: str,
    page: Path | None,
    every: int = 1,
    is_compiled: bool = False,
) -> None:
    """All studies with one seed before any has two: an interrupted run shows something of each."""
    results: dict[str, list[Result]] = {study.name: [] for study in studies}
    for seed in range(n_seeds):
        for study in studies:
            folder = out / f"{study.name}-seed-{seed}"
            results[study.name].append(
                reproduce(
                    study,
                    load(study),
                    folder,
                    seed=seed,
                    bf16=bf16,
                    device=device,
                    every=every,
                    is_compiled=is_compiled,
                )
            )
            text = "\n".join(table(one, results[one.name]) for one in studies if results[one.name])
            print(text, flush=True)
            if page:
                fill(page, text)


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
        help="training images to watch a run by; 5000 (and seed 0) if it is to be exported, or to teach",
    )
    parser.add_argument("--every", type=at_least_1, default=1, help="epochs from one checkpoint to the next")
    parser.add_argument("--compile", action="store_true", help="a slow start and faster steps")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="a tiny network, a few images, one epoch")
    options = parser.parse_args(argv)
    chosen = options.studies.split(",")
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"no study is called {unknown[0]!r}: use {', '.join(names)}")
    recipes = options.recipes.split(",")
    if unknown := [name for name in recipes if name not in ("paper", "wide")]:
        parser.error(f"no recipe for this is called {unknown[0]!r}: use paper, wide")
    studies = [by(recipe, study) for recipe in recipes for study in STUDIES if study.name in chosen]
    if options.toy:
        studies = [toy(study) for study in studies]
    if options.epochs:
        studies = [
            dataclasses.replace(one, recipe=dataclasses.replace(one.recipe, epochs=options.epochs))
            for one in studies
        ]
    try:
        run_all(
            studies,
            lambda study: _load(study, options.data, options.held_out, is_toy=options.toy),
            options.out,
            n_seeds=options.seeds,
            bf16=options.precision == "bf16",
            device=options.device,
            page=None if options.toy else options.page,
            every=options.every,
            is_compiled=options.compile,
        )
    except (TrainingError, data.DataError, ValueError, OSError) as error:
        print(f"model.reproduce: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("model.reproduce: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A scenario is a file: what it is to show, the shape of the load, and what the callers grant.

`loadtests/scenarios/*.toml` come with the project; a path to a file of the same form is as good. Must not
know HTTP or what becomes of a request.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from loadtests import arrivals as schedules
from loadtests.arrivals import Arrivals

FOLDER = Path(__file__).parent / "scenarios"
FIELDS = {"claim", "arrivals", "load", "seconds", "seed", "budgets"}


@dataclass(frozen=True)
class Scenario:
    """What is sent, but for the pictures and the meaning of load 1.

    Attributes:
        name: Of its file.
        claim: The sentence that it is to prove.
        arrivals: One of `arrivals.NAMES`.
        load: Rate that the shape multiplies, as a share of the capacity.
        duration_s: From the first request that may come to the last [s].
        seed: Of every random number.
        budgets_s: The mix of budgets [s].
        weights: How often each comes, relative to the others.
    """

    name: str
    claim: str
    arrivals: str
    load: float
    duration_s: float
    seed: int
    budgets_s: tuple[float, ...]
    weights: tuple[float, ...]

    @classmethod
    def read(cls, name: str) -> Self:
        """The scenario of that name, or in that file.

        Raises:
            ValueError: there is none, or it is not of the form of those that come with the project.
        """
        path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.toml")))
            raise ValueError(f"there is no scenario {name!r}: use {known}, or a path to a .toml") from error
        try:
            return cls._of(path.stem, tomllib.loads(text))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: {error}; the files in {FOLDER} show the form: {', '.join(sorted(FIELDS))}"
            ) from error

    @classmethod
    def _of(cls, name: str, given: dict[str, Any]) -> Self:
        if unknown := given.keys() - FIELDS:
            raise ValueError(f"unknown field {', '.join(sorted(unknown))}")
        return cls(
            name=name,
            claim=str(given["claim"]),
            arrivals=str(given["arrivals"]),
            load=float(given["load"]),
            duration_s=float(given["seconds"]),
            seed=int(given["seed"]),
            budgets_s=tuple(float(budget["ms"]) / 1e3 for budget in given["budgets"]),
            weights=tuple(float(budget["weight"]) for budget in given["budgets"]),
        )

    def schedule(self, capacity_hz: float, n_images: int) -> Arrivals:
        """Every request, the same for the same arguments.

        Args:
            capacity_hz: What load 1 is [requests/s].
            n_images: Pictures to choose from.

        Raises:
            ValueError: a number is out of its bounds, or there is no such shape.
        """
        rng = np.random.default_rng(self.seed)
        at_s = schedules.named(
            self.arrivals, rate_hz=self.load * capacity_hz, duration_s=self.duration_s, rng=rng
        )
        return schedules.schedule(
            at_s, budgets_s=self.budgets_s, weights=self.weights, n_images=n_images, rng=rng
        )

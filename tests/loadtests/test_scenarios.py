"""Every scenario that comes with the project makes a schedule, and a wrong file is refused with its name."""

from pathlib import Path

import numpy as np
import pytest

from loadtests.scenarios import FOLDER, Scenario

NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))
GOOD = (FOLDER / "steady.toml").read_text(encoding="utf-8")


def test_the_shapes_that_are_promised_are_there() -> None:
    assert {"steady", "ramp", "burst-4", "burst-8", "diurnal", "spike", "soak"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_scenario_offers_what_its_file_says(name: str) -> None:
    scenario = Scenario.read(name)
    schedule = scenario.schedule(200.0, 7)
    again = scenario.schedule(200.0, 7)

    assert scenario.name == name
    assert scenario.claim.endswith(".")
    assert set(np.unique(schedule.budget_s)) == set(scenario.budgets_s)
    assert schedule.at_s[-1] < scenario.duration_s
    assert schedule.image.max() < 7
    assert np.array_equal(schedule.at_s, again.at_s)
    assert np.array_equal(schedule.budget_s, again.budget_s)


def test_twice_the_capacity_is_twice_the_requests() -> None:
    steady = Scenario.read("steady")

    assert len(steady.schedule(400.0, 1)) == pytest.approx(2 * len(steady.schedule(200.0, 1)), rel=0.05)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD.replace("seconds", "second"), "unknown field second"),
        (GOOD.replace("seed = 0\n", ""), "seed"),
        (GOOD.replace("load = 0.5", 'load = "half"'), "half"),
        (GOOD.replace("ms = 2.0\n", ""), "ms"),
        ("claim = ", "Invalid"),
    ],
)
def test_a_file_of_another_form_is_refused_with_its_name(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)

    with pytest.raises(ValueError, match=rf"mine\.toml: .*{reason}.*show the form"):
        Scenario.read(str(path))


def test_an_unknown_name_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="use burst-4, burst-8, diurnal"):
        Scenario.read("stedy")

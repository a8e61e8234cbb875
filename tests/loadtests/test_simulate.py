"""The simulator plays every request to one end, repeats itself, and ranks policies as it must."""

import json
from pathlib import Path

import numpy as np
import pytest

from loadtests import arrivals as schedules
from loadtests import records
from loadtests.arrivals import Arrivals
from loadtests.offline import Outcomes
from loadtests.records import Record
from loadtests.simulate import BALANCES, Machine, Simulation, ladder_of, main, read_profile
from service.latency import Latency, LatencyProfile
from service.policies import POLICY_NAMES, PolicyName, named

ARTIFACT = Path(__file__).parents[2] / "model" / "pretrained"
MANIFEST = json.loads((ARTIFACT / "manifest.json").read_text())
LADDER = ladder_of(MANIFEST)
OUTCOMES = Outcomes.made_up(MANIFEST, 2000, seed=0)
MS = {"1": 0.5, "2": 1.0, "3": 2.0}
EXACT = Machine(
    LatencyProfile({column: {1: Latency(ms / 1e3, ms / 1e3)} for column, ms in MS.items()}),
    before_s=0.0,
    reserve_s=0.0,
)


def requests(load: float, n: int = 3000, name: str = "poisson", seed: int = 0) -> Arrivals:
    rng = np.random.default_rng(seed)
    rate_hz = load * EXACT.capacity_hz("1")
    at_s = schedules.named(name, rate_hz=rate_hz, duration_s=n / rate_hz, rng=rng)
    return schedules.schedule(at_s, budgets_s=[0.002, 0.005, 0.010, 0.050], n_images=len(OUTCOMES), rng=rng)


def play(policy: PolicyName, arrivals: Arrivals, machine: Machine = EXACT, **options: object) -> Record:
    simulation = Simulation(named(policy), machine, LADDER, OUTCOMES, **options)  # type: ignore[arg-type]  # named by the tests
    return simulation.run(arrivals)


def one(budget_s: float) -> Arrivals:
    return Arrivals(np.array([0.0]), np.array([budget_s]), np.array([3]))


def test_one_request_on_an_idle_machine_is_answered_by_what_fits() -> None:
    assert play("anytime", one(0.050)).columns_run[0].endswith("3")
    assert play("anytime", one(0.0006)).columns_run.tolist() == ["1"]
    assert play("fixed-deep", one(0.050)).columns_run.tolist() == ["3"]
    assert play("fixed-shallow", one(0.050)).latency_s == pytest.approx([0.0005], abs=1e-8)
    assert play("anytime", one(0.0001)).outcome.tolist() == ["rejected"]


def test_an_answer_is_right_where_the_table_of_outcomes_says_so() -> None:
    record = play("fixed-shallow", requests(0.5))
    image = requests(0.5).image
    answered = record.outcome == "answered"
    assert (record.is_correct[answered] == OUTCOMES.is_correct["1",][image[answered]]).all()
    assert not record.is_correct[~answered].any()


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("load", [0.5, 3.0])
def test_every_request_ends_once_and_every_run_is_the_same_again(policy: PolicyName, load: float) -> None:
    arrivals = requests(load)
    record = play(policy, arrivals)
    assert len(record) == len(arrivals)
    assert set(record.outcome.tolist()) <= {"answered", "rejected", "expired"}
    assert (np.isfinite(record.latency_s) == (record.outcome == "answered")).all()
    assert (record.latency_s == play(policy, arrivals).latency_s)[record.outcome == "answered"].all()


def test_in_turn_is_best_among_equals_and_the_less_busy_of_two_beside_a_slow_one() -> None:
    def attainment(balance: str, slowed: float) -> float:
        arrivals = requests((0.9 if slowed == 1 else 0.6) * 8, n=12_000)
        return records.summary(
            play("anytime", arrivals, n_replicas=8, balance=balance, slowed=slowed)
        ).attainment

    assert attainment("round-robin", 1) > attainment("power-of-two", 1) > attainment("random", 1)
    assert attainment("power-of-two", 3) > attainment("round-robin", 3)
    assert attainment("round-robin", 30) > attainment("power-of-two", 30)  # who refuses everybody looks free
    assert attainment("round-robin", 30) > 0.8


@pytest.mark.parametrize("balance", BALANCES)
def test_more_replicas_answer_more(balance: str) -> None:
    arrivals = requests(3.0)
    alone = records.summary(play("anytime", arrivals))
    together = records.summary(play("anytime", arrivals, n_replicas=4, balance=balance))
    assert together.attainment > 1.5 * alone.attainment


def test_looking_at_two_replicas_is_better_than_looking_at_none() -> None:
    arrivals = requests(6.0, n=10_000)
    looked, random = (
        records.summary(play("anytime", arrivals, n_replicas=8, balance=balance)).attainment
        for balance in ("power-of-two", "random")
    )
    assert looked > random


@pytest.mark.parametrize("load", [0.5, 1.0, 1.5])
def test_the_policy_that_ships_gets_more_right_in_time_than_any_that_runs_one_column(load: float) -> None:
    """In simulated time nothing is noisy: these are exact repetitions."""
    arrivals = requests(load, n=8000)
    right = {policy: records.summary(play(policy, arrivals)).accuracy_of_all for policy in POLICY_NAMES}
    assert max(right, key=lambda policy: right[policy]) == "anytime"


def test_stalls_are_survived() -> None:
    machine = Machine(EXACT.profile, before_s=0.0, reserve_s=0.0, stall_share=0.002)
    arrivals = requests(0.5)
    record = play("anytime", arrivals, machine)
    assert 0.5 < records.summary(record).attainment < records.summary(play("anytime", arrivals)).attainment
    # Who has an answer in hand is sent it on time, however long a refinement takes.
    is_refined = np.char.find(record.columns_run, "+") > 0
    assert is_refined.any()
    assert (record.latency_s[is_refined] <= record.budget_s[is_refined]).all()


def test_a_profile_is_read_as_a_server_tells_it(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"latency_ms": {"1": {"1": {"median": 0.5, "high": 0.7}}}}))
    assert read_profile(str(path)).latency("1", 1) == Latency(0.0005, 0.0007)
    path.write_text("{}")
    with pytest.raises(ValueError, match="curl SERVER/model"):
        read_profile(str(path))


def test_batching_pays_on_the_made_up_gpu() -> None:
    profile = read_profile("gpu")
    assert profile.latency("1", 32).median_s == pytest.approx(2 * profile.latency("1", 1).median_s)


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plane"
    assert (
        main(["--profile", "gpu", "--n", "500", "--repeats", "2", "--loads", "0.5", "--out", str(out)]) == 0
    )
    printed = capsys.readouterr().out
    assert all(f" {policy} " in printed for policy in (*POLICY_NAMES, "oracle"))
    assert "regret" in printed
    assert out.with_suffix(".svg").exists()
    assert "python -m loadtests.simulate --profile gpu" in out.with_suffix(".md").read_text()


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(SystemExit, match="fixed-shallow"):
        main(["--profile", "gpu", "--policies", "anytime,best"])

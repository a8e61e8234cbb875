"""Ensembles, temperatures, confidence tables and BatchNorm statistics."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from model import calibrate
from model.calibrate import Combination, ConfidenceTable, Measured
from model.fractalnet import Architecture, FractalNet
from tests.model.small import a_dataset, a_network


def noisy_logits(labels_N: Tensor, n_classes: int, *, strength: float, seed: int) -> Tensor:
    """Logits that favour the right class by `strength` on average: log p of a naive Bayes observer."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.randn(len(labels_N), n_classes, generator=generator)
    seen += strength * nn.functional.one_hot(labels_N, n_classes)
    return strength * seen


LABELS = torch.arange(2000) % 4


def test_probabilities_follow_the_formula_of_the_manifest() -> None:
    logits = {"1": torch.tensor([[1.0, 2.0, -1.0]]), "2": torch.tensor([[0.5, -0.5, 3.0]])}
    combination = Combination(("1", "2"), (0.25, 0.75), 1.5, (0.1, 0.0, -0.1))

    by_hand = torch.zeros(3)
    for k in range(3):
        log_p = [logits[c][0, k] - torch.log(torch.exp(logits[c][0]).sum()) for c in ("1", "2")]
        by_hand[k] = (0.25 * log_p[0] + 0.75 * log_p[1]) / 1.5 + (0.1, 0.0, -0.1)[k]
    expected = by_hand.exp() / by_hand.exp().sum()

    torch.testing.assert_close(combination.log_probabilities(logits).exp()[0], expected)


def test_the_temperature_undoes_overconfidence() -> None:
    honest = noisy_logits(LABELS, 4, strength=1.5, seed=0)

    fitted = calibrate.fit(("1",), {"1": 5 * honest}, LABELS)

    assert fitted.weights == (1.0,)
    assert 4 < fitted.temperature < 6
    assert calibrate.measure(fitted.log_probabilities({"1": 5 * honest}), LABELS).ece < 0.03
    assert calibrate.measure((5 * honest).log_softmax(1), LABELS).ece > 0.1


def test_the_better_column_weighs_more_and_a_useless_one_nothing() -> None:
    logits = {
        "1": noisy_logits(LABELS, 4, strength=1.0, seed=0),
        "2": noisy_logits(LABELS, 4, strength=2.0, seed=1),
        "3": torch.randn(len(LABELS), 4, generator=torch.Generator().manual_seed(2)),
    }
    fitted = calibrate.fit(("1", "2", "3"), logits, LABELS)

    assert abs(sum(fitted.weights) - 1) < 1e-6
    assert fitted.weights[1] > fitted.weights[0] > 5 * fitted.weights[2]


def test_no_image_is_judged_by_what_it_shaped() -> None:
    """Each fold holds a class that the other folds lack: fitted without it, its bias can only be wrong."""
    labels = torch.arange(100) % calibrate.N_FOLDS
    logits = {"1": torch.zeros(100, calibrate.N_FOLDS)}

    honest = calibrate.measure(calibrate.cross_fitted(("1",), logits, labels), labels)

    assert honest.nll > torch.log(torch.tensor(float(calibrate.N_FOLDS))) + 0.1


def test_a_combination_is_kept_only_if_it_beats_its_parts() -> None:
    good = noisy_logits(LABELS, 4, strength=2.0, seed=0)
    logits = {"1": noisy_logits(LABELS, 4, strength=1.0, seed=1), "2": good, "3": good.clone()}

    kept = {c.key for c in calibrate.calibrate(logits, LABELS).combinations}

    assert {"1", "2", "3", "1+2"} <= kept
    assert "2+3" not in kept  # twice the same answer
    assert "1+2+3" not in kept


def test_what_refinement_passes_through_is_kept_as_well() -> None:
    """On the way from 1 to 1+2+3 the answer is that of 1+2, be it no better than that of 1."""
    nll = {("1",): 0.4, ("2",): 0.45, ("3",): 0.42, ("1", "2"): 0.4, ("1", "3"): 0.41, ("2", "3"): 0.43}

    kept = calibrate._worth_serving(nll | {("1", "2", "3"): 0.35})

    assert kept == [("1",), ("2",), ("3",), ("1", "2"), ("1", "2", "3")]


def test_confidence_tables_count_every_image_and_agree_with_the_accuracies() -> None:
    logits = {
        "1": noisy_logits(LABELS, 4, strength=1.0, seed=0),
        "2": noisy_logits(LABELS, 4, strength=2.0, seed=1),
    }
    result = calibrate.calibrate(logits, LABELS)

    tables = {calibrate.key(table.columns): table for table in result.confidence}
    assert set(tables["1"].accuracy) == {"1", "1+2"}
    assert set(tables["2"].accuracy) == {"2", "1+2"}
    for table in result.confidence:
        assert sum(table.n) == len(LABELS)
        for name, by_bin in table.accuracy.items():
            overall = sum(n * a for n, a in zip(table.n, by_bin, strict=True)) / len(LABELS)
            assert abs(overall - result.measured[name].accuracy) < 1e-5


def test_who_is_sure_gains_less_than_who_is_not() -> None:
    logits = {
        "1": noisy_logits(LABELS, 4, strength=1.5, seed=0),
        "2": noisy_logits(LABELS, 4, strength=2.5, seed=1),
    }
    table: ConfidenceTable = calibrate.calibrate(logits, LABELS).confidence[0]
    gain = [after - now for now, after in zip(table.accuracy["1"], table.accuracy["1+2"], strict=True)]

    assert gain[1] > 0.1 > abs(gain[-1])


def test_ece_of_a_coin_that_claims_too_much() -> None:
    """Always 90 % sure and right half of the time: off by 0.4."""
    log_p = torch.tensor([[0.9, 0.1]]).log().repeat(100, 1)

    measured = calibrate.measure(log_p, torch.arange(100) % 2)

    assert measured == Measured(accuracy=0.5, nll=measured.nll, ece=measured.ece)
    assert abs(measured.ece - 0.4) < 1e-6


@given(st.integers(2, 30), st.integers(2, 6), st.integers(0, 10**6))
def test_measures_stay_in_their_ranges(n: int, n_classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_p = (3 * torch.randn(n, n_classes, generator=generator)).log_softmax(1)
    measured = calibrate.measure(log_p, torch.randint(n_classes, (n,), generator=generator))

    assert 0 <= measured.accuracy <= 1
    assert 0 <= measured.ece <= 1
    assert measured.nll >= 0


def test_recalibrated_statistics_are_the_averages_over_training_images() -> None:
    dataset = a_dataset(n_train=40)
    net = a_network(seed=3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.running_mean, 7.0)  # type: ignore[arg-type]

    better = calibrate.recalibrated(net, dataset)

    first = better.column(1)[0]
    with torch.no_grad():
        seen = first(dataset.normalise(dataset.train.images_NCHW))
    norm = better.column(1)[1]
    assert isinstance(norm, nn.BatchNorm2d)
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert norm.momentum == 0.1
    untouched = net.column(1)[1]
    assert isinstance(untouched, nn.BatchNorm2d)
    assert float(untouched.running_mean[0]) == 7.0  # type: ignore[index]


def test_a_remainder_of_one_image_weighs_no_more_than_any_other() -> None:
    n = calibrate.RECALIBRATION_BATCH + 1
    dataset = a_dataset(n_train=n)
    net = a_network(seed=3)

    calibrate.recalibrate(net.column(1), dataset)

    first, norm = net.column(1)[0], net.column(1)[1]
    with torch.no_grad():
        seen = first(dataset.normalise(dataset.train.images_NCHW))
    assert isinstance(norm, nn.BatchNorm2d)
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), atol=2e-3, rtol=0)


def test_recalibrating_one_column_leaves_all_others_alone() -> None:
    dataset, net = a_dataset(n_train=40), a_network(seed=3)
    before = {name: value.clone() for name, value in net.state_dict().items()}

    calibrate.recalibrate(net.column(2), dataset)

    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".columns.1." in name and ".norm_alone." in name for name in changed)


def test_dropout_does_not_disturb_recalibration() -> None:
    dataset = a_dataset(n_train=40)
    net = FractalNet(Architecture((4, 6), 2, n_classes=4, size=8, dropout=(0.5, 0.5)))

    once, twice = calibrate.recalibrated(net, dataset), calibrate.recalibrated(net, dataset)

    for name, value in once.state_dict().items():
        torch.testing.assert_close(value, twice.state_dict()[name])


def test_the_report_names_every_network_and_every_set_of_statistics() -> None:
    text = calibrate.report(a_network(seed=0), a_dataset(n_train=80))

    assert "| BatchNorm statistics | 1 | 2 | full |" in text
    assert sum(line.startswith(("| the joined", "| its own")) for line in text.splitlines()) == 3
    assert "| 1+2+full |" in text

"""The masks against the probabilities they are to have; seeded, so a bound that holds once holds always."""

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.droppath import Global, Local, sample, sample_global, sample_join, sample_local
from model.fractalnet import Architecture, FractalNet, join_sizes

N = 4000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_follows(drawn: Iterable[Hashable], probability: Mapping[Hashable, float]) -> None:
    """Pearson's chi-square, with a bound that one honest sampler in about 100,000 exceeds."""
    counts = Counter(drawn)
    n = counts.total()
    assert counts.keys() <= probability.keys()
    assert sum(probability.values()) == pytest.approx(1)
    chi2 = sum((counts[outcome] - n * p) ** 2 / (n * p) for outcome, p in probability.items())
    freedom = len(probability) - 1
    assert chi2 < freedom + 4.5 * (2 * freedom) ** 0.5 + 12


def join_probabilities(n_inputs: int, drop: float) -> dict[Hashable, float]:
    """Each input lives with 1 - drop; where all would die, one of them, each as likely, is revived."""
    return {
        mask: drop ** (n_inputs - sum(mask)) * (1 - drop) ** sum(mask)
        + (drop**n_inputs / n_inputs if sum(mask) == 1 else 0)
        for mask in itertools.product((False, True), repeat=n_inputs)
        if any(mask)
    }


@pytest.mark.parametrize(("n_inputs", "drop"), [(2, 0.15), (3, 0.15), (2, 0.5), (3, 0.6), (4, 0.8)])
def test_a_join_keeps_each_input_as_often_as_it_should(n_inputs: int, drop: float) -> None:
    generator = seeded(n_inputs)

    drawn = [sample_join(n_inputs, drop, generator) for _ in range(N)]

    assert_follows(drawn, join_probabilities(n_inputs, drop))


def test_the_survivor_is_revived_uniformly() -> None:
    generator = seeded(1)

    drawn = [sample_join(4, 0.9999999, generator).index(True) for _ in range(N)]

    assert_follows(drawn, dict.fromkeys(range(4), 1 / 4))


@pytest.mark.parametrize("pair", [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 1), (1, 1))])
def test_joins_are_drawn_independently(pair: tuple[tuple[int, int], tuple[int, int]]) -> None:
    generator = seeded(2)
    (block_a, join_a), (block_b, join_b) = pair

    drawn = []
    for _ in range(N):
        masks = sample_local(2, 3, 0.5, generator).masks
        drawn.append((masks[block_a][join_a], masks[block_b][join_b]))

    a, b = (join_probabilities(join_sizes(3)[join], 0.5) for join in (join_a, join_b))
    assert_follows(drawn, {(x, y): a[x] * b[y] for x in a for y in b})


def test_global_drop_path_takes_each_column_as_often() -> None:
    generator = seeded(3)

    drawn = [sample_global(4, generator).column for _ in range(N)]

    assert_follows(drawn, dict.fromkeys((1, 2, 3, 4), 1 / 4))


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_local_and_global_are_mixed_as_asked(share: float) -> None:
    generator = seeded(4)

    drawn = [isinstance(sample(2, 3, 0.15, share, generator), Local) for _ in range(N)]

    assert_follows(drawn, {True: share, False: 1 - share})


def test_a_share_of_all_or_nothing_is_exact() -> None:
    generator = seeded(5)

    assert {type(sample(2, 3, 0.15, 1, generator)) for _ in range(300)} == {Local}
    assert {type(sample(2, 3, 0.15, 0, generator)) for _ in range(300)} == {Global}


def test_a_rate_of_nothing_drops_nothing() -> None:
    assert sample_local(2, 4, 0, seeded()).masks == FractalNet(Architecture((4, 6), 4)).all_alive()


def test_equal_generators_draw_equal_paths_and_unequal_ones_do_not() -> None:
    def draw(seed: int) -> list[object]:
        generator = seeded(seed)
        return [sample(3, 4, 0.3, 0.5, generator) for _ in range(50)]

    assert draw(6) == draw(6)
    assert draw(6) != draw(7)


@given(
    n_blocks=st.integers(1, 6),
    n_columns=st.integers(1, 6),
    drop=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**32),
)
def test_masks_fit_the_network_and_leave_every_join_an_input(
    n_blocks: int, n_columns: int, drop: float, seed: int
) -> None:
    masks = sample_local(n_blocks, n_columns, drop, seeded(seed)).masks

    assert [tuple(len(mask) for mask in block) for block in masks] == [join_sizes(n_columns)] * n_blocks
    assert all(any(mask) for block in masks for mask in block)


@pytest.mark.parametrize("drop", [-0.1, 1, 1.5, float("nan")])
def test_a_rate_that_is_no_probability_below_1_is_refused(drop: float) -> None:
    with pytest.raises(ValueError, match="drop rate"):
        sample_local(2, 3, drop, seeded())


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_no_probability_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="local share"):
        sample(2, 3, 0.15, share, seeded())

"""The network against blocks written out by hand, the numbers of its paper, and its own laws."""

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from model.droppath import sample_local
from model.fractalnet import (
    PRESETS,
    Architecture,
    ConvUnit,
    FractalBlock,
    FractalNet,
    JoinMasks,
    Stem,
    columns_at,
    cost,
    initialise,
    join_sizes,
    join_weights,
    preset,
    whitening_filters,
)

WIDE = (64, 128, 256, 512, 512)
NARROW = (16, 32, 64, 128, 128)


def toy(n_columns: int = 3, *, equal_statistics: bool = False, **how: object) -> FractalNet:
    """Two blocks on 8x8 images with random weights and random BatchNorm statistics, in evaluation mode."""
    torch.manual_seed(7)
    settings = {"widths": (4, 6), "n_classes": 5, "size": 8} | how
    net = FractalNet(Architecture(n_columns=n_columns, **settings))  # type: ignore[arg-type]
    for unit in units(net):
        for norm in (unit.norm_alone, unit.norm_joined):
            statistics(norm, "mean").normal_()
            statistics(norm, "var").uniform_(0.5, 2)
            if norm.affine:
                norm.weight.data.uniform_(0.5, 2)
                norm.bias.data.normal_()
        if equal_statistics:
            unit.norm_joined.load_state_dict(unit.norm_alone.state_dict())
    return net.eval()


def units(net: FractalNet) -> Iterator[ConvUnit]:
    return (module for module in net.modules() if isinstance(module, ConvUnit))


def statistics(norm: nn.BatchNorm2d, of: str) -> Tensor:
    return norm.get_buffer(f"running_{of}")


def images(n: int = 3, size: int = 8, channels: int = 3) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def blocks(net: FractalNet) -> list[FractalBlock]:
    return [block for block in net.blocks if isinstance(block, FractalBlock)]


def by_hand(unit: ConvUnit, x: Tensor) -> Tensor:
    """Convolution, BatchNorm with the joined net's statistics, ReLU."""
    norm = unit.norm_joined
    y = functional.conv2d(x, unit.conv.weight, padding=1)
    mean, var = (statistics(norm, of)[:, None, None] for of in ("mean", "var"))
    y = (y - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    return y.clamp(min=0)


def pool(x: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    return x.reshape(n, channels, height // 2, 2, width // 2, 2).amax((3, 5))


# ---- shape: what the expansion rule makes ----


def test_the_joins_of_a_block_are_where_the_columns_end_together() -> None:
    assert [list(columns_at(row, 3)) for row in (1, 2, 3, 4)] == [[3], [2, 3], [3], [1, 2, 3]]
    assert [join_sizes(c) for c in (1, 2, 3, 4)] == [(), (2,), (2, 3), (2, 3, 2, 4)]


def test_a_block_of_three_columns_is_the_one_written_out_by_hand() -> None:
    block, x = blocks(toy())[0], images()
    [a], [b1, b2], [c1, c2, c3, c4] = (block.units(column) for column in (1, 2, 3))

    join2 = (by_hand(b1, x) + by_hand(c2, by_hand(c1, x))) / 2
    deepest = by_hand(c4, by_hand(c3, join2))
    expected = (pool(by_hand(a, x)) + pool(by_hand(b2, join2)) + pool(deepest)) / 3

    torch.testing.assert_close(block(x, ((True, True), (True, True, True))), expected)
    pooled_after = pool((by_hand(a, x) + by_hand(b2, join2) + deepest) / 3)
    assert not torch.allclose(expected, pooled_after)  # so the test tells the two orders apart


def test_a_join_is_the_mean_of_its_survivors_alone() -> None:
    block, x = blocks(toy())[0], images()
    [a], [b1, b2], [c1, c2, c3, c4] = (block.units(column) for column in (1, 2, 3))

    without_column_2_at_the_end = (pool(by_hand(a, x)) + pool(by_hand(c4, by_hand(c3, by_hand(b1, x))))) / 2
    torch.testing.assert_close(block(x, ((True, False), (True, False, True))), without_column_2_at_the_end)

    without_column_1_at_the_end = pool(by_hand(b2, by_hand(c2, by_hand(c1, x))))
    torch.testing.assert_close(block(x, ((False, True), (False, True, False))), without_column_1_at_the_end)


@pytest.mark.parametrize("n_columns", [1, 2, 3, 4, 5])
def test_a_block_is_what_the_expansion_rule_says(n_columns: int) -> None:
    block, x = blocks(toy(n_columns))[0], images()
    unused = {column: iter(block.units(column)) for column in range(1, n_columns + 1)}

    def branches(c: int, z: Tensor) -> list[Tensor]:
        """f_c(z) before the join at its end: f_1 = conv and f_{c+1}(z) = conv(z) joined with f_c(f_c(z))."""
        shallow = next(unused[n_columns - c + 1])
        if c == 1:
            return [by_hand(shallow, z)]
        half = torch.stack(branches(c - 1, z)).mean(0)
        return [by_hand(shallow, z), *branches(c - 1, half)]

    expected = torch.stack([pool(branch) for branch in branches(n_columns, x)]).mean(0)
    all_alive = tuple((True,) * size for size in join_sizes(n_columns))

    torch.testing.assert_close(block(x, all_alive), expected)
    assert all(next(rest, None) is None for rest in unused.values())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_answers_for_any_size_and_number_of_classes(name: str) -> None:
    with torch.device("meta"):  # shapes alone
        size = 96 if name == "imagenet-34" else 40
        net = FractalNet(preset(name, n_classes=7, size=size, channels=1)).eval()
        for network in net.networks().values():
            assert network(torch.zeros(2, 1, size, size)).shape == (2, 7)


def test_what_can_be_served_is_listed_shallow_first() -> None:
    assert list(toy().networks()) == ["1", "2", "3", "full"]


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ({"widths": ()}, "at least one block"),
        ({"widths": (4, 0)}, "at least one block"),
        ({"n_columns": 0}, "at least 1"),
        ({"n_classes": 1}, "at least 2"),
        ({"channels": 0}, "at least 1"),
        ({"dropout": (0.1,)}, "one rate per block: 2, not 1"),
        ({"size": 3}, "at least 4"),
        ({"size": 8, "stem": Stem("conv", 4, kernel=3, stride=2, pool=2)}, "at least 16"),
    ],
)
def test_a_net_that_cannot_be_is_refused(how: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Architecture(**({"widths": (4, 6), "n_columns": 2} | how))  # type: ignore[arg-type]


def test_an_unknown_preset_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match="cifar-deep-6"):
        preset("cifar-21", n_classes=10, size=32)


# ---- cost: against the tables of the paper and of its re-implementations ----


@functools.cache
def costs(name: str, n_classes: int) -> Mapping[str, tuple[int, int]]:
    """(parameters, MACs) of each network of a preset."""
    with torch.device("meta"):
        architecture = preset(name, n_classes=n_classes, size=224 if name == "imagenet-34" else 32)
        measured = {n: cost(net, architecture) for n, net in FractalNet(architecture).networks().items()}
    return MappingProxyType({network: (c.parameters, c.macs) for network, c in measured.items()})


@pytest.mark.parametrize(("n_classes", "parameters"), [(100, 33_770_788), (10, 33_724_618)])
def test_cifar_20_has_as_many_parameters_as_its_known_re_implementation(
    n_classes: int, parameters: int
) -> None:
    assert costs("cifar-20", n_classes)["full"][0] == parameters  # asserted by osmr's imgclsmob


@pytest.mark.parametrize(
    ("n_columns", "millions"), [(1, 0.26), (2, 0.85), (3, 2.13), (4, 4.78), (5, 10.18), (6, 21.10)]
)
def test_the_ultra_deep_nets_have_the_parameters_of_the_papers_table_3(
    n_columns: int, millions: float
) -> None:
    name = f"cifar-deep-{n_columns}"

    assert costs(name, 100)["full"][0] / 1e6 == pytest.approx(millions, abs=0.005)
    assert PRESETS[name].depth(n_columns) == 5 * 2 ** (n_columns - 1)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("cifar-20", {"1": 67.8, "2": 228.3, "3": 549.1, "full": 845.2}),
        ("cifar-deep-4", {"1": 4.6, "2": 14.6, "3": 34.7, "4": 74.8, "full": 128.6}),
    ],
)
def test_each_column_costs_what_it_should(name: str, millions: dict[str, float]) -> None:
    measured = costs(name, 10)

    assert {network: round(macs / 1e6, 1) for network, (_, macs) in measured.items()} == millions


@pytest.mark.parametrize("name", ["cifar-20", "cifar-deep-6", "imagenet-34", "cifar-anytime"])
def test_the_joined_net_costs_as_much_as_all_its_columns(name: str) -> None:
    measured = costs(name, 10)
    a, full = PRESETS[name], measured["full"]
    head = (a.widths[-1] * 10 + 10, a.widths[-1] * 10)
    stem = (0, 0)
    if a.stem is not None:
        n_weights = 3 * a.stem.kernel**2 * a.stem.width
        affine = 2 * a.stem.width if a.stem.kind == "conv" else 0
        side = (224 if name == "imagenet-34" else 32) // a.stem.stride
        stem = (n_weights + affine, n_weights * side**2)

    for index in (0, 1):  # stem and head are shared, and so counted once in the joined net
        apart = [measured[str(k)][index] - head[index] - stem[index] for k in range(1, a.n_columns + 1)]
        assert sum(apart) + head[index] + stem[index] == full[index]


def test_imagenet_34_has_34_layers_and_costs_what_its_columns_add_up_to() -> None:
    a = PRESETS["imagenet-34"]
    measured = costs("imagenet-34", 1000)

    assert a.depth(4) + 1 == 34  # the classifier is a layer to the paper
    by_formula = 3 * 49 * 64 * 112**2 + 1024 * 1000
    side, n_in = 56, 64
    for width in a.widths:
        by_formula += 9 * side**2 * (n_in * width + 7 * width**2)
        side, n_in = side // 2, width
    assert measured["4"][1] == by_formula


def test_counting_the_cost_leaves_the_network_as_it_was() -> None:
    net = toy().train()
    before = copy.deepcopy(net.state_dict())

    cost(net, net.architecture)
    cost(net.eval().column(2), net.architecture)

    assert not net.training
    assert not any(unit.norm_alone.training for unit in units(net))
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


# ---- masks ----


def calls(net: FractalNet, masks: JoinMasks | Tensor) -> list[tuple[int, int, int]]:
    """Which convolutions run, in order, as (block, column, place in the column), each once per call."""
    names = {
        id(unit.conv): (b, column, i)
        for b, block in enumerate(blocks(net))
        for column in range(1, net.architecture.n_columns + 1)
        for i, unit in enumerate(block.units(column))
    }
    seen: list[tuple[int, int, int]] = []
    hooks = [
        unit.conv.register_forward_hook(lambda module, _inputs, _output: seen.append(names[id(module)]))
        for unit in units(net)
    ]
    net(images(), masks)
    for hook in hooks:
        hook.remove()
    return seen


def test_whatever_no_surviving_path_needs_is_never_computed() -> None:
    net = toy()
    all_alive, column_2 = ((True, True), (True, True, True)), ((True, False), (False, True, False))
    only_column_1 = ((False, True), (True, False, False))  # what survives at the inner join, nobody needs

    assert sorted(calls(net, (all_alive, column_2))) == [
        *((0, column, i) for column, n in ((1, 1), (2, 2), (3, 4)) for i in range(n)),
        (1, 2, 0),
        (1, 2, 1),
    ]
    assert sorted(calls(net, (only_column_1, only_column_1))) == [(0, 1, 0), (1, 1, 0)]


def test_a_dropped_path_leaves_its_batchnorm_statistics_alone() -> None:
    net = toy().train()
    before = copy.deepcopy(net.state_dict())
    mask = ((True, False), (False, True, False))

    net(images(), (mask, mask))

    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {
        f"blocks.{b}.columns.1.{i}.norm_joined.{what}"
        for b in (0, 1)
        for i in (0, 1)
        for what in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_without_masks_nothing_is_dropped() -> None:
    net = toy()

    torch.testing.assert_close(net(images()), net(images(), net.all_alive()))
    assert len(calls(net, net.all_alive())) == 2 * 7


@pytest.mark.parametrize(
    "block",
    [
        ((False, False), (True, True, True)),
        ((True, True), (False, False, False)),
        ((True, True),),
        ((True, True), (True, True, True), (True, True)),
        ((True, True, True), (True, True, True)),
        ((True, True), (True, True)),
        (),
    ],
)
def test_masks_that_do_not_fit_are_refused(block: Sequence[tuple[bool, ...]]) -> None:
    with pytest.raises(ValueError, match=r"join lost all|zip\(\)"):
        toy()(images(), (((True, True), (True, True, True)), tuple(block)))


def test_masks_for_another_number_of_blocks_are_refused() -> None:
    net = toy()

    for masks in (net.all_alive()[:1], net.all_alive() + net.all_alive()[:1]):
        with pytest.raises(ValueError, match=r"zip\(\)"):
            net(images(), masks)


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 4), st.booleans())
def test_masks_as_numbers_say_the_same(seed: int, n_columns: int, training: bool) -> None:
    masks = sample_local(2, n_columns, 0.5, torch.Generator().manual_seed(seed)).masks
    by_mask, by_weight = (toy(n_columns).double().train(training) for _ in range(2))

    of_masks = by_mask(images().double(), masks)
    of_weights = by_weight(images().double(), join_weights(masks))

    # A third is written in float32.
    assert_near = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    assert_near(of_masks, of_weights)
    for logits in (of_masks, of_weights):
        logits.square().sum().backward()
    for a, b in zip(by_mask.parameters(), by_weight.parameters(), strict=True):
        expected = torch.zeros_like(a) if a.grad is None else a.grad
        assert_near(torch.zeros_like(b) if b.grad is None else b.grad, expected)


def test_weights_of_a_join_without_input_are_refused() -> None:
    with pytest.raises(ValueError, match="join lost all"):
        join_weights((((True, True), (False, False, False)),))


def test_the_operations_under_weights_are_the_same_whatever_is_dropped() -> None:
    net = toy()
    dropped = (((True, False), (False, True, False)),) * 2

    ran = [calls(net, join_weights(masks)) for masks in (dropped, net.all_alive())]

    assert ran[0] == ran[1]
    assert len(ran[0]) == 2 * 7


# ---- columns ----


def masks_of_column(net: FractalNet, column: int, others: Tensor) -> JoinMasks:
    """Masks that keep one column alone at each join it takes part in, and anything at the others."""
    n_columns = net.architecture.n_columns
    draws = iter(others.tolist())
    block = []
    for row in range(1, 2 ** (n_columns - 1) + 1):
        meeting = columns_at(row, n_columns)
        if len(meeting) > 1:
            anything = tuple(bool(next(draws)) for _ in meeting)
            alone = tuple(c == column for c in meeting)
            block.append(
                alone if column in meeting else anything if any(anything) else (True,) * len(meeting)
            )
    return (tuple(block),) * len(net.architecture.widths)


@pytest.mark.parametrize(("n_columns", "column"), [(c, k) for c in range(1, 5) for k in range(1, c + 1)])
@pytest.mark.parametrize("training", [False, True])
def test_the_joined_net_with_one_column_alive_is_that_column(
    n_columns: int, column: int, training: bool
) -> None:
    net = toy(n_columns, equal_statistics=True).train(training)  # training takes the batch's own statistics
    others = torch.randint(2, (32,), generator=torch.Generator().manual_seed(column))

    joined = net(images(), masks_of_column(net, column, others))

    torch.testing.assert_close(joined, net.column(column)(images()))


@settings(max_examples=25)
@given(st.lists(st.booleans(), min_size=32, max_size=32), st.integers(1, 4))
def test_what_survives_where_a_column_takes_no_part_does_not_matter(others: list[bool], column: int) -> None:
    net = toy(4, equal_statistics=True)

    joined = net(images(1), masks_of_column(net, column, torch.tensor(others)))

    torch.testing.assert_close(joined, net.column(column)(images(1)))


def test_a_column_is_a_plain_network_over_the_same_weights() -> None:
    net = toy(dropout=(0.0, 0.5), stem=Stem("conv", 4, kernel=3, stride=1))
    column = net.column(2)

    plain = {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.Dropout}
    assert type(column) is nn.Sequential
    assert {type(layer) for layer in column} == plain | {nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear}
    assert sum(isinstance(layer, nn.Conv2d) for layer in column) == net.architecture.depth(2) == 5
    assert sum(isinstance(layer, nn.Dropout) for layer in column) == 2  # a rate of 0 is no layer
    assert {id(p) for p in column.parameters()} <= {id(p) for p in net.parameters()}


def test_dropout_stands_between_convolution_and_batchnorm() -> None:
    net = toy(1, dropout=(0.5, 0.5))
    order: list[type[nn.Module]] = []
    for module in (module for unit in units(net) for module in unit.children()):
        module.register_forward_hook(lambda module, _inputs, _output: order.append(type(module)))

    for network in net.networks().values():
        order.clear()
        network(images())
        assert order[:4] == [nn.Conv2d, nn.Dropout, nn.BatchNorm2d, nn.ReLU]


@pytest.mark.parametrize("column", [-1, 0, 4])
def test_a_column_that_is_not_there_is_refused(column: int) -> None:
    with pytest.raises(ValueError, match="1 to 3"):
        toy().column(column)


@pytest.mark.parametrize("training", [False, True])
def test_a_column_is_in_the_mode_of_its_network(training: bool) -> None:
    assert toy().train(training).column(1).training is training


# ---- BatchNorm ----


def changed_by(net: FractalNet, network: nn.Module) -> set[str]:
    """Which BatchNorm statistics a training pass through one network moves, as "norm column"."""
    before = copy.deepcopy(net.state_dict())
    network.train()
    network(images())
    changed = (key for key, value in net.state_dict().items() if not torch.equal(value, before[key]))
    return {f"{key.split('.')[5]} {int(key.split('.')[3]) + 1}" for key in changed}


def test_a_column_alone_and_the_joined_net_keep_statistics_of_their_own() -> None:
    net = toy()

    assert changed_by(net, net.column(2)) == {"norm_alone 2"}
    assert changed_by(net, net) == {"norm_joined 1", "norm_joined 2", "norm_joined 3"}


def test_scale_and_bias_are_shared_and_stay_so() -> None:
    net = toy()
    restored = FractalNet(net.architecture)
    restored.load_state_dict(net.state_dict())
    for each in (net, copy.deepcopy(net), restored, toy().to(torch.float64)):
        for unit in units(each):
            assert unit.norm_alone.weight is unit.norm_joined.weight
            assert unit.norm_alone.bias is unit.norm_joined.bias

    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    net.train().column(1)(images()).square().sum().backward()  # of the columns, only the first learns
    before = copy.deepcopy(net.state_dict())
    optimiser.step()
    moved = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"head.2.weight", "head.2.bias"} | {
        f"blocks.{b}.columns.0.0.{what}"
        for b in (0, 1)
        for what in (
            "conv.weight",
            *(f"{norm}.{p}" for norm in ("norm_alone", "norm_joined") for p in ("weight", "bias")),
        )
    }


def test_batchnorm_without_scale_and_bias_as_the_authors_have_it() -> None:
    net = FractalNet(Architecture((4, 6), 2, size=8, affine=False))

    assert {name.rsplit(".", 2)[-2] for name, _ in net.named_parameters()} == {
        "conv",
        "2",
    }  # 2: the classifier


# ---- stem and initial weights ----


def natural(n: int = 200) -> Tensor:
    """Images whose neighbouring pixels and channels are alike, of mean 0."""
    rough = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    smooth = functional.avg_pool2d(rough, 3, stride=1, padding=1) + 0.3 * rough.mean(1, keepdim=True)
    return smooth - smooth.mean((0, 2, 3), keepdim=True)


def test_whitened_patches_are_uncorrelated_and_of_variance_1() -> None:
    filters = whitening_filters(natural(), width=20, kernel=4, epsilon=0)
    out = functional.conv2d(natural(), filters, stride=2).transpose(0, 1).flatten(1)

    torch.testing.assert_close(out @ out.T / out.shape[1], torch.eye(20), rtol=0, atol=1e-3)


def test_the_strongest_directions_come_first_and_the_weakest_are_not_blown_up() -> None:
    flat = torch.full((4, 3, 8, 8), 0.5)  # one direction has all the variance, the others none

    filters = whitening_filters(flat, width=4, kernel=2)

    assert functional.conv2d(flat, filters[:1], stride=2).abs().mean() == pytest.approx(1, abs=0.01)
    assert filters.isfinite().all()


def test_more_filters_than_a_patch_has_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="12 numbers"):
        whitening_filters(images(), width=13, kernel=2)


def test_the_whitening_stem_is_fitted_halves_the_image_and_is_never_trained() -> None:
    net = toy(2, size=16, stem=Stem("whiten", 8, kernel=4, stride=2))
    initialise(net, "dirac", natural())

    torch.testing.assert_close(net.stem[0].weight, whitening_filters(natural(), 8, 4))
    assert net.stem(natural()).shape == (200, 8, 8, 8)
    assert not net.stem[0].weight.requires_grad
    with pytest.raises(ValueError, match="give it training images"):
        initialise(net, "dirac")


def test_the_trained_stem_is_on_the_way_of_every_network() -> None:
    net = toy(2, size=16, stem=Stem("conv", 8, kernel=7, stride=2, pool=2))

    assert net.stem(natural()).shape == (200, 8, 4, 4)
    for name, network in net.train().networks().items():
        net.zero_grad()
        network(natural()[:4]).sum().backward()
        assert net.stem[0].weight.grad is not None, name


def test_xavier_weights_are_uniform_within_their_bound() -> None:
    net = toy(widths=(16, 32))
    initialise(net, "xavier")

    for unit in units(net):
        weight = unit.conv.weight
        bound = (3 / (9 * weight.shape[1])) ** 0.5  # Caffe's "xavier" counts what comes in
        assert bound * 0.9 < weight.abs().max() <= bound
    assert not net.head[2].get_parameter("bias").any()


def test_dirac_weights_begin_as_the_identity_on_the_first_channels() -> None:
    net = toy(widths=(4, 6))
    initialise(net, "dirac")

    for unit in units(net):
        n_in = unit.conv.in_channels
        x = images(channels=n_in)
        torch.testing.assert_close(unit.conv(x)[:, :n_in], x)
        assert unit.conv.weight[n_in:].any(dim=(1, 2, 3)).all()  # the channels beyond them still differ


def test_dirac_weights_of_a_narrowing_block_keep_as_many_channels_as_there_are() -> None:
    net = toy(1, widths=(6, 4))
    initialise(net, "dirac")
    x = images(channels=6)

    torch.testing.assert_close(blocks(net)[1].units(1)[0].conv(x), x[:, :4])


def test_initial_weights_repeat_from_a_seed() -> None:
    first, second = toy(), toy()
    for net in (first, second):
        torch.manual_seed(3)
        initialise(net, "dirac")

    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)

"""The graph of a model: layers, tails and exchanges, found in small modules and counted by hand."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from nets import (
    Branches,
    ChannelsLast,
    Plain,
    Residual,
    export,
    network_of,
    random_images,
    seeded,
    shared_network,
    without,
)
from robustdice.errors import ModelError
from robustdice.model.network import Network, build_network
from robustdice.model.tracing import quiet
from robustdice.plan import Layer

RESIDUAL = (
    Layer(
        "conv1",
        6,
        1,
        3 * 9 + 4,
        27 * 64,
        16,
        tail_weights=4,
        neuron_preactivations=64,
        filter_weights=27,
        affine_weights=4,
    ),
    Layer("conv2", 6, 1, 6 * 9 + 1, 54 * 16, 16, neuron_preactivations=16, filter_weights=54, affine_weights=1),
    Layer(
        "expand",
        8,
        1,
        (6 + 1) + (9 + 1),
        (6 + 9) * 16,
        16,
        9 + 1,
        9 * 16,
        16,
        filter_weights=6,
        affine_weights=1,
        tail_filter_weights=9,
        tail_filters=1,
    ),
    Layer(
        "grouped",
        12,
        3,
        2 * 9 + 1,
        18 * 16,
        16,
        neuron_preactivations=16,
        reads_group=True,
        filter_weights=18,
        affine_weights=1,
    ),
    Layer("head", 5, 1, 12 + 1, 12, 1, filter_weights=12, affine_weights=1, gives_scores=True),
)
CHANNELS_LAST = (
    Layer("stem", 6, 1, 3 * 4 + 1, 12 * 16, 16, neuron_preactivations=16, filter_weights=12, affine_weights=1),
    Layer(
        "depthwise",
        6,
        1,
        9 + 1,
        9 * 16,
        16,
        neuron_preactivations=16,
        reads_group=True,
        filter_weights=9,
        affine_weights=1,
    ),
    Layer("up", 12, 1, 6 + 1, 6 * 16, 16, neuron_preactivations=16, filter_weights=6, affine_weights=1),
    Layer(
        "down",
        6,
        1,
        12 + 1 + 1,
        12 * 16,
        16,
        tail_weights=1,
        neuron_preactivations=16,
        filter_weights=12,
        affine_weights=2,
    ),
    Layer("head", 4, 1, 6 + 1, 6, 1, filter_weights=6, affine_weights=1, gives_scores=True),
)
PLAIN = (
    Layer("conv", 6, 1, 9 + 1, 9 * 64, 16, neuron_preactivations=64, filter_weights=9, affine_weights=1),
    Layer("fc1", 7, 1, 96 + 1, 96, 1, filter_weights=96, affine_weights=1),
    Layer("fc2", 4, 1, 7 + 1, 7, 1, filter_weights=7, affine_weights=1, gives_scores=True),
)
BRANCHES = (
    Layer("left", 4, 1, 2 + 1, 2 * 36, 36, neuron_preactivations=36, filter_weights=2, affine_weights=1),
    Layer("right", 6, 1, 18 + 1, 18 * 36, 36, neuron_preactivations=36, filter_weights=18, affine_weights=1),
    Layer("mix", 5, 1, 90 + 1, 90 * 16, 16, neuron_preactivations=16, filter_weights=90, affine_weights=1),
    Layer(
        "head", 3, 1, 5 + 1, 5 * 16, 1, neuron_preactivations=16, filter_weights=5, affine_weights=1, gives_scores=True
    ),
)
NETS: list[tuple[Callable[[], nn.Module], tuple[int, ...], tuple[Layer, ...]]] = [
    (Residual, (3, 8, 8), RESIDUAL),
    (Plain, (1, 8, 8), PLAIN),
    (Branches, (2, 6, 6), BRANCHES),
    (ChannelsLast, (3, 8, 8), CHANNELS_LAST),
]


class Shared(nn.Module):
    """One convolution used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.conv(x).relu()).relu()
        result: Tensor = self.head(x.mean((2, 3)))
        return result


class Function(nn.Module):
    """Two convolutions with some code between them, global average pooling and a linear layer: 4 classes."""

    def __init__(
        self, between: Callable[[Tensor], Tensor], after: int = 6, layer: nn.Module | None = None, **parts: nn.Module
    ) -> None:
        super().__init__()
        self.first = layer or nn.Conv2d(2, 6, 3, padding=1)
        self.between = between
        self.second = nn.Conv2d(after, 5, 1)
        self.head = nn.Linear(5, 4)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.between(self.first(x)))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def first_tail(network: Network) -> list[str]:
    """The operations in the first layer's tail."""
    layer, names = network.layers[0], []
    node = layer.node
    while node is not layer.value:
        node = next(iter(node.users))
        names.append(str(node.target).split(".")[1])
    return names


@pytest.mark.parametrize(("make", "shape", "layers"), NETS)
def test_layers_are_counted_as_by_hand(
    make: Callable[[], nn.Module], shape: tuple[int, ...], layers: tuple[Layer, ...]
) -> None:
    module = seeded(make)
    network = network_of(module, *shape)
    assert network.plan_layers == layers
    held = sum(layer.neurons * layer.neuron_weights for layer in layers) + network.shared_weights
    statistics = sum(b.numel() for b in module.buffers() if b.is_floating_point())
    assert held == sum(parameter.numel() for parameter in module.parameters()) + statistics


def test_parameters_outside_of_layers_are_shared() -> None:
    network = shared_network(ChannelsLast, 3, 8, 8)
    assert network.shared_parameters == ("stem_norm.weight", "stem_norm.bias", "norm.weight", "norm.bias")
    assert network.shared_weights == 24


def test_the_exchanged_value_is_where_the_neurons_lie() -> None:
    residual = shared_network(Residual, 3, 8, 8)
    assert [(layer.shape, layer.axis, layer.features) for layer in residual.layers] == [
        ((6, 4, 4), 1, 1),
        ((6, 4, 4), 1, 1),
        ((8, 4, 4), 1, 1),
        ((12, 4, 4), 1, 1),
        ((5,), 1, 1),
    ]
    plain = shared_network(Plain, 1, 8, 8)
    assert [(layer.shape, layer.axis, layer.features) for layer in plain.layers] == [
        ((96,), 1, 16),
        ((7,), 1, 1),
        ((4,), 1, 1),
    ]
    last = shared_network(ChannelsLast, 3, 8, 8)
    assert [(layer.shape, layer.axis) for layer in last.layers] == [
        ((4, 4, 6), 3),
        ((4, 4, 6), 3),
        ((4, 4, 12), 3),
        ((6, 4, 4), 1),
        ((4,), 1),
    ]


def test_only_lost_class_scores_are_minus_infinity() -> None:
    for make, shape, _ in NETS:
        fills = [layer.fill for layer in shared_network(make, *shape).layers]
        assert fills == [0.0] * (len(fills) - 1) + [float("-inf")]


def test_grouped_convolutions_read_the_channels_of_their_group() -> None:
    residual = shared_network(Residual, 3, 8, 8)
    assert [layer.input_channels for layer in residual.layers] == [0, 0, 0, 2, 0]
    last = shared_network(ChannelsLast, 3, 8, 8)
    assert [layer.input_channels for layer in last.layers] == [0, 1, 0, 0, 0]


def test_filters_are_the_weights_and_biases_that_scores_count() -> None:
    residual = shared_network(Residual, 3, 8, 8)
    assert residual.layers[0].filters == ("conv1.weight",)
    assert residual.layers[2].filters == ("expand.weight", "expand.bias", "depthwise.weight", "depthwise.bias")
    assert [p.name for p in residual.layers[0].parameters] == [
        "conv1.weight",
        "norm1.weight",
        "norm1.bias",
        "norm1.running_mean",
        "norm1.running_var",
    ]


@pytest.mark.parametrize(
    ("module", "tail"),
    [
        (Function(lambda x: x.relu()), ["relu"]),
        (Function(nn.functional.silu), ["silu"]),
        (Function(lambda x: x * torch.sigmoid(x)), ["silu"]),
        (Function(lambda x: nn.functional.hardswish(x) * 2 + 1), ["hardswish", "mul", "add"]),
        (Function(nn.PReLU(6)), ["prelu"]),
        (Function(nn.PReLU()), ["leaky_relu"]),  # one slope for all
        (Function(nn.BatchNorm2d(6, affine=False)), ["batch_norm"]),
        (Function(nn.LayerNorm([6, 8, 8])), []),
        (Function(nn.GroupNorm(2, 6)), []),
        (Function(nn.InstanceNorm2d(6)), []),
        (Function(nn.Softmax(1)), []),
        (Function(nn.ZeroPad2d(1)), ["pad"]),
        (Function(nn.ReflectionPad2d(1)), ["pad"]),
        (Function(lambda x: x[:, :, 1:, ::2]), ["slice", "slice"]),
        (Function(lambda x: x[:, :4], after=4), []),
        (Function(lambda x: x + x.relu()), []),
        (Function(nn.Upsample(scale_factor=2)), ["upsample_nearest2d"]),
        (Function(nn.AvgPool2d(2)), ["avg_pool2d"]),
        (Function(nn.AdaptiveAvgPool2d((3, 2))), ["adaptive_avg_pool2d"]),
        (Function(nn.AdaptiveMaxPool2d(1)), ["amax"]),
        (Function(nn.AdaptiveMaxPool2d((3, 5))), []),
        (Function(nn.Dropout2d()), []),
        (Function(lambda x: x / x.norm(dim=1, keepdim=True)), []),
        (Function(nn.PixelShuffle(2), layer=nn.Conv2d(2, 24, 1)), []),
        (Function(nn.Conv2d(6, 6, 3, groups=6)), ["conv2d"]),
        (Function(nn.Conv2d(6, 12, 3, groups=6), after=12), []),
        (Function(nn.Conv2d(6, 6, 3, padding="same", groups=6)), ["conv2d"]),
        (Function(nn.ConvTranspose2d(6, 6, 2, stride=2)), []),
        (Function(lambda x: x.mT.mean(2, keepdim=True).mT), ["transpose", "mean", "transpose"]),
    ],
)  # fmt: skip
def test_the_tail_is_the_chain_of_what_acts_on_every_neuron_by_itself(module: nn.Module, tail: list[str]) -> None:
    network = network_of(seeded(lambda: module), 2, 8, 8)
    assert first_tail(network) == tail
    assert network.layers[0].layer.name == "first"
    images = torch.from_numpy(random_images(3, (2, 8, 8)))
    torch.testing.assert_close(network.run(images), module(images))


class Temperature(nn.Module):
    """A learned number that divides all class scores."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, x: Tensor) -> Tensor:
        return x / self.value


class Projection(nn.Module):
    """A linear layer as a product with a matrix that is not transposed."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix + self.bias


ACTIVATIONS = (nn.Softmax, nn.LogSoftmax, nn.Sigmoid, nn.LogSigmoid)
"""What makes probabilities of class scores."""


@pytest.mark.parametrize(
    "head",
    [
        [nn.Conv2d(4, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
        [nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 3, 1), nn.Flatten()],
        [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)],
        [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.Softmax(1)],
        [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.LogSoftmax(-1)],
        [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), Temperature(torch.tensor(0.5))],
        [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), Temperature(torch.full((1, 1), 0.5))],
        [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.Sigmoid()],
        [nn.AdaptiveAvgPool2d(1), nn.Flatten(), Projection(4, 3)],
    ],
    ids=lambda head: "-".join(type(part).__name__ for part in head),
)
def test_class_scores_are_neurons_of_the_last_layer(head: list[nn.Module]) -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), *head).eval()
    network = network_of(module, 1, 6, 6)
    last = network.layers[-1]
    assert (last.value, last.shape, last.fill) == (network.output, (3,), float("-inf"))
    images = torch.from_numpy(random_images(2, (1, 6, 6)))
    expected = nn.Sequential(*list(module)[:-1])(images) if isinstance(head[-1], ACTIVATIONS) else module(images)
    torch.testing.assert_close(network.run(images), expected)
    mask = [torch.ones(4, dtype=torch.bool), torch.tensor([True, False, True])]
    expected[:, 1] = float("-inf")
    torch.testing.assert_close(network.run(images, mask), expected)


@pytest.mark.parametrize("after", [lambda p: p.clamp(1e-6, 1), lambda p: p.clamp_min(1e-6).log()])
def test_what_follows_a_softmax_is_not_needed_to_rank_classes(after: Callable[[Tensor], Tensor]) -> None:
    network = network_of(Wrong(lambda x: after(x.softmax(1))), 1, 4, 4)
    assert (network.layers[-1].value, network.layers[-1].fill) == (network.output, float("-inf"))


def test_squeeze_keeps_a_batch_of_one_image_a_batch() -> None:
    class Squeezing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.adaptive_avg_pool2d(self.conv(x), 1).squeeze()

    network = network_of(Squeezing(), 1, 4, 4)
    assert network.run(torch.zeros(1, 1, 4, 4)).shape == (1, 3)
    assert network.layers[0].value is network.output


def test_a_layer_that_is_used_twice_is_two_layers_with_weights_of_their_own() -> None:
    module = seeded(Shared)
    network = network_of(module, 4, 6, 6)
    assert [layer.name for layer in network.plan_layers] == ["conv", "conv#2", "head"]
    first, second, _ = ({p.name for p in layer.parameters} for layer in network.layers)
    assert first == {"conv.weight", "conv.bias"}
    assert not first & second
    images = torch.from_numpy(random_images(2, (4, 6, 6)))
    torch.testing.assert_close(network.run(images), module(images))


@pytest.mark.parametrize("make", [Residual, Plain, Branches])
def test_a_lost_neuron_is_zero_at_the_end_of_its_layers_tail(make: type[Residual | Plain | Branches]) -> None:
    shape = next(shape for other, shape, _ in NETS if other is make)
    module = seeded(make)
    network = network_of(module, *shape)
    images = torch.from_numpy(random_images(3, shape))
    with torch.no_grad():
        for index, layer in enumerate(network.layers):
            lost = [0, layer.layer.neurons - 1]
            masks = [torch.ones(other.neurons, dtype=torch.bool) for other in network.plan_layers]
            masks[index][lost] = False
            entries = [neuron * layer.features + f for neuron in lost for f in range(layer.features)]
            with without(module, {make.tails[index]: entries}, layer.fill):
                expected = module(images)
            torch.testing.assert_close(network.run(images, masks), expected)
            assert not torch.equal(expected, module(images))


def test_losses_of_several_layers_add_up() -> None:
    module = seeded(Residual)
    network = network_of(module, 3, 8, 8)
    images = torch.from_numpy(random_images(2, (3, 8, 8)))
    masks = [torch.ones(layer.neurons, dtype=torch.bool) for layer in network.plan_layers]
    masks[0][[1, 2]], masks[2][5], masks[4][[0, 1, 2, 3, 4]] = False, False, False
    with without(module, {"pool": [1, 2], "depthwise": [5]}), torch.no_grad():
        expected = module(images)
    masks_without_head = [*masks[:4], torch.ones(5, dtype=torch.bool)]
    torch.testing.assert_close(network.run(images, masks_without_head), expected)
    assert bool(network.run(images, masks).isneginf().all())


@pytest.mark.parametrize(("make", "shape", "layers"), NETS)
def test_core_aten_form_gives_the_same_layers(
    make: Callable[[], nn.Module], shape: tuple[int, ...], layers: tuple[Layer, ...]
) -> None:
    module = seeded(make)
    program = export(module, *shape)
    with quiet():
        network = build_network(program.run_decompositions(), "test")
    assert network.plan_layers == layers
    images = torch.from_numpy(random_images(2, shape))
    torch.testing.assert_close(network.run(images), module(images))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(("make", "shape", "layers"), NETS)
def test_a_fixed_batch_size_is_overcome(
    make: Callable[[], nn.Module], shape: tuple[int, ...], layers: tuple[Layer, ...], batch: int
) -> None:
    module = seeded(make)
    network = build_network(export(module, *shape, batch=batch), "test")
    assert network.plan_layers == layers
    images = torch.from_numpy(random_images(3, shape))
    torch.testing.assert_close(network.run(images), module(images))


def sequence(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 1), *between, nn.Flatten(), nn.Linear(2 * 16, 3))


class Wrong(nn.Module):
    """A network whose forward is given."""

    def __init__(self, forward: Callable[..., object]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.give = forward

    def forward(self, x: Tensor) -> object:
        return self.give(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Wrong(lambda x: (x, x + 1)), "2 outputs; expected one tensor"),
        (Wrong(lambda x: {"scores": x, "again": x}), "2 outputs; expected one tensor"),
        (Wrong(lambda _: 3), "does not return a tensor"),
        (Wrong(lambda x: x[:, None] * x[..., None]), r"of shape .* expected float32 \[batch, classes\] .*: export"),
        (Wrong(lambda x: x[:, :1]), r'returns one score .* \{"activation": "sigmoid"\} in the sidecar'),
        (Wrong(lambda x: x[:, :1].softmax(1)), "returns one score"),
        (Wrong(lambda x: x + torch.rand_like(x)), "node rand_like .*is random"),
        (Wrong(lambda x: x.argmax(1, keepdim=True)), r"returns torch\.int64 of shape .* expected float32"),
        (Wrong(lambda x: x * float("nan")), "not finite"),
        (Wrong(lambda x: x - x.mean(0)), "depend on the batch"),
        (Wrong(lambda x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))), "node cond .*control flow"),
        (nn.Sequential(nn.Flatten(), nn.ReLU()), "no convolution or linear layer"),
    ],
)  # fmt: skip
def test_what_cannot_be_placed_is_named(module: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        network_of(module, 1, 4, 4)


def test_a_batch_that_must_be_large_is_refused() -> None:
    with quiet():
        program = torch.export.export(
            seeded(Plain), (torch.zeros(4, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch", min=3)},)
        )
    with pytest.raises(ModelError, match=r"does not run a batch of 2 .*export it in eval mode with a dynamic batch"):
        build_network(program, "test")


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (nn.Dropout(0.5), "node .*dropout.* is random; export in eval mode"),
        (nn.BatchNorm2d(2), "node .*batch_norm.* (it learns|as training does).*; export in eval mode"),
    ],
)
def test_a_model_in_training_mode_is_refused(between: nn.Module, message: str) -> None:
    with quiet():
        program = torch.export.export(sequence(between).train(), (torch.zeros(2, 1, 4, 4),))
        core = program.run_decompositions()
    for form in (program, core):
        with pytest.raises(ModelError, match=message):
            build_network(form, "test")


def test_one_tensor_in_a_dictionary_is_fine() -> None:
    network = network_of(Wrong(lambda x: {"scores": x}), 1, 4, 4)
    assert network.run(torch.zeros(2, 1, 4, 4)).shape == (2, 2)


def test_what_an_export_decided_about_is_no_input() -> None:
    class Flags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1)

        def forward(self, pixels: Tensor, flag: bool = False, rest: Tensor | None = None) -> tuple[Tensor, None]:
            return self.conv(pixels if rest is None else rest).mean((2, 3)) * (2 if flag else 1), None

    module, image = seeded(Flags), torch.zeros(2, 1, 4, 4)
    batch = {0: torch.export.Dim("batch")}
    for arguments, keywords in (((image, True, None), None), ((), {"pixels": image, "flag": True})):
        shapes = (batch, None, None) if arguments else {"pixels": batch, "flag": None}
        with quiet():
            program = torch.export.export(module, arguments, keywords, dynamic_shapes=shapes)
        images = torch.from_numpy(random_images(3, (1, 4, 4)))
        torch.testing.assert_close(build_network(program, "test").run(images), module(images, True)[0])


def test_two_inputs_are_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    program = torch.export.export(Two(), (torch.zeros(2, 3), torch.zeros(2, 3)))
    with pytest.raises(ModelError, match=r"2 inputs \(x, y\)"):
        build_network(program, "test")


def test_half_precision_is_refused() -> None:
    program = torch.export.export(sequence().eval().half(), (torch.zeros(2, 1, 4, 4).half(),))
    with pytest.raises(ModelError, match=r"is torch.float16; .* float32 models"):
        build_network(program, "test")


def test_a_graph_for_one_batch_size_only_is_refused() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)
            self.token = nn.Parameter(torch.ones(1, 4))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(x + self.token.expand(x.shape[0], -1))
            return result

    with pytest.raises(ModelError, match=r"batches of 4 only .*dynamic batch size"):
        build_network(export(Fixed(), 4, batch=4), "test")
    assert network_of(Fixed(), 4).outputs == 3


def test_the_digest_names_the_model() -> None:
    def digest(make: Callable[[], nn.Module], shape: Sequence[int], seed: int) -> str:
        network = network_of(seeded(make, seed), *shape)
        return network.reference.digest

    assert digest(Plain, (1, 8, 8), 0) == digest(Plain, (1, 8, 8), 0)
    assert digest(Plain, (1, 8, 8), 0) != digest(Plain, (1, 8, 8), 1)


@pytest.mark.parametrize("activation", [nn.Softmax, nn.LogSigmoid])
@pytest.mark.parametrize(
    "reshape",
    [
        lambda x: x[:, :, None, None],
        lambda x: x[:, None, None, :],
        lambda x: x[:, None],
        lambda x: x[:, None, :, None, None],
    ],
)
def test_scores_may_have_further_axes_of_one_entry(
    reshape: Callable[[Tensor], Tensor], activation: Callable[..., nn.Module]
) -> None:
    softmax = activation is nn.Softmax

    def scores(x: Tensor) -> object:
        shaped = reshape(x)
        axis = next(axis for axis, size in enumerate(shaped.shape) if axis and size == 2)
        return nn.Softmax(axis)(shaped) if softmax else activation()(shaped)

    module = Wrong(scores)
    network = network_of(module, 1, 4, 4)
    images = torch.from_numpy(random_images(3, (1, 4, 4)))
    plain = module.conv(images).mean((2, 3))
    assert (network.outputs, network.activation) == (2, "softmax" if softmax else "sigmoid")
    torch.testing.assert_close(network.run(images), plain)
    lost = network.run(images, [torch.tensor([False, True])])
    torch.testing.assert_close(lost, torch.stack([torch.full((3,), float("-inf")), plain[:, 1]], 1))


@pytest.mark.parametrize(
    "give", [lambda x: x[:, :1].sigmoid(), lambda x: x[:, 0].sigmoid(), lambda x: x[:, :1, None].sigmoid()]
)
def test_one_score_behind_a_sigmoid_is_two_classes(give: Callable[[Tensor], Tensor]) -> None:
    module = Wrong(give)
    network = network_of(module, 1, 4, 4)
    images = torch.from_numpy(random_images(8, (1, 4, 4)))
    yes = module(images).reshape(-1)
    probabilities = network.run(images).softmax(1)
    assert (network.outputs, network.activation) == (2, "softmax")
    torch.testing.assert_close(probabilities, torch.stack([1 - yes, yes], 1))
    assert torch.equal(probabilities.argmax(1), (yes > 0.5).long())


def test_the_only_score_is_one_neuron_and_without_it_there_is_no_answer() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 1), nn.Sigmoid())
    network = network_of(module, 1, 4, 4)
    last = network.layers[-1]
    assert (last.layer.neurons, last.features, last.shape, last.fill) == (1, 2, (2,), float("-inf"))
    images = torch.from_numpy(random_images(2, (1, 4, 4)))
    masks = [torch.ones(4, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)]
    assert bool(network.run(images, masks).isneginf().all())


def test_what_scores_mean_can_be_said_where_the_graph_does_not() -> None:
    images = torch.from_numpy(random_images(4, (1, 4, 4)))
    declared = {"activation": "sigmoid"}
    several = Wrong(lambda x: x)
    network = build_network(export(several, 1, 4, 4), "test", declared)
    assert (network.outputs, network.activation) == (2, "sigmoid")
    torch.testing.assert_close(network.run(images), several(images))
    one = Wrong(lambda x: x[:, :1])
    network = build_network(export(one, 1, 4, 4), "test", declared)
    assert (network.outputs, network.activation) == (2, "softmax")
    torch.testing.assert_close(network.run(images), torch.cat([torch.zeros(4, 1), one(images)], 1))
    exclusive = build_network(export(Wrong(torch.sigmoid), 1, 4, 4), "test", {"activation": "softmax"})
    assert exclusive.activation == "softmax"
    with pytest.raises(ModelError, match="ends in a softmax, but its activation is said to be a sigmoid"):
        build_network(export(Wrong(lambda x: x.softmax(1)), 1, 4, 4), "test", declared)


def test_several_labels_are_another_model_than_one_class() -> None:
    program = export(seeded(lambda: Wrong(torch.sigmoid)), 1, 4, 4)
    labels, classes = (build_network(program, "test", {"activation": end}) for end in ("sigmoid", "softmax"))
    assert labels.reference.digest != classes.reference.digest

"""The lowered graph computes what was trained, for every kind of quantizer and model, and leaves the model alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import onnxruntime
import pytest
import torch
from quantized_nets import NETS, quantized
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.integer.dynamic import onnx_translations
from lightning_compress.quantization.integer.lockstep import lockstep, wilson
from lightning_compress.quantization.integer.lowering import lower
from lightning_compress.quantization.spec import QuantSpec

KINDS = [
    ("int8", "int8"), ("int4", "int8"), ("lsq4", "lsq4"), ("binary", "int8"), ("ternary", "int8"), ("po2_8", "po2_8"),
    ("lsq2", "lsq+4"), ("int8", "int8_dynamic"), ("int8", None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("net", "weights", "activations"),
    [*(("residual", *kind) for kind in KINDS), ("encoder", "lsq4", "lsq4"), ("encoder", "int8", "int8_dynamic")],
)
def test_without_completion_the_graph_is_the_trained_model(net: str, weights: str, activations: str | None) -> None:
    """Only the fold of batch normalization rounds differently, which moves a value near a border by one code."""
    torch.manual_seed(0)
    make, calls = NETS[net]
    model, batches = make(), calls()
    quantized(model, batches, weights, activations)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exact = lower(model, batches[0], batches, completed=False)
    found = lockstep(model, exact, calls(4, 7))
    assert found.mean_difference < 1e-3
    assert set(exact.report["float"]) == set()
    complete = lower(model, batches[0], batches)
    assert lockstep(model, complete, calls(4, 7)).mean_difference < 0.05
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("net", NETS)
def test_post_training_stays_close_to_the_plain_model(net: str) -> None:
    torch.manual_seed(0)
    make, calls = NETS[net]
    model, batches = make(), calls(4)
    for lowered in (lower(model, batches[0], batches), lower(model, batches[0], batches, percentile=99.9)):
        assert lockstep(model.eval(), lowered, batches).mean_difference < 0.02
    assert lockstep(model, lower(model, batches[0], activations="dynamic"), batches).mean_difference < 0.02


def test_the_file_is_small_and_reads_back_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()
    call = ExampleCall("", (torch.randn(4, 256),))
    lowered = lower(model, call, [call])
    floats = [n for n, v in lowered.program.state_dict.items() if v.is_floating_point() and v.numel() > 256]
    assert floats == []
    buffer = io.BytesIO()
    torch.export.save(lowered.program, buffer)
    assert len(buffer.getvalue()) < 0.35 * 4 * 2 * 256 * 256
    buffer.seek(0)
    again, x = torch.export.load(buffer).module(), torch.randn(7, 256)  # another batch size
    assert torch.equal(again(x), lowered.module()(x))


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_onnx_runtime_gives_the_same_numbers(activations: str) -> None:
    torch.manual_seed(0)
    make, calls = NETS["encoder"]
    model, batches = make().eval(), calls()
    lowered = lower(model, batches[0], batches, activations=activations)
    exported = torch.onnx.export(
        lowered.program, dynamo=True, verbose=False, custom_translation_table=onnx_translations()
    )
    buffer = io.BytesIO()
    exported.save(buffer)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(buffer.getvalue(), options)
    (tokens,) = calls(1, 9)[0].args
    (found,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
    expected = lowered.module()(tokens)
    assert (torch.from_numpy(found) - expected).abs().mean() < 0.02 * (expected.max() - expected.min())


class Reused(nn.Module):
    """One layer twice, tied weights, keyword arguments, a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 6)
        self.out.weight = self.inner.weight

    def forward(self, x: Tensor, *, shift: Tensor, scale: float = 2.0) -> dict[str, Tensor]:
        x = self.inner(torch.relu(self.inner(x)) + shift)
        return {"logits": self.out(x) * scale}


def test_reused_layers_keywords_and_nested_outputs() -> None:
    torch.manual_seed(0)
    model = Reused().eval()
    call = ExampleCall("", (torch.randn(4, 6),), {"scale": 3.0, "shift": torch.randn(4, 6)})
    swapped = ExampleCall("", call.args, {"shift": call.kwargs["shift"], "scale": 3.0})
    lowered = lower(model, call, [call, swapped])
    assert sum(name.endswith("_int8") for name in lowered.program.state_dict) == 1
    found = lowered.module()(*call.args, **call.kwargs)["logits"]
    with torch.no_grad():
        torch.testing.assert_close(found, model(*call.args, **call.kwargs)["logits"], atol=0.1, rtol=0)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (3, 4, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (3, 2, 3, 3, 3)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (3, 4, 5)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (3, 4, 5, 5)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 4, 2), (3, 2, 3, 3, 3)),
    "linear_4d": (lambda: nn.Linear(5, 6), (3, 2, 4, 5)),
    "linear_turned": (lambda: nn.Sequential(nn.Flatten(2), nn.Linear(20, 6)), (3, 2, 4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("granularity", ["channel", "tensor", None])
def test_kinds_of_layers(name: str, granularity: str | None) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model, call = nn.Sequential(make(), nn.ReLU()), ExampleCall("", (torch.randn(shape),))
    if granularity is not None:
        weights = QuantSpec(granularity=granularity, observer="minmax", narrow=True)
        quantized(model, [call], weights, "int8")
    if name == "conv_transpose2d" and granularity == "channel":  # its output channels are spread over two dimensions
        with pytest.raises(CompressionError, match="one for each output channel"):
            lower(model, call, [call])
        return
    lowered = lower(model.eval(), call, [call], completed=False)
    difference = lockstep(model, lowered, [call], dim=1).difference
    assert difference < (1e-5 if granularity is not None else 0.03)


class Written(nn.Module):
    """Products as GPT-2 and others write them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 3))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, 1), self.a).relu().view(*x.shape[:2], 8) @ self.b


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_products_with_matrices_are_linear_layers(activations: str) -> None:
    torch.manual_seed(0)
    model, call = Written().eval(), ExampleCall("", (torch.randn(3, 5, 6),))
    lowered = lower(model, call, [call], activations=activations)  # type: ignore[arg-type]
    assert sum(name.endswith("_int8") for name in lowered.program.state_dict) == 2
    assert lockstep(model, lowered, [call]).difference < 0.03


@pytest.mark.parametrize("activations", ["int8", "int8_dynamic"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_store_each_weight_once(kind: type[nn.Module], activations: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.head = kind(4, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cells(x)[0][:, -1])

    torch.manual_seed(0)
    model, call = Net(), ExampleCall("", (torch.randn(2, 5, 4),))
    quantized(model, [call], "int8", activations)
    lowered = lower(model, call, [call], dynamic_batch=False, completed=False)
    assert sum(name.endswith("_int8") for name in lowered.program.state_dict) == 3
    assert lockstep(model, lowered, [call]).difference < 1e-5


def test_scales_that_no_kernel_knows_stay_float_and_are_reported() -> None:
    torch.manual_seed(0)
    model, call = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), ExampleCall("", (torch.randn(4, 8),))
    quantized(model, [call], QuantSpec(granularity="group:4", observer="minmax"), "int8")
    lowered = lower(model, call, [call], completed=False)
    assert "one for each output channel" in lowered.report["float"]["0"]
    assert lockstep(model, lowered, [call]).difference < 1e-5


def test_masks_are_part_of_the_integers() -> None:
    from lightning_compress.layers import add_transform

    torch.manual_seed(0)
    model, call = nn.Sequential(nn.Linear(8, 4)), ExampleCall("", (torch.randn(4, 8),))
    add_transform(model[0], "mask", _left_half)
    quantized(model, [call], "int8", "int8")
    lowered = lower(model, call, [call])
    codes = next(v for n, v in lowered.program.state_dict.items() if n.endswith("_int8"))
    assert bool((codes[:, 4:] == 0).all())
    assert bool((codes[:, :4] != 0).any())


def _left_half(weight: Tensor) -> Tensor:
    return weight * (torch.arange(weight.shape[1]) < 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_of_floats_become_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype).eval()
    call = ExampleCall("", (torch.randn(4, 8, dtype=dtype),))
    lowered = lower(model, call, [call])
    assert lockstep(model, lowered, [call]).difference < 0.05
    assert {p.dtype for p in model.parameters()} == {dtype}


class InPlace(nn.Module):
    """Writes that are safe to replace, and one that is seen through a view."""

    def __init__(self, viewed: bool) -> None:
        super().__init__()
        self.a, self.b, self.viewed = nn.Linear(6, 6), nn.Linear(6, 6), viewed

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        view = y.view(-1, 2, 3)
        y.relu_()
        y += x
        return self.b(view.reshape(-1, 6) if self.viewed else y)


@pytest.mark.parametrize("viewed", [True, False])
def test_operators_that_write(viewed: bool) -> None:
    torch.manual_seed(0)
    model, call = InPlace(viewed).eval(), ExampleCall("", (torch.randn(4, 6),))
    lowered = lower(model, call, [call])
    assert lockstep(model, lowered, [call]).difference < 0.05
    written = [n for n in lowered.program.graph.nodes if getattr(getattr(n.target, "_schema", None), "is_mutable", 0)]
    assert written == []


class Open(nn.Module):
    """Arguments of any name, as those of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.net(args[0] + kwargs["more"]) + kwargs["table"].sum()


def test_open_signatures_and_which_tensors_are_batches() -> None:
    torch.manual_seed(0)
    model, table = Open().eval(), torch.randn(2, 3)  # of the size that a batch of 1 is traced with
    call = ExampleCall("", (torch.randn(1, 3),), {"more": torch.randn(1, 3), "table": table})
    x, more = torch.randn(5, 3), torch.randn(5, 3)
    lowered = lower(model, call, [call, ExampleCall("", (x,), {"more": more, "table": table})])
    with torch.no_grad():
        expected = model(x, more=more, table=table)
    assert (lowered.module()(x, more=more, table=table) - expected).abs().max() < 0.05
    assert lowered.module()(x, more=more, table=table).shape == (5, 2)


def test_part_of_a_model() -> None:
    model = nn.ModuleDict({"net": nn.Linear(4, 3), "unused": nn.Linear(1, 1)}).eval()
    call = ExampleCall("net", (torch.randn(2, 4),))
    lowered = lower(model, call, [call])
    assert lowered.module()(torch.randn(5, 4)).shape == (5, 3)
    assert len([n for n in lowered.program.state_dict if n.endswith("_int8")]) == 1


def test_quantizers_that_are_not_enabled_do_nothing() -> None:
    torch.manual_seed(0)
    make, calls = NETS["residual"]
    model, batches = make(), calls()
    twin = copy.deepcopy(model).eval()
    quantized(model, batches, "int2", "int2")
    for module in model.modules():
        if hasattr(module, "enabled"):
            module.enabled = False
    ours, theirs = (lower(m, batches[0], batches).module() for m in (model, twin))
    assert torch.equal(ours(*batches[0].args), theirs(*batches[0].args))


def test_batch_of_fixed_size() -> None:
    net, call = nn.Linear(3, 2).eval(), ExampleCall("", (torch.randn(1, 3),))
    assert lower(net, call, [call], dynamic_batch=False).module()(torch.randn(1, 3)).shape == (1, 2)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum() > 0 else x


CALL = ExampleCall("", (torch.ones(2, 2),))


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: lower(nn.Linear(2, 2), CALL), "no enabled quantizers"),
        (lambda: lower(nn.Linear(2, 2), CALL, []), "no calibration call"),
        (lambda: lower(nn.Linear(2, 2), CALL, [ExampleCall("", (torch.ones(2, 3),))]), "calibration call 1 fails"),
        (lambda: lower(nn.Tanh(), CALL, [CALL]), "nothing to lower"),
        (lambda: lower(Branches(), CALL, [CALL]), "cannot trace Branches"),
        (lambda: lower(nn.Linear(2, 2, device="meta"), CALL, [CALL]), "meta device"),
        (lambda: lockstep(nn.Linear(2, 2), lower(nn.Linear(2, 2), CALL, [CALL]), []), "no call to compare"),
    ],
)
def test_what_cannot_be_done_is_explained(act: Callable[[], object], words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        act()


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="percentile"):
        lower(nn.Linear(2, 2), CALL, [CALL], percentile=0.99)
    with pytest.raises(ValueError, match="activations"):
        lower(nn.Linear(2, 2), CALL, [CALL], activations="int8")  # type: ignore[arg-type]


def test_values_that_are_not_finite_are_refused() -> None:
    call = ExampleCall("", (torch.full((2, 2), float("nan")),))
    with pytest.raises(CompressionError, match="not finite"):
        lower(nn.Linear(2, 2), call, [call])


def test_nothing_global_changes(rng_untouched: Callable[[], None]) -> None:
    fused = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=[]):
        net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    lower(net, CALL, [CALL])
    assert torch.backends.mha.get_fastpath_enabled() == fused


def test_wilson_interval() -> None:
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == pytest.approx(1)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I, method 3

"""`quantize`: a trained network keeps its accuracy, each step helps where it should, and mistakes are named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import loading, manifest
from lightning_compress.errors import CompressionError
from lightning_compress.layers import add_transform, get_transform
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization import attachment
from lightning_compress.quantization.post_training import Settings, quantize, quantize_with_report
from lightning_compress.quantization.schemes import SCHEMES, Scheme, ordered, read_scheme
from lightning_compress.quantization.spec import QuantSpec, parse
from lightning_compress.quantization.toolbox.rounding import AdaRoundSettings
from lightning_compress.quantization.toolbox.signal import signal_ratios

QUICK = Settings(samples=256, adaround=AdaRoundSettings(iterations=80))


def make() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(24 * 16, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> tuple[TensorDataset, TensorDataset]:
    images, labels = load_digits(return_X_y=True)
    data = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return tuple(TensorDataset(*(part[chosen] for part in data)) for chosen in (order[:1200], order[1200:]))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def trained(digits: tuple[TensorDataset, TensorDataset]) -> nn.Sequential:
    torch.manual_seed(0)
    model, (images, labels) = make(), digits[0].tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(12):
        for part in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
    with torch.no_grad():  # channels of very different sizes, as in trained MobileNets
        factor = 10 ** (torch.rand(12) * 2 - 1)
        model[1].weight.mul_(factor)
        model[1].bias.mul_(factor)
        model[3].weight.div_(factor.view(-1, 1, 1, 1))
    optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    images, labels = data.tensors
    return float((model(images).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("scheme", [*SCHEMES])
def test_every_scheme_runs_and_8_bits_keep_the_accuracy(scheme: str, trained: nn.Module, digits: Any) -> None:
    model = quantize(trained, digits[0], scheme=scheme, settings=QUICK)
    found, wanted = accuracy(model, digits[1]), accuracy(trained, digits[1])
    assert wanted > 0.95
    drop = {"w2a2_lsq": 1.0, "w4a8": 0.05, "nagel_w4a8_adaround": 0.03}.get(scheme, 0.01)
    assert found >= wanted - drop


def test_the_model_itself_is_not_touched(trained: nn.Module, digits: Any) -> None:
    before, state = copy.deepcopy(trained.state_dict()), torch.get_rng_state()
    loader = DataLoader(digits[0], 64, shuffle=True)
    steps = ("equalization", "adaround", "batch_norm", "bias_correction")
    model = quantize(trained, loader, steps=steps, settings=QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in trained.state_dict().items())
    assert not attachment.quantizers(trained)
    assert not manifest.of(trained)["edits"]
    assert all(p.grad is None and p.requires_grad for p in trained.parameters())
    assert model.training is False


def test_in_place_is_the_same(trained: nn.Module, digits: Any) -> None:
    steps = ("equalization", "bias_correction")
    other = quantize(trained, digits[0], steps=steps, settings=QUICK)
    own = copy.deepcopy(trained).train()
    weight = own[0].weight
    assert quantize(own, digits[0], steps=steps, settings=QUICK, inplace=True) is own
    assert own[0].weight is weight
    assert own.training
    assert torch.equal(own.eval()(digits[1].tensors[0]), other(digits[1].tensors[0]))
    assert {e["kind"] for e in manifest.of(own)["edits"]} == {e["kind"] for e in manifest.of(other)["edits"]}


def test_steps_recover_what_4_bits_per_tensor_lose(trained: nn.Module, digits: Any) -> None:
    rough = Scheme(QuantSpec(bits=4, observer="mse", narrow=True), QuantSpec(symmetric=False, observer="mse"))
    outputs = {}
    for steps in ((), ("equalization",), ("equalization", "adaround"), ("equalization", "gptq")):
        _, report = quantize_with_report(trained, digits[0], scheme=rough, steps=steps, settings=QUICK)
        assert report.output is not None
        outputs[steps] = report.output.after
        assert set(report.layers) == {"0", "3", "6", "11", "13"}
    assert outputs["equalization",] > outputs[()] + 1
    assert outputs["equalization", "adaround"] > outputs["equalization",] + 2
    assert outputs["equalization", "gptq"] > outputs["equalization",] + 1


@pytest.mark.parametrize("step", ["adaround", "gptq"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:4"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_written_weights_are_on_the_grid(
    step: str, granularity: str, symmetric: bool, trained: nn.Module, digits: Any
) -> None:
    if granularity == "group:4" and not symmetric:
        pytest.skip("the same code as for one channel")
    spec = QuantSpec(bits=4, symmetric=symmetric, granularity=granularity, observer="minmax", narrow=symmetric)
    model = quantize(
        trained, digits[0], scheme=Scheme(spec, None), steps=(step,), settings=QUICK, targets=("6", "11", "13")
    )
    nearest = quantize(trained, digits[0], scheme=Scheme(spec, None), settings=QUICK, targets=("6", "11", "13"))
    for name in ("6", "11", "13"):
        layer = model.get_submodule(name)
        quantizer = get_transform(layer, "fq", "weight")
        assert torch.equal(quantizer(layer.weight), layer.weight)
        plain = nearest.get_submodule(name)
        assert not torch.equal(get_transform(plain, "fq", "weight")(plain.weight), layer.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype, trained: nn.Module, digits: Any) -> None:
    model, images = copy.deepcopy(trained).to(dtype), digits[0].tensors[0][:128].to(dtype)
    for step in ("adaround", "gptq"):
        found = quantize(model, images, steps=("equalization", step), settings=QUICK)
        for name in ("0", "3", "6", "11", "13"):
            layer = found.get_submodule(name)
            assert layer.weight.dtype == dtype
            assert torch.equal(get_transform(layer, "fq", "weight")(layer.weight), layer.weight)
        agree = found(images).argmax(1) == trained(images.float()).argmax(1)
        assert float(agree.float().mean()) > 0.97


def test_masked_weights_stay_zero(trained: nn.Module, digits: Any) -> None:
    model = copy.deepcopy(trained)
    for name in ("6", "11"):
        add_transform(model.get_submodule(name), "mask", Half())
    for step in ("adaround", "gptq"):
        for symmetric in (True, False):
            spec = QuantSpec(bits=4, symmetric=symmetric, granularity="channel", narrow=symmetric)
            found = quantize(model, digits[0], scheme=Scheme(spec, None), steps=(step,), settings=QUICK)
            for name in ("6", "11"):
                layer = found.get_submodule(name)
                assert bool((layer.weight[:, ::2] == 0).all())
                assert torch.equal(get_transform(layer, "fq", "weight")(layer.weight), layer.weight)


class Half(nn.Module):
    """Hides every second input."""

    def forward(self, weight: Tensor) -> Tensor:
        mask = torch.ones_like(weight)
        mask[:, ::2] = 0
        return weight * mask


def test_ranges_come_from_the_data_by_the_observer(trained: nn.Module) -> None:
    images = torch.rand(512, 1, 8, 8)
    images[0, 0, 0, 0] = 50.0
    for observer, high in (("minmax", 50.0), (None, 50.0), ("percentile", 2.0), ("mse", 50.0)):
        settings = Settings(observer=observer)  # type: ignore[arg-type]
        model = quantize(trained, [images], settings=settings, targets=("0",))
        found = float(attachment.quantizers(model)["0.input"].get_buffer("hi"))
        assert found <= high
        assert found == high or observer in ("percentile", "mse")


def test_all_forms_of_calibration_data_mean_the_same(trained: nn.Module, digits: Any) -> None:
    images, labels = (tensor[:64] for tensor in digits[0].tensors)
    forms: list[Any] = [
        images, [images], [(images, labels)], [{"input": images}], [ExampleCall("", (images,))],
        DataLoader(TensorDataset(images, labels), 16),
    ]  # fmt: skip
    wanted = None
    for form in forms:
        found = attachment.quantizers(quantize(trained, form))["13.input"].get_buffer("hi")
        wanted = found if wanted is None else wanted
        assert torch.equal(found, wanted)


def test_samples_limit_what_is_drawn(trained: nn.Module, digits: Any) -> None:
    drawn = []

    def batches() -> Any:
        for start in range(0, 1000, 50):
            drawn.append(start)
            yield digits[0].tensors[0][start : start + 50]

    quantize(trained, batches(), settings=Settings(samples=100))
    assert drawn == [0, 50]


def test_a_part_of_a_model_that_is_called_by_itself(digits: Any, trained: nn.Module) -> None:
    outer = nn.ModuleDict({"net": copy.deepcopy(trained), "idle": nn.Linear(2, 2)})
    images = digits[0].tensors[0][:32]
    found, report = quantize_with_report(outer, [images], example=ExampleCall("net", (images,)))
    assert set(report.skipped["calibration"]) == {"idle"}
    assert type(found["idle"]) is nn.Linear
    assert found["net"](images).shape == (32, 10)


def test_dynamic_needs_no_data(trained: nn.Module, digits: Any) -> None:
    model = quantize(trained, scheme="int8_dynamic")
    assert accuracy(model, digits[1]) >= accuracy(trained, digits[1]) - 0.01
    even = quantize(trained, example=digits[0].tensors[0][:2], scheme="int8_dynamic", steps=("equalization",))
    assert accuracy(even, digits[1]) >= accuracy(trained, digits[1]) - 0.01


def test_attention_and_recurrent_layers() -> None:
    torch.manual_seed(0)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 16)
            self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
            self.lstm = nn.LSTM(16, 8, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.lstm(self.encoder(self.embed(tokens)))[0][:, -1])

    model, tokens = Mixed().eval(), torch.randint(11, (32, 6))
    steps = ("smoothing", "adaround", "bias_correction")
    found, report = quantize_with_report(model, [tokens], steps=steps, settings=QUICK)
    assert report.output is not None
    assert report.output.after > 20
    assert "lstm" not in report.skipped["smoothing"]  # only linear layers and attention are looked at
    assert "embed" in report.skipped["adaround"]
    assert report.skipped["bias_correction"].keys() >= {"embed", "lstm"}
    assert found(tokens).shape == (32, 3)


def test_tied_weights_share_their_codes(digits: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[3].weight = model[1].weight
    found = quantize(model, digits[0], steps=("adaround",), settings=QUICK)
    assert found[3].weight is found[1].weight
    quantizer = get_transform(found[3], "fq", "weight")
    assert torch.equal(quantizer(found[3].weight), found[3].weight)


def test_a_saved_model_loads_and_computes_the_same(trained: nn.Module, digits: Any, tmp_path: Any) -> None:
    model = quantize(trained, digits[0], scheme="nagel_w4a8_adaround", settings=QUICK)
    path = tmp_path / "model.pt"
    torch.save({"state_dict": model.state_dict(), manifest.KEY: manifest.of(model)}, path)
    loaded = loading.load(make(), path).eval()
    assert torch.equal(loaded(digits[1].tensors[0]), model(digits[1].tensors[0]))


def test_it_trains_on_and_comes_off(trained: nn.Module, digits: Any) -> None:
    model = quantize(trained, digits[0], settings=QUICK)
    F.cross_entropy(model.train()(digits[0].tensors[0][:32]), digits[0].tensors[1][:32]).backward()
    assert all(p.grad is not None for p in model.parameters())
    plain = attachment.detach(model)
    assert type(plain[0]) is nn.Conv2d
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), trained.parameters(), strict=True))


def test_reports_of_noise() -> None:
    reference, rough = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    reference.weight.data.fill_(1.0)
    rough.weight.data.fill_(1.01)
    found = signal_ratios(reference, rough, [], [ExampleCall("", (torch.ones(3, 2),))])
    assert found[""] == pytest.approx(40, abs=1e-2)
    assert signal_ratios(reference, reference, [], [ExampleCall("", (torch.ones(3, 2),))])[""] == float("inf")


def test_mistakes_are_named_and_leave_the_model_alone(trained: nn.Module, digits: Any) -> None:
    images = digits[0].tensors[0][:32]
    bad = images.clone()
    bad[3] = float("nan")
    model = copy.deepcopy(trained)
    before = copy.deepcopy(model.state_dict())
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({}, CompressionError, "no calibration data"),
        ({"calibration": []}, CompressionError, "no batch"),
        ({"calibration": TensorDataset(torch.zeros(0, 1, 8, 8))}, CompressionError, "empty"),
        ({"calibration": {"x": images}}, CompressionError, "pass `prepare=`"),
        ({"calibration": [images, bad]}, CompressionError, "batch 1 has NaN"),
        ({"calibration": [images * 1e38]}, CompressionError, "not finite"),
        ({"calibration": images, "scheme": "int3_magic"}, ValueError, "int3_magic"),
        ({"calibration": images, "scheme": {"nope*": "int8_static"}}, CompressionError, "nope"),
        ({"calibration": images, "scheme": {"1": "int8_static"}}, CompressionError, "BatchNorm2d"),
        ({"calibration": images, "targets": ("nope",)}, CompressionError, "nope"),
        ({"calibration": images, "steps": ("magic",)}, ValueError, "magic"),
        ({"scheme": "int8_dynamic", "steps": ("adaround",)}, CompressionError, "adaround"),
        ({"scheme": "int8_dynamic", "steps": ("equalization",)}, CompressionError, "example="),
        ({"calibration": images, "settings": Settings(samples=0)}, ValueError, "samples"),
    ]
    for arguments, kind, words in cases:
        with pytest.raises(kind, match=words):
            quantize(model, **arguments, inplace=True)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(CompressionError, match="quantizers already"):
        quantize(quantize(model, images), images)


def test_plans_choose_single_layers(trained: nn.Module, digits: Any) -> None:
    scheme = {"6": {"weights": "int4"}, "11": "int8_static"}
    model = quantize(trained, digits[0], scheme=scheme, settings=QUICK)
    assert set(attachment.quantizers(model)) == {"6.weight", "11.weight", "11.input"}


def test_schemes_as_data() -> None:
    affine = SCHEMES["krishnamoorthi_asymmetric_per_channel"].weights
    assert affine is not None
    assert not affine.symmetric
    assert affine.granularity == "channel"
    assert SCHEMES["nagel_w8a8_per_tensor"].weights != SCHEMES["nagel_w8a8_per_channel"].weights
    layers = SCHEMES["nagel_w4a8_adaround"].layers(make())
    assert [slots["weight"].bits for slots in layers.values()] == [8, 4, 4, 4, 8]
    assert read_scheme(Scheme(parse("int8", "weights"), None)).activations is None
    assert ordered(["adaround", "equalization"]) == ("equalization", "adaround")
    with pytest.raises(TypeError, match="scheme"):
        read_scheme(3)  # type: ignore[arg-type]

"""An integer model as one file: whole or not at all, checked when read, and compared with the model it came from."""

import io
import json
import zipfile

import pytest
import torch
from torch import nn

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.encoding import decode, encode
from lightning_compress.errors import CompressionError
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.integer import artifact as artifacts
from lightning_compress.quantization.integer.artifact import Int8Artifact
from lightning_compress.quantization.integer.lockstep import wilson
from lightning_compress.quantization.integer.lowering import lower
from lightning_compress.quantization.integer.reduction import without_saturation
from lightning_compress.quantization.integer.runtimes import compile_program


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.twin = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x, scale=None):
        x = torch.relu(self.norm(self.conv(x)))
        y = self.head(torch.relu(x + self.twin(x)).mean((2, 3)))
        return y if scale is None else y * scale


class Sum(nn.Module):
    """Nested inputs, keyword arguments, and results that are no tensors."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x, parts=(), mask=None, flag=True):
        y = self.linear(x + parts[0])
        return {"y": y * mask if flag else y, "none": None, "n": 3}


def net(seed=0):
    torch.manual_seed(seed)
    return Net().eval()


def images(n, seed=1):
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def calls(n=4):
    return [ExampleCall("", (images(8, seed),)) for seed in range(n)]


@pytest.fixture(scope="module")
def made():
    model = net()
    return model, Int8Artifact.of(model, calls()[0], calls())


def test_saved_and_loaded_it_gives_the_same_bits(made, tmp_path):
    model, artifact = made
    path = artifact.save(tmp_path / "new" / "net.pt2")
    loaded = Int8Artifact.load(path)
    assert [file.name for file in path.parent.iterdir()] == ["net.pt2"]
    assert loaded.metadata["report"] == artifact.metadata["report"]
    assert loaded.metadata["versions"]["torch"] == str(torch.__version__)
    for batch in (1, 2, 11):
        assert torch.equal(loaded.run(images(batch)), artifact.run(images(batch)))
    assert artifact.size() == pytest.approx(artifact.size(path), rel=0.02)
    assert not any(p.grad_fn for p in model.parameters())


def test_it_is_a_torch_export_file_too(made, tmp_path):
    path = made[1].save(tmp_path / "net.pt2")
    x = images(3)
    torch.testing.assert_close(torch.export.load(path).module()(x), made[1].run(x), rtol=1e-4, atol=1e-5)


def test_the_manifest_travels(tmp_path):
    record = {"version": 1, "edits": [{"kind": "channels.cut", "slices": {"a": {"0": torch.tensor([1, 2])}}}]}
    artifact = Int8Artifact.of(net(), calls()[0], calls(), record)
    assert manifest.equal(Int8Artifact.load(artifact.save(tmp_path / "a.pt2")).manifest, record)


def rewritten(path, change):
    """A copy of a zip file with one entry changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    path.write_bytes(buffer.getvalue())
    return path


def entry(edit):
    def change(name, content):
        if not name.endswith(f"extra/{artifacts._ENTRY}"):
            return content
        record = decode(content.decode())
        edit(record)
        return encode(record)

    return change


BROKEN = {
    "missing": (lambda path: path.with_name("other.pt2"), "cannot be read.*missing"),
    "text": (lambda path: (path.write_text("hello"), path)[1], "damaged or no artefact"),
    "cut off": (
        lambda path: (path.write_bytes(path.read_bytes()[:-500]), path)[1],
        "damaged or no artefact|is cut off",
    ),
    "flipped bits": (
        lambda path: (path.write_bytes(path.read_bytes().replace(b'"version"', b'"versiom"')), path)[1],
        "damaged",
    ),
    "newer": (
        lambda path: rewritten(path, entry(lambda record: record.update(version=99, lightning_compress="9.0"))),
        r"version 99 of artefacts, written by lightning-compress 9.0; this one reads up to version 1: upgrade",
    ),
    "no version": (lambda path: rewritten(path, entry(lambda record: record.pop("version"))), "record.*is damaged"),
    "no graph": (
        lambda path: rewritten(path, lambda name, content: None if "models/" in name else content),
        "graph in .* cannot be read by PyTorch",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_is_told_apart(case, made, tmp_path):
    change, message = BROKEN[case]
    path = change(made[1].save(tmp_path / "a.pt2"))
    with pytest.raises(CompressionError, match=message):
        Int8Artifact.load(path)


def test_another_programs_file_is_no_artefact(tmp_path):
    path = lc.export(net(), tmp_path / "net.pt2", images(2))
    with pytest.raises(CompressionError, match=r"is not an integer artefact.*Int8Artifact\.save"):
        Int8Artifact.load(path)


def test_a_failure_while_saving_keeps_the_older_file(made, tmp_path, monkeypatch):
    path = made[1].save(tmp_path / "a.pt2")
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        made[1].save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt2"]


def test_agreement_counts_and_its_interval(made):
    model, artifact = made
    found = artifact.agreement(model, calls())
    assert found.count == 32
    assert found.low <= found.top1 <= found.high
    assert found.top1 > 0.85
    assert 0 < found.difference < 0.05
    other = artifact.agreement(net(seed=5), calls())
    assert other.difference > 10 * found.difference
    with pytest.raises(CompressionError, match="no call to compare"):
        artifact.agreement(model, [])


def test_the_interval_is_wilsons():
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == pytest.approx(1)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_benchmark_reports_each_runtime_and_the_size(made):
    found = made[1].benchmark(made[0], images(2), runtimes=("reference",), threads=1, repeats=3)
    assert found.keys() == {"reference", "size"}
    row = found["reference"]
    assert row["integer_ops"] == {"conv2d": 2, "linear": 1}
    assert row["float"]["median"] >= row["float"]["minimum"] > 0
    assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert row["difference"] < 0.05
    assert found["size"]["ratio"] == found["size"]["int8"] / found["size"]["float"]
    assert "accuracy" not in row


def test_benchmark_counts_right_answers_too(made):
    model, artifact = made
    x = images(20)
    y = model.eval()(x).argmax(1)
    y[:5] = (y[:5] + 1) % 5  # of which the model is wrong
    data = [(x[:12], y[:12]), (x[12:], y[12:])]
    row = artifact.benchmark(model, images(2), runtimes=("reference",), threads=1, repeats=1, data=data)["reference"]
    integer = artifact.run(x).argmax(1)
    assert row["float_accuracy"] == 0.75
    assert row["accuracy"] == pytest.approx(float((integer == y).float().mean()))
    assert row["agreement"] == pytest.approx(float((integer == model(x).argmax(1)).float().mean()))
    assert row["count"] == 20
    with pytest.raises(CompressionError, match="holds no batch"):
        artifact.benchmark(model, images(2), runtimes=("reference",), threads=1, repeats=1, data=[])


# ------------------------------------------------------------------------------------------------- reference executor
def test_the_reference_computes_what_the_graph_says(made):
    """Integer arithmetic and the dequantized graph are two computations of the same numbers."""
    model, artifact = made
    x = images(16)
    y = artifact.program.module()(x).detach()
    largest = float(y.max() - y.min())
    assert float((artifact.run(x) - y).abs().max()) < 1e-3 * largest
    assert float((artifact.run(x) - model(x).detach()).abs().max()) < 0.05 * largest


LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9)),
    "conv2d same": (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (4, 9, 9)),
    "conv3d": (nn.Conv3d(2, 3, 2, bias=False), (2, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (4, 5, 5)),
    "transposed groups": (nn.ConvTranspose1d(4, 6, 3, groups=2), (4, 5)),
    "linear 3-D": (nn.Linear(5, 4), (3, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_in_integers(name):
    layer, shape = LAYERS[name]
    model = nn.Sequential(layer, nn.ReLU())
    call = ExampleCall("", (torch.randn(8, *shape),))
    program = lower(model, call, [call]).program
    runner = compile_program(program, "reference")
    assert sum(runner.integer_ops.values()) == 1
    x = torch.randn(3, *shape)
    torch.testing.assert_close(runner(x), program.module()(x), rtol=1e-4, atol=1e-4)


def test_dynamic_activations_are_integer_products_in_the_reference():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    program = lower(model, ExampleCall("", (torch.randn(4, 6),)), activations="dynamic").program
    runner = compile_program(program, "reference")
    assert runner.integer_ops == {"_int_mm": 2}
    x = torch.randn(5, 6)
    torch.testing.assert_close(runner(x), program.module()(x))


def test_sums_beyond_32_bits_are_an_error():
    model = nn.Linear(70_000, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    call = ExampleCall("", (torch.ones(2, 70_000),))
    with pytest.raises(CompressionError, match="need more than 32 bits"):
        compile_program(lower(model, call, [call]), "reference")


def test_nested_arguments_and_results():
    def call(n):
        x = torch.randn(n, 6)
        return ExampleCall("", (x,), {"parts": [x * 2], "mask": torch.ones(n, 4), "flag": True})

    example = call(4)
    runner = compile_program(lower(Sum(), example, [example]), "reference")
    other = call(3)
    swapped = dict(reversed(other.kwargs.items()))
    found = runner(*other.args, **swapped)
    assert found.keys() == {"y", "none", "n"}
    assert (found["none"], found["n"]) == (None, 3)
    torch.testing.assert_close(found["y"], Sum.forward(Sum(), *other.args, **other.kwargs)["y"], rtol=9, atol=9)
    with pytest.raises(TypeError, match="the program takes 1 positional arguments and the keyword arguments"):
        runner(other.args[0])
    with pytest.raises(TypeError, match="arranged as when it was exported; got 2 positional"):
        runner(*other.args, 1, **other.kwargs)


def test_results_have_no_gradients_and_inputs_stay(made):
    x = images(2).requires_grad_()
    kept = x.detach().clone()
    assert not made[1].run(x).requires_grad
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"runtime": "tensorrt"}, ValueError, "runtime='tensorrt' is not known; use one of reference, inductor"),
        ({"threads": 0}, ValueError, "threads is a whole number of at least 1; got 0"),
        ({"threads": 1.5}, ValueError, "got 1.5"),
    ],
)
def test_bad_arguments(options, error, message, made):
    with pytest.raises(error, match=message):
        compile_program(made[1].program, **{"runtime": "reference", **options})


def test_a_program_without_integers_is_an_error():
    program = torch.export.export(net(), (images(2),))
    with pytest.raises(CompressionError, match=r"nothing of it is integer; lower a quantized model, or.*allow_float"):
        compile_program(program, "reference")
    runner = compile_program(program, "reference", allow_float=True)
    assert (runner.integer_ops, runner.float_ops) == ({}, {"conv2d": 2, "linear": 1})


# ---------------------------------------------------------------------------------------------------------- reduction
def test_narrowed_weights_add_up_without_overflow(made):
    program = made[1].program
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    safe, names = without_saturation(program)
    assert len(names) == 3
    for name in names:
        rows = safe.state_dict[name].flatten(1).abs().int()
        assert int(rows.topk(2, dim=1).values.sum(1).max()) <= 128
    assert all(torch.equal(before[name], tensor) for name, tensor in program.state_dict.items())  # a copy was changed
    assert without_saturation(safe) == (safe, ())
    x = images(16)
    y, z = program.module()(x).detach(), safe.module()(x).detach()
    assert float((y - z).abs().max() / (y.max() - y.min())) < 0.05


def test_a_file_for_unknown_cpus_has_weights_that_add_up_anywhere(made, tmp_path):
    onnx = pytest.importorskip("onnx")

    def most(path):
        """The largest sum of two absolute int8 weights of one output."""
        tensors = [onnx.numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer]
        weights = [torch.tensor(t).flatten(1).abs().int() for t in tensors if t.dtype == "int8" and t.ndim > 1]
        assert len(weights) == 3
        return max(int(rows.topk(2, dim=1).values.sum(1).max()) for rows in weights)

    assert most(made[1].to_onnx(tmp_path / "safe.onnx")) <= 128
    assert most(made[1].to_onnx(tmp_path / "full.onnx", reduce=False)) > 128  # the control


def test_outputs_with_small_pairs_stay_exactly_as_they_are():
    model = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.001, 0.002, 0.0], [1.0, 0.9, 0.8, 0.7]]))
    call = ExampleCall("", (torch.rand(8, 4),))
    program = lower(model, call, [call]).program
    safe, (codes,) = without_saturation(program)
    assert torch.equal(safe.state_dict[codes][0], program.state_dict[codes][0])
    assert not torch.equal(safe.state_dict[codes][1], program.state_dict[codes][1])


def test_the_record_is_plain_data(made, tmp_path):
    with zipfile.ZipFile(made[1].save(tmp_path / "a.pt2")) as archive:
        name = next(name for name in archive.namelist() if name.endswith(f"extra/{artifacts._ENTRY}"))
        record = json.loads(archive.read(name))
    assert record["version"] == 1
    assert record["metadata"]["report"]["layers"].keys() == {"conv", "twin", "head"}

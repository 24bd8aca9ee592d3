"""Each format is read back by the program it is for, and must give the model's own outputs for any batch size."""

import json
import math
import sys

import lightning as L
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from torch import nn

import lightning_compress as lc
from lightning_compress import graphs, layers, manifest
from lightning_compress.cost import Call
from lightning_compress.errors import CompressionError
from lightning_compress.exporting import decode, encode, export, read_safetensors

EDITS = {
    "version": 1,
    "edits": [
        {
            "kind": "channels.cut",
            "slices": {"conv.weight": {"0": torch.tensor([0, 2, 3])}},
            "attributes": {"conv": {"out_channels": 3, "bias": True, "none": None, "scale": 0.1}},
        }
    ],
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x, scale=None):
        y = self.head(self.drop(torch.relu(self.norm(self.conv(x))).mean((2, 3))))
        return y if scale is None else y * scale


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.rnn = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.out = nn.Linear(10, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.out(self.rnn(self.embed(tokens))[0]))


class Lit(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()
        self.example_input_array = torch.randn(1, 3, 6, 6)

    def forward(self, x):
        return self.net(x)


def image(batch):
    return torch.randn(batch, 3, 6, 6)


def tokens(batch):
    return torch.randint(0, 11, (batch, 4))


CASES = [("conv", Net, image), ("tied rnn", Recurrent, tokens), ("lightning", Lit, image)]
cases = pytest.mark.parametrize(("make", "inputs"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])


def outputs(model, *args):
    twin = type(model)()
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "_lc_" not in k})
    with torch.no_grad():
        return twin.eval()(*args)


def run_onnx(path, *args):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, args, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


@cases
def test_onnx_runs_in_onnxruntime_with_any_batch(make, inputs, tmp_path):
    model = make()
    path = export(model, tmp_path / "model.onnx", inputs(2), manifest=EDITS)
    for batch in (1, 5):
        x = inputs(batch)
        torch.testing.assert_close(run_onnx(path, x), outputs(model, x), rtol=1e-5, atol=1e-5)
    properties = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert manifest.equal(decode(properties["lightning_compress"]), EDITS)
    assert [f.name for f in tmp_path.iterdir()] == ["model.onnx"]


@cases
def test_pt2_runs_with_any_batch(make, inputs, tmp_path):
    model = make()
    extra = {"lightning_compress": ""}
    program = torch.export.load(export(model, tmp_path / "model.pt2", inputs(2), manifest=EDITS), extra_files=extra)
    for batch in (1, 5):
        x = inputs(batch)
        torch.testing.assert_close(program.module()(x), outputs(model, x), rtol=1e-5, atol=1e-5)
    assert manifest.equal(decode(extra["lightning_compress"]), EDITS)


@cases
def test_safetensors_loads_strictly_into_a_fresh_module(make, inputs, tmp_path):
    model = make()
    state, record = read_safetensors(export(model, tmp_path / "model.safetensors", manifest=EDITS))
    fresh = make()
    fresh.load_state_dict(state, strict=True)
    x = inputs(3)
    assert torch.equal(outputs(fresh, x), outputs(model, x))
    assert manifest.equal(record, EDITS)
    assert lc.load(make(), export(model, tmp_path / "plain.safetensors")).state_dict().keys() == state.keys()


def test_tied_weights_are_stored_once(tmp_path):
    model = Recurrent()
    path = export(model, tmp_path / "model.safetensors")
    state, _ = read_safetensors(path)
    assert state["head.weight"] is state["embed.weight"]
    with safe_open(path, "pt") as file:
        assert "head.weight" not in list(file.keys())
        assert file.metadata()["format"] == "pt"


class Halve:
    """A weight transform that is no mask."""

    def __call__(self, weight):
        return weight * 0.5


def test_the_weights_that_the_model_computes_with_are_written(tmp_path):
    model = Net().eval()
    layers.add_transform(model.conv, "half", Halve())
    layers.add_transform(model.head, "half", Halve())
    x = image(3)
    expected = model(x).detach()
    loaded = lc.load(Net(), export(model, tmp_path / "model.safetensors")).eval()
    assert torch.equal(loaded(x), expected)
    assert torch.equal(loaded.conv.weight, model.conv.weight * 0.5)
    program = torch.export.load(export(model, tmp_path / "model.pt2", x))
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run_onnx(export(model, tmp_path / "m.onnx", x), x), expected, rtol=1e-5, atol=1e-5)


def test_a_cut_model_comes_back_smaller(tmp_path):
    model = Net().eval()
    keep = torch.tensor([0, 2, 3])
    channels = {f"norm.{name}": {"0": keep} for name in ("weight", "bias", "running_mean", "running_var")}
    cut = {
        "kind": "channels.cut",
        "slices": {"conv.weight": {"0": keep}, "conv.bias": {"0": keep}, "head.weight": {"1": keep}, **channels},
        "attributes": {"conv": {"out_channels": 3}, "norm": {"num_features": 3}, "head": {"in_features": 3}},
    }
    manifest.replay(model, {"version": 1, "edits": [cut]})
    x = image(2)
    loaded = lc.load(Net(), export(model, tmp_path / "model.safetensors")).eval()
    assert loaded.conv.weight.shape == (3, 3, 3, 3)
    assert torch.equal(loaded(x), model(x))
    assert manifest.equal(manifest.of(loaded), manifest.of(model))
    torch.testing.assert_close(run_onnx(export(model, tmp_path / "m.onnx", x), x), model(x), rtol=1e-5, atol=1e-5)


def test_views_of_one_storage_are_stored_apart(tmp_path):
    model = nn.Module()
    whole = torch.arange(12.0).reshape(3, 4)
    for name, view in {"a": whole[:2], "b": whole[1:], "c": whole.t(), "empty": whole[:0]}.items():
        model.register_buffer(name, view)
    state, _ = read_safetensors(export(model, tmp_path / "model.safetensors"))
    assert all(torch.equal(state[name], view) for name, view in model.named_buffers())
    assert state.keys() == model.state_dict().keys()


def test_an_example_call_exports_the_part_it_calls(tmp_path):
    model = Lit()
    call = Call(image(3), scale=torch.rand(3, 1))
    call.module = "net"
    program = torch.export.load(export(model, tmp_path / "net.pt2", call))
    x, scale = image(4), torch.rand(4, 1)
    torch.testing.assert_close(program.module()(x, scale=scale), outputs(model.net, x, scale))
    program = torch.export.load(export(model.net, tmp_path / "named.pt2", {"scale": scale, "x": x}))
    torch.testing.assert_close(program.module()(scale=scale[:1], x=x[:1]), outputs(model.net, x[:1], scale[:1]))


def test_a_fitted_lightning_module_is_left_as_it_was(tmp_path):
    model = Lit()
    model.add_module("_lc_projector", nn.Linear(2, 2))
    model._trainer = trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=True)
    model.net.norm.eval()
    fields, modes = dict(vars(model)), [m.training for m in model.modules()]
    values = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(0)
    paths = [export(model, tmp_path / f"model.{suffix}") for suffix in ("onnx", "pt2", "safetensors")]
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))
    assert vars(model) == fields
    assert model._trainer is trainer
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    x = image(1)
    torch.testing.assert_close(run_onnx(paths[0], x), outputs(model, x), rtol=1e-5, atol=1e-5)
    assert not [name for name in torch.export.load(paths[1]).state_dict if "_lc_" in name]
    assert not [name for name in read_safetensors(paths[2])[0] if "_lc_" in name]


def test_compiled_wrappers_are_looked_through(tmp_path):
    model = Net()
    model.head = torch.compile(model.head)
    wrapped = torch.compile(model)
    state, _ = read_safetensors(export(wrapped, tmp_path / "model.safetensors"))
    assert state.keys() == Net().state_dict().keys()
    x = image(2)
    program = torch.export.load(export(wrapped, tmp_path / "model.pt2", x))
    model.head = model.head._orig_mod
    torch.testing.assert_close(program.module()(x), outputs(model, x))


def test_a_static_batch_on_request(tmp_path):
    path = export(Net(), tmp_path / "model.onnx", image(3), dynamic_batch=False)
    assert onnxruntime.InferenceSession(str(path)).get_inputs()[0].shape == [3, 3, 6, 6]


def test_large_weights_go_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "_ONNX_INLINE_LIMIT", 10)
    model = nn.Sequential(nn.Linear(100, 100))
    path = export(model, tmp_path / "model.onnx", torch.randn(2, 100))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    x = torch.randn(4, 100)
    torch.testing.assert_close(run_onnx(path, x), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_the_format_can_be_named_and_folders_are_made(tmp_path):
    path = export(Net(), tmp_path / "new" / "weights.bin", format="safetensors")
    assert read_safetensors(path)[0].keys() == Net().state_dict().keys()


class ManyInputs(nn.Module):
    def forward(self, x, table, more, flag=True, named=None):
        y = x + more + named["b"][0] if flag else x
        return y @ table


def test_keyword_order_static_inputs_and_nested_arguments(tmp_path):
    def call(batch, table):
        x = torch.randn(batch, 3)
        return Call(x, table, named={"b": [x * 3]}, flag=True, more=x * 2)

    model, table, extra = ManyInputs(), torch.randn(3, 5), torch.randn(3, 5)
    program = torch.export.load(export(model, tmp_path / "model.pt2", call(4, table))).module()
    other = call(7, extra)
    torch.testing.assert_close(program(*other.args, **other.kwargs), other.run(model))
    one = call(1, table)
    assert export(model, tmp_path / "one.onnx", one).exists()


class Specialised(nn.Module):
    def forward(self, x):
        return x.reshape(2, 3)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
@pytest.mark.parametrize(
    ("model", "message"), [(Specialised(), "dynamic_batch=False"), (Branching(), "data-dependent Python control flow")]
)
def test_a_failure_says_why_and_keeps_the_older_file(model, message, suffix, tmp_path):
    path = tmp_path / f"model.{suffix}"
    path.write_text("precious")
    with pytest.raises(CompressionError, match=message):
        export(model, path, torch.randn(2, 3))
    assert path.read_text() == "precious"


def test_a_failure_while_writing_keeps_the_older_file(tmp_path, monkeypatch):
    path = export(Net(), tmp_path / "model.safetensors")
    before = path.read_bytes()

    def save_half(state, name, metadata):
        with open(name, "w") as file:
            file.write("half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", save_half)
    with pytest.raises(OSError, match="disk full"):
        export(Net(), path)
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(CompressionError, match=r'pip install "lightning-compress\[onnx\]"'):
        export(Net(), tmp_path / "model.onnx", image(1))


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"the suffix '\.ckpt' .* is not a known format; use one of safetensors, onnx"):
        export(Net(), tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="format='tflite'"):
        export(Net(), tmp_path / "model", format="tflite")
    with pytest.raises(CompressionError, match="needs example inputs; pass `example_inputs="):
        export(Net(), tmp_path / "model.pt2")
    sparse = nn.Module()
    sparse.register_buffer("weight", torch.eye(3).to_sparse())
    with pytest.raises(CompressionError, match="'weight' is a Tensor that safetensors cannot hold"):
        export(sparse, tmp_path / "model.safetensors")
    stuck = Net()
    stuck.file = (i for i in range(3))
    with pytest.raises(CompressionError, match=r"cannot be copied .*generator"):
        export(stuck, tmp_path / "model.pt2", image(1))
    with pytest.raises(CompressionError, match="cannot be read as safetensors"):
        read_safetensors(tmp_path / "missing.safetensors")
    (tmp_path / "bad.safetensors").write_text("nothing")
    with pytest.raises(CompressionError, match="cannot be read as safetensors"):
        read_safetensors(tmp_path / "bad.safetensors")
    assert [f.name for f in tmp_path.iterdir()] == ["bad.safetensors"]


def test_a_foreign_safetensors_file_has_no_manifest(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "foreign.safetensors")
    assert read_safetensors(tmp_path / "foreign.safetensors")[1] is None


TENSORS = [
    torch.tensor([3, -1, 2**62]),
    torch.tensor(5),
    torch.zeros(0, 3),
    torch.zeros(0, dtype=torch.int64),
    torch.tensor([[True, False]]),
    torch.tensor([0.1, math.nan, -math.inf, -0.0]),
    torch.randn(2, 3, dtype=torch.float64).t(),
    torch.randn(3).bfloat16(),
    torch.arange(6, dtype=torch.uint8).reshape(2, 3),
]


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda t: f"{t.dtype}{tuple(t.shape)}")
def test_tensors_are_encoded_without_loss(tensor):
    back = decode(encode({"edits": [tensor]}))["edits"][0]
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert manifest.equal(back, tensor)


def test_plain_data_is_encoded_without_loss_as_valid_json():
    data = {"a": [1, 2.5, "x", True, None, {"b": []}], "inf": math.inf, "third": 1 / 3, "big": 2**70}
    assert decode(encode(data)) == data
    assert math.isnan(decode(encode({"nan": math.nan}))["nan"])
    json.loads(encode(data), parse_constant=pytest.fail)


@pytest.mark.parametrize("bad", [{1: "a"}, {"a": {"__tensor__": 1}}, {"a": object()}, {"a": {1, 2}}])
def test_what_is_not_plain_data_is_refused(bad):
    with pytest.raises(TypeError, match="manifest"):
        encode(bad)

"""Integer graphs in the real runtimes: the same numbers as the graph, really integer, and nothing changed around."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_compress as lc
from lightning_compress.errors import CompressionError
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.integer import runtime_inductor, runtimes
from lightning_compress.quantization.integer.artifact import Int8Artifact
from lightning_compress.quantization.integer.lowering import lower
from lightning_compress.quantization.integer.reduction import without_saturation
from lightning_compress.quantization.integer.runtimes import compile_program

PACKAGES = {
    "inductor": ("torchao", "int8"),
    "aoti": ("torchao", "int8"),
    "onnxruntime": ("onnxruntime", "onnx"),
    "openvino": ("openvino", "openvino"),
}


def runtime(name):
    marks = [pytest.mark.needs_compiler] if name in ("inductor", "aoti") else []
    return pytest.param(name, marks=marks)


every = pytest.mark.parametrize("name", [runtime(name) for name in PACKAGES])


def needs(name):
    package, extra = PACKAGES[name]
    wanted = (package, "onnxscript") if name in ("onnxruntime", "openvino") else (package,)
    missing = [each for each in wanted if importlib.util.find_spec(each) is None]  # importing OpenVINO starts a thread
    if missing:
        pytest.skip(f"runtime {name!r} needs the extra `{extra}` ({missing[0]} is not installed)")


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(x + self.second(x)).mean((2, 3)))


class Residual(nn.Module):
    """`x + linear(x)`, where inductor adds into the caller's tensor or a constant if it is not kept from it."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(32))
        self.linear = nn.Linear(32, 32)
        self.other = nn.Linear(32, 32)

    def forward(self, x):
        return x + self.linear(x) + (self.position + self.other(x))


MODELS = {"convolutions": (ConvNet, (3, 12, 12)), "linear residual": (Residual, (32,))}


def lowered(kind, completed=True):
    make, shape = MODELS[kind]
    torch.manual_seed(0)
    calls = [ExampleCall("", (torch.randn(8, *shape),)) for _ in range(3)]
    program, _ = without_saturation(
        lower(make().eval(), calls[0], calls, completed=completed).program
    )  # the same numbers on any CPU
    return program, shape


@every
@pytest.mark.parametrize("kind", MODELS)
def test_the_numbers_of_the_graph_for_any_batch(name, kind):
    needs(name)
    program, shape = lowered(kind)
    threads = torch.get_num_threads()
    runner = compile_program(program, name, threads=1)
    assert sum(runner.integer_ops.values()) >= 2
    assert runner.reduced == ()
    for batch in (1, 5, 16):
        x = torch.randn(batch, *shape)
        y = program.module()(x).detach()
        kept = x.clone()
        results = [runner(x).clone() for _ in range(3)]
        # Requantization may round a value exactly between two codes either way: one step of the grid.
        assert float((results[0] - y).abs().max()) <= 0.02 * float(y.max() - y.min())
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
        assert torch.equal(x, kept)
    assert torch.get_num_threads() == threads


@every
def test_nothing_is_left_behind(name, tmp_path):
    needs(name)
    program, _ = lowered("linear residual")
    config = torch._inductor.config if "torch._inductor" in sys.modules else None
    before = None if config is None else dict(config.save_config_portable())
    runner = compile_program(program, name)
    assert list(tmp_path.iterdir()) == []  # the current folder
    import torch._inductor.config as after

    assert after.freezing is False
    assert torch.compiler.config.cache_key_tag == ""
    assert before is None or dict(after.save_config_portable()) == before
    assert torch.is_grad_enabled()
    if name == "aoti":
        assert runner.file.exists()
        file = runner.file
        del runner
        assert not file.exists()


def test_onnxruntime_fuses_what_it_can():
    needs("onnxruntime")
    program, _ = lowered("convolutions")
    runner = compile_program(program, "onnxruntime")
    assert runner.integer_ops["QLinearConv"] == 2
    assert runner.integer_ops["QLinearAdd"] == 1
    assert not any(name.endswith("Conv") for name in runner.float_ops)
    only_inputs = compile_program(lowered("convolutions", completed=False)[0], "onnxruntime")  # the naive way
    assert sum(only_inputs.integer_ops.values()) < sum(runner.integer_ops.values())
    assert "QLinearAdd" not in only_inputs.integer_ops
    assert any(name.endswith("Conv") for name in only_inputs.float_ops)  # plain, or fused with its activation


def test_openvino_runs_layers_as_integers():
    needs("openvino")
    runner = compile_program(lowered("convolutions")[0], "openvino")
    assert runner.integer_ops["Convolution"] == 2
    assert runner.integer_ops["FullyConnected"] == 1
    assert runner.float_ops == {}


def test_dynamic_activations():
    needs("onnxruntime")
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    program = lower(net, ExampleCall("", (torch.randn(4, 16),)), activations="dynamic").program
    runner = compile_program(program, "onnxruntime")
    assert runner.integer_ops == {"MatMulInteger": 2}
    x = torch.randn(7, 16)
    torch.testing.assert_close(runner(x), program.module()(x), rtol=1e-4, atol=1e-4)


def test_dynamic_activations_in_openvino_are_an_error_since_it_computes_them_in_floating_point():
    needs("openvino")
    program = lower(nn.Linear(16, 3), ExampleCall("", (torch.randn(4, 16),)), activations="dynamic").program
    with pytest.raises(CompressionError, match="OpenVINO computes dynamic activations in floating point"):
        compile_program(program, "openvino")


@pytest.mark.needs_compiler
def test_without_gradients_off_or_freezing_nothing_is_integer_and_that_is_an_error(monkeypatch):
    needs("inductor")
    program, _ = lowered("linear residual")
    monkeypatch.setattr(runtime_inductor, "_settings", lambda threads: {"freezing": False, "cpp.threads": threads})
    with pytest.raises(CompressionError, match="inductor compiled the integer graph without a single integer operator"):
        compile_program(program, "inductor")


SILENT = """
import sys, warnings
warnings.filterwarnings("ignore")
import torch
from lightning_compress.errors import CompressionError
from lightning_compress.quantization.integer import runtime_inductor
from lightning_compress.quantization.integer.artifact import Int8Artifact
torch.set_num_threads(1)
if sys.argv[2] == "unregistered":
    runtime_inductor.register_passes = lambda: None
try:
    runner = Int8Artifact.load(sys.argv[1]).compile("inductor")
    print("integer", sum(runner.integer_ops.values()))
except CompressionError as error:
    print("error", error)
"""


@pytest.mark.needs_compiler
def test_without_the_passes_it_is_an_error_and_spoils_no_cache(tmp_path):
    needs("inductor")
    program, _ = lowered("linear residual")
    path = Int8Artifact(program).save(tmp_path / "net.pt2")
    found = []
    for how in ("unregistered", "registered"):
        command = [sys.executable, "-c", SILENT, str(path), how]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
        found.append(done.stdout.strip().splitlines()[-1])
    assert "without a single integer operator" in found[0]
    assert found[1] == "integer 2"


@pytest.mark.needs_compiler
def test_aoti_writes_a_file_that_pytorch_loads(tmp_path):
    needs("aoti")
    program, shape = lowered("convolutions")
    runner = compile_program(program, "aoti", path=tmp_path / "net.pt2", threads=1)
    assert runner.file == tmp_path / "net.pt2"
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt2"]
    x = torch.randn(3, *shape)
    with torch.no_grad():
        assert torch.equal(torch._inductor.aoti_load_package(str(runner.file))(x), runner(x))


@every
def test_a_missing_package_names_the_extra(name, monkeypatch):
    program, _ = lowered("linear residual")
    package, extra = PACKAGES[name]
    for module in [m for m in sys.modules if m == package or m.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    importlib.invalidate_caches()
    with pytest.raises(CompressionError, match=rf'pip install "lightning-compress\[{extra}\]"'):
        compile_program(program, name)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_products_that_would_overflow_are_kept_from_it(name):
    """255 * 127 * 2 does not fit 16 bits, in which CPUs without VNNI add pairs."""
    needs(name)
    net = nn.Linear(64, 8)
    nn.init.constant_(net.weight, 1.0)
    nn.init.zeros_(net.bias)
    call = ExampleCall("", (torch.ones(4, 64),))
    program = lower(net, call, [call]).program
    torch.testing.assert_close(compile_program(program, name)(call.args[0]), torch.full((4, 8), 64.0))
    if runtimes.cpu_saturates():  # the control: this CPU has the fault
        assert float(compile_program(program, name, reduce=False)(call.args[0])[0, 0]) < 60


def test_an_exported_model_is_integer_and_a_quarter_of_the_size(tmp_path):
    needs("onnxruntime")
    import onnxruntime

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4)).eval()
    x = torch.randn(64, 256)
    small = lc.export(net, tmp_path / "int8.onnx", calibration=[x])
    dense = lc.export(net, tmp_path / "float.onnx", x)
    assert small.stat().st_size < 0.3 * dense.stat().st_size
    session = onnxruntime.InferenceSession(str(small), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map.keys() >= {"lightning_compress", "lightning_compress.int8"}
    record = json.loads(session.get_modelmeta().custom_metadata_map["lightning_compress.int8"])
    assert record["metadata"]["report"]["layers"].keys() == {"0", "2", "4"}
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    wanted = net(x).detach()
    assert float((found - wanted).abs().max() / (wanted.max() - wanted.min())) < 0.1
    assert sorted(file.name for file in Path(tmp_path).iterdir()) == ["float.onnx", "int8.onnx"]


@pytest.mark.needs_compiler
@pytest.mark.parametrize("runtime", ["inductor", "aoti"])
def test_grey_images(runtime):
    """Inductor mistakes the memory format of a convolution with one input channel; it stays in floating point."""
    pytest.importorskip("torchao")
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).eval()  # fmt: skip
    call = ExampleCall("", (torch.randn(4, 1, 14, 14),))
    lowered = lower(model, call, [call])
    x = torch.randn(7, 1, 14, 14)
    runner = compile_program(lowered, runtime, example=call)
    assert sum(runner.integer_ops.values()) == 2
    wanted = compile_program(lowered, "reference", example=call)(x)
    assert (runner(x) - wanted).abs().max() < 0.05 * (wanted.max() - wanted.min())


@pytest.mark.needs_compiler
def test_a_loaded_graph_whose_shapes_are_products_of_the_batch(tmp_path):
    pytest.importorskip("torchao")
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    x = torch.randn(4, 6, 16)
    artifact = Int8Artifact.load(lc.export(model, tmp_path / "a.pt2", example_inputs=x, calibration=[x]))
    runner = artifact.compile("inductor")
    wanted = artifact.run(x[:3])
    assert (runner(x[:3]) - wanted).abs().max() < 0.05 * (wanted.max() - wanted.min())

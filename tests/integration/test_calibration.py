"""Any data calibrates: loaders, datasets, data modules, batches; `lc.export(calibration=)` makes integers of it."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset

import lightning_compress as lc
from lightning_compress.calibration import calibration_calls
from lightning_compress.errors import CompressionError
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.integer.artifact import Int8Artifact
from lightning_compress.quantization.integer.runtime_reference import integer_layers


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


def net(seed=0):
    torch.manual_seed(seed)
    return Net().eval()


def images(n, seed=1):
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def calls(n=4):
    return [ExampleCall("", (images(8, seed),)) for seed in range(n)]


class Data(L.LightningDataModule):
    """Knows its data only after `setup`."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append(stage)
        self.data = TensorDataset(images(40), torch.zeros(40, dtype=torch.int64))

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=8, shuffle=True)


class Dicts(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"x": images(1, index)[0], "label": index}


def loader(**options):
    return DataLoader(TensorDataset(images(40), torch.zeros(40)), batch_size=8, **options)


SOURCES = {
    "datamodule": Data,
    "loader": loader,
    "loader with a sampler": lambda: loader(sampler=SubsetRandomSampler(range(10))),
    "dataset": lambda: TensorDataset(images(40), torch.zeros(40)),
    "batches": lambda: [(images(4), torch.zeros(4)), (images(4, 2), torch.zeros(4))],
    "generator": lambda: (images(4, seed) for seed in range(3)),
    "calls": calls,
    "one tensor": lambda: images(8),
    "a list of loaders": lambda: type("Two", (), {"train_dataloader": lambda self: [loader(), loader()]})(),
}


@pytest.mark.parametrize("source", SOURCES)
def test_any_data_calibrates_an_export(source, tmp_path, rng_untouched):
    model = net_with_rng_kept()
    path = lc.export(model, tmp_path / "net.pt2", calibration=SOURCES[source]())
    artifact = Int8Artifact.load(path)
    assert integer_layers(artifact.program.module()) == {"conv2d": 2, "linear": 1}
    assert artifact.agreement(model, calls()).difference < 0.1
    assert not model.training


def net_with_rng_kept():
    with torch.random.fork_rng(devices=[]):
        return net()


def test_a_data_module_is_set_up_only_if_it_has_to_be():
    data = Data()
    list(calibration_calls(net(), data))
    assert data.calls == ["prepare_data", "fit"]
    list(calibration_calls(net(), data))
    assert data.calls == ["prepare_data", "fit"]


def test_batches_are_the_same_each_time_and_limited():
    data = TensorDataset(torch.arange(2000.0)[:, None])
    first, second = ([call.args[0] for call in calibration_calls(nn.Linear(1, 1), data)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert sum(len(x) for x in first) == 512


def test_a_sampler_of_ones_own_is_respected():
    data = TensorDataset(torch.arange(100.0)[:, None])
    found = DataLoader(data, batch_size=4, sampler=SubsetRandomSampler(range(10)))
    seen = torch.cat([call.args[0] for call in calibration_calls(nn.Linear(1, 1), found)])
    assert sorted(seen.flatten().tolist()) == list(range(10))


def test_dictionaries_give_keyword_arguments():
    (call,) = calibration_calls(net(), Dicts())
    assert call.args == ()
    assert call.kwargs.keys() == {"x"}


def test_the_example_says_how_many_arguments_there_are():
    batch = (images(4), torch.ones(4, 1), torch.zeros(4))
    assert [len(c.args) for c in calibration_calls(net(), [batch])] == [1]
    two = ExampleCall("", (images(2), torch.ones(2, 1)))
    assert [len(c.args) for c in calibration_calls(net(), [batch], two)] == [2]


def test_prepare_says_what_the_model_takes(tmp_path):
    batches = [{"image": images(4), "y": 0}]
    with pytest.raises(CompressionError, match=r"entries \['image', 'y'\], and the model takes.*prepare="):
        lc.export(net(), tmp_path / "a.pt2", calibration=batches)
    assert lc.export(net(), tmp_path / "a.pt2", calibration=batches, prepare=lambda batch: batch["image"]).exists()


WRONG = {
    "a batch without samples": ([torch.zeros(0, 1, 8, 8)], CompressionError, "is empty"),
    "empty": ([], CompressionError, "holds no batch"),
    "number": (3, TypeError, "calibration is a DataLoader.*got int"),
    "text batch": (["abc"], CompressionError, "a batch for calibration is a str; pass `prepare=`"),
    "too short": ([()], CompressionError, "0 elements and the model takes 1 positional"),
    "wrong shape": ([torch.randn(4, 2)], CompressionError, "."),
    "no data module": (
        type("Bad", (), {"setup": lambda s, stage: None, "train_dataloader": lambda s: 1 / 0})(),
        CompressionError,
        "Bad gives no training data for calibration: ZeroDivisionError",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_data_that_does_not_fit(case, tmp_path):
    data, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        lc.export(net(), tmp_path / "a.pt2", calibration=data)
    assert list(tmp_path.iterdir()) == []


def test_safetensors_hold_no_integers(tmp_path):
    with pytest.raises(ValueError, match=r"ends in '\.onnx' or '\.pt2'"):
        lc.export(net(), tmp_path / "a.safetensors", calibration=[images(2)])

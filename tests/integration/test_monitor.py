"""What the monitor prints, logs and shows, for a technique that needs no other part of the package."""

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from short_fits import Net, fit, read_csv
from torch import nn

from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.callbacks.events import EventRecord
from lightning_compress.callbacks.monitor import CompressionMonitor
from lightning_compress.schedule import Schedule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


class Zero(CompressionCallback):
    """A technique of the test's own: sets the first rows of each layer to zero, one more at each event."""

    def __init__(self, name=None, every=2):
        super().__init__(name, Schedule(begin=2, every=every))
        self.every = every

    def event(self, run, step):
        rows = len(self.done) + 1
        layers = []
        for name, module in run.pl_module.named_modules():
            if isinstance(module, nn.Linear):
                before = float((module.weight != 0).float().mean())
                module.weight.data[: min(rows, 2)] = 0
                layers.append({"name": name, "before": before, "after": float((module.weight != 0).float().mean())})
        run.emit(
            EventRecord(
                step=step,
                epoch=run.trainer.current_epoch,
                technique="Zero",
                name=self.name,
                asked={"rows": rows},
                reached={"rows": min(rows, 2)},
                layers=layers,
                notes=["rows are rows"],
                seconds=0.5,
            )
        )


class Bar(L.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append(trainer.progress_bar_metrics.get("rows"))


def test_the_monitor_prints_logs_and_shows_progress(tmp_path, capsys):
    bar = Bar()
    fit(CompressionMonitor(max_layers=2), Zero(), bar, logger=CSVLogger(tmp_path, "csv"))
    assert bar.seen == [None, None, 1, 1, 2, 2, 2, 2]
    out = capsys.readouterr().out
    first, rest = out.split("Zero: step 4, epoch 1, 0.50 s\n")
    assert first.strip().splitlines() == [
        "Zero: step 2, epoch 0, 0.50 s",
        "goal  asked  reached",
        "----  -----  -------",
        "rows      1        1",
        "layer   before  after",
        "------  ------  -----",
        "body.0       1  0.875",
        "head         1    0.5",
        "(layers not shown: 1 more changed)",
        "total       before  now   ratio",
        "----------  ------  ---  ------",
        "parameters     162  162  100.0%",
        "nonzeros       162  138   85.2%",
        "bytes          648  648  100.0%",
        "note: rows are rows",
    ]
    final = rest.split("Compression, the whole fit\n")[1]
    assert "rows      3        2" in final
    assert "head         1      0\n" in final
    assert "nonzeros       162" in final
    assert "3 events between steps 2 and 6, 0 bytes in each checkpoint, peak memory not measured" in final
    assert "cost: 1.50 s of " in final
    rows = read_csv(tmp_path / "csv/version_0/metrics.csv")
    assert [row["step"] for row in rows if row["compression/Zero/rows"]] == ["2", "4", "6"]
    assert next(row["compression/nonzeros"] for row in rows if row["compression/nonzeros"]) == "138.0"
    assert "max_layers: 2" in (tmp_path / "csv/version_0/hparams.yaml").read_text()
    assert len(read_csv(tmp_path / "csv/version_0/compression_Zero_layers.csv")) == 9


@pytest.mark.parametrize("bar", ["tqdm", "rich"])
def test_the_bar_shows_the_value_and_survives_printing(bar, capsys):
    if bar == "rich":
        pytest.importorskip("rich")
        from lightning.pytorch.callbacks import RichProgressBar

        shown = RichProgressBar()
    else:
        from lightning.pytorch.callbacks import TQDMProgressBar

        shown = TQDMProgressBar()
    fit(CompressionMonitor(), Zero(), shown, enable_progress_bar=True)
    captured = capsys.readouterr()
    assert "Zero: step 2, epoch 0" in captured.out
    assert "Compression, the whole fit" in captured.out
    assert "rows" in (captured.out + captured.err).replace("rows are rows", "")


class StopAfterAnEpoch(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint("half.ckpt")
        trainer.should_stop = True


def test_a_resumed_fit_reports_the_whole(capsys):
    monitor = CompressionMonitor(print_events=False)
    fit(monitor, Zero(), StopAfterAnEpoch())
    assert "1 events between steps 2 and 2" in capsys.readouterr().out
    state = torch.load("half.ckpt", weights_only=True)["callbacks"][monitor.state_key]
    assert 0 < state["trained"] <= monitor.trained
    bar, resumed = Bar(), CompressionMonitor(print_events=False)
    fit(resumed, Zero(), bar, ckpt_path="half.ckpt")
    out = capsys.readouterr().out
    assert bar.seen == [2, 2, 2, 2]
    assert "nonzeros       162" in out
    assert "body.0       1   0.75" in out
    assert "cost: 1.50 s of" in out
    assert "3 events between steps 2 and 6" in out
    assert resumed.trained > state["trained"]


def test_two_instances_and_an_uneventful_fit(capsys):
    fit(Zero("one"), CompressionMonitor(print_events=False), Zero("two"))
    out = capsys.readouterr().out
    assert "one: rows" in out
    assert "two: head" in out
    fit(CompressionMonitor(), max_epochs=1)
    assert "no event took place" in capsys.readouterr().out
    fit(CompressionMonitor(), Zero(), barebones=True, log_every_n_steps=0, max_epochs=1)


def test_layers_are_cut_to_the_most_changed():
    text = CompressionMonitor(max_layers=2)._layers_text(
        {"a": (1.0, 0.9), "b": (1, 1), "c": (1.0, 0.1), "d": ("fp32", "int8"), "e": (0, 0)}
    )
    assert text.splitlines() == [
        "layer  before  after",
        "-----  ------  -----",
        "c           1    0.1",
        "d        fp32   int8",
        "(layers not shown: 1 more changed, 2 unchanged)",
    ]
    assert CompressionMonitor(max_layers=0)._layers_text({"a": (1, 0)}) == "(layers not shown: 1 more changed)"
    with pytest.raises(ValueError, match="max_layers >= 0; got -1"):
        CompressionMonitor(max_layers=-1)


def test_a_monitor_changes_nothing():
    def train(*callbacks):
        torch.manual_seed(0)
        module = Net()
        fit(*callbacks, module=module)
        return [*module.state_dict().values(), torch.get_rng_state()], set(vars(module))

    (values, names), (expected, expected_names) = train(CompressionMonitor()), train()
    assert all(map(torch.equal, values, expected))
    assert names == expected_names

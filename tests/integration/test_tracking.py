"""What loggers were given is read back from their files; the fits are a few steps long."""

import base64
import json
from types import SimpleNamespace

import fits
import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from short_fits import Net, fit, read_csv
from torch import nn
from wandb_records import finished

import lightning_compress as lc
from lightning_compress import exporting, manifest
from lightning_compress.audits.scorecard import Scorecard
from lightning_compress.callbacks import CompressionAudit, CompressionMonitor
from lightning_compress.callbacks.events import EventRecord
from lightning_compress.callbacks.testing import TinyNet, tiny_loader
from lightning_compress.callbacks.tracking import Tracker
from lightning_compress.schedule import Schedule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


RECORD = EventRecord(
    step=4, epoch=1, technique="Pruning", name="Body", asked={"sparsity": 0.5},
    reached={"sparsity": torch.tensor(0.48)},
    layers=[{"name": "body.0", "before": 1.0, "after": 0.5}, {"name": "a|b", "before": 1, "after": 1}], seconds=0.25,
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- hooks


class EveryHook(L.Callback):
    """Logs in each hook, also where `self.log` is forbidden."""

    NAMES = (
        "setup", "on_fit_start", "on_sanity_check_start", "on_sanity_check_end", "on_train_start",
        "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "on_before_backward",
        "on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_validation_start",
        "on_validation_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_end", "on_fit_end",
        "on_exception", "teardown",
    )  # fmt: skip

    def __init__(self):
        self.seen = set()
        for name in self.NAMES:
            setattr(self, name, self.make(name))

    def make(self, name):
        def hook(trainer, *args, **kwargs):
            self.seen.add(name)
            Tracker(trainer).log_metrics({f"hooks/{name}": torch.ones(1)})
            Tracker(trainer).log_table("hooks", ["hook"], [[name]])

        return hook


def test_logging_works_in_every_hook(tmp_path):
    every = EveryHook()
    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tb")]
    fit(every, logger=loggers, max_epochs=1)
    assert every.seen == set(every.NAMES) - {"on_exception"}
    rows = read_csv(tmp_path / "csv/version_0/metrics.csv")
    for name in every.seen:
        assert [row for row in rows if row[f"hooks/{name}"] == "1.0"], name
    assert {row["hook"] for row in read_csv(tmp_path / "csv/version_0/hooks.csv")} == every.seen
    assert every.seen <= {
        tag.removeprefix("hooks/") for tag in tensorboard(tmp_path / "tb/version_0").Tags()["scalars"]
    }


def test_logging_works_after_an_exception(tmp_path):
    class Broken(Net):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fit(EveryHook(), logger=CSVLogger(tmp_path, "csv"), module=Broken())
    assert "on_exception" in {row["hook"] for row in read_csv(tmp_path / "csv/version_0/hooks.csv")}
    assert "1.0" in [row["hooks/on_exception"] for row in read_csv(tmp_path / "csv/version_0/metrics.csv")]


def test_the_step_is_the_one_of_self_log(tmp_path):
    class TwoOptimizers(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            Tracker(self.trainer).log_metrics({"ours": batch_idx})
            self.log("theirs", float(batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.body.parameters(), 0.1), torch.optim.SGD(self.head.parameters(), 0.1)]

    trainer = fit(logger=CSVLogger(tmp_path, "csv"), module=TwoOptimizers(), max_epochs=1)
    assert trainer.global_step == 8
    rows = read_csv(tmp_path / "csv/version_0/metrics.csv")
    ours, theirs = ([(row["step"], row[name]) for row in rows if row[name]] for name in ("ours", "theirs"))
    assert ours == theirs == [(str(i), f"{i}.0") for i in range(4)]


# ------------------------------------------------------------------------------------------------------------ loggers


def fake_trainer(*loggers, rank=0):
    loop = SimpleNamespace(_batches_that_stepped=7)
    return SimpleNamespace(
        loggers=list(loggers), is_global_zero=rank == 0, global_step=99, fit_loop=SimpleNamespace(epoch_loop=loop)
    )


def log_everything(tracker, path):
    tracker.log_metrics({"a": 1, "t": torch.tensor([2.0]), "flag": True})
    tracker.log_config({"Pruning": {"sparsity": 0.5, "schedule": Schedule(begin=3), "targets": ("*",), "what": Net}})
    tracker.log_config({"Pruning": "again"})
    tracker.log_event(RECORD)
    tracker.log_artifact(path, "small-net", {"macs": 3}, {"version": 1, "edits": [{"keep": torch.tensor([1, 2])}]})


def test_only_rank_zero_writes_and_no_logger_is_needed(tmp_path):
    class Forbidden:
        def __getattr__(self, name):
            raise AssertionError(f"rank 1 used {name}")

    (tmp_path / "file").write_text("x")
    log_everything(Tracker(fake_trainer(Forbidden(), rank=1)), tmp_path / "file")
    log_everything(Tracker(fake_trainer()), tmp_path / "file")


def test_csv_files(tmp_path):
    from pytorch_lightning.loggers import CSVLogger as OtherCSVLogger

    (tmp_path / "file").write_text("x")
    for logger in (CSVLogger(tmp_path, "csv"), OtherCSVLogger(tmp_path, "other")):
        tracker = Tracker(fake_trainer(logger))
        log_everything(tracker, tmp_path / "file")
        tracker.log_event(RECORD, step=8)
        tracker.log_table("compression/Body/layers", ["other", "columns"], [[1, "x, y"]])
        logger.save()
        folder = tmp_path / logger.name / "version_0"
        first = [row for row in read_csv(folder / "metrics.csv") if row["step"] == "7"]
        assert {k: v for row in first for k, v in row.items() if v} == {
            "step": "7", "a": "1.0", "t": "2.0", "flag": "1.0", "compression/Body/sparsity_asked": "0.5",
            "compression/Body/sparsity": str(float(RECORD.reached["sparsity"])), "compression/Body/seconds": "0.25",
        }  # fmt: skip
        rows = read_csv(folder / "compression_Body_layers.csv")
        assert [(row["step"], row["event_step"], row["layer"], row["after"]) for row in rows] == [
            ("7", "4", "body.0", "0.5"), ("7", "4", "a|b", "1"), ("8", "4", "body.0", "0.5"), ("8", "4", "a|b", "1"),
        ]  # fmt: skip
        assert read_csv(folder / "compression_Body_layers.2.csv") == [{"step": "7", "other": "1", "columns": "x, y"}]
        assert "begin: 3" in (folder / "hparams.yaml").read_text()
        assert "again" not in (folder / "hparams.yaml").read_text()


def tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def test_tensorboard_files(tmp_path):
    (tmp_path / "file").write_text("x")
    logger = TensorBoardLogger(tmp_path, "tb")
    log_everything(Tracker(fake_trainer(logger)), tmp_path / "file")
    logger.finalize("success")
    events = tensorboard(tmp_path / "tb/version_0")
    assert [(e.step, e.value) for e in events.Scalars("t")] == [(7, 2.0)]
    assert {"compression/Body/sparsity", "compression/Body/sparsity_asked"} <= set(events.Tags()["scalars"])
    [table] = events.Tensors("compression/Body/layers/text_summary")
    assert table.tensor_proto.string_val[0].decode().splitlines() == [
        "| event_step | layer | before | after |",
        "| --- | --- | --- | --- |",
        "| 4 | body.0 | 1 | 0.5 |",
        "| 4 | a\\|b | 1 | 1 |",
    ]
    [config] = events.Tensors("compression/config/text_summary")
    assert '"begin": 3' in config.tensor_proto.string_val[0].decode()


def history(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_an_offline_wandb_run_holds_everything(tmp_path, monkeypatch):
    import wandb

    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    net = nn.Linear(3, 2)
    path = exporting.export(net, tmp_path / "net.safetensors")
    logger = WandbLogger(project="test", offline=True, save_dir=str(tmp_path))
    tracker = Tracker(fake_trainer(logger))
    log_everything(tracker, path)
    tracker.log_table("mixed", ["value"], [[1.5], ["none"], [None]])
    wandb.finish()

    [run] = tmp_path.glob("**/run-*.wandb")
    found = finished(run)
    rows = {}
    for record in found:
        rows.update(history(record.history.item))
    assert (rows["a"], rows["t"], rows["trainer/global_step"]) == (1.0, 2.0, 7)
    assert rows["compression/Body/sparsity"] == pytest.approx(0.48)
    assert rows["compression/Body/sparsity_asked"] == 0.5

    [table] = [json.loads(f.read_text()) for f in run.parent.glob("files/media/table/compression/Body/*.table.json")]
    assert table["columns"] == ["event_step", "layer", "before", "after"]
    assert table["data"] == [[4, "body.0", 1.0, 0.5], [4, "a|b", 1, 1]]
    [mixed] = [json.loads(f.read_text()) for f in run.parent.glob("files/media/table/mixed*.table.json")]
    assert mixed["data"] == [["1.5"], ["none"], [None]]

    config = {}
    for record in found:
        for item in (*record.config.update, *record.run.config.update):
            config["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    assert config["lightning_compress"]["Pruning"]["schedule"]["begin"] == 3

    [artifact] = [record.artifact for record in found if record.artifact.type == "model"]
    assert (artifact.name, json.loads(artifact.metadata)) == ("small-net", {"macs": 3})
    files = {entry.path: entry.local_path for entry in artifact.manifest.contents}
    assert set(files) == {"net.safetensors", "manifest.json"}
    stored, _ = exporting.read_safetensors(files["net.safetensors"])
    assert torch.equal(stored["weight"], net.weight)
    with open(files["manifest.json"]) as file:
        assert manifest.equal(exporting.decode(file.read())["edits"][0]["keep"], torch.tensor([1, 2]))


def test_a_fit_logs_its_compressed_model_offline(tmp_path, monkeypatch):
    import wandb

    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandbLogger(project="test", offline=True, save_dir=str(tmp_path))
    ours = [*fits.TECHNIQUES["masks"](), *fits.TECHNIQUES["channels"](), CompressionMonitor(print_events=False)]
    trainer = L.Trainer(**{**fits.QUIET, "logger": logger}, max_epochs=4, num_sanity_val_steps=0, callbacks=ours)
    net = TinyNet()
    trainer.fit(net, tiny_loader())
    wandb.finish()

    [run] = tmp_path.glob("**/run-*.wandb")
    [artifact] = [record.artifact for record in finished(run) if record.artifact.type == "model"]
    files = {entry.path: entry.local_path for entry in artifact.manifest.contents}
    assert set(files) == {"model.ckpt", "manifest.json"}
    small = lc.load_from_checkpoint(TinyNet, files["model.ckpt"])
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(small.eval()(x), net.eval()(x))
    with open(files["manifest.json"]) as file:
        record = exporting.decode(file.read())
    assert manifest.equal(record["edits"], manifest.edits_of(net))
    assert set(record["masks"]) == {"net.0.weight", "net.3.weight", "net.9.weight"}
    assert json.loads(artifact.metadata)["class"] == "TinyNet"


def test_an_audit_is_read_back_from_an_offline_wandb_run(tmp_path, monkeypatch):
    """Scalars with their intervals, the table of all metrics, the page, the pictures, and the files of the report."""
    pytest.importorskip("captum")
    import wandb

    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandbLogger(project="test", offline=True, save_dir=str(tmp_path))
    audit = CompressionAudit("initial", space=(-6.0, 6.0), every=2, examples=32, final_examples=16, tier=1)
    trainer = L.Trainer(**{**fits.QUIET, "logger": logger}, max_epochs=2, num_sanity_val_steps=0,
                        callbacks=[fits.TECHNIQUES["masks"]()[0], audit])  # fmt: skip
    torch.manual_seed(0)
    trainer.fit(TinyNet(width=4), tiny_loader(), tiny_loader())
    wandb.finish()

    [run] = tmp_path.glob("**/run-*.wandb")
    found, rows, steps = finished(run), {}, {}
    for record in found:
        row = history(record.history.item)
        rows.update(row)
        steps.update({name: row.get("trainer/global_step") for name in row})
    for name, value in audit.card.scalars().items():
        assert rows[name] == pytest.approx(value), name
    metric = audit.card["fidelity.accuracy"]
    shown = [rows[f"audit/fidelity/accuracy{end}"] for end in ("", "_lo", "_hi", "_delta", "_delta_lo", "_delta_hi")]
    change = metric.paired
    assert shown == pytest.approx([metric.value, metric.lo, metric.hi, change.delta, change.lo, change.hi])
    cheap = [record for record in found if "audit/forgetting/worst_class" in history(record.history.item)]
    assert len(cheap) == 2  # at the validation, and at the end

    folder = run.parent / "files"
    [table] = [json.loads(file.read_text()) for file in folder.glob("media/table/audit/metrics*.table.json")]
    columns = table["columns"]
    listed = {f"{row[0]}.{row[1]}": dict(zip(columns, row, strict=True)) for row in table["data"]}
    assert set(listed) == {f"{m.family}.{m.name}" for m in audit.card.metrics()}
    own = listed["fidelity.accuracy"]
    assert (own["compressed"], own["lo"], own["delta_hi"]) == (metric.value, metric.lo, change.hi)

    assert (rows["audit/report/_type"], steps["audit/report/_type"]) == ("html-file", trainer.global_step)
    page = (folder / rows["audit/report/path"]).read_text()
    assert "TinyNet" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    pictures = {a["name"]: a for r in audit.card.results for a in r.artifacts if a["kind"] == "png"}
    assert pictures
    for name, picture in pictures.items():
        assert rows[f"audit/{name}/_type"] == "image-file"
        assert rows[f"audit/{name}/caption"] == picture["note"]
        assert (folder / rows[f"audit/{name}/path"]).read_bytes() == base64.b64decode(picture["data"])

    [artifact] = [record.artifact for record in found if record.artifact.type == "audit-report"]
    assert (artifact.name, json.loads(artifact.metadata)["verdict"]) == (audit.name, audit.card.verdict)
    files = {entry.path: entry.local_path for entry in artifact.manifest.contents}
    assert set(files) == {"scorecard.json", "scorecard.html", "scorecard.md"}
    assert Scorecard.load(files["scorecard.json"]) == audit.card


def test_refusals(tmp_path):
    tracker = Tracker(fake_trainer())
    with pytest.raises(ValueError, match=r"metric 'x' must be one number; got a tensor of shape \(2,\)"):
        tracker.log_metrics({"x": torch.ones(2)})
    with pytest.raises(ValueError, match="metric 'x' must be one number; got str: 'high'"):
        tracker.log_metrics({"x": "high"})
    with pytest.raises(ValueError, match="table 'x' has 2 columns, a row has 1 values"):
        tracker.log_table("x", ["a", "b"], [[1]])
    with pytest.raises(FileNotFoundError, match="to log as artifact 'net'"):
        tracker.log_artifact(tmp_path / "missing", "net")

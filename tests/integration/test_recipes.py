"""The YAML files under examples/recipes/ run from the command line, and what is wrong in one is said plainly."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import load_file
from source import ROOT

import lightning_compress as lc
from lightning_compress.callbacks import _cli
from lightning_compress.callbacks.testing import TinyNet
from lightning_compress.quantization.attachment import quantizers

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
RECIPES = ROOT / "examples" / "recipes"
QUIET = [
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=CSVLogger",
    "--trainer.logger.save_dir=logs",
]  # fmt: skip
QUANTIZING = ("quantize", "quantize_after_training", "learned_bits")
WITH_TEACHER = ("assistant", "distil", "distil_in_phases", "all_in_one")


def run(command: str, recipe: str, *arguments: str) -> None:
    _cli.main([command, f"--config={RECIPES / recipe}.yaml", *QUIET, *arguments])


def fitted(recipe: str, *arguments: str) -> Path:
    """The checkpoint that the recipe writes, from a folder in which nothing else was run."""
    if recipe in WITH_TEACHER:
        run("fit", "dense", "--trainer.max_epochs=1")
    if recipe == "route":
        run("fit", "record_route", "--trainer.max_epochs=2")
    run("fit", recipe, *arguments)
    return max(Path().rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def record_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True).get("lightning_compress", {})
    return found


@pytest.mark.parametrize(
    "recipe",
    [
        "dense",
        "prune",
        "channel_prune",
        "quantize",
        "quantize_after_training",
        "learned_bits",
        "distil",
        "distil_in_phases",
        "route",
        "assistant",
        "mutual",
        "shared",
        "all_in_one",
    ],
)
def test_recipe(recipe: str) -> None:
    """It fits, its checkpoint holds what was asked for, and the checkpoint can be tested and used."""
    path = fitted(recipe, "--trainer.max_epochs=6")
    edits, masks = record_of(path).get("edits", []), record_of(path).get("masks", {})
    assert bool(edits) == (recipe in ("channel_prune", *QUANTIZING, "all_in_one"))
    assert bool(masks) == (recipe in ("prune", "all_in_one"))
    model = lc.load(TinyNet(batchnorm=recipe in ("channel_prune", *QUANTIZING)), path)
    if masks:
        weights = [dict(model.named_parameters())[name] for name in masks]
        zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        assert zeros == pytest.approx(0.9 if recipe == "prune" else 0.8, abs=0.001)
    if recipe in QUANTIZING:
        assert all(q.enabled for q in quantizers(model).values())
    elif edits:
        assert model.net[0].out_channels < 16
    for command in ("validate", "test", "predict") if recipe == "all_in_one" else ("test",):
        run(command, recipe, f"--ckpt_path={path}")


def test_recipe_of_several_heads() -> None:
    run("fit", "dense", "--trainer.max_epochs=1", f"--model={TinyNet.__module__}.TinyHeads")
    run("fit", "distil_heads", "--trainer.max_epochs=2")
    path = max(Path().rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    run("test", "distil_heads", f"--ckpt_path={path}")
    logged = "".join(file.read_text() for file in Path("logs").rglob("metrics.csv"))
    assert "Distillation/quarter_kd" in logged
    assert "Distillation/light_regression" in logged


@pytest.mark.parametrize("recipe", ["audit_rollback", "audit_repair"])
def test_recipes_that_act_on_audits(recipe: str) -> None:
    path = fitted(recipe, "--trainer.max_epochs=3")
    assert type(lc.load_from_checkpoint(TinyNet, path)) is TinyNet


def test_recipe_of_audits() -> None:
    path = fitted("audit", "--trainer.max_epochs=4")
    card = lc.Scorecard.load("scorecard.json")
    assert card["fidelity.accuracy"].margin == 0.02
    assert card.identity["examples"] == 64
    assert Path("scorecard.html").exists()
    assert not any("space" in text for text in card.caveats)
    assert type(lc.load_from_checkpoint(TinyNet, path)) is TinyNet  # nothing of the audit is in the checkpoint
    logged = "".join(file.read_text() for file in Path("logs").rglob("metrics.csv"))
    assert "audit/forgetting/worst_class_hi" in logged


def test_recipe_with_answers_on_disk() -> None:
    run("fit", "dense", "--trainer.max_epochs=1")
    for _ in range(2):
        run("fit", "distil_cached", "--trainer.max_epochs=2")
    kept = [len(load_file(file)["keys"]) for file in Path("checkpoints/answers").rglob("*.safetensors")]
    assert kept == [64]


@pytest.mark.parametrize("recipe", ["prune", "channel_prune", "distil", "all_in_one"])
def test_recipe_in_a_trial_run(recipe: str) -> None:
    if recipe in WITH_TEACHER:
        run("fit", "dense", "--trainer.max_epochs=1")
    run("fit", recipe, "--trainer.fast_dev_run=2")


def test_a_recipe_is_resumed_from_its_checkpoint() -> None:
    path = fitted("all_in_one", "--trainer.max_epochs=6")
    run("fit", "all_in_one", f"--ckpt_path={path}", "--trainer.max_epochs=7")


def test_load_from_checkpoint_of_the_command_line() -> None:
    assert type(lc.load_from_checkpoint(TinyNet, fitted("prune"))) is TinyNet
    assert "on_load_checkpoint" not in vars(TinyNet)


def test_numbers_that_follow_a_schedule() -> None:
    arguments = [f"--config={RECIPES / 'distil.yaml'}", *QUIET]
    cli = LightningCLI(run=False, save_config_callback=None, args=arguments)
    (term,) = cli.trainer.callbacks[0].losses  # type: ignore[attr-defined]
    assert term.weight == lc.Scheduled(2.0, 0.0, lc.Schedule(begin=0, end="80%", every=1, curve="linear"))
    assert term.temperature == 4.0


def test_a_schedule_takes_what_it_leaves_out_from_the_callback() -> None:
    wanted = ["--trainer.callbacks=Pruning", "--trainer.callbacks.sparsity=0.5", "--trainer.callbacks.schedule.begin=5"]
    model = f"--model={TinyNet.__module__}.TinyNet"
    (ours, *_) = LightningCLI(run=False, save_config_callback=None, args=[*wanted, model]).trainer.callbacks  # type: ignore[attr-defined]
    assert ours.schedule == lc.Schedule(begin=5, end="50%", every="1 epoch")


def test_values_are_overridden_on_the_command_line() -> None:
    path = fitted("prune", "--trainer.callbacks+=ExactResume", "--model.width=8", "--trainer.max_epochs=3")
    checkpoint = torch.load(path, weights_only=True)
    assert any(key.startswith("ExactResume") for key in checkpoint["callbacks"])
    assert checkpoint["hyper_parameters"]["width"] == 8


WRONG = {
    "a class": ("class_path: Pruning", "class_path: Prunning", "Did you mean class_path: Pruning"),
    "an argument": ("sparsity:", "sparsitty:", "Option 'sparsitty' is not accepted"),
    "a choice": ("sparsity: 0.9", "mode: sof", r"Expected a typing.Literal\['hard', 'soft'\]. Got value: sof"),
    "a curve": ("curve: cubic", "curve: cubik", r"Literal\['cubic', 'linear', .*Got value: cubik"),
    "a type": ("sparsity: 0.9", "sparsity: much", r'Parser key "sparsity"[^|]*Given value: much'),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    old, new, message = WRONG[what]
    text = (RECIPES / "prune.yaml").read_text()
    assert old in text
    Path("wrong.yaml").write_text(text.replace(old, new))
    with pytest.raises(SystemExit, match="2"):
        _cli.main(["fit", "--config=wrong.yaml"])
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed
    assert "usage:" not in printed


def test_a_value_out_of_range_is_refused_before_training() -> None:
    Path("wrong.yaml").write_text((RECIPES / "prune.yaml").read_text().replace("sparsity: 0.9", "sparsity: 90"))
    with pytest.raises(ValueError, match=r"sparsity is the share of weights to remove.*got 90\.0"):
        _cli.main(["fit", "--config=wrong.yaml"])


@pytest.mark.parametrize("package", ["jsonargparse", "docstring_parser"])
def test_without_jsonargparse_the_extra_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=r'pip install "lightning-compress\[cli\]"'):
        _cli.main(["fit"])


def test_the_command_is_installed() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["lightning-compress"].partition(":")
    assert getattr(importlib.import_module(module), function) is _cli.main


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_it_is_a_module_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-compress", "fit", "--trainer.callbacks.help=Pruning"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module(_cli.__name__, run_name="__main__")
    assert "--trainer.callbacks.sparsity" in capsys.readouterr().out

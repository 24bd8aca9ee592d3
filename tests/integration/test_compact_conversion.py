"""Compact blocks in models: conversion without training, inside fits, in files; and what is refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch.callbacks import ModelCheckpoint
from low_rank_fits import AT
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import manifest, surgery
from lightning_compress.callbacks import (
    ChannelPruning,
    CompactConversion,
    Distillation,
    LowRank,
    Pruning,
    QuantizationAwareTraining,
    _cli,
)
from lightning_compress.callbacks.events import EventRecord
from lightning_compress.callbacks.testing import TinyNet, tiny_data, tiny_loader
from lightning_compress.compact import BLOCKS, CompactBlock, Fire, InvertedResidual, convert_with_report
from lightning_compress.compact.costs import Shape, Spec
from lightning_compress.compact.costs import parameters as formula
from lightning_compress.compact.replacement import convert_edit

ROOT = Path(__file__).parents[2]
X = tiny_data().tensors[0]
NEEDS_DATA = ["fire", "inverted_residual", "shuffle"]


def net(outputs: int = 16, bias: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, outputs, 3, stride=(2, 1), padding=1, bias=bias), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 1), nn.Conv2d(outputs, outputs, 3, groups=2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(outputs, 4),
        )  # fmt: skip


def run(ours: list[Any], module: Any = TinyNet, extra: Any = (), **settings: Any) -> Any:
    """A fit of 16 steps, with the records of conversions."""
    L.seed_everything(0, verbose=False)
    module = module if isinstance(module, L.LightningModule) else module()
    records: list[EventRecord] = []
    for callback in ours:
        if isinstance(callback, CompactConversion):
            callback.on_compression_event = lambda trainer, pl_module, record: records.append(record)  # type: ignore[method-assign]
    path = settings.pop("ckpt_path", None)
    settings = {**fits.QUIET, "max_epochs": 4, "num_sanity_val_steps": 0, **settings}
    trainer = L.Trainer(callbacks=[*ours, *extra], **settings)
    trainer.fit(module, tiny_loader(), ckpt_path=path)
    return trainer, module, records


# ------------------------------------------------------------------------------------------------ against torchvision
def test_fire_and_inverted_residual_are_those_of_torchvision() -> None:
    x = torch.randn(2, 24, 9, 9)
    theirs: Any = torchvision.models.squeezenet.Fire(24, 6, 16, 20).eval()
    ours: Any = Fire(24, 36, squeeze=6, expand1x1=16).eval()
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    assert torch.equal(ours(x), theirs(x))
    for outputs, stride, ratio in ((24, 1, 6), (40, 2, 4), (24, 1, 1)):
        theirs = torchvision.models.mobilenetv2.InvertedResidual(24, outputs, stride, ratio).eval()
        ours = InvertedResidual(24, outputs, stride=stride, hidden=24 * ratio).eval()
        ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn"])
def test_networks_of_torchvision_have_the_size_of_the_formula(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10).eval()
    found, report = convert_with_report(model, "depthwise_separable", example_inputs=torch.zeros(1, 3, 64, 64))
    dense = dict(model.named_modules())
    wanted = sum(p.numel() for p in model.parameters())
    for layer, (before, after) in report.parameters.items():
        shape = Shape.of(dense[layer])
        assert after == formula(shape, Spec("depthwise_separable", shape.inputs, bias=shape.bias))
        wanted += after - before
    assert len(report.parameters) == (16 if name == "resnet18" else 7)
    assert sum(p.numel() for p in found.parameters()) == wanted
    with torch.no_grad():
        assert found(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


# ------------------------------------------------------------------------------------------------------------- convert
@pytest.mark.parametrize("to", list(BLOCKS))
@pytest.mark.parametrize("norm", [False, True])
def test_a_converted_model_replays_and_everything_else_is_as_it_was(to: Any, norm: bool) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    small, report = convert_with_report(model, to, X, fit_steps=5, norm=norm)
    assert torch.equal(torch.get_rng_state(), random)
    assert manifest.equal(model.state_dict(), before)  # a copy was converted
    assert not manifest.edits_of(model)
    assert report.kept == {
        "0": "it is the first layer", "6": "it is 1 x 1, so there is no kernel to take apart",
        "7": "it has groups, so it is no dense convolution",
    }  # fmt: skip
    first, last = report.errors["3"]
    assert last <= first
    assert last < 0.7
    others = {key: value for key, value in small.state_dict().items() if not key.startswith("3.")}
    assert manifest.equal(others, {key: before[key] for key in others})
    assert small(X).shape == (64, 4)
    fresh = net()
    assert manifest.replay(fresh, manifest.of(small)) == 1
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh.eval()(X), small.eval()(X))


def test_a_fit_to_what_the_layer_gets_beats_the_weights_alone_and_random_values() -> None:
    model = net().eval()
    with torch.no_grad():
        wanted = model[:4](X)
        lost = {}
        for init in ("fit", "weights", "fresh"):
            small: Any = lc.convert(model, "depthwise_separable", X, init=init, fit_steps=30)  # type: ignore[arg-type]
            lost[init] = float((small[:4](X) - wanted).var() / wanted.var())
    assert lost["fit"] < 0.7 * lost["weights"]
    assert lost["weights"] < lost["fresh"]


def test_dtype_mode_gradients_layout_marks_and_hooks_are_kept() -> None:
    model = net(bias=True).double().to(memory_format=torch.channels_last).eval()
    model[3].weight.no_weight_decay = True  # type: ignore[union-attr]
    model[3].bias.requires_grad_(False)  # type: ignore[union-attr, operator]
    heard: list[str] = []
    handle = model[3].register_forward_hook(lambda module, args, output: heard.append(type(module).__name__))
    small = lc.convert(model, "fire", X.double(), fit_steps=2, inplace=True)
    assert small is model
    block: Any = small[3]
    assert type(block) is Fire
    assert not block.training
    assert all(p.dtype == torch.float64 for p in block.parameters())
    assert block.squeeze.weight.no_weight_decay
    assert block.squeeze.weight.requires_grad
    assert not block.expand.bias.requires_grad
    assert block.expand.weight.is_contiguous(memory_format=torch.channels_last)
    small(X.double())
    assert heard[-1] == "Fire"
    handle.remove()


def test_a_record_is_read_in_a_fresh_process(tmp_path: Path) -> None:
    small = lc.convert(TinyNet(), "depthwise_separable")
    torch.save({"state_dict": small.state_dict(), "lightning_compress": manifest.of(small)}, tmp_path / "a.ckpt")
    code = (
        "import lightning_compress as lc; from lightning_compress.callbacks.testing import TinyNet\n"
        f"print(type(lc.load(TinyNet(), {str(tmp_path / 'a.ckpt')!r}).net[3]).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "DepthwiseSeparable\n"
    stripped = lc.strip(tmp_path / "a.ckpt")
    assert isinstance(lc.load(TinyNet(), stripped).net[3], CompactBlock)


@pytest.mark.parametrize("to", list(BLOCKS))
def test_blocks_export(to: Any) -> None:
    small = lc.convert(net(), to, X, fit_steps=0).eval()
    program = torch.export.export(small, (X,)).module()
    torch.testing.assert_close(program(X), small(X))


# ---------------------------------------------------------------------------------------------------------- inside fits
def test_a_conversion_is_recorded_and_told() -> None:
    trainer, module, (record,) = run([CompactConversion("depthwise_separable", schedule=AT, fit_steps=3)])
    assert record.step == 5
    assert record.layers == [{"name": "net.3", "before": 2320, "after": 16 * 9 + 16 * 16 + 16}]
    assert record.reached["parameters"] == pytest.approx(sum(p.numel() for p in module.parameters()) / 2740, abs=1e-9)
    assert "kept net.0 dense: it is the first layer" in record.notes
    assert any("SGD state of net.3.depthwise.weight restarts" in note for note in record.notes)
    (edit,) = manifest.edits_of(module)
    spec = {"to": "depthwise_separable", "channels": 16, "groups": 1, "norm": False, "bias": True}
    assert edit == {"kind": "compact.convert", "by": "CompactConversion", "layers": {"net.3": spec}}
    (decided,) = trainer.callbacks[0].state_dict()["shared"]["decisions"]
    assert decided["name"] == "CompactConversion/errors"
    before, after = decided["outcome"]["net.3"]
    assert after < before


def test_before_the_conversion_nothing_is_different() -> None:
    """The same first steps, bit for bit, and random numbers after them."""
    losses = []
    for ours in ([], [CompactConversion("fire", schedule=lc.Schedule(begin=8), fit_steps=3)]):
        keep = fits.Losses()
        run(ours, lambda: TinyNet(dropout=0.2), extra=[keep])
        losses.append(keep.values)
    assert losses[0][:8] == losses[1][:8]
    assert losses[0][9:] != losses[1][9:]


def test_a_bias_keeps_its_momentum_and_the_block_trains() -> None:
    """Gradients of the last bias are those of the dense one; without the edit of the optimizer nothing would move."""
    seen: list[dict[str, Tensor]] = []
    momentum: dict[int, Tensor] = {}

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            layer = pl_module.net[3]
            bias = layer.pointwise.bias if isinstance(layer, CompactBlock) else layer.bias
            state = trainer.optimizers[0].state.get(bias)
            if state:
                momentum[trainer.global_step] = state["momentum_buffer"].clone()
            if isinstance(layer, CompactBlock):
                seen.append(copy.deepcopy(layer.state_dict()))

    kept: dict[str, Tensor] = {}

    class Before(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            layer = pl_module.net[3]
            if trainer.global_step == 5:
                kept["buffer"] = trainer.optimizers[0].state[layer.bias]["momentum_buffer"].clone()

    run([CompactConversion("depthwise_separable", schedule=AT, fit_steps=0)], extra=[Look(), Before()])
    assert torch.equal(momentum[5], kept["buffer"])
    assert all(not torch.equal(seen[0][key], seen[-1][key]) for key in seen[0])


@pytest.mark.parametrize("to", ["depthwise_separable", "fire"])
def test_distillation_heals_what_the_conversion_lost(to: Any) -> None:
    """The distance to the dense teacher, right after the conversion and at the end of the same fit."""
    L.seed_everything(1, verbose=False)
    teacher = TinyNet(optimizer="Adam")
    L.Trainer(max_epochs=20, **fits.QUIET).fit(teacher, tiny_loader())
    distances: list[float] = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            with torch.no_grad():
                distances.append(float(F.mse_loss(pl_module.net(X), teacher.net(X))))

    ours = [
        CompactConversion(to, schedule=lc.Schedule(begin=1), fit_steps=10),
        Distillation(copy.deepcopy(teacher), losses=[lc.KD(2.0, weight=4.0)]),
    ]
    _, module, _ = run(ours, copy.deepcopy(teacher), extra=[Look()], max_epochs=20)
    assert isinstance(module.net[3], CompactBlock)
    converted, healed = distances[1], distances[-1]
    assert healed < 0.5 * converted


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_parts(backend: str) -> None:
    class Compiled(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(self.net, backend=backend)  # type: ignore[assignment]

    def ours() -> list[Any]:
        return [CompactConversion("depthwise_separable", schedule=AT, fit_steps=0)]

    plain = run(ours())[1]
    torch._dynamo.reset()
    compiled = run(ours(), Compiled)[1]
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Grouped(TinyNet):
    """Vectors have a group of their own, without weight decay, as many recipes have it."""

    def __init__(self) -> None:
        super().__init__()
        self.net[3] = nn.Conv2d(16, 16, 3, padding=1, bias=False)

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.dim() > 1]
        vectors = [p for p in self.parameters() if p.dim() <= 1]
        return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2)


@pytest.mark.parametrize("to", NEEDS_DATA)
def test_new_vectors_join_the_group_of_vectors_and_the_fit_resumes(to: Any, tmp_path: Path) -> None:
    def ours() -> list[Any]:
        return [CompactConversion(to, schedule=AT, fit_steps=2)]

    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=8)
    trainer, straight, _ = run(ours(), Grouped, extra=[saving], enable_checkpointing=True)
    for group, vectors in zip(trainer.optimizers[0].param_groups, (False, True), strict=True):
        named = [n for n, p in straight.named_parameters() if (p.dim() <= 1) == vectors]
        by_id = {id(p): n for n, p in straight.named_parameters()}
        assert [by_id[id(p)] for p in group["params"]] == named
    _, resumed, _ = run(ours(), Grouped, ckpt_path=tmp_path / "step=8.ckpt")
    assert manifest.equal(straight.state_dict(), resumed.state_dict())


# --------------------------------------------------------------------------------------------------------- composition
@pytest.mark.parametrize("to", list(BLOCKS))
def test_channels_are_cut_inside_of_blocks(to: Any) -> None:
    late = lc.Schedule(begin=9, curve="constant")
    ours = [CompactConversion(to, schedule=AT, fit_steps=0), ChannelPruning(keep_macs=0.12, schedule=late)]
    if to == "shuffle":  # the shuffle mixes channels, which the graph of what hangs together says
        with pytest.raises(lc.CompressionError, match=r"net.3.reduce \(its channels pass through .*View, which mixes"):
            run(ours)
        return
    _, module, _ = run(ours)
    assert [edit["kind"] for edit in manifest.edits_of(module)] == ["compact.convert", "channels.cut"]
    assert module(X).shape == (64, 4)


def test_masks_are_decided_anew_on_the_block_and_factors_go_inside_of_it() -> None:
    pruning = Pruning(0.8, schedule=fits.MASKS)
    _, module, _ = run([CompactConversion("inverted_residual", schedule=AT, fit_steps=0), pruning])
    weights = [p for p in module.parameters() if p.dim() > 1]
    assert sum(int((w == 0).sum()) for w in weights) == round(0.8 * sum(w.numel() for w in weights))
    factors = LowRank(4, schedule=lc.Schedule(begin=8))
    _, module, _ = run([CompactConversion("inverted_residual", schedule=AT, fit_steps=0), factors])
    assert [edit["kind"] for edit in manifest.edits_of(module)] == ["compact.convert", "low_rank.replace"]


def test_masks_of_an_earlier_fit_keep_their_layers_dense() -> None:
    _, module, _ = run([Pruning(0.8, schedule=fits.MASKS)])
    _, _, (record,) = run([CompactConversion("depthwise_separable", schedule=AT, fit_steps=0)], module)
    assert any("its weights are masked, and there is no Pruning" in note for note in record.notes)
    assert type(module.net[3]) is nn.Conv2d


# ----------------------------------------------------------------------------------------------------------- bad input
class Manual(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


REFUSED: list[tuple[list[Any], Any, str]] = [
    ([CompactConversion("fire", schedule="setup")], TinyNet, r"needs calibration data.*init='fresh'"),
    ([CompactConversion("fire", schedule=AT)], Manual, "cannot be rehearsed.*pass calibration="),
    ([CompactConversion("fire", schedule=AT), QuantizationAwareTraining()], TinyNet, "schedule='setup', where the"),
    ([CompactConversion("fire", schedule=AT, targets=("encoder",))], TinyNet, "matches no module"),
    ([CompactConversion("inverted_residual", width=6, schedule=AT)], TinyNet, "be converted.*1.87 of its parameters"),
    ([CompactConversion("shuffle", groups=3, schedule=AT)], TinyNet, "no multiples of 3 groups"),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "module", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_fits_that_cannot_work_are_refused_before_they_train(ours: list[Any], module: Any, message: str) -> None:
    model = module()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(lc.CompressionError, match=message):
        run(ours, model)
    assert manifest.equal(model.state_dict(), before)


@pytest.mark.parametrize("to", NEEDS_DATA)
def test_without_data_blocks_with_activations_are_refused(to: Any) -> None:
    with pytest.raises(lc.CompressionError, match="activations inside it make it fit what the layer really gets"):
        lc.convert(net(), to)
    assert isinstance(lc.convert(net(), to, init="fresh")[3], BLOCKS[to])


def test_layers_that_cannot_be_converted_are_kept_and_the_reason_is_said() -> None:
    model = nn.ModuleDict({
        "tied": nn.Conv2d(4, 4, 3), "twin": nn.Conv2d(4, 4, 3), "nan": nn.Conv2d(4, 4, 3), "good": nn.Conv2d(4, 4, 3),
        "norm": nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "lazy": nn.LazyConv2d(4, 3),
        "up": nn.ConvTranspose2d(4, 4, 3),
    })  # fmt: skip
    model["twin"].weight = model["tied"].weight
    model["nan"].weight.data[0, 0, 0, 0] = float("nan")
    found, report = convert_with_report(model, "depthwise_separable", keep_first_last=False)
    assert isinstance(found["good"], CompactBlock)
    reasons = {
        "tied": "tied to another", "twin": "tied to another", "nan": "not finite", "norm": "weight_norm",
        "lazy": "lazy",
    }  # fmt: skip
    assert report.kept.keys() == reasons.keys()
    assert all(text in report.kept[name] for name, text in reasons.items())
    with pytest.raises(lc.CompressionError, match="none of these is one of Conv2d"):
        lc.convert(model, "depthwise_separable", targets=("up",))
    with pytest.raises(lc.CompressionError, match=r"no layer can be converted.*part of a compact block already"):
        lc.convert(found, "depthwise_separable", targets=("good",))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"9": Spec("fire", 4)}, "has no module '9'"), ({"4": Spec("fire", 4)}, "not of a BatchNorm2d"),
        ({"3": Spec("ghost", 4)}, "to is one of"), ({"3": Spec("fire", 0)}, "squeeze is a whole number"),
    ],
)  # fmt: skip
def test_an_edit_that_does_not_fit_changes_nothing(layers: Any, message: str) -> None:
    model = net(bias=True)[:6]
    before = copy.deepcopy(model.state_dict())
    good = {"0": Spec("depthwise_separable", 1, bias=True)}
    with pytest.raises(lc.CompressionError, match=message), surgery.edit(model, [convert_edit({**good, **layers})]):
        pass
    assert manifest.equal(model.state_dict(), before)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"schedule": "start"}, ValueError, "schedule is a Schedule or 'setup'"),
    ({"schedule": None}, TypeError, "schedule is a Schedule"), ({"to": "ghost"}, ValueError, "to is one of"),
    ({"calibration_samples": 0}, ValueError, "calibration_samples"), ({"targets": 3}, TypeError, "targets takes names"),
    ({"example_inputs": 3}, TypeError, "example_inputs"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_arguments_say_what_is_right(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CompactConversion(**{"to": "fire", **arguments})


def test_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = [f"--trainer.enable_{what}=false" for what in ("progress_bar", "model_summary")]
    quiet += ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
    recipes = ROOT / "examples" / "recipes"
    _cli.main(["fit", f"--config={recipes / 'dense.yaml'}", *quiet, "--trainer.max_epochs=1"])
    known = set(Path().rglob("*.ckpt"))
    _cli.main(["fit", f"--config={recipes / 'compact.yaml'}", *quiet])
    (path,) = set(Path().rglob("*.ckpt")) - known
    assert isinstance(lc.load(TinyNet(), path).net[3], CompactBlock)

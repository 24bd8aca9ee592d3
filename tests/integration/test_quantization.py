"""Quantization-aware training in a Trainer: phases, files, averages, compilation, cuts, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import layers, manifest
from lightning_compress.callbacks import (
    ChannelPruning,
    PostTrainingQuantization,
    Pruning,
    QuantizationAwareTraining,
)
from lightning_compress.callbacks.testing import TinyNet, tiny_loader
from lightning_compress.quantization import attachment

X = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def run(callbacks: list[Any], module: L.LightningModule | type[TinyNet] = TinyNet, **settings: Any) -> tuple[Any, Any]:
    L.seed_everything(0, verbose=False)
    path = settings.pop("ckpt_path", None)
    module = module() if isinstance(module, type) else module
    trainer = L.Trainer(callbacks=callbacks, **{**fits.QUIET, "max_epochs": 4, "num_sanity_val_steps": 0, **settings})
    trainer.fit(module, tiny_loader(), tiny_loader(samples=16), ckpt_path=path)
    return trainer, module


class Watch(L.Callback):
    """Notes the state of the quantizers before each step and around each validation."""

    def __init__(self) -> None:
        self.enabled: list[bool] = []
        self.observing: list[bool] = []
        self.ranges: list[Tensor] = []
        self.changed_in_validation = False

    @staticmethod
    def _ranges(module: nn.Module) -> Tensor:
        found = attachment.quantizers(module).values()
        return torch.cat([b.detach().flatten().clone() for q in found for b in q.buffers()])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        found = attachment.quantizers(pl_module)
        self.enabled.append(all(q.enabled for q in found.values()))
        self.observing.append(any(q.observing for q in found.values()))
        self.ranges.append(self._ranges(pl_module))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._before = copy.deepcopy(pl_module.state_dict())
        self._modes = [m.training for m in pl_module.modules()]

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.changed_in_validation |= not manifest.equal(self._before, dict(pl_module.state_dict()))


def test_it_observes_quantizes_and_freezes_when_it_should() -> None:
    watch = Watch()
    run([QuantizationAwareTraining(**fits.QAT), watch])
    assert watch.enabled == [step >= 5 for step in range(16)]
    assert watch.observing == [2 <= step < 12 for step in range(16)]
    moved = [not torch.equal(a, b) for a, b in zip(watch.ranges, watch.ranges[1:], strict=False)]
    assert all(moved[1:11])
    assert not any(moved[12:])
    assert not watch.changed_in_validation


def test_before_it_begins_nothing_is_different() -> None:
    class Weights(L.Callback):
        def __init__(self) -> None:
            self.found: list[str] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.found.append(manifest.digest({n: p for n, p in pl_module.named_parameters() if "_lc_" not in n}))

    plain, ours = Weights(), Weights()
    run([plain])
    run([QuantizationAwareTraining("w2a2_lsq", **fits.QAT), ours])
    assert plain.found[:5] == ours.found[:5]
    assert plain.found[5] != ours.found[5]


class Modes(TinyNet):
    def __init__(self) -> None:
        super().__init__(dropout=0.25, batchnorm=True)
        self.net[1].momentum, self.net[1].eps = 0.03, 1e-3  # type: ignore[union-attr]


def test_dropout_and_batch_norm_keep_their_settings_and_batch_norm_is_frozen_late() -> None:
    seen: list[tuple[bool, bool]] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append((pl_module.net[1].training, pl_module.net[8].training))

    _, module = run([QuantizationAwareTraining(**fits.QAT), Look()], Modes())
    assert seen == [(step < 13, True) for step in range(16)]
    assert (module.net[1].momentum, module.net[1].eps, module.net[8].p) == (0.03, 1e-3, 0.25)
    assert module.net[1].training == module.training


def test_the_users_own_class_loads_the_file(tmp_path: Path) -> None:
    trainer, module = run([QuantizationAwareTraining("w2a2_lsq", **fits.QAT)])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    wrong = TinyNet().load_state_dict(state, strict=False)
    assert not wrong.missing_keys
    assert wrong.unexpected_keys
    assert all("._lc_fq_" in key for key in wrong.unexpected_keys)
    plain = TinyNet.load_from_checkpoint(lc.strip(tmp_path / "last.ckpt"))  # strictly, without this package
    assert all(torch.equal(p, module.get_parameter(n)) for n, p in plain.named_parameters())
    stripped = lc.load_from_checkpoint(TinyNet, tmp_path / "last.stripped.ckpt")
    assert not attachment.quantizers(stripped)


def test_a_file_from_before_it_began_computes_in_full_precision(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=4)
    run([QuantizationAwareTraining(**fits.QAT), saving], enable_checkpointing=True)
    early, late = (lc.load_from_checkpoint(TinyNet, tmp_path / f"step={n}.ckpt").eval() for n in (4, 8))
    assert not any(q.enabled for q in attachment.quantizers(early).values())
    assert all(q.enabled for q in attachment.quantizers(late).values())
    plain = copy.deepcopy(late)
    attachment.detach(plain)
    assert type(plain.net[0]) is nn.Conv2d
    assert not torch.equal(late(X), plain(X))
    with layers.bypassed(late):
        assert torch.equal(late(X), plain(X))


def test_validate_and_test_use_what_the_checkpoint_says(tmp_path: Path) -> None:
    trainer, module = run([QuantizationAwareTraining(**fits.QAT)])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    mine = trainer.test(module, tiny_loader(), verbose=False)[0]["test_loss"]
    other = L.Trainer(callbacks=[QuantizationAwareTraining(**fits.QAT)], **fits.QUIET)
    again = other.test(TinyNet(), tiny_loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)[0]["test_loss"]
    assert again == pytest.approx(mine, rel=1e-6)


def test_a_second_fit_goes_on_quantized() -> None:
    _, module = run([QuantizationAwareTraining(**fits.QAT)])
    watch = Watch()
    run([QuantizationAwareTraining(**fits.QAT), watch], module)
    assert all(watch.enabled)
    assert len(manifest.edits_of(module)) == 2


class Follow(L.Callback):
    """Averages what quantizers hold by itself, from the step on in which they begin."""

    def __init__(self, average: EMAWeightAveraging) -> None:
        self.average, self.wanted = average, dict[str, Tensor]()

    @staticmethod
    def tensors(module: nn.Module) -> dict[str, Tensor]:
        found = attachment.quantizers(module).items()
        return {f"{name}.{n}": t.detach().clone() for name, q in found for n, t in q.state_dict(keep_vars=True).items()}

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if trainer.global_step == 5:
            self.wanted = self.tensors(pl_module)
            assert manifest.equal(self.tensors(self.average._average_model.module), self.wanted)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        now = self.tensors(pl_module)
        self.wanted = {name: (self.wanted[name] + now[name]) / 2 for name in self.wanted}
        self.last = now


@pytest.mark.parametrize("preset", ["int8_static", "w2a2_lsq"])
def test_an_average_has_the_mean_of_ranges_and_steps_since_quantization_began(preset: Any) -> None:
    average = EMAWeightAveraging(decay=0.5)
    follow = Follow(average)
    _, module = run([average, follow, QuantizationAwareTraining(preset, **{**fits.QAT, "freeze_ranges": None})])
    found = follow.tensors(module)
    assert all(quantizer.enabled for quantizer in attachment.quantizers(module).values())
    torch.testing.assert_close(found, follow.wanted, rtol=1e-5, atol=1e-7)
    moving = [name for name in found if not torch.allclose(found[name], follow.last[name], rtol=1e-4)]
    assert len(moving) >= 2  # the last ones are others


def test_masked_weights_stay_exactly_zero_when_quantized() -> None:
    soft = Pruning(0.8, schedule=fits.MASKS, mode="soft")
    zeros: list[float] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            used = [layers.transformed_weight(m) for m in (pl_module.net[0], pl_module.net[3], pl_module.net[9])]
            zeros.append(sum(int((w == 0).sum()) for w in used) / sum(w.numel() for w in used))

    run([soft, QuantizationAwareTraining(**fits.QAT), Look()])
    assert zeros[-1] >= 0.8 - 1e-3


def test_quantizers_follow_a_channel_cut_and_train_on() -> None:
    cut = ChannelPruning(keep_macs=0.5, schedule=lc.Schedule(begin=9, curve="constant"))
    shapes: list[tuple[int, int, int]] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            step = attachment.quantizers(pl_module)["net.3.weight"].step
            state = trainer.optimizers[0].state.get(step, {})
            size = len(state["exp_avg"]) if "exp_avg" in state else 0
            shapes.append((pl_module.net[3].out_channels, len(step), size))

    trainer, module = run([QuantizationAwareTraining("w2a2_lsq", first_last="same", **fits.QAT), cut, Look()],
                          TinyNet(optimizer="Adam"))  # fmt: skip
    before, after = shapes[8], shapes[9]
    assert before == (16, 16, 16)
    assert after[0] < 16
    assert after == (after[0],) * 3
    assert trainer.global_step - 9 >= 5
    assert torch.isfinite(module.eval()(X)).all()


def test_tied_weights_share_a_quantizer() -> None:
    class Tied(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(super().forward(x)))  # type: ignore[no-any-return]

    _, module = run([QuantizationAwareTraining("w2a2_lsq", **fits.QAT)], Tied())
    found = attachment.quantizers(module)
    assert found["a.weight"] is found["b.weight"]
    assert found["a.input"] is not found["b.input"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(precision: Any) -> None:
    _, module = run([QuantizationAwareTraining("w2a2_lsq", **fits.QAT)], precision=precision)
    ranges = [b for q in attachment.quantizers(module).values() for b in (*q.buffers(), *q.parameters())]
    assert all(torch.isfinite(r).all() for r in ranges)


@pytest.mark.parametrize("preset", ["int8_static", "int8_dynamic", "w4a8", "w2a2_lsq", "fp8"])
def test_every_preset(preset: Any) -> None:
    _, module = run([QuantizationAwareTraining(preset, **fits.QAT)])
    assert torch.isfinite(module.eval()(X)).all()


@pytest.mark.needs_compiler
def test_a_compiled_model_trains_like_an_eager_one() -> None:
    class Compiled(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(self.net, backend="aot_eager")

    _, eager = run([QuantizationAwareTraining(**fits.QAT)])
    _, compiled = run([QuantizationAwareTraining(**fits.QAT)], Compiled)
    for mine, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- bad input
BAD = [
    ({"preset": "int7"}, ValueError, "preset is one of"),
    ({"weights": "int9"}, ValueError, "bits is a whole number"),
    ({"weights": "in8"}, ValueError, "not known"),
    ({"weights": 8}, TypeError, "QuantSpec or a name"),
    ({"activations": "binary"}, ValueError, "not for activations"),
    ({"weights": "pact4"}, ValueError, "not for weights"),
    ({"plan": ["net.0"]}, TypeError, "plan is a dictionary"),
    ({"plan": {"net.0": "int7"}}, ValueError, "no preset"),
    ({"first_last": "int4"}, ValueError, "first_last is"),
    ({"schedule": None}, TypeError, "schedule says when"),
    ({"observe": -1}, ValueError, "cannot be negative"),
    ({"freeze_ranges": 1.5}, ValueError, "strictly between 0 and 1"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        QuantizationAwareTraining(**arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"plan": {"net.77": "none"}}, "net.77"),
        ({"targets": ("net.1",)}, "net.1"),
        ({"weights": "none", "activations": "none"}, "nothing is left to quantize"),
        ({"plan": {"net.0": {"hidden": "int8"}}}, "has no such thing"),
    ],
)
def test_plans_that_fit_nothing(arguments: dict[str, Any], text: str) -> None:
    module = TinyNet()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(lc.CompressionError, match=text):
        run([QuantizationAwareTraining(**{**fits.QAT, **arguments})], module)
    assert manifest.equal(before, module.state_dict())
    assert type(module.net[0]) is nn.Conv2d


def test_activations_that_are_not_finite_are_named() -> None:
    class Bad(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * float("nan"))

    with pytest.raises(lc.CompressionError, match=r"net\.0\.input.*(NaN|finite)"):
        run([QuantizationAwareTraining(**fits.QAT)], Bad())


def test_a_layer_that_never_runs_is_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    class Idle(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(4, 4)

    records: list[Any] = []

    class Hear(QuantizationAwareTraining):
        def on_compression_event(self, trainer: Any, pl_module: Any, record: Any) -> None:
            records.append(record)

    _, module = run([Hear(**fits.QAT)], Idle())
    assert any("idle" in note for note in records[0].notes)
    assert not attachment.quantizers(module)["idle.input"].enabled


class Exotic(TinyNet):
    """With layers that cannot have quantizers: two that run, one that does not, and one that is left to float."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.cell, self.idle = nn.Bilinear(4, 4, 4), nn.LSTMCell(4, 4), nn.GRUCell(4, 4)
        self.norm, self.known = nn.LayerNorm(4), nn.LSTMCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(super().forward(x))
        return self.pair(y, y) + self.cell(y)[0] + self.known(y)[0]  # type: ignore[no-any-return]


WAYS = [
    {"preset": "int8_static"}, {"preset": "int8_dynamic"}, {"weights": "int8", "activations": "none"},
    {"schedule": lc.Schedule(begin=0)},
]  # fmt: skip


@pytest.mark.parametrize("arguments", WAYS)
def test_layers_of_types_without_quantizers_are_named(arguments: dict[str, Any]) -> None:
    records: list[Any] = []
    ours = QuantizationAwareTraining(**{**fits.QAT, "exclude": ("known",), **arguments})
    ours.on_compression_event = lambda trainer, pl_module, record: records.append(record)  # type: ignore[method-assign]
    _, module = run([ours], Exotic())
    (note,) = [note for note in records[0].notes if "no quantizers" in note]
    assert note.endswith("floating point: pair (Bilinear), cell (LSTMCell)")
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_layers_without_quantizers_that_nobody_asked_for_are_not_named() -> None:
    records: list[Any] = []
    ours = QuantizationAwareTraining(**fits.QAT, targets=("net.*",))
    ours.on_compression_event = lambda trainer, pl_module, record: records.append(record)  # type: ignore[method-assign]
    run([ours], Exotic())
    assert records[0].notes == []


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
def test_quantization_after_training_names_them_too(scheme: str) -> None:
    records: list[Any] = []
    after = PostTrainingQuantization(scheme, samples=16, exclude=("known",))
    after.on_compression_event = lambda trainer, pl_module, record: records.append(record)  # type: ignore[method-assign]
    run([after], Exotic())
    assert after.report is not None
    assert after.report.skipped["quantization"] == {
        "pair": "there are no quantizers for Bilinear", "cell": "there are no quantizers for LSTMCell",
    }  # fmt: skip
    assert sum("no quantizers for" in note for note in records[0].notes) == 2


def test_two_callbacks_may_not_disagree_about_a_layer() -> None:
    with pytest.raises(lc.CompressionError, match="leave the layer to one callback"):
        run([QuantizationAwareTraining(**fits.QAT), QuantizationAwareTraining("w4a8", name="b", **fits.QAT)])


# ------------------------------------------------------------------------------------------------- after training
def test_post_training_quantization_ends_a_fit(tmp_path: Path) -> None:
    after = PostTrainingQuantization(samples=32)
    trainer, module = run([after])
    assert all(q.enabled for q in attachment.quantizers(module).values())
    assert after.report is not None
    assert after.report.output.after > 15
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = lc.load_from_checkpoint(TinyNet, tmp_path / "last.ckpt")
    assert torch.equal(loaded.eval()(X), module.eval()(X))
    assert not torch.equal(module(X), run([])[1].eval()(X))


def test_post_training_quantization_writes_a_file_of_its_own(tmp_path: Path) -> None:
    _, module = run([PostTrainingQuantization(samples=16, save_to=tmp_path / "small.ckpt")])
    loaded = lc.load_from_checkpoint(TinyNet, tmp_path / "small.ckpt")
    assert torch.equal(loaded.eval()(X), module.eval()(X))
    run([PostTrainingQuantization(samples=16, save_to=tmp_path / "trial.ckpt")], fast_dev_run=True)
    assert not (tmp_path / "trial.ckpt").exists()


def test_post_training_quantization_leaves_no_trace_on_training() -> None:
    _, plain = run([])
    _, module = run([PostTrainingQuantization(samples=16)])
    assert all(torch.equal(p, module.get_parameter(n)) for n, p in plain.named_parameters())


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("given", [False, True])
def test_post_training_quantization_in_the_precision_of_the_fit(precision: Any, given: bool) -> None:
    data = tiny_loader().dataset if given else None
    after = PostTrainingQuantization("nagel_w8a8_per_channel", samples=32, calibration=data)
    _, module = run([after], precision=precision)
    assert all(q.enabled for q in attachment.quantizers(module).values())
    assert after.report is not None
    assert after.report.output.after > 15
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    assert {p.dtype for n, p in module.named_parameters()} == {dtype}
    assert torch.isfinite(module.eval()(X.to(dtype))).all()


class NoDataset:
    """Gives batches, and holds no dataset that one could draw from."""

    def __init__(self) -> None:
        self.batches = [tuple(part.clone() for part in batch) for batch in tiny_loader()]
        self.batches[0][0].mul_(9)  # the widest range, and the first to go
        self.reads = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        for batch in self.batches:
            self.reads += 1
            yield batch


@pytest.mark.parametrize("samples", [16, 48, 512])
def test_a_loader_without_a_dataset_is_not_read_again(samples: int) -> None:
    loader = NoDataset()
    L.seed_everything(0, verbose=False)
    module, after = TinyNet(), PostTrainingQuantization(samples=samples)
    L.Trainer(callbacks=[after], max_epochs=2, **fits.QUIET).fit(module, loader)
    assert loader.reads == 8
    seen = torch.cat([x for x, _ in loader.batches[-(samples // 16) :]])
    quantizer = attachment.quantizers(module)["net.0.input"]
    assert float(quantizer.get_buffer("hi")) == pytest.approx(float(seen.max()), rel=1e-6)
    assert float(quantizer.get_buffer("lo")) == pytest.approx(float(seen.min()), rel=1e-6)


def test_calibration_sees_what_the_step_sees() -> None:
    class Bright(TinyNet):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] + 100, batch[1]

    _, module = run([PostTrainingQuantization(samples=16)], Bright())
    assert float(attachment.quantizers(module)["net.0.input"].get_buffer("hi")) > 90


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "deepspeed"])
def test_post_training_quantization_of_parts_of_weights_is_refused_before_training(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_compress.callbacks.strategies.kind_of", lambda strategy: kind)
    module = TinyNet()
    with pytest.raises(lc.CompressionError, match=r"call lc\.quantize\(model, data\)"):
        run([PostTrainingQuantization(samples=16)], module)
    assert module.trainer.global_step == 0


def test_averaged_weights_come_first() -> None:
    _, module = run([EMAWeightAveraging(decay=0.5), PostTrainingQuantization(samples=16)])
    assert attachment.quantizers(module)
    with pytest.raises(lc.CompressionError, match="put it before PostTrainingQuantization"):
        run([PostTrainingQuantization(samples=16), EMAWeightAveraging(decay=0.5)])


def test_a_safetensors_file_holds_the_quantizers(tmp_path: Path) -> None:
    _, module = run([QuantizationAwareTraining("w2a2_lsq", **fits.QAT)])
    loaded = lc.load(TinyNet(), lc.export(module, tmp_path / "q.safetensors"))
    assert torch.equal(loaded.eval()(X), module.eval()(X))


def test_the_integer_model_agrees_with_the_trained_one(tmp_path: Path) -> None:
    _, module = run([QuantizationAwareTraining(**fits.QAT)], TinyNet(batchnorm=True))
    path = lc.export(module, tmp_path / "int8.pt2", example_inputs=X, calibration=tiny_loader())
    artifact = lc.Int8Artifact.load(path)
    x = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    wanted, found = module.eval()(x), artifact.run(x)
    assert (wanted - found).abs().max() <= 0.02 * (wanted.max() - wanted.min())
    assert (wanted.argmax(1) == found.argmax(1)).float().mean() >= 0.99

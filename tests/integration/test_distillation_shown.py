"""What a distilled fit promises beside its losses: compiled or checkpointed students, teachers that leak nowhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import torch
from bad_input import refuses
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import Distillation
from lightning_compress.callbacks.testing import TinyNet, tiny_loader

X = torch.zeros(2, 1, 8, 8)


def net(cls: type[TinyNet] = TinyNet, seed: int = 0, **hparams: Any) -> TinyNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(**hparams)


def train(module: Any, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    L.seed_everything(3, verbose=False)
    path, validate = settings.pop("ckpt_path", None), settings.pop("validate", False)
    trainer = L.Trainer(
        callbacks=list(callbacks), **{**fits.QUIET, "max_epochs": 2, "num_sanity_val_steps": 0, **settings}
    )
    trainer.fit(module, tiny_loader(), tiny_loader() if validate else None, ckpt_path=path)
    return trainer


def terms() -> list[lc.LossTerm]:
    return [lc.KD(2.0), lc.Hint("net.5", 10.0), lc.AT("net.2", 10.0)]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {n.replace("_orig_mod.", ""): p.detach().clone() for n, p in module.named_parameters()}


# -- compiled students -------------------------------------------------------------------------------------------------


def inner(module: TinyNet) -> Any:
    module.net = torch.compile(module.net, backend="aot_eager")  # type: ignore[assignment]
    return module


def whole(module: TinyNet) -> Any:
    return torch.compile(module, backend="aot_eager")


@pytest.mark.parametrize("compiled", [inner, whole])
def test_a_compiled_student_learns_what_an_eager_one_does(compiled: Any) -> None:
    torch._dynamo.reset()
    eager, module = net(), net()
    train(eager, Distillation(fits.teacher(), losses=terms(), example_inputs=X))
    trainer = train(compiled(module), Distillation(fits.teacher(), losses=terms(), example_inputs=X))
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # else nothing was compiled
    found = weights(module)
    for name, value in weights(eager).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert float(trainer.callback_metrics["Distillation/hint"]) > 0
    torch._dynamo.reset()


# -- activation checkpointing ------------------------------------------------------------------------------------------


class Checkpointed(TinyNet):
    """The first half of the network is computed twice: in the forward, and again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        middle: Tensor = checkpoint(self.net[:6], x, use_reentrant=False)
        return self.net[6:](middle)


class Tapped(L.Callback):
    """How often the taps and the teacher were asked in each step."""

    def __init__(self, callback: Distillation) -> None:
        self.callback, self.taps, self.asked = callback, [], 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and trainer.current_epoch == 0:
            part = self.callback._handle.module
            part.register_forward_hook(lambda *_: setattr(self, "asked", self.asked + 1))

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        from lightning_compress.callbacks.coordinator import Coordinator

        source = Coordinator.of(trainer).pipeline.sources[0]
        self.taps.append({name: len(tap._recorder.calls) for name, tap in source.taps.taps.items()})

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.on_before_zero_grad(trainer, pl_module, None)


def test_activation_checkpointing_counts_nothing_twice() -> None:
    plain, module = net(), net(Checkpointed)
    train(plain, Distillation(fits.teacher(), losses=terms(), example_inputs=X))
    callback = Distillation(fits.teacher(), losses=terms(), example_inputs=X)
    tapped = Tapped(callback)
    train(module, callback, tapped)
    assert manifest.equal(weights(plain), weights(module))
    assert tapped.asked == 8
    assert all(set(counts.values()) == {0} for counts in tapped.taps)  # the second run in the backward is not recorded


# -- the teacher is nowhere --------------------------------------------------------------------------------------------


class Modes(L.Callback):
    """The teacher's mode, and what the Trainer holds, at each step."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher, self.training, self.names = teacher, set(), set()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.training |= {part.training for part in self.teacher.modules()}
        mine = {id(p) for p in self.teacher.parameters()}
        everywhere = [
            *trainer.strategy.model.parameters(), *trainer.strategy.model.buffers(),
            *(p for o in trainer.optimizers for g in o.param_groups for p in g["params"]),
        ]  # fmt: skip
        self.names |= {tuple(t.shape) for t in everywhere if id(t) in mine}


def test_the_teacher_leaks_nowhere(tmp_path: Path) -> None:
    taught = net(seed=5, width=24, dropout=0.5, batchnorm=True)
    before = copy.deepcopy(taught.state_dict())
    modes, module = Modes(taught), net(batchnorm=True)
    plain = train(net(batchnorm=True), validate=True)
    trainer = train(module, Distillation(taught), modes, validate=True)
    assert modes.training == {False}  # through validations, too
    assert not modes.names
    assert manifest.equal(dict(taught.state_dict()), dict(before))
    assert not any(p.requires_grad or p.grad is not None for p in taught.parameters())
    for weights_only in (False, True):
        for who, one in (("plain", plain), ("ours", trainer)):
            one.save_checkpoint(tmp_path / f"{who}.ckpt", weights_only=weights_only)
        found, wanted = (torch.load(tmp_path / f"{w}.ckpt", weights_only=True) for w in ("ours", "plain"))
        assert found["state_dict"].keys() == wanted["state_dict"].keys()
        if weights_only:
            assert found.keys() == wanted.keys()
        else:
            sizes = [
                sum(v.numel() for s in f["optimizer_states"] for p in s["state"].values() for v in p.values())
                for f in (found, wanted)
            ]
            assert sizes[0] == sizes[1]
            (state,) = (s for k, s in found["callbacks"].items() if "Distillation" in k)
            assert not any(isinstance(v, Tensor) for v in state.values())
    small = (tmp_path / "ours.ckpt").stat().st_size - (tmp_path / "plain.ckpt").stat().st_size
    assert small < sum(p.numel() for p in taught.parameters())  # less than a quarter of its bytes
    torch.save({"state_dict": module.state_dict()}, tmp_path / "bare.ckpt")
    assert not [key for key in module.state_dict() if key not in plain.lightning_module.state_dict()]


def test_an_optimizer_sees_the_projector_and_no_teacher() -> None:
    module = net()
    trainer = train(module, Distillation(fits.teacher(), losses=terms(), example_inputs=X))
    held = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert any(name.startswith("_lc_") for name, _ in module.named_parameters())


# -- bad input ---------------------------------------------------------------------------------------------------------


class Vectors(nn.Module):
    """A teacher whose layers are called as the student's, and return something else."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


BAD = [
    ("a map and a vector", lambda: [lc.AT({"net.2": "net.2"})], Vectors, r"cannot be compared|no places"),
    ("a hint of a vector", lambda: [lc.Hint({"net.2": "net.2"})], Vectors, r"cannot be compared: student \(16, 16, "),
    ("student's layer", lambda: [lc.Hint("net.55")], TinyNet, r"no module 'net.55'. Did you mean 'net.5'"),
    ("teacher's layer", lambda: [lc.Hint({"net.5": "net.33"})], TinyNet, r"no module 'net.33'. Did you mean 'net.3'"),
    ("a word", lambda: [lc.AT("nett.5")], TinyNet, r"no module 'nett.5'. Did you mean 'net.5'"),
    ("widths without a projector", lambda: [lc.Hint("net.5", projector="never")], lambda: TinyNet(width=24),
     r"without a projector. Give it projector='always'"),
    ("a layer that never runs", lambda: [lc.AT("spare")], TinyNet, r"watches 'spare', which `training_step` did not"),
    ("classes", lambda: [lc.DKD()], lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 7)),
     r"student \(16, 4\), teacher \(16, 7\).*Use a teacher with the student's classes"),
]  # fmt: skip


class Spare(TinyNet):
    def __init__(self, **hparams: Any) -> None:
        super().__init__(**hparams)
        self.spare = nn.Conv2d(1, 1, 1)


@pytest.mark.parametrize(("make", "teacher", "says"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
def test_what_cannot_be_compared(make: Any, teacher: Any, says: str) -> None:
    student = net(Spare if "spare" in says else TinyNet)
    taught: nn.Module = net(Spare) if "spare" in says else teacher()
    refuses(student, says, Distillation(taught, losses=make(), example_inputs=X))


def test_a_teachers_file_that_changed_is_noticed_when_the_fit_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "teacher.ckpt"
    train(net(seed=5)).save_checkpoint(file)
    trainer = train(net(), Distillation(str(file)))
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    train(net(), Distillation(str(file)), ckpt_path=tmp_path / "stopped.ckpt", max_epochs=3)  # the same file: fine
    train(net(seed=6)).save_checkpoint(file)
    with pytest.raises(lc.CompressionError, match=r"trained with another teacher; pass the same one, or allow_teach"):
        train(net(), Distillation(str(file)), ckpt_path=tmp_path / "stopped.ckpt", max_epochs=3)
    file.unlink()
    with pytest.raises(lc.CompressionError, match="there is no checkpoint at"):
        train(net(), Distillation(str(file)), ckpt_path=tmp_path / "stopped.ckpt", max_epochs=3)

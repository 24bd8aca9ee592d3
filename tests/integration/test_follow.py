"""What keeps state per parameter or channel follows cuts and swaps of modules, in one transaction, or refuses them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import splitting
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import Distillation, Pruning
from lightning_compress.callbacks.base import STRUCTURE, CompressionCallback
from lightning_compress.callbacks.testing import ResumableLoader, TinyNet, tiny_data
from lightning_compress.pruning.packing import unpack
from lightning_compress.surgery import Edit, Journal, Swap
from lightning_compress.terms import LossTerm, Shapes, TapSpec, TapSpecs

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
EVENT, STEPS = 3, 8  # five more steps
KEEP = torch.tensor([0, 1, 4, 5, 8, 9, 12])
HEAD = (KEEP[:, None] * 4 + torch.arange(4)).flatten()


def cut() -> Edit:
    """The second convolution keeps seven of sixteen filters."""
    return {
        "kind": "channels.cut",
        "slices": {"net.3.weight": {"0": KEEP}, "net.3.bias": {"0": KEEP}, "net.9.weight": {"1": HEAD}},
        "attributes": {"net.3": {"out_channels": 7}, "net.9": {"in_features": 28}},
    }


def swap() -> Edit:
    """The head becomes two layers."""
    return {"kind": splitting.KIND, "module": "net.9", "rank": 3}


EDITS = {"cut": [cut], "swap": [swap], "cut, then swap": [cut, swap]}


# -- stand-ins for what is to come


class Edits(CompressionCallback):
    """Makes fixed edits at one step."""

    order = STRUCTURE
    changes_structure = True

    def __init__(self, edits: Sequence[Any]) -> None:
        super().__init__(schedule=lc.Schedule(begin=EVENT, end=EVENT + 1, every=4))
        self.edits = edits

    def event(self, run: Any, step: int) -> None:
        self.swaps = [s for edit in self.edits for s in run.edit(self.name, [edit()]).swaps]


class Ranges:
    """A number for each output channel, as quantizer ranges are."""

    def __init__(self, module: nn.Module) -> None:
        self.of = {n: torch.arange(float(p.shape[0])) for n, p in module.named_parameters() if p.dim() > 1}

    def follow(self, swaps: Sequence[Swap], journal: Journal) -> None:
        for swap in swaps:
            if swap.name not in self.of:
                continue
            old = self.of[swap.name]
            journal.set_item(self.of, swap.name, old)
            del self.of[swap.name]
            if swap.keep is None:
                for new in swap.new:
                    journal.set_item(self.of, new.name, torch.arange(float(new.tensor.shape[0])))
            else:
                journal.set_item(self.of, swap.name, old[swap.keep[0]] if 0 in swap.keep else old)


class Tracks(CompressionCallback):
    """Owns ranges; they must fit after every step."""

    def start(self, run: Any) -> None:
        self.ranges = Ranges(run.pl_module)

    def followers(self, run: Any) -> Sequence[Any]:
        return [self.ranges] if hasattr(self, "ranges") else []

    def batch_end(self, run: Any) -> None:
        wanted = {n: p.shape[0] for n, p in run.pl_module.named_parameters() if p.dim() > 1 and not n.startswith("_lc")}
        assert {n: len(v) for n, v in self.ranges.of.items() if not n.startswith("_lc")} == wanted


class Hint(LossTerm):
    """Features of a layer, projected to the teacher's width; it knows how to follow a cut of that layer."""

    def __init__(self, at: str = "net.3") -> None:
        super().__init__(1.0, "hint")
        self.at, self.computed = TapSpec(at), 0

    def taps(self) -> TapSpecs:
        return TapSpecs(student=(self.at,), teacher=(self.at,))

    def build(self, shapes: Shapes) -> nn.Module:
        return nn.Linear(shapes.student[self.at][1], shapes.teacher[self.at][1])

    def follow(self, child: str, swaps: Sequence[Swap], shapes: Shapes) -> list[Edit]:
        keep = next(s.keep for s in swaps if s.name == f"{self.at.module}.weight")
        slices = {f"{child}.weight": {"1": keep[0]}}
        attributes = {child: {"in_features": shapes.student[self.at][1]}}
        return [{"kind": "channels.cut", "slices": slices, "attributes": attributes}]

    def compute(self, student: Any, teacher: Any, step: int) -> Tensor:
        self.computed += 1
        (s,), (t,) = student[self.at], teacher[self.at]
        s, t = (x.flatten(2).mean(2) if x.dim() > 2 else x for x in (s, t))
        return F.mse_loss(self.module(s), t)


class Stubborn(Hint):
    """Does not say how it follows."""

    follow = LossTerm.follow


def run(callbacks: list[Any], path: Path | None = None, save: Path | None = None) -> tuple[Any, TinyNet]:
    L.seed_everything(0, verbose=False)
    module = TinyNet(optimizer="Adam")
    extra = [SaveAt(5, save)] if save else []
    trainer = L.Trainer(callbacks=[*callbacks, *extra], **fits.QUIET, max_steps=STEPS, num_sanity_val_steps=0)
    trainer.fit(module, ResumableLoader(tiny_data(), 16), ckpt_path=path)
    return trainer, module


class SaveAt(L.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def callbacks(edits: str, hint: Hint | None = None) -> list[Any]:
    hint = hint or Hint()
    return [
        Distillation(fits.teacher(), losses=[lc.KD(), hint], example_inputs=X), Edits(EDITS[edits]), Tracks(),
        Pruning(0.5, schedule=lc.Schedule(begin=1, end=2, every=4)),
    ]  # fmt: skip


def check(trainer: Any, module: TinyNet, edits: str, hint: Hint) -> None:
    assert trainer.global_step == STEPS
    assert hint.computed == STEPS
    parameters = dict(module.named_parameters())
    (optimizer,) = trainer.optimizers
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in parameters.values()}
    assert {id(p) for p in optimizer.state} == {id(p) for p in held}
    assert all(v.shape == p.shape for p, s in optimizer.state.items() for v in s.values() if v.dim())
    masks = vars(module)["_lc_masks"]
    weights = {n for n, p in parameters.items() if p.dim() > 1 and not n.startswith("_lc")}
    assert set(masks) == weights  # layers that the swap brought are masked too
    for name, packed in masks.items():
        assert not parameters[name][~unpack(packed)].any()
    zeros = sum(int((~unpack(m)).sum()) for m in masks.values()) / sum(unpack(m).numel() for m in masks.values())
    assert zeros == pytest.approx(0.5, abs=0.01)
    assert len(manifest.edits_of(module)) == len(EDITS[edits])
    assert not any("_lc_" in str(edit) for edit in manifest.edits_of(module))


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("at", ["net.3", "net.9"])
def test_masks_ranges_taps_and_projectors_follow_and_train_on(edits, at):
    """The projector hangs on the layer that is cut, or its tap on the one that is replaced."""
    hint = Hint(at)
    trainer, module = run(callbacks(edits, hint))
    check(trainer, module, edits, hint)
    projector = module.get_submodule("_lc_Distillation_hint")
    width = 4 if at == "net.9" else 7 if "cut" in edits else 16
    assert projector.weight.shape[1] == projector.in_features == width


def test_the_projectors_weights_and_momentum_are_those_of_the_kept_channels():
    noted: dict[str, Tensor] = {}

    class Notes(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == EVENT:  # listed before ours: before; listed after: after
                weight = pl_module.get_submodule("_lc_Distillation_hint").weight
                side = "after" if noted else "before"
                noted[side] = weight.detach().clone()
                noted[f"{side} state"] = trainer.optimizers[0].state[weight]["exp_avg"].clone()

    run([Notes(), *callbacks("cut"), Notes()])
    assert torch.equal(noted["after"], noted["before"][:, KEEP])
    assert torch.equal(noted["after state"], noted["before state"][:, KEEP])


@pytest.mark.parametrize("edits", EDITS)
def test_soft_masks_follow_and_the_layers_that_a_swap_brought_are_soft_too(edits):
    pruning = Pruning(0.5, schedule=lc.Schedule(begin=1, end=2, every=4), mode="soft")
    kinds: dict[str, set[str]] = {}

    class Notes(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            kinds[trainer.global_step] = {
                type(m).__name__ for n, m in pl_module.named_modules() if hasattr(m, "weight") and "_lc" not in n
            }

    _, module = run([Edits(EDITS[edits]), pruning, Notes()])
    assert kinds[STEPS] == {"TransformedConv2d", "TransformedLinear"}
    masks = vars(module)["_lc_masks"]
    assert set(masks) == {n for n, p in module.named_parameters() if p.dim() > 1}
    for name, packed in masks.items():
        assert not module.get_parameter(name)[~unpack(packed)].any()


@pytest.mark.parametrize("edits", EDITS)
def test_a_resumed_fit_has_a_projector_of_the_new_size_and_equals_the_straight_one(edits, tmp_path: Path):
    _, straight = run(callbacks(edits), save=tmp_path / "a.ckpt")
    hint = Hint()
    trainer, resumed = run(callbacks(edits, hint), path=tmp_path / "a.ckpt")
    assert trainer.global_step == STEPS
    for (name, one), (other, two) in zip(straight.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(one, two), name


@pytest.mark.parametrize("edits", EDITS)
def test_a_file_loads_into_the_users_own_class_without_the_projector(edits, tmp_path: Path):
    trainer, module = run(callbacks(edits))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = lc.load_from_checkpoint(TinyNet, tmp_path / "a.ckpt")
    assert torch.equal(loaded.eval()(X), module.eval()(X))
    assert not any(name.startswith("_lc") for name, _ in loaded.named_parameters())


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("first", [True, False])
def test_averages_follow_with_their_projector(edits, first):
    average = EMAWeightAveraging(decay=0.5)
    ours = callbacks(edits)
    _, module = run([average, *ours] if first else [*ours, average])
    mine, theirs = dict(module.named_parameters()), dict(average._average_model.module.named_parameters())
    assert {n: p.shape for n, p in mine.items()} == {n: p.shape for n, p in theirs.items()}
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)


def test_a_term_that_cannot_follow_refuses_the_edit_and_everything_is_as_before():
    state: dict[str, Any] = {}

    class Notes(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            state["before"] = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            state["module"] = pl_module

    hint = Stubborn()
    with pytest.raises(lc.CompressionError, match=r"'hint' owns the module '_lc_Distillation_hint', sized to features"):
        run([Notes(), *callbacks("cut", hint)])
    now = dict(state["module"].named_parameters())
    assert all(torch.equal(now[n], p) for n, p in state["before"].items())
    assert manifest.edits_of(state["module"]) == []


def test_a_term_that_watches_other_layers_refuses_nothing():
    hint = Stubborn("net.0")
    trainer, module = run(callbacks("cut", hint))
    check(trainer, module, "cut", hint)


def test_user_objects_that_hold_replaced_parameters_are_named():
    class Holds(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.watched = {"weights": [pl_module.net[3].weight]}

    with pytest.warns(UserWarning, match=r"Holds.watched still refers to parameters that were replaced"):
        run([Edits([cut]), Holds()])

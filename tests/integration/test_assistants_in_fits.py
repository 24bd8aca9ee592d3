"""Chains in fits: equal to the loop written by hand, what files hold, who decides, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import staged
import torch
import torch.nn.functional as F
from bad_input import refuses
from staged import X, assistant, chain, drawn, second_assistant, wide
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import AssistantDistillation, CapacityGap, Distillation, DrawnAssistant, distill_chain
from lightning_compress.callbacks.testing import TinyNet, tiny_data, tiny_loader
from lightning_compress.errors import CompressionError

SETTINGS: dict[str, Any] = {**fits.QUIET, "num_sanity_val_steps": 0}


def by_hand(chain: list[nn.Module], at: list[int]) -> dict[str, Tensor]:
    """One loop; in each phase the next of the chain learns from the one before, with an optimizer of its own."""
    number, step = 0, 0
    optimizer = torch.optim.SGD(chain[1].parameters(), 1e-2, momentum=0.9)
    for _ in range(4):
        for x, y in tiny_loader():
            if step in at:
                number += 1
                optimizer = torch.optim.SGD(chain[number + 1].parameters(), 1e-2, momentum=0.9)
            with torch.no_grad():
                answers = chain[number].eval()(x)
            logits = chain[number + 1](x)
            loss = F.cross_entropy(logits, y) + lc.kd_loss(logits, answers, 2.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return dict(chain[-1].named_parameters())


def student() -> TinyNet:
    L.seed_everything(0, verbose=False)
    return TinyNet()


def test_a_chain_is_the_loop_written_by_hand() -> None:
    found = fits.fit(chain(assistant, second_assistant, at=[3, 7]))
    wanted = by_hand([wide(), assistant(), second_assistant(), student()], [3, 7])
    assert all(torch.equal(found["weights"][name], value) for name, value in wanted.items())


def test_in_a_phase_nothing_else_is_trained() -> None:
    """Weight decay and momentum leave a student alone that waits, and an assistant that teaches."""
    watched: dict[int, list[Any]] = {}

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            parts = [module.net, module._lc_AssistantDistillation_assistant0.module]
            watched[trainer.global_step] = [copy.deepcopy(dict(part.named_parameters())) for part in parts]

    class Decaying(TinyNet):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.1)

    fits.fit(chain(at=[5]), extra=[Watch()], model=Decaying)
    same = {
        step: [manifest.equal(a, b) for a, b in zip(watched[step], watched[step + 1], strict=True)]
        for step in range(15)
    }  # fmt: skip
    assert same == {step: [True, False] if step < 5 else [False, True] for step in range(15)}


def test_a_weight_of_zero_is_no_callback() -> None:
    none, zero = fits.fit("none"), fits.fit(chain(losses=[lc.KD(weight=0.0)]))
    assert manifest.equal(none["weights"], zero["weights"])
    assert none["losses"] == zero["losses"]


class Parts(L.LightningModule):
    """A named student, a loss with parameters beside it, two groups, and an optimizer over the student only."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TinyNet().net
        self.scale = nn.Parameter(torch.ones(()))
        self.net[3].bias.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]) * self.scale, batch[1])

    def configure_optimizers(self) -> Any:
        biases = [p for n, p in self.net.named_parameters() if n.endswith("bias")]
        weights = [p for n, p in self.net.named_parameters() if n.endswith("weight")]
        return torch.optim.SGD([{"params": weights}, {"params": biases, "lr": 0.05}, {"params": [self.scale]}], lr=0.01)


def test_a_named_student_is_left_as_it_was_found_and_assistants_join_its_groups() -> None:
    L.seed_everything(0, verbose=False)
    module = Parts()
    assert module.hparams == {}  # made when first asked
    net, before = module.net, sorted(vars(module))
    groups: list[list[int]] = []

    class Look(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            groups.extend([p.numel() for p in g["params"]] for g in trainer.optimizers[0].param_groups)

    ours = AssistantDistillation(wide(), [lambda: assistant().net], student="net", at=[5])  # type: ignore[list-item, return-value, union-attr]
    trainer = L.Trainer(callbacks=[ours, Look()], max_epochs=4, **SETTINGS)
    trainer.fit(module, tiny_loader())
    assert module.net is net
    assert sorted(vars(module)) == before
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == ["net.3.bias"]
    assert not any("_lc_" in name for name, _ in module.named_modules())
    wide_head = 20 * 4 * 4
    assert wide_head in groups[0]
    assert wide_head not in groups[1]
    assert groups[1].count(20) == 2  # biases of the assistant's two convolutions
    assert groups[2] == [1]


def test_the_same_trainer_goes_on_with_its_assistants() -> None:
    class Pause(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 4

    callback = chain(assistant, second_assistant, at=[6, 10])[0]
    trainer, module = L.Trainer(callbacks=[callback, Pause()], max_epochs=4, **SETTINGS), student()
    trainer.fit(module, tiny_loader())
    assert trainer.global_step == 4
    first = copy.deepcopy(callback._modules[0].state_dict())  # type: ignore[attr-defined]
    trainer.should_stop = False
    trainer.fit(module, tiny_loader())
    assert trainer.global_step == 16
    kept = [m.state_dict() for m in callback._modules]  # type: ignore[attr-defined]
    assert not manifest.equal(dict(kept[0]), dict(first))  # it went on to learn, ...
    assert not manifest.equal(dict(kept[1]), dict(second_assistant().state_dict()))  # ... and then the next did
    assert [d["outcome"] for d in callback.shared["decisions"]] == [1, 2]


def test_files_hold_assistants_only_while_they_are_needed_and_never_among_the_weights(tmp_path: Path) -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step in (2, 5, 9):
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.small.ckpt", weights_only=True)

    ours = chain(assistant, second_assistant, at=[4, 8])
    fits.fit(ours, extra=[Saves()])
    own = set(TinyNet().state_dict())
    for step, needed in ((2, {"0", "1"}), (5, {"0", "1"}), (9, {"1"})):
        checkpoint = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)
        assert set(checkpoint["state_dict"]) == own
        assert set(checkpoint["callbacks"][ours[0].state_key]["assistants"]) == needed
        small = torch.load(tmp_path / f"{step}.small.ckpt", weights_only=True)
        assert set(small["state_dict"]) == own
        assert "callbacks" not in small
        TinyNet.load_from_checkpoint(tmp_path / f"{step}.ckpt")  # strictly, without this package


def test_what_is_logged_says_the_phase() -> None:
    seen: list[tuple[float, bool]] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            logged = trainer.callback_metrics
            seen.append((float(logged["AssistantDistillation/phase"]), "AssistantDistillation/kd" in logged))

    fits.fit(chain(at=[5]), extra=[Look()])
    assert seen == [(float(step >= 5), True) for step in range(16)]


# ---------------------------------------------------------------------------------------------------------- drawn
@pytest.mark.parametrize("by", ["channels", "low_rank"])
def test_the_drawn_assistant_is_the_best_score_of_the_candidates(by: Any) -> None:
    callback = drawn(by=by)[0]
    fits.fit([callback])
    (record,) = [d["outcome"] for d in callback.shared["decisions"] if d["name"].endswith("/assistant")]
    scores = [m + 0.2 * (1 - s) for m, s in zip(record["metrics"], record["scales"], strict=True)]
    assert record["scale"] == record["scales"][scores.index(max(scores))]
    assert all(s <= asked + 0.02 for s, asked in zip(record["scales"], (0.75, 0.5), strict=True))
    size = sum(p.numel() for p in callback._modules[0].parameters())  # type: ignore[attr-defined]
    assert size / sum(p.numel() for p in wide().parameters()) == pytest.approx(record["scale"])


def test_a_drawn_assistant_comes_from_the_teacher_and_the_metric_is_what_it_says() -> None:
    spec = DrawnAssistant(scales=(0.5,), samples=64, labels=1)
    callback = AssistantDistillation(wide(), spec, losses=[lc.KD(2.0)], example_inputs=X)
    kept: list[nn.Module] = []

    class Look(L.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            kept.append(copy.deepcopy(module._lc_AssistantDistillation_assistant0.module))

    fits.fit([callback], extra=[Look()])
    x, y = tiny_data().tensors
    accuracy = float((kept[0].eval()(x).argmax(1) == y).double().mean())
    assert callback._drawn is not None
    assert callback._drawn["metrics"] == [accuracy]
    keep = callback._drawn["edits"][0]["slices"]["net.0.weight"]["0"]
    assert torch.equal(kept[0].net[0].weight, wide().net[0].weight[keep])  # type: ignore[index, union-attr]


def test_a_drawn_assistant_lies_between_teacher_and_student() -> None:
    """A candidate that is no larger than the student is left out; if none is left there is nothing to draw."""
    spec = DrawnAssistant(scales=(0.5, 0.02), samples=64, tradeoff=10.0)  # by its score the smallest would win
    callback = AssistantDistillation(wide(), spec, losses=[lc.KD(2.0)], example_inputs=X)
    fits.fit([callback])
    assert callback._drawn is not None
    assert callback._drawn["asked"] == [0.5]
    none = AssistantDistillation(wide(), DrawnAssistant(scales=(0.02,), samples=64), example_inputs=X)
    with pytest.raises(lc.CompressionError, match="nothing between itself and the student"):
        fits.fit([none])


# ------------------------------------------------------------------------------------------------------------ gap
def test_a_gap_starts_the_chain_once() -> None:
    ours = staged.chain_by_gap()
    fits.fit(ours)
    taken = [(d["step"], d["name"], d["outcome"]) for d in ours[0].shared["decisions"]]
    assert [name for _, name, _ in taken] == [f"AssistantDistillation/{what}" for what in ("gap", "phase", "phase")]
    assert [outcome for _, _, outcome in taken[1:]] == [1, 2]
    assert taken[1][0] == taken[0][0] + 1  # the first step after it


def test_without_a_gap_it_is_plain_distillation() -> None:
    never = CapacityGap("AssistantDistillation", every=1, rule=lc.GapRule(window=100))
    found = fits.fit([*chain(when="gap"), never])
    wanted = fits.fit([Distillation(wide(), losses=[lc.KD(2.0)])])
    assert manifest.equal(found["weights"], wanted["weights"])
    assert len(never.history) == 16


def test_the_monitor_measures_what_the_step_computed_and_changes_nothing() -> None:
    gap = CapacityGap("Distillation", every=4, until="10%")
    logged: list[dict[str, float]] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("CapacityGap")})

    found = fits.fit([gap, *fits.TECHNIQUES["distillation"]()], extra=[Look()])
    wanted = fits.fit("distillation")
    assert manifest.equal(found["weights"], wanted["weights"])
    assert [row[0] for row in gap.history] == [0, 4, 8, 12]
    fresh, (x, y) = student(), next(iter(tiny_loader()))
    logits, answers = fresh(x), fits.teacher().eval()(x)
    assert gap.history[0][1] == float((logits.argmax(1) == answers.argmax(1)).double().mean())
    g, h = (
        torch.autograd.grad(loss, logits, retain_graph=True)[0]
        for loss in (F.cross_entropy(logits, y), lc.kd_loss(logits, answers.detach(), 2.0))
    )
    assert gap.history[0][2] == pytest.approx(float(F.cosine_similarity(g.flatten(), h.flatten(), 0)), rel=1e-5)
    assert set(logged[0]) == {f"CapacityGap/{what}" for what in ("agreement", "slope", "gradient_cosine")}
    assert gap.shared["decisions"] == []  # not after `until`


# -------------------------------------------------------------------------------------------------- several fits
def test_several_fits_are_one_after_the_other_by_hand(tmp_path: Path) -> None:
    def fitted(teacher: nn.Module, module: L.LightningModule) -> L.LightningModule:
        L.Trainer(callbacks=[Distillation(teacher)], max_epochs=1, **SETTINGS).fit(module, tiny_loader())
        return module

    def make_trainer(callbacks: list[L.Callback]) -> L.Trainer:
        return L.Trainer(callbacks=callbacks, max_epochs=1, **SETTINGS)

    makers: list[Any] = [assistant, lambda: staged.made(16, 3)]
    found = distill_chain(wide(), makers, make_trainer, tiny_loader(), dirpath=tmp_path)
    wanted = fitted(fitted(wide(), assistant()), staged.made(16, 3))  # type: ignore[arg-type]
    assert manifest.equal(dict(found[-1].state_dict()), dict(wanted.state_dict()))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.ckpt", "1.ckpt"]
    with pytest.raises(CompressionError, match="no best file"):
        distill_chain(wide(), makers, make_trainer, tiny_loader(), keep="best", dirpath=tmp_path)
    with pytest.raises(CompressionError, match="assistant 0 is larger than the teacher"):
        distill_chain(assistant(), [wide, *makers], make_trainer, tiny_loader())  # type: ignore[list-item]


# ------------------------------------------------------------------------------------------------------- refusals
class FiveClasses(TinyNet):
    def __init__(self) -> None:
        super().__init__(width=18)
        self.net[-1] = nn.Linear(4 * 18, 5)


def test_chains_that_cannot_be() -> None:
    refuses(TinyNet(), r"assistant 0 is larger than the teacher.*Parameters", *chain(lambda: TinyNet(width=40)))
    refuses(TinyNet(), r"assistant 0 answers with shape \(2, 5\) and the student with \(2, 4\)", *chain(FiveClasses))
    refuses(TinyNet(), "add CapacityGap.watch='AssistantDistillation'", *chain(when="gap"))
    refuses(TinyNet(), "'Distilation', and no distillation callback", CapacityGap("Distilation"), *chain())
    refuses(TinyNet(), "3 steps are too few|too few for 1 assistants", *chain(), max_epochs=-1, max_steps=1)
    refuses(TinyNet(), "phases begin one after the other; at=.5, 3.", *chain(assistant, second_assistant, at=[5, 3]))


def test_another_teacher_is_refused_on_resume(tmp_path: Path) -> None:
    trainer = L.Trainer(callbacks=chain(at=[2]), max_epochs=1, **SETTINGS)
    trainer.fit(TinyNet(), tiny_loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = AssistantDistillation(staged.made(24, 3), [assistant], at=[2])
    again = L.Trainer(callbacks=[other], max_epochs=2, **SETTINGS)
    with pytest.raises(CompressionError, match="trained with another teacher"):
        again.fit(TinyNet(), tiny_loader(), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"teacher": "initial"}, ValueError, "trained model of its own"),
        ({"teacher": lc.EMATeacher()}, ValueError, "trained model of its own"),
        ({"assistants": []}, ValueError, "empty list"),
        ({"assistants": nn.Linear(1, 1)}, TypeError, "assistants is a list"),
        ({"assistants": [3]}, TypeError, "a function that makes it; got 3"),
        ({"placement": "shard"}, ValueError, "cannot be sharded"),
        ({"student_share": 1}, ValueError, "share of the steps"),
        ({"at": [3, 4]}, ValueError, "so 1 for 1 assistants"),
        ({"when": "later"}, ValueError, "when is one of"),
        ({"learning_rate": "again"}, ValueError, "learning_rate is one of"),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        AssistantDistillation(**{"teacher": wide(), "assistants": [assistant], **arguments})


@pytest.mark.parametrize("bad", [{"scales": ()}, {"scales": (1.0,)}, {"by": "width"}, {"tradeoff": -1}, {"samples": 0}])
def test_candidates_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        DrawnAssistant(**bad)

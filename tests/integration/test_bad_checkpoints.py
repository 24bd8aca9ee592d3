"""Damaged, foreign and unfitting files, and full disks: a clear error, and the model and the files as before."""

from __future__ import annotations

import copy
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from bad_input import EARLY, X, full_disk, refuses, trainer, unchanged
from safetensors.torch import save_file
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import ChannelPruning, Distillation, ExactResume, Pruning
from lightning_compress.callbacks.testing import TinyNet, tiny_loader
from lightning_compress.errors import CompressionError


class Other(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good files: dense, narrow (other hyperparameters), other (another class), cut, masked."""
    folder = tmp_path_factory.mktemp("made")
    fits: list[tuple[str, L.LightningModule, list[L.Callback]]] = [
        ("dense", TinyNet(), [ExactResume()]),
        ("narrow", TinyNet(width=8), []),
        ("other", Other(), []),
        ("cut", TinyNet(), [ChannelPruning(0.5, schedule=EARLY)]),
        ("masked", TinyNet(), [Pruning(0.5, schedule=EARLY)]),
    ]
    for name, module, callbacks in fits:
        fitter = trainer(*callbacks)
        fitter.fit(module, tiny_loader())
        fitter.save_checkpoint(folder / f"{name}.ckpt")
        lc.export(module, folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def changed(name: str, change: Callable[[Any], Any]) -> str:
    """A copy of a checkpoint in which something is wrong."""
    checkpoint = torch.load(f"{name}.ckpt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, "bad.ckpt")
    return "bad.ckpt"


def write(content: bytes) -> str:
    Path("bad.ckpt").write_bytes(content)
    return "bad.ckpt"


def saved(thing: Any) -> str:
    torch.save(thing, "bad.ckpt")
    return "bad.ckpt"


def record(change: Callable[[dict[str, Any]], Any], name: str = "cut") -> Callable[[], str]:
    return lambda: changed(name, lambda checkpoint: change(checkpoint["lightning_compress"]))


UNREADABLE: list[tuple[str, Callable[[], str], str]] = [
    ("missing", lambda: "nowhere.ckpt", "no checkpoint at 'nowhere.ckpt'"),
    ("folder", lambda: str(Path.cwd()), "is a folder and no sharded checkpoint"),
    ("empty", lambda: write(b""), "is empty: it was probably written when the disk was full"),
    ("text", lambda: write(b"hello"), "cannot be read as a checkpoint.*no checkpoint at all"),
    ("cut off", lambda: write(Path("dense.ckpt").read_bytes()[:2000]), "cannot be read.*damaged, incomplete"),
    ("a list", lambda: saved([1, 2]), "is no Lightning checkpoint.*save one with `trainer.save_checkpoint`"),
    ("a state dict", lambda: saved(TinyNet().state_dict()), "is no Lightning checkpoint.*no 'state_dict'"),
    ("a module", lambda: saved(TinyNet()), "cannot be read.*TinyNet was not an allowed.*unsafe to unpickle"),
    ("no tensors", lambda: saved({"state_dict": [1]}), "'state_dict' in 'bad.ckpt' is a list"),
]
FOREIGN: list[tuple[str, Callable[[], str], str]] = [
    ("a text", lambda: changed("cut", lambda c: c.update(lightning_compress="x")), "a str, no dictionary"),
    ("version", record(lambda r: r.update(version=9)), "version 9.*update lightning-compress"),
    ("no version", record(lambda r: r.pop("version")), "has no version"),
    ("edits", record(lambda r: r.update(edits="x")), "no list of dictionaries"),
    ("kind", record(lambda r: r["edits"][0].update(kind="magic.cut")), "'magic.cut'.*does not know"),
    ("name", record(lambda r: rename(r["edits"][0]["slices"])), "does not have: 'net.77.weight'"),
    ("index", record(lambda r: far(r["edits"][0]["slices"])), r"'net.0.weight' has shape.*cannot be cut.*largest 99"),
    ("mask name", record(lambda r: rename(r["masks"]), "masked"), "a mask of 'net.77.weight', which the model"),
    ("mask shape", record(lambda r: swap(r["masks"]), "masked"), r"mask of 'net.\d.weight' has shape.*its parameter"),
    ("mask", record(lambda r: r["masks"].update({"net.9.weight": {}}), "masked"), "packed mask lacks.*damaged"),
]  # fmt: skip


def rename(names: dict[str, Any]) -> None:
    names["net.77.weight"] = names.pop("net.9.weight")


def far(slices: dict[str, Any]) -> None:
    slices["net.0.weight"]["0"] = torch.tensor([0, 99])


def swap(masks: dict[str, Any]) -> None:
    masks["net.0.weight"], masks["net.9.weight"] = masks["net.9.weight"], masks["net.0.weight"]


ALL = [pytest.param(make, says, id=name) for name, make, says in UNREADABLE + FOREIGN]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("make", "says"), ALL)
def test_load(make: Callable[[], str], says: str) -> None:
    module, path = TinyNet(), make()
    with unchanged(module), pytest.raises(CompressionError, match=says):
        lc.load(module, path)
    with pytest.raises(CompressionError, match=says):
        lc.load_from_checkpoint(TinyNet, path)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("make", "says"), ALL)
def test_resume_and_teach(make: Callable[[], str], says: str) -> None:
    path = make()
    refuses(TinyNet(), says, Pruning(0.5, schedule=EARLY), ckpt_path=path, max_epochs=4)
    says = "no checkpoint at 'nowhere.ckpt'; give the path of one, a module" if path == "nowhere.ckpt" else says
    refuses(TinyNet(), says, Distillation(path))


@pytest.mark.usefixtures("here")
def test_files_that_do_not_fit() -> None:
    """Another class, other widths, a missing name, a wrong prefix: nothing is loaded in part."""
    cases: list[tuple[nn.Module, str, str, str]] = [
        (TinyNet(), "other.ckpt", "", "does not fit TinyNet: 8 names are on one side only, for example"),
        (TinyNet(), "narrow.ckpt", "", r"'net.0.weight' has shape \(8, 1, 3, 3\) in the file and \(16, 1, 3, 3\)"),
        (TinyNet(width=8), "cut.ckpt", "", r"does not fit TinyNet: 'net.0.weight' has shape \(8, 1, 3, 3\)"),
        (TinyNet().net, "dense.ckpt", "", r"does not fit Sequential \(did you mean prefix='net.'\?\)"),
        (TinyNet().net, "cut.ckpt", "nett.", r"did you mean prefix='net.'"),
        (TinyNet(), "other.safetensors", "", "names are on one side only"),
    ]
    for module, path, prefix, says in cases:
        with unchanged(module), pytest.raises(CompressionError, match=says):
            lc.load(module, path, prefix=prefix)
    bad = changed("cut", lambda c: c["state_dict"].pop("net.9.bias"))
    module = TinyNet()
    with (
        unchanged(module),
        pytest.raises(CompressionError, match=r"1 names are on one side.*'net.9.bias' in the model"),
    ):
        lc.load(module, bad)
    with pytest.raises(CompressionError, match=r"(?s)does not fit TinyNet.*Missing.*net.9.bias.*same hyperparam"):
        lc.load_from_checkpoint(TinyNet, bad)
    with pytest.raises(CompressionError, match=r"(?s)does not fit Other.*Is it of this class"):
        lc.load_from_checkpoint(Other, "dense.ckpt")
    with pytest.raises(CompressionError, match=r"Lightning did not write.*use `load"):
        lc.load_from_checkpoint(TinyNet, saved({"state_dict": TinyNet().state_dict()}))
    with pytest.raises(CompressionError, match=r"(?s)teacher 'narrow.ckpt' does not fit TinyNet.*pass the module"):
        trainer(Distillation("narrow.ckpt")).fit(TinyNet(), tiny_loader())


@pytest.mark.usefixtures("here")
def test_a_fit_that_cannot_load_weights_undoes_the_cuts_of_the_checkpoint() -> None:
    bad = changed("cut", lambda c: c["state_dict"].update({"net.9.bias": torch.zeros(7)}))
    says = "size mismatch for net.9.bias"  # Lightning's own words
    refuses(TinyNet(), says, Pruning(0.5, schedule=EARLY), kind=RuntimeError, ckpt_path=bad, max_epochs=4)


@pytest.mark.usefixtures("here")
def test_a_plain_checkpoint_is_a_warm_start() -> None:
    """One that was written without any of our callbacks."""
    fitter = trainer()
    fitter.fit(TinyNet(), tiny_loader())
    fitter.save_checkpoint("plain.ckpt")
    module = TinyNet()
    resumed = trainer(Pruning(0.5, schedule=lc.Schedule(begin=9, every=1)), max_epochs=4)
    resumed.fit(module, tiny_loader(), ckpt_path="plain.ckpt")
    assert resumed.global_step == 16
    assert module.__dict__["_lc_masks"]


@pytest.mark.usefixtures("here")
def test_models_that_were_already_edited() -> None:
    module = lc.load(TinyNet(), "cut.ckpt")
    lc.load(module, "cut.ckpt")  # the same edits: fine
    for path in ("dense.ckpt", "narrow.ckpt"):
        with unchanged(module), pytest.raises(CompressionError, match=r"already carries.*build a fresh model"):
            lc.load(module, path)
    says = r"already carries .* edits.*with 0 edits.*build a fresh model"
    refuses(module, says, ChannelPruning(0.5, schedule=EARLY), ckpt_path="dense.ckpt", max_epochs=4)
    says = r"already carries compression edits.*pass teacher=lc.load_from_checkpoint\(TinyNet, path\)"
    refuses(module, says, Distillation("dense.ckpt"))


@pytest.mark.usefixtures("here")
def test_safetensors() -> None:
    files: list[tuple[str, Callable[[str], Any], str]] = [
        ("missing.safetensors", lambda path: None, "cannot be read as safetensors.*check the path"),
        ("short.safetensors", lambda path: Path(path).write_bytes(b"xx"), "cannot be read as safetensors"),
        ("part.safetensors", lambda path: Path(path).write_bytes(Path("cut.safetensors").read_bytes()[:-99]), "inc"),
        ("text.safetensors", lambda path: save_file(X_NET, path, {"lightning_compress": "{no"}), "record of comp"),
        ("list.safetensors", lambda path: save_file(X_NET, path, {"lightning_compress": "[1]"}), "record of comp"),
        ("alien.safetensors", lambda path: save_file({"x": X}, path), "7 names are on one side only"),
    ]  # fmt: skip
    for path, make, says in files:
        make(path)
        module = TinyNet()
        with unchanged(module), pytest.raises(CompressionError, match=says):
            lc.load(module, path)


X_NET = TinyNet().state_dict()


def test_export_to_a_folder() -> None:
    Path("a.safetensors").mkdir()
    with pytest.raises(CompressionError, match="is a folder; give the path of a file"):
        lc.export(TinyNet(), "a.safetensors")


def test_export_that_cannot_be_traced(here: Path) -> None:
    module = TinyNet()
    for inputs, says in [
        (None, "needs example inputs; pass `example_inputs="),
        (torch.zeros(2, 3, 8, 8), "cannot trace"),
    ]:
        with unchanged(module), pytest.raises(CompressionError, match=says):
            lc.export(module, here / "new.pt2", inputs)


# --------------------------------------------------------------------------------------------------- callbacks' state
RANDOM: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("no ranks", lambda s: s.update(ranks=[]), "random state of 0 processes, and now there are 1; exact resume needs"),
    ("two ranks", lambda s: s["ranks"].append(s["ranks"][0]), "of 2 processes, and now there are 1.*leave ExactResume"),
    ("empty", lambda s: s.update(ranks=[{}]), "random state in the checkpoint is damaged.*leave ExactResume out"),
    ("text", lambda s: s.update(ranks="x"), "random state in the checkpoint is damaged"),
]  # fmt: skip


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("change", "says"), [c[1:] for c in RANDOM], ids=[c[0] for c in RANDOM])
def test_random_state(change: Callable[[dict[str, Any]], Any], says: str) -> None:
    bad = changed("dense", lambda c: change(c["callbacks"]["ExactResume"]))
    with pytest.raises(CompressionError, match=says):
        trainer(ExactResume(), max_epochs=4).fit(TinyNet(), tiny_loader(), ckpt_path=bad)


@pytest.mark.usefixtures("here")
def test_state_of_a_technique() -> None:
    bad = changed("masked", lambda c: c["callbacks"]["Pruning{'name': 'Pruning'}"].update(schedule=3))
    with pytest.raises(
        CompressionError, match=r"state of Pruning in the checkpoint cannot be read.*of another version"
    ):
        trainer(Pruning(0.5, schedule=EARLY), max_epochs=4).fit(TinyNet(), tiny_loader(), ckpt_path=bad)


# ---------------------------------------------------------------------------------------------------------- full disk
def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    module = TinyNet()
    fitter = trainer(Pruning(0.5, schedule=EARLY))
    fitter.fit(module, tiny_loader())
    fitter.save_checkpoint("a.ckpt")
    for name in ("a.safetensors", "a.pt2"):
        lc.export(module, name, X)
    writes: list[Callable[[], Any]] = [
        lambda: fitter.save_checkpoint("a.ckpt"), lambda: fitter.save_checkpoint("b.ckpt"),
        lambda: lc.export(module, "a.safetensors"), lambda: lc.export(module, "b.safetensors"),
        lambda: lc.export(module, "a.pt2", X), lambda: lc.strip("a.ckpt"),
        lambda: lc.strip("a.ckpt", "a.ckpt"),
    ]  # fmt: skip
    for write in writes:
        with unchanged(module), full_disk(), pytest.raises(OSError, match=r"(too large|No space)"):
            write()

    def no_space(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", no_space)
        for write in (writes[0], writes[-1]):
            with unchanged(module), pytest.raises(OSError, match="No space left"):
                write()
    fresh = lc.load(TinyNet(), "a.ckpt")
    assert manifest.equal(copy.deepcopy(fresh.state_dict()), module.state_dict())

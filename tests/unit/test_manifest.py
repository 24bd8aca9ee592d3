"""The record of edits: digest, diff, replay, parts of it, and loading by it; all or nothing."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import save

import lightning_compress as lc
from lightning_compress import manifest, reading
from lightning_compress.errors import CompressionError
from lightning_compress.pruning.packing import pack
from lightning_compress.surgery import Journal

FIRST = {
    "kind": "channels.cut",
    "slices": {"0.weight": {"0": torch.tensor([0, 2])}, "0.bias": {"0": torch.tensor([0, 2])},
               "1.weight": {"1": torch.tensor([0, 2])}},
    "attributes": {"0": {"out_features": 2}, "1": {"in_features": 2}},
}  # fmt: skip
SECOND = {
    "kind": "channels.cut",
    "slices": {"1.weight": {"0": torch.tensor([1, 3])}, "1.bias": {"0": torch.tensor([1, 3])}},
    "attributes": {"1": {"out_features": 2}},
}  # fmt: skip
OTHER = {**SECOND, "slices": {"1.weight": {"0": torch.tensor([0, 3])}, "1.bias": {"0": torch.tensor([0, 3])}}}


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 4))


def record(*edits: Any, **more: Any) -> dict[str, Any]:
    return {"version": 1, "edits": list(edits), **more}


def cut(*edits: Any, seed: int = 1) -> nn.Sequential:
    module = net(seed)
    manifest.replay(module, record(*edits))
    return module


def saved(path: Path, module: nn.Module, prefix: str = "", **more: Any) -> Path:
    state = {prefix + name: value for name, value in module.state_dict().items()}
    found = {"state_dict": state, manifest.KEY: {**manifest.of(module), **more.pop("masks_of", {})}, **more}
    torch.save(found, path)
    return path


def snapshot(module: nn.Module) -> dict[str, Any]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        "objects": {name: id(value) for name, value in tensors.items()},
        "values": {name: value.detach().clone() for name, value in tensors.items()},
        "attributes": [str(module)],
        "edits": manifest.edits_of(module),
        "vars": sorted(vars(module)),
    }


@pytest.fixture
def unchanged() -> Callable[[nn.Module], Callable[[], None]]:
    def remember(module: nn.Module) -> Callable[[], None]:
        before = snapshot(module)

        def check() -> None:
            assert manifest.equal(snapshot(module), before)

        return check

    return remember


# ---------------------------------------------------------------------------------------------------- digest and diff
PLAIN = {"a": [1, 2.5, True, None, "x"], "b": {"t": torch.arange(3)}}


def test_equal_data_have_one_digest_whatever_the_order_and_the_layout() -> None:
    other = {"b": {"t": torch.arange(6)[::2] // 2}, "a": (1, 2.5, True, None, "x")}
    assert manifest.digest(PLAIN) == manifest.digest(other)
    assert manifest.digest(torch.ones(2, 3).T.contiguous()) == manifest.digest(torch.ones(3, 2))


@pytest.mark.parametrize(
    "other",
    [
        {**PLAIN, "c": None}, {"a": PLAIN["a"]}, {**PLAIN, "a": [1, 2.5, True, None]},
        {**PLAIN, "a": [1.0, 2.5, True, None, "x"]},
        {**PLAIN, "a": [1, 2.5, 1, None, "x"]}, {**PLAIN, "b": {"t": torch.arange(3).int()}},
        {**PLAIN, "b": {"t": torch.arange(3)[None]}}, {**PLAIN, "b": {"t": torch.tensor([0, 1, 3])}},
        {**PLAIN, "b": [{"t": torch.arange(3)}]},
    ],
)  # fmt: skip
def test_different_data_have_different_digests(other: Any) -> None:
    assert not manifest.equal(PLAIN, other)


def test_digests_are_the_same_in_another_process() -> None:
    code = (
        "import torch; from lightning_compress import manifest; print(manifest.digest({'a': [torch.arange(3), 1.5]}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == manifest.digest({"a": [torch.arange(3), 1.5]})


def test_values_that_are_equal_only_by_comparison_are_different() -> None:
    assert not manifest.equal(torch.tensor(0.0), torch.tensor(-0.0))
    assert manifest.equal(torch.tensor(float("nan")), torch.tensor(float("nan")))
    assert manifest.equal(torch.empty(0, 3), torch.empty(0, 3))
    assert not manifest.equal(torch.empty(0, 3), torch.empty(3, 0))
    assert not manifest.equal(torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.float16))


def test_diff_names_what_only_one_side_has() -> None:
    assert manifest.diff(record(FIRST), record(FIRST)) == []
    assert manifest.diff(None, record(FIRST)) == ["+ edit 0: channels.cut"]
    assert manifest.diff(record(FIRST, SECOND), record(FIRST, OTHER)) == [
        "- edit 1: channels.cut",
        "+ edit 1: channels.cut",
    ]
    assert manifest.diff(record(FIRST, SECOND), record(FIRST)) == ["- edit 1: channels.cut"]


# -------------------------------------------------------------------------------------------------------------- replay
def test_replay_is_idempotent_and_goes_on_where_it_stopped() -> None:
    module = net()
    assert manifest.replay(module, record(FIRST)) == 1
    weight = module[0].weight
    assert manifest.replay(module, record(FIRST)) == 0
    assert module[0].weight is weight
    assert manifest.replay(module, record(FIRST, SECOND)) == 1
    assert manifest.equal(manifest.of(module), record(FIRST, SECOND))
    assert module(torch.ones(1, 5)).shape == (1, 2)


def test_replay_of_all_at_once_is_replay_one_by_one() -> None:
    step = net()
    manifest.replay(step, record(FIRST))
    manifest.replay(step, record(FIRST, SECOND))
    assert manifest.equal(dict(cut(FIRST, SECOND, seed=0).state_dict()), dict(step.state_dict()))


@pytest.mark.parametrize("nothing", [None, {}, record()])
def test_no_edits_change_nothing(nothing: Any, unchanged: Any) -> None:
    module = net()
    check = unchanged(module)
    assert manifest.replay(module, nothing) == 0
    check()


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (record(FIRST), "does not start with"),  # fewer edits than the model has
        (record(FIRST, OTHER), "does not start with"),
        (record(SECOND, FIRST), "does not start with"),
        (record(FIRST, SECOND, {"kind": "magic.cut"}), "'magic.cut'"),
        (record(FIRST, SECOND, {**SECOND, "slices": {"9.weight": {"0": torch.tensor([0])}}}), "'9.weight'"),
        (record(FIRST, SECOND, {**SECOND, "slices": {"1.bias": {"0": torch.tensor([7])}}}), "'1.bias'"),
        ({"version": 2, "edits": []}, "version 2.*update"),
        ({"edits": []}, "no version"),
        ({"version": "1", "edits": []}, "no version"),
        (record(1), "no list of dictionaries"),
        ({"version": 1, "edits": {}}, "no list of dictionaries"),
        ([], "no dictionary"),
    ],
)
def test_what_cannot_be_replayed_is_refused_and_changes_nothing(bad: Any, says: str, unchanged: Any) -> None:
    module = cut(FIRST, SECOND)
    check = unchanged(module)
    with pytest.raises(CompressionError, match=says):
        manifest.replay(module, bad)
    check()


def test_the_last_edit_of_several_fails_and_the_first_ones_are_undone(unchanged: Any) -> None:
    module = net()
    check = unchanged(module)
    with pytest.raises(CompressionError, match="unknown"):
        manifest.replay(module, record(FIRST, SECOND, {**SECOND, "slices": {"unknown": {"0": torch.tensor([0])}}}))
    check()


def test_a_replay_can_be_undone_later(unchanged: Any) -> None:
    module, journal = net(), Journal()
    check = unchanged(module)
    manifest.replay(module, record(FIRST, SECOND), journal)
    journal.undo()
    check()


def test_the_record_is_a_copy_and_follows_copies_and_pickles_of_the_module(tmp_path: Path) -> None:
    module = cut(FIRST)
    manifest.of(module)["edits"].clear()
    assert len(manifest.edits_of(module)) == 1
    torch.save(module, tmp_path / "module.pt")
    for other in (copy.deepcopy(module), torch.load(tmp_path / "module.pt", weights_only=False)):
        manifest.replay(other, record(FIRST, SECOND))
        assert len(manifest.edits_of(other)) == 2
    assert len(manifest.edits_of(module)) == 1


# ------------------------------------------------------------------------------------------------------- parts of it
def test_a_part_below_a_prefix() -> None:
    both = {
        "kind": "channels.cut", "by": "me",
        "slices": {"net.0.weight": {"0": torch.tensor([0])}, "head.weight": {"1": torch.tensor([0])}},
        "attributes": {"net.0": {"out_features": 1}, "head": {"in_features": 1}},
    }  # fmt: skip
    elsewhere = {"kind": "channels.cut", "slices": {"head.weight": {"0": torch.tensor([0])}}, "attributes": {}}
    whole = record(both, elsewhere, masks={"net.0.weight": 1, "network.weight": 2})
    part = manifest.without_prefix(whole, "net.")
    wanted = {
        "kind": "channels.cut", "by": "me",
        "slices": {"0.weight": {"0": torch.tensor([0])}}, "attributes": {"0": {"out_features": 1}},
    }  # fmt: skip
    assert manifest.equal(part, record(wanted, masks={"0.weight": 1}))
    assert manifest.without_prefix(None, "net.") is None
    assert manifest.equal(manifest.without_prefix(whole, ""), whole)


def test_our_own_modules_are_left_out_and_versions_stay() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.BatchNorm1d(2))
            self._lc_kd_projector = nn.Linear(2, 2)

    state = Whole().state_dict()
    plain = manifest.without_auxiliary(state)
    assert all(name.startswith("net.") for name in plain)
    assert plain._metadata["net.0"] == {"version": 2}  # type: ignore[attr-defined]
    part = manifest.part_of_state(state, "net.")
    assert sorted(part) == sorted(nn.Sequential(nn.BatchNorm1d(2)).state_dict())
    assert part._metadata["0"] == {"version": 2}  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------------------------- load
def test_load_builds_the_structure_and_fills_it(tmp_path: Path) -> None:
    wanted = cut(FIRST, SECOND)
    loaded = net(5)
    assert lc.load(loaded, saved(tmp_path / "a.ckpt", wanted)) is loaded
    assert manifest.equal(dict(loaded.state_dict()), dict(wanted.state_dict()))
    assert manifest.equal(manifest.of(loaded), manifest.of(wanted))
    lc.load(loaded, tmp_path / "a.ckpt")  # again, into the smaller one


def test_load_goes_on_from_an_earlier_file_but_not_back(tmp_path: Path, unchanged: Any) -> None:
    early, late = saved(tmp_path / "early.ckpt", cut(FIRST)), saved(tmp_path / "late.ckpt", cut(FIRST, SECOND))
    module = lc.load(lc.load(net(), early), late)
    check = unchanged(module)
    with pytest.raises(CompressionError, match="build a fresh model"):
        lc.load(module, early)
    check()


@pytest.mark.parametrize("prefix", ["net.", "model.deep.net."])
def test_load_a_part_of_a_lightning_module(prefix: str, tmp_path: Path) -> None:
    class Whole(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.net, self.head, self._lc_helper = net(seed), nn.Linear(4, 2), nn.Linear(1, 1)

    whole = Whole(1)
    edits = [{**e, "slices": {f"net.{k}": v for k, v in e["slices"].items()},
              "attributes": {f"net.{k}": v for k, v in e["attributes"].items()}} for e in (FIRST, SECOND)]  # fmt: skip
    edits[1]["slices"]["head.weight"] = {"1": torch.tensor([1, 3])}
    manifest.replay(whole, record(*edits))
    start = prefix.removesuffix("net.")
    renamed = manifest.without_prefix(record(*edits), "")
    for edit in renamed["edits"]:
        for field in ("slices", "attributes"):
            edit[field] = {start + name: value for name, value in edit[field].items()}
    state = {start + name: value for name, value in whole.state_dict().items()}
    torch.save({"state_dict": state, manifest.KEY: renamed}, tmp_path / "a.ckpt")
    part = lc.load(net(3), tmp_path / "a.ckpt", prefix=prefix)
    assert manifest.equal(dict(part.state_dict()), dict(whole.net.state_dict()))
    with pytest.raises(CompressionError, match=f"did you mean prefix='{prefix}'"):
        lc.load(net(3), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="ends with a dot"):
        lc.load(net(3), tmp_path / "a.ckpt", prefix="net")


def test_load_applies_masks(tmp_path: Path) -> None:
    module = cut(FIRST)
    mask = torch.tensor([[True, False]] * 4)
    path = saved(tmp_path / "a.ckpt", module, masks_of={"masks": {"1.weight": pack(mask)}})
    assert torch.equal(lc.load(net(), path)[1].weight, module[1].weight * mask)


def without_name(found: dict[str, Any]) -> None:
    del found["state_dict"]["1.bias"]


def with_another_name(found: dict[str, Any]) -> None:
    found["state_dict"]["2.bias"] = torch.ones(1)


def of_another_shape(found: dict[str, Any]) -> None:
    found["state_dict"]["1.bias"] = torch.ones(9)


def with_an_edit_that_does_not_fit(found: dict[str, Any]) -> None:
    found[manifest.KEY]["edits"][1]["slices"] = {"1.bias": {"0": torch.tensor([8])}}


def with_a_mask_of_another_shape(found: dict[str, Any]) -> None:
    found[manifest.KEY]["masks"] = {"1.weight": pack(torch.ones(9, 9, dtype=torch.bool))}


def with_a_mask_of_another_name(found: dict[str, Any]) -> None:
    found[manifest.KEY]["masks"] = {"7.weight": pack(torch.ones(9, 9, dtype=torch.bool))}


def with_masks_that_are_none(found: dict[str, Any]) -> None:
    found[manifest.KEY]["masks"] = {"1.weight": torch.ones(2)}


def from_the_future(found: dict[str, Any]) -> None:
    found[manifest.KEY]["version"] = 9


def foreign(found: dict[str, Any]) -> None:
    found[manifest.KEY] = "mine"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_name, "'1.bias' in the model"), (with_another_name, "'2.bias' in the file"),
        (of_another_shape, r"\(9,\) in the file and \(2,\) in the model"), (with_an_edit_that_does_not_fit, "'1.bias'"),
        (with_a_mask_of_another_shape, r"\(9, 9\)"), (with_a_mask_of_another_name, "'7.weight'"),
        (with_masks_that_are_none, "no dictionary of masks"), (from_the_future, "version 9"), (foreign, "a str"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_before_anything_changes(
    damage: Callable[[dict[str, Any]], None], says: str, tmp_path: Path, unchanged: Any
) -> None:
    found = {"state_dict": cut(FIRST, SECOND).state_dict(), manifest.KEY: copy.deepcopy(record(FIRST, SECOND))}
    damage(found)
    torch.save(found, tmp_path / "a.ckpt")
    module = net(3)
    check = unchanged(module)
    with pytest.raises(CompressionError, match=says):
        lc.load(module, tmp_path / "a.ckpt")
    check()


class Migrates(nn.Linear):
    """Reads older states under another name, by the version that the state dict carries, as torchvision's MNASNet."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *args: Any) -> None:
        if metadata.get("version") not in (1, 2):
            raise ValueError(f"version {metadata.get('version')} is unknown")
        if metadata["version"] == 1:
            state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")
        super()._load_from_state_dict(state, prefix, metadata, *args)


@pytest.mark.parametrize("prefix", ["", "net."])
def test_modules_that_migrate_older_states(prefix: str, tmp_path: Path) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(Migrates(2, 2))

    whole = Whole()
    source = whole if prefix else whole.net
    torch.save({"state_dict": source.state_dict()}, tmp_path / "new.ckpt")
    assert lc.load(nn.Sequential(Migrates(2, 2)), tmp_path / "new.ckpt", prefix)[0].weight.equal(whole.net[0].weight)
    old = source.state_dict()
    old[f"{prefix}0.kernel"] = old.pop(f"{prefix}0.weight")
    old._metadata[f"{prefix}0"]["version"] = 1
    torch.save({"state_dict": old}, tmp_path / "old.ckpt")
    assert lc.load(nn.Sequential(Migrates(2, 2)), tmp_path / "old.ckpt", prefix)[0].weight.equal(whole.net[0].weight)


def test_a_module_that_fails_while_it_loads_is_as_before(tmp_path: Path, unchanged: Any) -> None:
    module = nn.Sequential(nn.Linear(2, 3), Migrates(3, 2))
    check = unchanged(module)
    state = {name: torch.full_like(value, 7.0) for name, value in module.state_dict().items()}
    del state["1.weight"]
    plain = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).state_dict()
    plain.update(state)
    del plain["1.weight"]
    plain._metadata["1"]["version"] = 2
    torch.save({"state_dict": plain}, tmp_path / "a.ckpt")
    with pytest.raises(CompressionError, match=r"1\.weight"):
        lc.load(module, tmp_path / "a.ckpt")
    check()


# ------------------------------------------------------------------------------------------------------ kinds of files
class Secret:
    """An object that only a trusted file may hold."""


def test_objects_are_unpickled_only_if_the_user_says_so(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", cut(FIRST), hyper_parameters={"secret": Secret()})
    with pytest.raises(CompressionError, match="weights_only=False"):
        lc.load(net(), path)
    assert manifest.edits_of(lc.load(net(), path, weights_only=False))
    assert manifest.read(path, weights_only=False) is not None


def shards(folder: Path, owner: str = "state_dict") -> Path:
    """A sharded checkpoint, as Lightning's strategies write it."""
    module = cut(FIRST)
    with pytest.warns(UserWarning, match="torch.distributed"):
        save({owner: dict(module.state_dict()), "optimizer": {"momentum": torch.ones(3)}}, checkpoint_id=folder)
    torch.save(
        {manifest.KEY: manifest.of(module), "epoch": 1, "pytorch-lightning_version": "2.6.6"}, folder / "meta.pt"
    )
    return folder


@pytest.mark.parametrize("owner", ["state_dict", "model"])
def test_sharded_folders(owner: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    folder = shards(tmp_path / "a.ckpt", owner)
    recwarn.clear()
    loaded = lc.load(net(), folder)
    assert manifest.equal(dict(loaded.state_dict()), dict(cut(FIRST).state_dict()))
    stripped = lc.strip(folder)
    assert stripped.is_file()
    assert manifest.equal(dict(lc.load(net(), stripped).state_dict()), dict(loaded.state_dict()))
    assert [w for w in recwarn if "distributed" in str(w.message)] == []


def test_damaged_sharded_folders_are_refused(tmp_path: Path, unchanged: Any) -> None:
    folder = shards(tmp_path / "a.ckpt")
    module = net()
    check = unchanged(module)
    for file in folder.glob("*.distcp"):
        file.write_bytes(b"")
    with pytest.raises(CompressionError, match="the shards in the folder"):
        lc.load(module, folder)
    (folder / ".metadata").unlink()
    with pytest.raises(CompressionError, match="the shards in the folder"):
        lc.load(module, folder)
    (folder / "meta.pt").unlink()
    with pytest.raises(CompressionError, match=r"no 'meta.pt'"):
        lc.load(module, folder)
    check()


def test_only_the_part_of_a_sharded_folder_that_is_asked_for_is_read(tmp_path: Path) -> None:
    assert "state_dict" not in reading.read_checkpoint(shards(tmp_path / "a.ckpt"))
    assert manifest.equal(manifest.read(tmp_path / "a.ckpt"), manifest.of(cut(FIRST)))


# --------------------------------------------------------------------------------------------------------------- strip
def test_strip_leaves_what_a_user_needs(tmp_path: Path) -> None:
    module = cut(FIRST)
    state: dict[str, Tensor] = {**module.state_dict(), "_lc_kd.weight": torch.ones(5), "0._lc_scores": torch.ones(5)}
    found = {
        "state_dict": state, manifest.KEY: manifest.of(module), "epoch": 3, "hyper_parameters": {"width": 4},
        "optimizer_states": [{}], "lr_schedulers": [], "callbacks": {"Distillation": {"teacher": state}},
        "current_model_state": state, "averaging_state": {},
    }  # fmt: skip
    torch.save(found, tmp_path / "a.b.ckpt")
    path = lc.strip(tmp_path / "a.b.ckpt")
    assert path == tmp_path / "a.b.stripped.ckpt"
    left = torch.load(path, weights_only=True)
    assert sorted(left) == ["epoch", "hyper_parameters", "lightning_compress", "state_dict"]
    assert manifest.equal(left["state_dict"], dict(module.state_dict()))
    lc.load(net(), path)
    assert lc.strip(tmp_path / "a.b.ckpt", tmp_path / "a.b.ckpt") == tmp_path / "a.b.ckpt"  # over itself
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.b.ckpt", "a.b.stripped.ckpt"]
    lc.load(net(), tmp_path / "a.b.ckpt")


# --------------------------------------------------------------------------------------------------------- materialize
def test_materialize_outside_of_a_fit_does_nothing() -> None:
    module = net()
    before = snapshot(module)
    assert lc.materialize(module) is module
    assert manifest.equal(snapshot(module), before)

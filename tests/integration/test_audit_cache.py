"""What the dense model did is computed once, and never used where it is not certainly the same."""

from __future__ import annotations

import copy
import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lightning_compress as lc
from lightning_compress.audits import remembered
from lightning_compress.audits.remembered import Remembered
from lightning_compress.audits.robustness import Robustness
from lightning_compress.audits.scorecard import Scorecard

OPTIONS = {
    "robustness": {"eps": 0.1, "steps": 4, "queries": 6}, "corruptions": {"severities": [3]},
    "robustness_curve": {"radii": [0.05, 0.1], "steps": 3}, "inversion": {"restarts": 1, "steps": 3, "queries": 2},
    "dormant_scan": {"steps": 1, "examples": 4},
}  # fmt: skip


ASKED = [0]


class Counted(nn.Module):
    """A network that counts the examples it was asked, where the guard of audits does not put it back."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))

    def forward(self, x: Tensor) -> Tensor:
        ASKED[0] += len(x)
        return self.net(x)


@pytest.fixture(scope="module")
def models() -> tuple[Counted, nn.Module, TensorDataset]:
    torch.manual_seed(0)
    x = torch.rand(40, 1, 8, 8)
    y = x.flatten(1)[:, :4].argmax(1)
    dense = Counted()
    optimizer = torch.optim.Adam(dense.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(dense(x), y).backward()
        optimizer.step()
    small = copy.deepcopy(dense.net)
    with torch.no_grad():
        small[0].weight.mul_(small[0].weight.abs() > 0.1)
    return dense.eval(), small.eval(), TensorDataset(x, y)


def audited(models: Any, cache: Path | None, **changes: Any) -> Scorecard:
    dense, small, data = models
    settings = {"space": (0.0, 1.0), "tier": 1, "examples": 24, "cost": False, "progress": False, **changes}
    own = list(OPTIONS) if settings["tier"] == 2 else ["robustness", "corruptions"]
    settings.setdefault("options", {name: OPTIONS[name] for name in own})
    return lc.audit(dense, small, data, cache=cache, **settings)


def content(card: Scorecard) -> Any:
    """All of a card but when it was made, how long it took and how often models were asked."""

    def rest(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: rest(v) for k, v in value.items() if k not in ("seconds", "created", "forward_passes")}
        return [rest(v) for v in value] if isinstance(value, list) else value

    return rest(card.to_dict())


def asked(models: Any, *arguments: Any, **changes: Any) -> tuple[int, Scorecard]:
    before = ASKED[0]
    card = audited(models, *arguments, **changes)
    return ASKED[0] - before, card


def test_a_card_is_the_same_without_with_a_new_and_with_a_known_memory(models: Any, tmp_path: Path) -> None:
    pytest.importorskip("captum")
    plain, new, known = (audited(models, cache, tier=2) for cache in (None, tmp_path, tmp_path))
    assert content(plain) == content(new) == content(known)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_dense_model_works_once(models: Any, tmp_path: Path) -> None:
    pytest.importorskip("captum")
    first, _ = asked(models, tmp_path)
    second, card = asked(models, tmp_path)
    assert second < 0.15 * first  # answers, probes of gradients and noise, which are looked at anew each time
    other = (models[0], copy.deepcopy(models[1]), models[2])
    with torch.no_grad():
        other[1][0].weight.mul_(0.9)
    third, changed = asked(other, tmp_path)
    assert third < 0.2 * first
    assert content(changed) == content(audited(other, None)) != content(card)


@pytest.mark.parametrize("what", ["weights", "buffer", "code", "data", "seed", "arguments", "version"])
def test_what_is_stale_is_never_used(what: str, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"audits": [Robustness(**OPTIONS["robustness"])]}
    first, _ = asked(models, tmp_path, options={}, **changes)
    again, _ = asked(models, tmp_path, options={}, **changes)
    assert again < 0.5 * first  # the control: what is not stale is used
    dense, small, data = copy.deepcopy(models[0]), *models[1:]
    if what == "weights":
        with torch.no_grad():
            dense.net[3].bias[0] += 1e-6
    elif what == "buffer":
        dense.register_buffer("unused", torch.ones(1))
    elif what == "code":

        class Other(Counted):
            def forward(self, x: Tensor) -> Tensor:
                ASKED[0] += len(x)
                return self.net(x) * 1.0

        dense.__class__ = Other
    elif what == "data":
        x, y = data.tensors
        data = TensorDataset(x.clone().index_fill_(0, torch.tensor([0]), 0.5), y)
    elif what == "seed":
        changes["seed"] = 1
    elif what == "arguments":
        changes = {"audits": [Robustness(**{**OPTIONS["robustness"], "steps": 5})]}
    else:
        monkeypatch.setattr(remembered, "_versions", lambda: ("audits of tomorrow",))
    count, card = asked((dense, small, data), tmp_path, options={}, **changes)
    assert count > (0.5 if what == "arguments" else 0.8) * first  # other steps need no new probe of gradients
    assert content(card) == content(audited((dense, small, data), None, options={}, **changes))


def only(folder: Path) -> Path:
    [file] = folder.iterdir()
    return file


@pytest.mark.parametrize("damage", ["cut", "flipped", "rubbish", "another", "answers"])
def test_what_is_damaged_is_never_used(damage: str, models: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"audits": [Robustness(**OPTIONS["robustness"])], "options": {}}
    first, card = asked(models, tmp_path, **settings)
    file = only(tmp_path)
    raw = file.read_bytes()
    if damage == "cut":
        file.write_bytes(raw[: len(raw) // 2])
    elif damage == "flipped":
        file.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    elif damage == "rubbish":
        file.write_bytes(b"\0" * 100)
    else:
        tensors = load_file(file)
        if damage == "answers":  # a file that is sound in itself, of a model that answered otherwise
            tensors["answers"] = tensors["answers"] + 1
        header = {"digest": file.stem.removeprefix("dense-"), "content": remembered.digest_of(tensors)}
        if damage == "answers":
            with safe_open(file, "pt") as opened:
                header["digest"] = opened.metadata()["digest"]
        save_file(tensors, file, header)
    count, again = asked(models, tmp_path, **settings)
    assert count > 0.9 * first
    assert content(again)["results"] == content(card)["results"]
    [note] = [caveat for caveat in again.caveats if "not used, but computed anew" in caveat]
    says = {"another": "not those that were written", "flipped": "not those", "answers": "answers otherwise"}
    assert says.get(damage, "cannot be read") in note
    count, last = asked(models, tmp_path, **settings)  # and it was written anew
    assert count < 0.5 * first
    assert not [caveat for caveat in last.caveats if "not used" in caveat]


def test_a_full_disk_costs_no_result_and_leaves_what_was_there(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"audits": [Robustness(**OPTIONS["robustness"])], "options": {}}
    audited(models, tmp_path, **settings)
    before = only(tmp_path).read_bytes()

    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    more = {"audits": [Robustness(**{**OPTIONS["robustness"], "steps": 3})], "options": {}}
    card = audited(models, tmp_path, **more)
    assert card["robustness.robust_accuracy"].value is not None
    assert [caveat for caveat in card.caveats if "could not be kept" in caveat and "No space left" in caveat]
    assert only(tmp_path).read_bytes() == before  # and nothing half-written beside it


def test_a_function_has_no_fingerprint(models: Any, tmp_path: Path) -> None:
    dense, small, data = models
    with pytest.raises(lc.CompressionError, match=r"what it depends on cannot be read.*Leave `cache=` out"):
        lc.audit(lambda x: dense(x), small, data, space=(0.0, 1.0), tier=0, cost=False, cache=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_large_parts_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_compress.audits.handles import ModelHandle

    monkeypatch.setattr(remembered, "_LARGEST", 100)
    memory = Remembered(tmp_path, ModelHandle(nn.Linear(2, 2)), torch.zeros(1, 2), {})
    for size, kept in ((10, True), (1000, False)):
        memory.get("part", {"size": size}, lambda size=size: {"x": torch.zeros(size, dtype=torch.uint8)})
        hits = memory.hits
        memory.get("part", {"size": size}, lambda size=size: {"x": torch.zeros(size, dtype=torch.uint8)})
        assert (memory.hits > hits) is kept

"""The commit a scorecard names is the one that is checked out, and there is none where git knows nothing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_compress as lc
from lightning_compress.audits import provenance
from lightning_compress.audits.provenance import commit_of

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git, and this machine has none")


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "train.py").write_text("epochs = 1")
    git(folder, "add", "train.py")
    git(folder, "commit", "-q", "-m", "Train")
    return folder


@pytest.fixture(autouse=True)
def _as_in_a_new_process() -> None:
    commit_of.cache_clear()


@needs_git
def test_the_commit_and_whether_files_changed_since(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")[:12]
    assert commit_of(repository) == commit
    (repository / "runs.log").write_text("what git does not know is no change")
    commit_of.cache_clear()
    assert commit_of(repository) == commit
    (repository / "train.py").write_text("epochs = 2")
    assert commit_of(repository) == commit  # what runs was imported before
    commit_of.cache_clear()
    assert commit_of(repository) == f"{commit}, with changes"


@needs_git
def test_a_repository_without_a_commit_and_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    git(tmp_path / "empty", "init", "-q")
    assert commit_of(tmp_path / "empty") is None
    assert commit_of(tmp_path / "missing") is None


@needs_git
def test_git_that_hangs_is_left_alone(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(command: list[str], **settings: object) -> None:
        raise subprocess.TimeoutExpired(command, provenance.TIMEOUT)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert commit_of(repository) is None


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert commit_of(tmp_path) is None


@needs_git
def test_a_scorecard_and_its_reports_name_it(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.rand(24, 4), torch.arange(24) % 3
    models = [nn.Linear(4, 3).eval(), nn.Linear(4, 3).eval()]

    def card() -> lc.Scorecard:
        return lc.audit(*models, torch.utils.data.TensorDataset(x, y), tier=0, progress=False)

    assert "code" not in card().identity
    monkeypatch.chdir(repository)
    found, commit = card(), git(repository, "rev-parse", "HEAD")[:12]
    assert found.identity["code"] == commit
    assert lc.Scorecard.load(found.save(repository / "card.json")).identity["code"] == commit
    assert commit in found.to_html()
    assert commit in found.to_markdown()

"""Which code made a scorecard: the commit of the folder in which it ran."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path

TIMEOUT = 5.0  # seconds; a repository on a slow disk must not hold up an audit


@cache
def commit_of(folder: Path) -> str | None:
    """The commit that is checked out, followed by ``, with changes`` if files git knows differ from it.

    A process asks once: what it runs was imported then, whatever is checked out later.

    Args:
        folder: Somewhere in a repository, usually the working directory.

    Returns:
        For instance ``"8f4122d0c1b2"``; `None` outside of a repository, before its first commit, without git, or if git
        gives no answer within five seconds.

    Example:
        >>> commit_of(Path("/")) is None
        True
    """
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}, with changes" if changes else commit


def _git(folder: Path, *arguments: str) -> str | None:
    program = shutil.which("git")
    if program is None:
        return None
    # Reading must not take the lock that a commit of the user needs at the same moment.
    command = [program, "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

"""Files that others may use too: written in one step and never through a link, locked while a job runs."""

from __future__ import annotations

import errno
import os
import secrets
import signal
import subprocess
import sys

import numpy as np
import pytest

import jaxalign
from jaxalign import streaming
from jaxalign.files import storage
from jaxalign.files.storage import locked, replace_file

X = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)


def test_no_link_is_followed(tmp_path, monkeypatch):
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("mine")
    out.mkdir()
    for name in ("grid.png", "grid.png.new", ".grid.png.new"):
        (out / name).symlink_to(victim)
    replace_file(out / "grid.png", b"content")
    assert (out / "grid.png").read_bytes() == b"content"
    assert not (out / "grid.png").is_symlink()
    assert victim.read_text() == "mine"
    # Not even where the name is guessed.
    monkeypatch.setattr(secrets, "token_hex", lambda length: "0")
    replace_file(out / "layers.png", b"")
    (out / f"{storage.PREFIX}{storage._tag(out / 'layers.png')}-0.new").symlink_to(victim)
    with pytest.raises(FileExistsError):
        replace_file(out / "layers.png", b"content")
    assert victim.read_text() == "mine"


def test_a_write_that_fails_leaves_nothing_and_names_the_file(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as failed:  # noqa: PT011
        replace_file(tmp_path / "folder", b"content")
    assert failed.value.filename == str(tmp_path / "folder")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as failed:  # noqa: PT011
        replace_file(tmp_path / "x.json", b"content")
    assert (failed.value.errno, failed.value.filename) == (errno.ENOSPC, str(tmp_path / "x.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_names_may_be_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("x" * 255)
    with locked(path):
        replace_file(path, b"content")
    assert path.read_bytes() == b"content"


HOLDER = """
import runpy, sys, time
from pathlib import Path
with runpy.run_path(sys.argv[1])["locked"](Path(sys.argv[2])):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_lock_ends_with_its_process(kind, tmp_path):
    path = tmp_path if kind == "folder" else tmp_path / "state"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, storage.__file__, str(path)], stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError, match="another job is using it"), locked(path):
            pass
        holder.send_signal(signal.SIGKILL)
    # What was not complete when it was killed is removed; another job's files are not.
    tag, other = ("*" if kind == "folder" else storage._tag(path)), tmp_path / f"{storage.PREFIX}other-1.new"
    (tmp_path / f"{storage.PREFIX}{tag.replace('*', 'any')}-0.new").write_bytes(b"")
    other.write_bytes(b"")
    with locked(path):
        assert len(list(tmp_path.iterdir())) == (2 if kind == "file" else 1)
    assert list(tmp_path.iterdir()) == ([other] if kind == "file" else [])


def test_a_lock_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """Between opening a lock file and locking it, its last holder may remove it: the name then stands for another."""
    lock, taken = storage._lock, []

    def lock_late(descriptor):
        if not taken:
            next(tmp_path.iterdir()).unlink()
        taken.append(descriptor)
        lock(descriptor)

    monkeypatch.setattr(storage, "_lock", lock_late)
    with locked(tmp_path / "state"):
        assert len(taken) == 2
        with pytest.raises(BlockingIOError), locked(tmp_path / "state"):
            pass


class StopError(Exception):
    pass


def stop(stage, done, total):
    if done == 2 and stage != "sigma":
        raise StopError


JOBS = {
    "by pairs": {"kernel": "linear", "block_rows": 5},
    "set by set": {"measure": "procrustes"},
}


def compare(path, job, **options):
    return jaxalign.compare_grid({"a": X, "b": X**2}, checkpoint=path, **JOBS[job], **options)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_checkpoints_of_a_grid_hold_what_a_job_writes(job, tmp_path):
    path = tmp_path / "state"
    with pytest.raises(StopError):
        compare(path, job, progress=stop)
    with np.load(path) as content:
        whole = dict(content)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]
    changes = [{"more": np.ones(2)}, {"done": np.array("two")}]
    changes += [{name: np.zeros((7, 7))} for name in whole if name != "identity"]
    if job == "by pairs":
        changes += [{"done": np.array(-1)}, {"done": np.array(1000)}]
    for change in changes:
        with path.open("wb") as file:
            np.savez(file, **{**whole, **change})
        with pytest.raises(ValueError, match="truncated or not a checkpoint of compare_grid"):
            compare(path, job)
    with path.open("wb") as file:
        np.savez(file, **whole)
    np.testing.assert_allclose(compare(path, job).values, compare(None, job).values, rtol=1e-4)


def test_one_job_at_a_time_has_a_checkpoint(tmp_path):
    path = tmp_path / "state"
    calls = (
        lambda: compare(path, "by pairs"),
        lambda: compare(path, "set by set"),
        lambda: streaming.solve_sigma(X, density=0.2, checkpoint=path),
        lambda: streaming.mean_density(X, sigma=1.0, checkpoint=path),
    )
    with locked(path):
        for call in calls:
            with pytest.raises(BlockingIOError, match="state"):
                call()

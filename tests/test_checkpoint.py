"""Checkpoints survive what happens to files: kills, full disks, torn and rotten files.  The lines of the logs are
never doubled by a resume."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from pymathrl import checkpoint
from pymathrl.checkpoint import (
    check_checkpoint,
    clean_checkpoints,
    hash_parameters,
    latest_checkpoint,
    load_state,
    save_checkpoint,
    truncate_metrics,
)
from pymathrl.errors import UserError
from pymathrl.files import write_atomic


def write_model(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 8)


def state_of(step: int) -> dict:
    return {"cursor": step, "lr": 0.1 + 0.2, "adam": {"exp_avg": torch.full((3,), float(step))}}


def save(run: Path, *steps: int, keep: int = 10) -> None:
    for step in steps:
        save_checkpoint(run, step, write_model, state_of(step), keep=keep)


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_round_trip_is_exact(tmp_path):
    state = {
        "float": 0.1 + 0.2,
        "big": 2**70,
        "text": "π",
        "none": None,
        "nested": {"a": [1, 2.5, {"b": True}]},
        "tuple": (1, 2),
        "int_keys": {0: "x"},
        "nonfinite": float("inf"),
        "bf16": torch.randn(4, dtype=torch.bfloat16),
        "optimizer": {
            "state": OrderedDict({0: {"step": torch.tensor(3.0), "m": torch.randn(2, 3)}}),
            "groups": [{"betas": (0.9, 0.99)}],
        },
    }
    path = save_checkpoint(tmp_path, 7, write_model, state)
    assert path == tmp_path / "checkpoints" / "step-7" and latest_checkpoint(tmp_path) == (7, path)
    back = load_state(path)
    assert torch.equal(back.pop("bf16"), state.pop("bf16"))
    moments, expected = back["optimizer"]["state"][0], state["optimizer"]["state"][0]
    assert torch.equal(moments.pop("m"), expected.pop("m")) and torch.equal(moments.pop("step"), expected.pop("step"))
    assert back == state
    # plain values are readable
    assert json.loads((path / "trainer/state.json").read_text())["nested"] == state["nested"]
    assert (path / "model.safetensors").stat().st_size == 2048
    assert names(tmp_path) == ["step-7"]


@pytest.mark.parametrize("bad", [object(), {"x": [torch.float32]}, {(1, object()): 1}, Path("x")])
def test_state_that_could_not_be_loaded_is_refused_when_saving(tmp_path, bad):
    with pytest.raises(TypeError, match=r"state\['k'\]"):
        save_checkpoint(tmp_path, 1, write_model, {"k": bad})
    assert names(tmp_path) == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {"flip": flip, "cut": cut, "delete": Path.unlink, "empty": lambda p: p.write_bytes(b"")}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "file", ["model.safetensors", "trainer/state.pt", "trainer/state.json", "trainer/manifest.json"]
)
def test_a_damaged_checkpoint_is_skipped_with_a_reason(tmp_path, file, damage):
    save(tmp_path, 5, 10)
    newest = tmp_path / "checkpoints" / "step-10"
    DAMAGE[damage](newest / file)
    if (file, damage) == ("trainer/manifest.json", "cut"):  # only the final newline is lost: nothing is damaged
        assert latest_checkpoint(tmp_path) == (10, newest)
        return
    reasons: list[str] = []
    found = latest_checkpoint(tmp_path, reasons.append)
    assert found is not None and found[0] == 5
    assert len(reasons) == 1 and str(newest) in reasons[0] and (file in reasons[0] or "manifest" in file)
    DAMAGE["delete"](tmp_path / "checkpoints/step-5/config.json")
    assert latest_checkpoint(tmp_path, reasons.append) is None
    assert "config.json" in reasons[-1]


def test_the_skip_is_logged_by_default(tmp_path, caplog):
    save(tmp_path, 1)
    flip(tmp_path / "checkpoints/step-1/model.safetensors")
    assert latest_checkpoint(tmp_path) is None
    assert "model.safetensors: content differs" in caplog.text


def test_every_flipped_bit_of_the_manifest_is_harmless_or_found(tmp_path):
    save(tmp_path, 3)
    folder = tmp_path / "checkpoints/step-3"
    manifest = folder / "trainer/manifest.json"
    good = manifest.read_bytes()
    for i in range(0, len(good), 7):
        manifest.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
        assert check_checkpoint(folder) is not None or good[i : i + 1].isspace()
    manifest.write_bytes(good)
    assert check_checkpoint(folder) is None
    os.rename(folder, folder.with_name("step-4"))
    assert check_checkpoint(folder.with_name("step-4")) == "trainer/manifest.json: written for step-3"


def test_failure_in_write_leaves_no_trace(tmp_path):
    save(tmp_path, 1)

    def interrupted(folder: Path) -> None:
        write_model(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, interrupted, state_of(2))
    assert names(tmp_path) == ["step-1"] and check_checkpoint(tmp_path / "checkpoints/step-1") is None


def test_sigkill_during_a_save(tmp_path):
    code = (
        "import os, signal, sys\nfrom pymathrl.checkpoint import save_checkpoint\n"
        "def write(d):\n    (d / 'model.safetensors').write_bytes(b'x' * 100)\n"
        "    if kill: os.kill(os.getpid(), signal.SIGKILL)\n"
        "kill = False; save_checkpoint(sys.argv[1], 1, write, {'cursor': 1})\n"
        "kill = True; save_checkpoint(sys.argv[1], 2, write, {'cursor': 2})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    stale = [n for n in names(tmp_path) if n.startswith(".tmp-step-2-")]
    assert len(stale) == 1
    found = latest_checkpoint(tmp_path)
    assert found is not None and found[0] == 1 and load_state(found[1]) == {"cursor": 1}
    assert clean_checkpoints(tmp_path) == stale
    assert names(tmp_path) == ["step-1"]


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 4)
    flip(tmp_path / "checkpoints/step-4/model.safetensors")
    save(tmp_path, 4)
    assert check_checkpoint(tmp_path / "checkpoints/step-4") is None and names(tmp_path) == ["step-4"]


def test_kill_between_the_two_renames_of_a_replacement(tmp_path):
    save(tmp_path, 4)
    root = tmp_path / "checkpoints"
    os.rename(root / "step-4", root / ".replaced-step-4-99")  # the state on disk after a kill there
    assert clean_checkpoints(tmp_path) == []
    assert names(tmp_path) == ["step-4"] and check_checkpoint(root / "step-4") is None
    (root / ".replaced-step-4-99").mkdir()  # killed one moment later: the new one is in place
    assert clean_checkpoints(tmp_path) == [".replaced-step-4-99"] and names(tmp_path) == ["step-4"]


def test_keep_drops_the_oldest_and_only_after_the_new_one_is_saved(tmp_path, monkeypatch):
    save(tmp_path, 2, 9, 10, 100, keep=2)
    assert names(tmp_path) == ["step-10", "step-100"]

    def refuse(folder: Path, step: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "_seal", refuse)
    with pytest.raises(UserError, match="Input/output error"):
        save(tmp_path, 101, keep=1)
    assert names(tmp_path) == ["step-10", "step-100"]
    with pytest.raises(ValueError, match="keep = 0"):
        save(tmp_path, 101, keep=0)


def test_keep_counts_only_steps_up_to_the_new_one(tmp_path):
    save(tmp_path, 10, 20, 30)
    flip(tmp_path / "checkpoints/step-30/model.safetensors")  # resumed from 20, now at 25
    save(tmp_path, 25, keep=2)
    assert names(tmp_path) == ["step-20", "step-25", "step-30"]
    found = latest_checkpoint(tmp_path, lambda reason: None)
    assert found is not None and found[0] == 25


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_full_disk(tmp_path, monkeypatch, call):
    save(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as m:
        m.setattr(os, call, full)
        with pytest.raises(
            UserError, match=r"step 2 \(earlier checkpoints are intact\).*No space left on device; free some space"
        ) as caught:
            save(tmp_path, 2)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert names(tmp_path) == ["step-1"] and check_checkpoint(tmp_path / "checkpoints/step-1") is None
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-1", "step-2"]


def test_full_disk_inside_the_model_writer(tmp_path):
    def write(folder: Path) -> None:
        # how safetensors reports it
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(UserError, match="No space left on device; free some space"):
        save_checkpoint(tmp_path, 1, write, {})

    def broken(folder: Path) -> None:
        raise RuntimeError("a bug, not a disk")

    with pytest.raises(RuntimeError, match="a bug"):
        save_checkpoint(tmp_path, 1, broken, {})


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs the /dev/full device of Linux")
def test_torch_save_on_a_full_disk_names_the_disk():
    with pytest.raises(OSError, match="No space left"):
        # opened and written in place: the device node stays
        checkpoint._save_tensors({"w": torch.zeros(1 << 18)}, Path("/dev/full"))
    assert Path("/dev/full").is_char_device()


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match=r"checkpoints.*File exists; a file stands where a folder is needed"):
        save(tmp_path, 1)
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"Not a directory|File exists"):
        save(tmp_path / "run", 1)
    with pytest.raises(UserError, match="not a run folder"):
        latest_checkpoint(tmp_path / "run")


def test_read_only_folder(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="Permission denied; choose a folder you may write to"):
        save(tmp_path, 1)


def test_no_checkpoint_yet(tmp_path):
    assert latest_checkpoint(tmp_path) is None and clean_checkpoints(tmp_path) == []


def test_load_state_names_a_damaged_file(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "checkpoints/step-1"
    cut(path / "trainer/state.pt")
    with pytest.raises(UserError, match="step-1: the file is damaged"):
        load_state(path)
    (path / "trainer/state.json").unlink()
    with pytest.raises(UserError, match=r"state\.json: No such file"):
        load_state(path)


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomic(path, b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_hash_parameters_sees_every_part():
    base = {
        "a": torch.arange(4.0),
        "b": torch.ones(2, 2, dtype=torch.bfloat16),
        "s": torch.tensor(1.0),
        "e": torch.empty(0),
    }
    reference = hash_parameters(base.items())
    assert hash_parameters(reversed(base.items())) == reference and len(reference) == 64
    strided = base | {"b": torch.ones(2, 4, dtype=torch.bfloat16)[:, ::2]}
    assert hash_parameters(strided.items()) == reference  # equal values, other strides
    nudged = base["a"].clone()
    nudged[2] = torch.nextafter(nudged[2], torch.tensor(9.0))
    for change in (
        {"a": nudged},
        {"a": base["a"].reshape(2, 2)},
        {"a": base["a"].view(torch.int32)},
        {"s": torch.tensor([1.0])},
        {"new": torch.empty(0)},
    ):
        assert hash_parameters((base | change).items()) != reference
    # bits, not values
    assert hash_parameters([("a", torch.tensor([0.0]))]) != hash_parameters([("a", torch.tensor([-0.0]))])


def test_truncate_metrics_drops_later_steps_and_the_partial_line(tmp_path):
    metrics, samples = tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl"
    lines = "".join(json.dumps({"step": s, "reward": s / 10}) + "\n" for s in range(6))
    metrics.write_text(lines + '{"step": 6, "rew')
    samples.write_text('{"step": 2, "text": "a"}\n{"step": 5, "text": "b"}\n')
    assert truncate_metrics(tmp_path, 3) == 4
    assert metrics.read_text() == "".join(lines.splitlines(keepends=True)[:4])
    assert samples.read_text() == '{"step": 2, "text": "a"}\n'
    before = metrics.stat().st_mtime_ns
    assert truncate_metrics(tmp_path, 3) == 0 and metrics.stat().st_mtime_ns == before
    assert truncate_metrics(tmp_path, -1) == 5 and metrics.read_bytes() == b""
    assert truncate_metrics(tmp_path / "empty", 0) == 0


def test_truncate_metrics_completes_a_line_without_its_newline(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    assert truncate_metrics(tmp_path, 9) == 0
    # else the next line would be glued to it
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("broken", ["{", "[1]", '{"reward": 1}', "\x00\x00"])
def test_truncate_metrics_names_a_broken_line(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + broken + '\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        truncate_metrics(tmp_path, 1)
    path.write_text('{"step": 1}\n' + broken + "\n")
    assert truncate_metrics(tmp_path, 1) == 1

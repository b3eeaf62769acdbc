"""What a run leaves on disk is whole or absent, whatever ends it, and says which."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raftdiff import checkpoint
from raftdiff.checkpoint import (
    Checkpoints,
    RunLock,
    clean_staging,
    load_optimizer_tensors,
    optimizer_tensors,
    publish_folder,
    read_meta,
    remove,
    verify,
    write_file,
)
from raftdiff.errors import ConfigError, ResumeError, RunLockedError, StorageError, WeightsError

ROOT = Path(__file__).resolve().parent.parent


def save(checkpoints: Checkpoints, round: int, step: int = 0, **options):
    parts = {"adapter": {"a": torch.full((4,), float(round)), "b": torch.arange(step + 1)}}
    return checkpoints.save(round, step, parts, {"rounds": round}, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_at(monkeypatch, module, name: str, call: int) -> None:
    """Make the `call`-th call of a function of the system fail as on a full disk."""
    real, calls = getattr(module, name), iter(range(1, 1000))

    def function(*arguments, **options):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, function)


# One file


def test_write_file_replaces_the_old_content_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b" / "report.html"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["report.html"]


@pytest.mark.parametrize(("name", "call"), [("fsync", 1), ("replace", 1)])
def test_a_full_disk_leaves_the_old_file_and_names_path_and_bytes(tmp_path, monkeypatch, name, call):
    path = tmp_path / "report.html"
    path.write_bytes(b"old")
    fail_at(monkeypatch, os, name, call)
    with pytest.raises(StorageError, match=r"report\.html: No space left on device.* 12345 bytes, and \d+ are free"):
        write_file(path, b"x" * 12345)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["report.html"]


# One folder


def test_a_published_folder_verifies_and_keeps_its_meta(tmp_path):
    target = tmp_path / "lora"
    with publish_folder(target, meta={"step": 7, "name": "r\u00e9"}) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "x.bin").write_bytes(b"123")
        assert not target.exists()
    assert verify(target) is None
    assert read_meta(target) == {"step": 7, "name": "r\u00e9"}
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["files"] == {
        "sub/x.bin": {"bytes": 3, "sha256": "a665a45920422f9d417e4867efdc4fb8a04a1f3fff1fa07e998e86f7f7a27ae3"}
    }


def test_everything_is_durable_before_the_rename_and_the_rename_after_it(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda d: (events.append(os.fstat(d).st_ino), fsync(d)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    target = tmp_path / "lora"
    with publish_folder(target) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "x").write_bytes(b"1")
    paths = [target / "sub" / "x", target / "manifest.json", target / "sub", target, tmp_path]
    x, manifest, sub, folder, parent = (path.stat().st_ino for path in paths)
    assert events == [x, manifest, sub, folder, "rename", parent]


@pytest.mark.parametrize("exchange", [True, False])
def test_publishing_replaces_what_stood_there(tmp_path, monkeypatch, exchange):
    if not exchange:  # as on a system without renameat2
        monkeypatch.setattr(checkpoint.ctypes, "CDLL", lambda name: object())
    target = tmp_path / "lora"
    for content in (b"old", b"new"):
        with publish_folder(target) as staging:
            (staging / "x").write_bytes(content)
    assert verify(target) is None
    assert (target / "x").read_bytes() == b"new"
    assert names(tmp_path) == ["lora"]


def test_an_exception_in_the_block_publishes_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), publish_folder(tmp_path / "lora") as staging:
        (staging / "x").write_bytes(b"1")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_strangers_in_a_published_folder_do_not_matter(tmp_path):
    with publish_folder(tmp_path / "lora") as staging:
        (staging / "x").write_bytes(b"1")
    (tmp_path / "lora" / ".DS_Store").write_bytes(b"?")
    assert verify(tmp_path / "lora") is None


def test_one_flipped_bit_is_detected_wherever_it_is(tmp_path):
    with publish_folder(tmp_path / "f", meta={"loss": 0.5, "n": [1, -2]}) as staging:
        (staging / "x").write_bytes(b"ab")
    for path in (tmp_path / "f" / "x", tmp_path / "f" / "manifest.json"):
        whole = path.read_bytes()
        for bit in range(0, 8 * len(whole), 5):  # each byte, and in turn each of its bits
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            assert f"{path.name} is damaged" in (verify(tmp_path / "f") or ""), bit
        path.write_bytes(whole)
    assert verify(tmp_path / "f") is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "x").write_bytes(b"12"), "x has 2 bytes instead of 3"),
        (lambda f: (f / "x").write_bytes(b""), "x has 0 bytes instead of 3"),
        (lambda f: (f / "x").unlink(), "x is missing"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda f: (f / "manifest.json").write_bytes(b""), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_bytes(b"[]"), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json is damaged"),
    ],
)
def test_verify_says_what_is_wrong(tmp_path, damage, reason):
    with publish_folder(tmp_path / "f") as staging:
        (staging / "x").write_bytes(b"123")
    damage(tmp_path / "f")
    assert verify(tmp_path / "f") == reason


def test_read_meta_refuses_a_damaged_manifest(tmp_path):
    with pytest.raises(ResumeError, match=r"manifest\.json is missing"):
        read_meta(tmp_path)


def test_clean_staging_takes_only_what_a_dead_run_staged(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / ".part-00000.parquet.0123456789ab.tmp").write_bytes(b"half")
    (tmp_path / ".lora.0123456789ab.tmp").mkdir()
    (tmp_path / ".notes.tmp").write_bytes(b"mine")
    (tmp_path / "kept.tmp").write_bytes(b"mine")
    clean_staging(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".notes.tmp", "kept.tmp", "samples"]


def test_remove_takes_files_folders_and_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_bytes(b"1")
    (tmp_path / "file").write_bytes(b"1")
    for name in ("folder", "file", "absent"):
        remove(tmp_path / name)
    assert names(tmp_path) == []


# Checkpoints


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    conv = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tensors = {"half": torch.randn(3).bfloat16(), "count": torch.tensor(5), "conv": conv, "empty": torch.zeros(0, 2)}
    saved = checkpoints.save(3, 40, {"adapter": tensors, "rng": {}}, {"fingerprint": "f", "shape": (1, 2)})
    assert saved.folder == tmp_path / "checkpoints" / "round-0003-step-00040"
    newest, skipped = checkpoints.newest()
    assert newest == saved
    assert skipped == []
    assert (newest.round, newest.step, newest.meta) == (3, 40, {"fingerprint": "f", "shape": [1, 2]})
    assert newest.tensors("rng") == {}
    loaded = newest.tensors("adapter")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with pytest.raises(ResumeError, match=r"no part 'optimizer'.*adapter, rng"):
        newest.tensors("optimizer")


def test_an_empty_folder_has_no_newest_checkpoint(tmp_path):
    assert Checkpoints(tmp_path / "absent").newest() == (None, [])


def test_strangers_and_staging_are_not_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    saved = save(checkpoints, 1)
    (tmp_path / "round-0009-step-00000").write_bytes(b"a file")
    (tmp_path / "round-0009-step-00000-backup").mkdir()
    (tmp_path / "notes.txt").write_bytes(b"mine")
    (tmp_path / ".round-0002-step-00000.0123456789ab.tmp").mkdir()
    assert checkpoints.newest() == (saved, [])
    clean_staging(checkpoints.folder)
    save(checkpoints, 2)
    assert "notes.txt" in names(tmp_path)
    assert "round-0009-step-00000-backup" in names(tmp_path)
    assert not any(name.endswith(".tmp") for name in names(tmp_path))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-1], r"adapter\.safetensors has \d+ bytes instead of \d+"),
        (lambda data: b"", r"adapter\.safetensors has 0 bytes instead of \d+"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), r"adapter\.safetensors is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage, reason):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    save(checkpoints, 2)
    path = tmp_path / "round-0002-step-00000" / "adapter.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    newest, (line,) = checkpoints.newest()
    assert newest.round == 1
    assert torch.equal(newest.tensors("adapter")["a"], torch.full((4,), 1.0))
    with pytest.raises(ResumeError, match=reason):
        checkpoints.load(2)
    assert line.startswith(f"{path.parent} is skipped: adapter.safetensors ")
    save(checkpoints, 2)  # the repeated round takes the damaged one's place
    assert checkpoints.newest()[0].round == 2
    assert checkpoints.newest()[1] == []


def test_load_finds_the_end_of_a_round_or_lists_those_there_are(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for round, step in ((1, 0), (2, 0), (2, 40)):
        save(checkpoints, round, step)
    assert (checkpoints.load(2).round, checkpoints.load(2).step) == (2, 0)
    with pytest.raises(ResumeError, match="no checkpoint of round 7; it has those of rounds: 1, 2"):
        checkpoints.load(7)


def test_pruning_keeps_the_newest_the_best_and_only_the_current_mid_round(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for round in range(6):
        save(checkpoints, round, keep_rounds={1})
        if round < 5:
            save(checkpoints, round, 40, keep_rounds={1})
            save(checkpoints, round, 80, keep_rounds={1})
            assert [name for name in names(tmp_path) if not name.endswith("00000")] == [f"round-{round:04d}-step-00080"]
    assert names(tmp_path) == [f"round-{round:04d}-step-00000" for round in (1, 4, 5)]


def test_a_mid_round_checkpoint_does_not_push_out_the_last_end_of_a_round(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    save(checkpoints, 1, 40)
    assert names(tmp_path) == ["round-0001-step-00000", "round-0001-step-00040"]


def test_saving_after_a_fall_back_drops_the_later_course(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for round in (1, 2, 3):
        save(checkpoints, round)
    (tmp_path / "round-0003-step-00000" / "adapter.safetensors").write_bytes(b"")
    saved = save(checkpoints, 2, 40)
    assert checkpoints.newest() == (saved, [])
    assert names(tmp_path) == ["round-0001-step-00000", "round-0002-step-00000", "round-0002-step-00040"]


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (os, "fsync", 1),
        (os, "fsync", 2),
        (os, "fsync", 3),
        (os, "rename", 1),
        (Path, "mkdir", 1),
        (Path, "write_bytes", 1),
    ],
)
def test_a_full_disk_at_any_write_leaves_the_previous_checkpoint(tmp_path, monkeypatch, module, name, call):
    checkpoints = Checkpoints(tmp_path, keep=1)
    previous = save(checkpoints, 1)
    size = (previous.folder / "adapter.safetensors").stat().st_size
    fail_at(monkeypatch, module, name, call)
    with pytest.raises(StorageError, match=r"round-0002-step-00000: No space left on device") as caught:
        save(checkpoints, 2)
    needed = int(str(caught.value).split("It needs ")[1].split(" ")[0])
    assert needed >= size
    assert names(tmp_path) == ["round-0001-step-00000"]
    assert checkpoints.newest() == (previous, [])


# Real deaths. One interpreter loads torch once, then forks a child for each case. In kill/ the n-th child kills itself
# with SIGKILL just before its n-th operation on files (every open, mkdir, rename and remove is audited; fsync is not,
# so the child counts it itself), until one lives to the end. In full/ the system refuses files past n kB.

DEATHS = """
import os, resource, signal, sys
from pathlib import Path
import torch
from raftdiff.checkpoint import Checkpoints
from raftdiff.errors import StorageError

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir"}
folder = Path(sys.argv[1])

def save(checkpoints, round):
    checkpoints.save(round, 0, {"adapter": {"a": torch.full((5000,), float(round))}}, {"rounds": round})

def die_at(instant):
    count = 0
    def tick():
        nonlocal count
        count += 1
        if count == instant:
            os.kill(os.getpid(), signal.SIGKILL)
    fsync = os.fsync
    os.fsync = lambda descriptor: (tick(), fsync(descriptor))
    sys.addaudithook(lambda event, arguments: tick() if event in EVENTS and str(folder) in str(arguments) else None)

def killed(n):
    checkpoints = Checkpoints(folder / "kill" / str(n), keep=1)
    save(checkpoints, 1)
    die_at(n)
    save(checkpoints, 2)

def full(n):
    checkpoints = Checkpoints(folder / "full" / str(n))
    save(checkpoints, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000 * n, 1000 * n))
    try:
        save(checkpoints, 2)
    except StorageError as error:
        (folder / "full" / f"{n}.error").write_text(str(error))

def lived(work, n):
    child = os.fork()
    if child == 0:
        work(n)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0

n = 1
while not lived(killed, n):
    n += 1
print(n)
for n in (1, 5, 19):
    assert lived(full, n)
"""


@pytest.fixture(scope="module")
def deaths(tmp_path_factory) -> tuple[Path, int]:
    """The folder of the cases above, and the number of the child that lived."""
    folder = tmp_path_factory.mktemp("deaths")
    finished = subprocess.run(
        [sys.executable, "-c", DEATHS, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return folder, int(finished.stdout)


def test_sigkill_at_any_instant_of_a_save_leaves_a_verified_checkpoint(deaths):
    folder, lived = deaths
    assert lived > 15
    rounds = []
    for n in range(1, lived + 1):
        checkpoints = Checkpoints(folder / "kill" / str(n), keep=1)
        newest, skipped = checkpoints.newest()
        assert skipped == [], n
        assert torch.equal(newest.tensors("adapter")["a"], torch.full((5000,), float(newest.round)))
        rounds.append(newest.round)
        clean_staging(checkpoints.folder)
        save(checkpoints, 2)  # and the run goes on
        assert names(checkpoints.folder) == ["round-0002-step-00000"]
    assert rounds == sorted(rounds)
    assert set(rounds) == {1, 2}


@pytest.mark.parametrize("kilobytes", [1, 5, 19])
def test_a_disk_that_takes_only_some_of_the_bytes_is_reported(deaths, kilobytes):
    folder = deaths[0] / "full"
    message = (folder / f"{kilobytes}.error").read_text()
    assert f"cannot write {folder / str(kilobytes) / 'round-0002-step-00000'}: File too large" in message
    assert int(message.split("It needs ")[1].split(" ")[0]) >= 4 * 5000
    newest, skipped = Checkpoints(folder / str(kilobytes)).newest()
    assert (newest.round, skipped) == (1, [])
    assert names(newest.folder.parent) == ["round-0001-step-00000"]


# The optimizer


def train(module, optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(step))
        module(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def build(kind: str):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(6, 2, 3)).to(
        memory_format=torch.channels_last
    )
    groups = [{"params": module[0].parameters(), "lr": 0.01}, {"params": module[1].parameters()}]
    optimizer = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.1),
        "adamw_fused": lambda: torch.optim.AdamW(groups, lr=0.1, fused=True),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        "adafactor": lambda: torch.optim.Adafactor(groups, lr=0.1),
    }[kind]()
    return module, optimizer


@pytest.mark.parametrize("kind", ["adamw", "adamw_fused", "sgd", "adafactor"])
def test_a_restored_optimizer_goes_on_bit_for_bit(tmp_path, kind):
    module, optimizer = build(kind)
    train(module, optimizer, range(3))
    parts = {"adapter": module.state_dict(), "optimizer": optimizer_tensors(optimizer)}
    saved = Checkpoints(tmp_path).save(1, 0, parts, {})
    train(module, optimizer, range(3, 6))

    other, other_optimizer = build(kind)
    train(other, other_optimizer, range(1))  # state that loading must replace
    other.load_state_dict(saved.tensors("adapter"))
    load_optimizer_tensors(other_optimizer, saved.tensors("optimizer"))
    train(other, other_optimizer, range(3, 6))
    for name, tensor in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    before, after = optimizer_tensors(optimizer), optimizer_tensors(other_optimizer)
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)


def test_optimizer_tensors_are_a_copy_named_by_parameter():
    module, optimizer = build("adamw")
    train(module, optimizer, range(1))
    tensors = optimizer_tensors(optimizer)
    assert sorted(tensors) == sorted(f"{key}.{i}" for key in ("exp_avg", "exp_avg_sq", "step") for i in range(4))
    average = tensors["exp_avg.2"].clone()
    train(module, optimizer, range(1, 2))
    assert torch.equal(tensors["exp_avg.2"], average)
    assert tensors["step.0"].item() == 1


def test_loading_the_state_from_before_the_first_step_forgets_the_steps_since():
    module, optimizer = build("adamw")
    train(module, optimizer, range(1))
    load_optimizer_tensors(optimizer, {})
    assert optimizer_tensors(optimizer) == {}


class Counting(torch.optim.Optimizer):
    """Keeps one thing in its state: the value it is made with."""

    def __init__(self, parameters, value) -> None:
        super().__init__(parameters, {})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["count"] = value


@pytest.mark.parametrize("value", [7, 2**40, 0.1, True])
def test_python_numbers_in_the_state_come_back_as_they_were(value):
    parameter = torch.nn.Parameter(torch.zeros(2))
    tensors = optimizer_tensors(Counting([parameter], value))
    assert list(tensors) == ["count.0.number"]
    other = Counting([parameter], None)
    load_optimizer_tensors(other, tensors)
    assert other.state[parameter]["count"] == value
    assert type(other.state[parameter]["count"]) is type(value)


def test_a_state_that_tensors_cannot_hold_is_refused():
    with pytest.raises(ConfigError, match="Counting keeps 'count' as a list"):
        optimizer_tensors(Counting([torch.nn.Parameter(torch.zeros(2))], [1, 2]))


@pytest.mark.parametrize("name", ["exp_avg.4", "exp_avg.x", "exp_avg"])
def test_the_state_of_another_model_is_refused_and_changes_nothing(name):
    module, optimizer = build("adamw")
    train(module, optimizer, range(1))
    with pytest.raises(WeightsError, match=f"'{name}'.* 4 trained parameters"):
        load_optimizer_tensors(optimizer, {name: torch.zeros(2)})
    assert len(optimizer.state) == 4


# The lock


def test_the_lock_is_released_on_leaving_even_by_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path / "run"):
        raise ZeroDivisionError
    with RunLock(tmp_path / "run"), pytest.raises(RunLockedError), RunLock(tmp_path / "run"):
        pass


def test_a_second_process_is_told_the_owner_until_the_owner_dies(tmp_path):
    hold = (
        "import sys; from pathlib import Path; from raftdiff.checkpoint import RunLock\n"
        "with RunLock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    owner = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with owner:
        try:
            assert owner.stdout.readline() == "held\n"
            with pytest.raises(RunLockedError, match=f"in use by process {owner.pid} on .* since 2.*; wait for it"):
                RunLock(tmp_path).__enter__()
        finally:
            owner.send_signal(signal.SIGKILL)
            owner.wait()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_lock_without_an_owner_s_name_is_still_refused(tmp_path):
    with RunLock(tmp_path):
        (tmp_path / "lock").write_bytes(b"")
        with pytest.raises(RunLockedError, match="in use by another process"):
            RunLock(tmp_path).__enter__()

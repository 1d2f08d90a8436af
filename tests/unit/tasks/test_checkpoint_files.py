"""Checkpoint files: damage is found by their checksum, nothing in them runs code, and any program reads them."""

import builtins
import functools
import io
import os
import pickle
import random
import time
import zipfile
from pathlib import Path

import pytest
import torch

from lightning_adam_mini.factory import AdamMini
from lightning_adam_mini.schedule import Schedule
from lightning_adam_mini.tasks.atomic_files import temporary_path
from lightning_adam_mini.tasks.checkpoints.files import ExactUnpickler, checksum_of
from lightning_adam_mini.tasks.checkpoints.saving import AtomicCheckpointIO, read_checkpoint
from lightning_adam_mini.tasks.data.module import read_record

FLIPS = CUTS = 300


def content():
    torch.manual_seed(0)
    return {
        "state_dict": {f"weight{number}": torch.randn(4, 10) for number in range(3)},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.95)}]}],
        "hyper_parameters": {"optimizer": AdamMini(lr=0.1), "schedule": Schedule()},
        "pytorch-lightning_version": "2",
        "global_step": 3,
    }


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(), path)
    return path


def read(path, **options):
    return AtomicCheckpointIO().load_checkpoint(path, **options)


def flipped(data, bit):
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def damages(data, flips=FLIPS, cuts=CUTS):
    """The file with one bit flipped, or cut off: anywhere, and wherever an archive has its ends."""
    draw = random.Random(0)
    ends = [*range(64), *range(len(data) - 64, len(data))]
    bits = {draw.randrange(8 * len(data)) for _ in range(flips)} | {8 * byte + byte % 8 for byte in ends}
    lengths = {draw.randrange(len(data)) for _ in range(cuts)} | set(ends)
    yield from (flipped(data, bit) for bit in sorted(bits))
    yield from (data[:length] for length in sorted(lengths))


def assert_refused(path, damaged=None, load=read):
    with pytest.raises(ValueError, match="cannot read the checkpoint") as told:
        load(path)
    line = str(told.value)
    assert str(damaged or path) in line
    assert "\n" not in line
    assert "Errno" not in line
    assert ": ;" not in line, "it says why"


def test_every_flipped_bit_and_every_cut_is_found(saved):
    for damaged in damages(saved.read_bytes()):
        saved.write_bytes(damaged)
        assert_refused(saved)


def test_each_bit_of_the_checksum_itself_counts(saved):
    """Digits of either case would say the same number."""
    data = saved.read_bytes()
    for bit in range(8 * (len(data) - 36), 8 * len(data)):
        saved.write_bytes(flipped(data, bit))
        assert_refused(saved)


def test_damage_in_a_page_or_between_two_files_is_found(saved, tmp_path):
    AtomicCheckpointIO().save_checkpoint({**content(), "global_step": 4}, other := tmp_path / "other.ckpt")
    data, others = saved.read_bytes(), other.read_bytes()
    for number in range(0, len(data) - 512, 512):
        for half in (b"\0" * 512, others[number : number + 512]):
            damaged = data[:number] + half + data[number + 512 :]
            saved.write_bytes(damaged)
            if damaged != data:
                assert_refused(saved)
    for damaged in (data + b"\0", data + data, data[1:], b"\0" * len(data)):
        saved.write_bytes(damaged)
        assert_refused(saved)


def test_who_reads_without_memory_finds_it(saved):
    load = functools.partial(read_checkpoint, mmap=True)
    load(saved)
    data = saved.read_bytes()
    for damaged in damages(data, flips=10, cuts=10):
        saved.write_bytes(damaged)
        assert_refused(saved, load=load)


def test_other_programs_read_it_as_any_other(saved):
    expected = content()["state_dict"]
    for options in ({}, {"mmap": True}, {"weights_only": False}):
        torch.testing.assert_close(torch.load(saved, **options)["state_dict"], expected, rtol=0, atol=0)
    from lightning.fabric.utilities.load import _lazy_load, _materialize_tensors

    lazy = _materialize_tensors(_lazy_load(saved)["state_dict"])
    torch.testing.assert_close(lazy, expected, rtol=0, atol=0)
    with zipfile.ZipFile(saved) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"lightning-adam-mini crc32 ")


def test_the_checksum_is_of_the_bytes_that_were_written(saved, monkeypatch):
    """Computed on the way to the disk: what the disk changes is found."""
    import lightning_adam_mini.tasks.checkpoints.files as module

    monkeypatch.setattr(module.os, "fsync", lambda fd: os.pwrite(fd, b"?", 700))
    AtomicCheckpointIO().save_checkpoint(content(), saved)
    assert_refused(saved)


def test_files_of_other_programs_load_as_before(tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save(content(), path)
    assert read(path)["global_step"] == 3
    data = path.read_bytes()
    weights = content()["state_dict"]["weight1"].numpy().tobytes()
    path.write_bytes(flipped(data, 8 * data.index(weights) + 100))
    assert_refused(path)
    for length in (*range(0, len(data), 97), len(data) - 1):
        path.write_bytes(data[:length])
        assert_refused(path)
    torch.save(content(), path, _use_new_zipfile_serialization=False)
    assert read(path)["global_step"] == 3
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read(path)["global_step"] == 3


class Payload:
    """Runs a function when it is unpickled."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def stack_global(module, name, argument):
    """A pickle of protocol 4, which leads from a module to any name with dots in it."""
    texts = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name, argument)]
    return b"\x80\x04" + texts[0] + texts[1] + b"\x93" + texts[2] + b"\x85R."


HARMS = {
    "os.system": Payload(os.system, "touch harmed"),
    "eval": Payload(builtins.eval, "open('harmed', 'w')"),
    "exec": Payload(builtins.exec, "open('harmed', 'w')"),
    "import": Payload(builtins.__import__, "antigravity"),
    "partial": Payload(functools.partial, os.system, "touch harmed"),
    "open": Payload(io.open, "harmed", "w"),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("where", ["first", "in the hyperparameters", "legacy"])
@pytest.mark.parametrize("forced", [False, True])
def test_a_checkpoint_that_would_run_code(tmp_path, monkeypatch, harm, where, forced):
    """Also where the environment has torch trust all files."""
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.chdir(tmp_path)
    bad = HARMS[harm] if where != "in the hyperparameters" else {**content(), "hyper_parameters": {"x": HARMS[harm]}}
    with monkeypatch.context() as patch:
        patch.setattr(pickle, "DEFAULT_PROTOCOL", 2)
        torch.save(bad, "bad.ckpt", _use_new_zipfile_serialization=where != "legacy")
    for load in (read, functools.partial(read_checkpoint, mmap=True)):
        with pytest.raises(
            ValueError, match=r"it asks for [\w.]+, and to load what no checkpoint needs could run"
        ) as told:
            load(Path("bad.ckpt"))
        assert "bad.ckpt" in str(told.value)
    assert not Path("harmed").exists()


def test_a_checksum_is_compared_once_until_the_file_changes(saved, monkeypatch):
    """A resumed run reads the record of its data first, and then the checkpoint."""
    from lightning_adam_mini.tasks.checkpoints import files

    compared = []
    monkeypatch.setattr(files, "checksum_of", lambda *args: compared.append(args) or checksum_of(*args))
    read_record(saved)
    read(saved)
    assert len(compared) == 2, "a file that was just saved may change within the resolution of its time stamp"
    now = time.time()
    monkeypatch.setattr(files.time, "time", lambda: now + 10)
    read_record(saved)
    read(saved)
    assert len(compared) == 3
    saved.write_bytes(flipped(saved.read_bytes(), 5000))
    assert_refused(saved)


def test_classes_are_named_exactly():
    classes = {("os", "getcwd"), ("pathlib", "PosixPath")}
    assert ExactUnpickler(io.BytesIO(pickle.dumps(Path("a"))), {*classes, ("pathlib._local", "PosixPath")}).load()
    for module, name in (("os", "system"), ("os", "path.os.system"), ("pathlib", "os.system"), ("pathlib", "Path")):
        with pytest.raises(pickle.UnpicklingError, match=f"unsupported class {module}.{name}"):
            ExactUnpickler(io.BytesIO(stack_global(module, name, "touch harmed")), classes).load()


def test_a_full_disk_is_told_as_such(saved):
    """torch's writer would tell where it stands in the file."""
    before = saved.read_bytes()
    for size in (10, 1_000_000):
        temporary_path(saved).symlink_to("/dev/full")
        big = {**content(), "state_dict": {"weight": torch.zeros(size)}}
        with pytest.raises(OSError, match=f"cannot write the checkpoint {saved}: No space left on device; free space"):
            AtomicCheckpointIO().save_checkpoint(big, saved)
        assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]
        assert saved.read_bytes() == before


def test_what_the_first_fsdp_reads_is_verified(saved, monkeypatch):
    """Lightning's own reading of whole files unpickles any class."""
    from lightning.pytorch.strategies import FSDPStrategy

    from lightning_adam_mini.tasks.parallel.fsdp1 import prepare_fsdp1

    strategy = FSDPStrategy()
    prepare_fsdp1(strategy, torch.nn.Linear(2, 2))
    assert strategy.load_checkpoint(saved)["state_dict"].keys() == content()["state_dict"].keys()
    monkeypatch.chdir(saved.parent)
    torch.save({**content(), "x": HARMS["os.system"]}, "bad.ckpt")
    with pytest.raises(ValueError, match="could run code"):
        strategy.load_checkpoint("bad.ckpt")
    saved.write_bytes(flipped(saved.read_bytes(), 5000))
    assert_refused(saved, load=strategy.load_checkpoint)
    assert not Path("harmed").exists()

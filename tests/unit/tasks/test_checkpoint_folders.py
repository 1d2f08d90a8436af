"""Checkpoint folders: they take their place whole, are refused when they are not, and are read by one process."""

import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lightning_adam_mini.cli.run_folder import last_checkpoint, resolve_checkpoint
from lightning_adam_mini.tasks.checkpoints.folders import (
    drop_unsaved,
    name_parameters,
    number_parameters,
    read_contents,
    read_folder,
    read_parameter_names,
    write_folder,
)
from lightning_adam_mini.tasks.checkpoints.saving import AtomicCheckpointIO

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STATE = {
    "state_dict": {"model.weight": torch.arange(6.0).view(2, 3), "model.count": torch.tensor(3)},
    "optimizer_0": {
        "state": {"model.weight": {"step": torch.tensor(7.0), "exp_avg": torch.ones(2, 3)}},
        "param_groups": [{"params": ["model.weight"], "lr": 0.1, "betas": (0.9, 0.95)}, {"params": [], "lr": 0.2}],
    },
}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.mkdir(parents=True)
    dcp.save(STATE, checkpoint_id=path, no_dist=True)
    torch.save({"global_step": 7, "pytorch-lightning_version": "2"}, path / "meta.pt")
    return path


def test_last_and_best_are_folders_or_links(folder):
    run = folder.parent.parent
    assert resolve_checkpoint("last", run, may_start=False) == str(folder)
    best = folder.rename(folder.with_name("best-step=5.ckpt"))
    folder.symlink_to(best.name)
    assert resolve_checkpoint("last", run, may_start=False) == str(folder)
    assert resolve_checkpoint("best", run, may_start=False) == str(best)
    assert resolve_checkpoint(str(folder), run, may_start=False) == str(folder)


def test_a_kill_between_two_renames_is_mended_where_the_checkpoint_is_looked_for(folder):
    folder.rename(folder.with_name(".last.ckpt.new"))
    assert last_checkpoint(folder.parent.parent) == folder
    assert set(read_contents(folder).parts) == set(STATE)


def test_another_folder_is_no_checkpoint(folder):
    run = folder.parent.parent
    with pytest.raises(ValueError, match=r"is a folder, but no checkpoint: it has no \.metadata; give"):
        resolve_checkpoint(str(folder.parent), run, may_start=False)


def test_one_process_reads_what_it_would_have_saved(folder):
    checkpoint = AtomicCheckpointIO().load_checkpoint(folder, weights_only=True)
    assert checkpoint["global_step"] == 7
    torch.testing.assert_close(checkpoint["state_dict"], STATE["state_dict"], rtol=0, atol=0)
    (state,) = checkpoint["optimizer_states"]
    assert state["param_groups"] == [{"params": [0], "lr": 0.1, "betas": (0.9, 0.95)}, {"params": [], "lr": 0.2}]
    torch.testing.assert_close(state["state"], {0: STATE["optimizer_0"]["state"]["model.weight"]}, rtol=0, atol=0)


def test_parameter_names_are_read_without_the_tensors(folder, monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("a tensor is read")

    monkeypatch.setattr("torch.distributed.checkpoint.default_planner.DefaultLoadPlanner.resolve_tensor", read)
    assert read_parameter_names(folder) == [["model.weight"], []]


def test_the_weights_of_fsdp1_have_another_name(tmp_path):
    dcp.save({"model": STATE["state_dict"]}, checkpoint_id=tmp_path, no_dist=True)
    torch.save({"pytorch-lightning_version": "2"}, tmp_path / "meta.pt")
    assert read_folder(tmp_path).keys() == {"pytorch-lightning_version", "state_dict"}
    assert read_parameter_names(tmp_path) == [], "there is no optimizer"


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


class Payload:
    """Calls something when it is unpickled."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


BREAKS = {
    r"it has no \.metadata": lambda folder: (folder / ".metadata").unlink(),
    r"it has no meta\.pt": lambda folder: (folder / "meta.pt").unlink(),
    r"\.metadata is none of a checkpoint": lambda folder: cut(folder / ".metadata"),
    r"__0_0\.distcp is missing": lambda folder: (folder / "__0_0.distcp").unlink(),
    r"__0_0\.distcp has \d+ bytes of \d+": lambda folder: cut(folder / "__0_0.distcp"),
    r"meta\.pt: ": lambda folder: cut(folder / "meta.pt"),
    "names no version of Lightning": lambda folder: torch.save([1], folder / "meta.pt"),
}


def assert_refused(folder, message, load=None):
    with pytest.raises(ValueError, match=message) as told:
        (load or AtomicCheckpointIO().load_checkpoint)(folder)
    assert str(folder) in str(told.value)
    assert "\n" not in str(told.value)
    assert not Path("harmed").exists()


@pytest.mark.parametrize("message", BREAKS)
def test_a_folder_that_is_not_whole(folder, message):
    BREAKS[message](folder)
    assert_refused(folder, message)


@pytest.fixture
def ours(tmp_path):
    """A folder that this project has written."""
    state = STATE["optimizer_0"]
    checkpoint = {"state_dict": STATE["state_dict"], "optimizer_states": [state]}
    rest = {"global_step": 7, "pytorch-lightning_version": "2"}
    write_folder(checkpoint | rest, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


@pytest.mark.parametrize("name", [".metadata", "meta.pt", "__0_0.distcp"])
def test_every_flipped_bit_and_every_cut_of_a_folder_is_found(ours, name):
    assert AtomicCheckpointIO().load_checkpoint(ours).keys() >= {"state_dict", "optimizer_states", "global_step"}
    path, draw = ours / name, random.Random(0)
    data = path.read_bytes()
    for bit in {draw.randrange(8 * len(data)) for _ in range(100)}:
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        assert_refused(ours, f"{ours}/{name} is damaged")
    for length in {draw.randrange(len(data)) for _ in range(100)} | {0, 1, len(data) - 1}:
        path.write_bytes(data[:length])
        assert_refused(ours, f"{ours}/{name} is damaged")
    path.write_bytes(data)
    AtomicCheckpointIO().load_checkpoint(ours)


@pytest.mark.parametrize("name", [".metadata", "meta.pt", "__0_0.distcp"])
def test_a_file_of_an_earlier_save_is_found(ours, name):
    """Each is whole by itself, and has the size of the one that belongs there."""
    earlier = shutil.copytree(ours, ours.with_name("earlier.ckpt"))
    state = {name: value + 1 for name, value in STATE["state_dict"].items()}
    checkpoint = {"state_dict": state, "optimizer_states": [STATE["optimizer_0"]]}
    write_folder(checkpoint | {"global_step": 8, "pytorch-lightning_version": "2"}, ours)
    assert AtomicCheckpointIO().load_checkpoint(ours)["global_step"] == 8
    shutil.copy(earlier / name, ours / name)
    assert_refused(ours, "its checksum is not the one that it was saved with")


def test_checksums_that_another_program_has_carried_along_are_not_those_of_its_folder(ours, folder):
    torch.save(torch.load(ours / "meta.pt"), folder / "meta.pt")
    read = AtomicCheckpointIO().load_checkpoint(folder)
    assert read.keys() == {"global_step", "pytorch-lightning_version", "state_dict", "optimizer_states"}


def test_parts_of_other_programs_are_compared_with_the_checksums_in_their_archives(folder):
    path = folder / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[data.index(STATE["state_dict"]["model.weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    assert_refused(folder, "__0_0.distcp: Bad CRC-32 for file")


def stack_global(module, name):
    """A pickle of protocol 4, which leads from a module to any name with dots in it."""
    texts = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name, "touch harmed")]
    return b"\x80\x04" + texts[0] + texts[1] + b"\x93" + texts[2] + b"\x85R."


OF_TORCH = "torch.distributed.checkpoint"
HARMS = {
    "os.system": pickle.dumps(Payload(os.system, "touch harmed")),
    "eval": pickle.dumps(Payload(eval, "open('harmed', 'w')")),
    "a module of torch": f"c{OF_TORCH}.filesystem\nos.system\n(Vtouch harmed\ntR.".encode(),
    "a module that torch imports": stack_global(f"{OF_TORCH}.filesystem", "os.system"),
    "through a class": stack_global(f"{OF_TORCH}.metadata", "Metadata.__init__.__globals__"),
    "through the package": stack_global(OF_TORCH, "filesystem.os.system"),
    "a function of torch": stack_global(f"{OF_TORCH}.filesystem", "_generate_uuid"),
    "through a dtype": stack_global("torch", "float32.__class__"),
    "torch.load": stack_global("torch", "load"),
    "pathlib": stack_global("pathlib", "os.system"),
    "partial": stack_global("functools", "partial"),
    "copyreg": stack_global("copyreg", "__newobj__"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_an_outline_that_would_run_code(folder, monkeypatch, harm):
    monkeypatch.chdir(folder.parent)
    (folder / ".metadata").write_bytes(HARMS[harm])
    assert_refused(folder, "metadata is none of a checkpoint: it asks for .* could run code")


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("where", ["rest", "part"])
def test_a_folder_that_would_run_code(folder, monkeypatch, where, forced):
    """Also in what torch keeps between tensors, which its own planner unpickles whatever it is."""
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.chdir(folder.parent)
    harm = Payload(os.system, "touch harmed")
    if where == "rest":
        torch.save({"pytorch-lightning_version": "2", "x": harm}, folder / "meta.pt")
    else:
        shutil.move(folder / "meta.pt", folder.parent / "meta.pt")
        shutil.rmtree(folder)
        dcp.save({"optimizer_0": {"x": harm}, "state_dict": STATE["state_dict"]}, checkpoint_id=folder, no_dist=True)
        shutil.move(folder.parent / "meta.pt", folder / "meta.pt")
    assert_refused(folder, r"could run code")


def test_an_outline_that_leads_out_of_the_folder(folder):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for part in metadata.storage_data.values():
        part.relative_path = "../elsewhere"
    shutil.copy(folder / "__0_0.distcp", folder.parent / "elsewhere")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert_refused(folder, r"it names '\.\./elsewhere', which is no file of the folder")


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata.tmp", "meta.pt"])
def test_a_full_disk_is_told_as_such(ours, monkeypatch, file):
    """torch's writer would tell where it stands in the file."""
    real = Path.open

    def open_full(path, *args, **options):
        return real(Path("/dev/full") if path.name == file and "w" in args[0] else path, *args, **options)

    before = AtomicCheckpointIO().load_checkpoint(ours)
    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(OSError, match=f"cannot write the checkpoint {ours}: No space left on device; free space"):
        write_folder({**before, "optimizer_states": [], "state_dict": {"weight": torch.zeros(100_000)}}, ours)
    monkeypatch.undo()
    assert [path.name for path in ours.parent.iterdir()] == ["last.ckpt"]
    assert AtomicCheckpointIO().load_checkpoint(ours)["global_step"] == 7


def test_a_folder_without_weights(tmp_path):
    dcp.save({"other": STATE["state_dict"]}, checkpoint_id=tmp_path, no_dist=True)
    torch.save({}, tmp_path / "meta.pt")
    with pytest.raises(ValueError, match="no checkpoint of a training: it has no weights"):
        read_folder(tmp_path)


GROUPS = [{"params": ["a", "c"], "lr": 1.0}, {"params": ["b"], "lr": 2.0}]
NAMED = {"state": {name: {"step": torch.tensor(step)} for name, step in (("c", 2), ("b", 3), ("a", 1))}}
NAMED["param_groups"] = GROUPS


def test_names_and_numbers_follow_the_groups_and_not_the_model():
    """With two groups of weight decay the parameters a, b, c of a model have the numbers 0, 2, 1."""
    numbered = number_parameters(NAMED)
    assert [group["params"] for group in numbered["param_groups"]] == [[0, 1], [2]]
    assert {number: int(values["step"]) for number, values in numbered["state"].items()} == {0: 1, 1: 2, 2: 3}
    assert name_parameters(numbered, GROUPS) == NAMED
    of_the_model = {"state": {0: "a", 1: "b", 2: "c"}, "param_groups": [{"params": [0, 2]}, {"params": [1]}]}
    assert name_parameters(of_the_model, GROUPS)["state"] == {"a": "a", "b": "b", "c": "c"}
    with pytest.raises(ValueError, match=r"groups of \[2, 1\] parameters, this optimizer has \[3\].*start a new run"):
        name_parameters(numbered, [{"params": ["a", "b", "c"]}])


def saved(**shapes):
    return {f"state.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()}


def own():
    return {
        "state": {
            "w": {"exp_avg": torch.zeros(2, 3), "exp_avg_sq": torch.zeros(2, 1)},
            "u": {"exp_avg": torch.zeros(1)},
        }
    }


WHOLE = {"w.exp_avg": (2, 3), "w.exp_avg_sq": (2, 1), "u.exp_avg": (1,)}
OTHERS = [
    (WHOLE | {"w.exp_avg_sq": (2, 3)}, r"the saved exp_avg_sq of 'w' has shape \(2, 3\), but here it has \(2, 1\)"),
    ({"w.exp_avg": (2, 3), "u.exp_avg": (1,)}, r"the saved optimizer state has no w\.exp_avg_sq"),
    (WHOLE | {"w.max": (2, 3)}, r"the saved optimizer state has w\.max, this one has not"),
    ({}, r"the saved optimizer state has no w\.exp_avg"),
]


@pytest.mark.parametrize(("shapes", "message"), OTHERS)
def test_the_state_of_another_partition(shapes, message):
    with pytest.raises(ValueError, match=message + ".*Continue with the optimizer, model and partition"):
        drop_unsaved(own(), saved(**shapes))


def test_a_parameter_without_a_step_has_no_state():
    state = own()
    drop_unsaved(state, saved(**WHOLE))
    assert list(state["state"]) == ["w", "u"]
    drop_unsaved(state, saved(**{name: shape for name, shape in WHOLE.items() if name[0] == "w"}))
    assert list(state["state"]) == ["w"]

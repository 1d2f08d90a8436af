"""`adam-mini convert`: what it writes, `adam-mini fit` continues from."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import tiny_runs
from lightning_adam_mini.cli.main import main
from lightning_adam_mini.convert import from_adamw
from lightning_adam_mini.tasks.metrics import read_metrics
from ranks import run_ranks
from tiny_runs import assert_same_state, checkpoint, error_line, run

ADAMW = ["--optimizer", "AdamW"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, prepared_data):
    """A folder with the runs `adamw` and `mini` of ten steps."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_runs.write_recipe(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_ADAM_MINI_CACHE", str(prepared_data))
        patch.chdir(folder)
        assert run("fit", "--run_dir", "adamw", *ADAMW) == 0
        assert run("fit", "--run_dir", "mini") == 0
    return folder


def load(path):
    return checkpoint(Path(path).parent.parent, Path(path).stem) if "checkpoints" in str(path) else _load(path)


def _load(path):
    from lightning_adam_mini.tasks import base  # noqa: F401 - names the classes that checkpoints hold

    return torch.load(path, weights_only=True)


def state_of(saved):
    (state,) = saved["optimizer_states"]
    return state


def num_bytes(state):
    return sum(value.nbytes for entry in state["state"].values() for value in entry.values())


def group_of(names):
    """The order of a state of two groups: what decays, which are the matrices of GPT-2, and what does not."""
    return [name for name in names if name.endswith("weight") and "ln_" not in name] + [
        name for name in names if name.endswith("bias") or "ln_" in name
    ]


def test_a_run_with_adamw_continues_with_adam_mini_at_half_the_state(work_dir, trained, capsys):
    assert main(["convert", str(trained / "adamw"), "--out", "new.ckpt"]) == 0
    told = capsys.readouterr().out
    before, after = checkpoint(trained / "adamw"), load("new.ckpt")
    sizes = [num_bytes(state_of(saved)) for saved in (before, after)]
    assert f"AdamW -> AdamMini: {sizes[0]:,} bytes of optimizer state -> {sizes[1]:,}" in told
    assert 0.5 <= sizes[1] / sizes[0] < 0.53, sizes
    assert after["optimizer_factory"]["name"] == "AdamMini"
    assert after["lr_schedulers"] == before["lr_schedulers"]
    for key in ("lr", "initial_lr", "betas", "eps", "weight_decay"):
        assert [g[key] for g in state_of(after)["param_groups"]] == [g[key] for g in state_of(before)["param_groups"]]

    to_14 = ["--trainer.max_steps", 14, "--schedule.horizon", 14, "--trainer.log_every_n_steps", 1]
    assert run("fit", "--run_dir", "next", "--ckpt_path", "new.ckpt", "--optimizer.lr", "1e-2", *to_14) == 0
    err = capsys.readouterr().err
    assert "continues; " not in err, "the checkpoint's values are those of the recipe"
    last = str(trained / "adamw" / "checkpoints" / "last.ckpt")
    assert run("fit", "--run_dir", "same", "--ckpt_path", last, *ADAMW, *to_14) == 0
    ours, theirs = (read_metrics(name)["train_loss"] for name in ("next", "same"))
    assert ours[11] == theirs[11], "the first batch is seen by the same weights"
    assert all(abs(ours[step] - theirs[step]) < 0.2 for step in (12, 13, 14)), (ours, theirs)
    assert {int(entry["step"]) for entry in state_of(checkpoint("next"))["state"].values()} == {14}
    assert not list(work_dir.rglob(".*.tmp"))


def printed_command(capsys):
    """The arguments of the command that `convert` has printed."""
    (command,) = re.findall(r"continue with adam-mini (.*)", capsys.readouterr().out)
    return shlex.split(command)


@pytest.mark.parametrize(
    ("arguments", "target"),
    [
        ([], "of mine & yours.ckpt"),
        pytest.param(["--to", "adamw", "--to", "folder"], "new", marks=pytest.mark.slow),
    ],
)
def test_the_command_that_is_printed_trains_on(work_dir, trained, capsys, arguments, target):
    """As printed, also where the run was over."""
    assert main(["convert", str(trained / "mini"), "--out", target, *arguments]) == 0
    command = printed_command(capsys)
    assert command[-2:] == ["--trainer.max_steps", "20"]
    assert main(command) == 0
    run_dir = Path("runs") / Path(target).stem
    assert [path.name for path in Path("runs").iterdir()] == [run_dir.name], "not the name of a file"
    assert list(read_metrics(run_dir)["train_loss"]) == [12, 14, 16, 18, 20]
    assert load(run_dir / "checkpoints" / "last.ckpt")["global_step"] == 20
    assert main(["convert", str(trained / "mini"), "--out", target, *arguments, "--overwrite"]) == 0
    again = printed_command(capsys)
    assert f"{run_dir}-2" in again, "the folder of the command is free"


@pytest.mark.parametrize(
    ("trainer", "schedule", "saved", "further"),
    [
        ({"max_steps": 10}, {}, {"global_step": 10}, ["--trainer.max_steps", "20"]),
        ({"max_steps": 10}, {"horizon": 10}, {}, ["--trainer.max_steps", "20", "--schedule.horizon", "20"]),
        ({"max_steps": 10}, {"horizon": 50}, {}, ["--trainer.max_steps", "20"]),
        ({"max_steps": 11}, {}, {}, []),
        ({"max_steps": -1, "max_epochs": 4}, {}, {"epoch": 4}, ["--trainer.max_epochs", "8"]),
        ({"max_epochs": 4}, None, {"epoch": 3}, []),
        (
            {"max_epochs": 4},
            {},
            {"loops": {"processed": 3, "ready": 4, "is_last": True}},
            ["--trainer.max_epochs", "8"],
        ),
        ({"max_epochs": 4}, {}, {"loops": {"processed": 3, "ready": 4, "is_last": False}}, []),
        (None, {}, {}, []),
    ],
)
def test_a_run_that_is_over_is_continued_with_more_steps(tmp_path, trainer, schedule, saved, further):
    from lightning_adam_mini.cli.convert import _further

    if "loops" in saved:
        loops = dict(saved["loops"])
        batches = {"is_last_batch": loops.pop("is_last")}
        saved = {"loops": {"fit_loop": {"epoch_progress": {"current": loops}, "epoch_loop.batch_progress": batches}}}
    (tmp_path / "config.yaml").write_text(json.dumps({"trainer": trainer, "schedule": schedule}))
    assert _further(tmp_path / "config.yaml", {"global_step": 10, **saved}) == further


@pytest.mark.slow
def test_back_to_adamw(work_dir, trained):
    assert main(["convert", str(trained / "mini"), "--to", "adamw", "--out", "new.ckpt"]) == 0
    before, after = checkpoint(trained / "mini"), load("new.ckpt")
    assert num_bytes(state_of(after)) == num_bytes(state_of(checkpoint(trained / "adamw")))
    assert after["optimizer_factory"]["name"] == "AdamW"
    assert torch.equal(state_of(after)["state"][0]["exp_avg"], state_of(before)["state"][0]["exp_avg"])
    assert run("fit", "--run_dir", "next", "--ckpt_path", "new.ckpt", "--trainer.max_steps", 12, *ADAMW) == 0
    assert main(["convert", "new.ckpt", "--recipe", str(trained / "mini" / "config.yaml"), "--out", "again.ckpt"]) == 0
    for number, entry in state_of(load("again.ckpt"))["state"].items():
        for key, value in state_of(before)["state"][number].items():
            torch.testing.assert_close(entry[key], value, rtol=2e-7, atol=0)


def test_another_partition(work_dir, trained):
    partition = ["--optimizer.partition", "factored"]
    assert main(["convert", *partition, str(trained / "mini"), "--out", "new.ckpt"]) == 0
    saved = load("new.ckpt")
    assert saved["optimizer_factory"]["partition"] == "factored"
    assert saved["hyper_parameters"]["optimizer"].partition == "factored"
    assert "exp_avg_sq_row" in state_of(saved)["state"][0]
    assert run("fit", "--run_dir", "next", "--ckpt_path", "new.ckpt", "--trainer.max_steps", 12, *partition) == 0


@pytest.mark.slow
def test_a_file_of_another_program(work_dir, trained):
    """Lightning's own file: AdamW over one group, a schedule with one entry a group, nothing of ours."""
    saved = checkpoint(trained / "adamw")
    state, names = state_of(saved), list(saved["state_dict"])
    order = [name for name in names if name != "model.lm_head.weight"]
    numbers = {name: number for number, name in enumerate(group_of(order))}
    (group, _) = state["param_groups"]
    one = {**group, "params": list(range(len(order)))}
    states = {number: state["state"][numbers[name]] for number, name in enumerate(order)}
    schedule = {**saved["lr_schedulers"][0], "base_lrs": [0.01], "_last_lr": [0.001], "lr_lambdas": [None]}
    saved |= {"optimizer_states": [{"state": states, "param_groups": [one]}], "lr_schedulers": [schedule]}
    del saved["optimizer_factory"], saved["hyper_parameters"]
    torch.save(saved, "other.ckpt")
    assert main(["convert", "other.ckpt", "--recipe", "tiny.yaml", "--out", "new.ckpt"]) == 0
    after = load("new.ckpt")
    assert after["lr_schedulers"][0]["base_lrs"] == [0.01, 0.01]
    assert after["optimizer_factory"]["lr"] == 0.01
    assert [g["weight_decay"] for g in state_of(after)["param_groups"]] == [group["weight_decay"]] * 2
    assert main(["convert", str(trained / "adamw"), "--out", "ours.ckpt"]) == 0
    for number, entry in state_of(load("ours.ckpt"))["state"].items():
        for key, value in entry.items():
            assert torch.equal(state_of(after)["state"][number][key], value)
    assert run("fit", "--run_dir", "next", "--ckpt_path", "new.ckpt", "--trainer.max_steps", 12) == 0


def test_a_folder_and_back(work_dir, trained):
    """Nothing is lost between the two layouts, for an optimizer that is converted no further too."""
    for name, options in (("adamw", []), ("mini", ["--to", "adam-mini"])):
        assert main(["convert", str(trained / name), "--to", "folder", "--out", f"{name}.dist", *options]) == 0
        assert main(["convert", f"{name}.dist", "--to", "file", "--out", f"{name}.ckpt"]) == 0
        before, after = checkpoint(trained / name), load(f"{name}.ckpt")
        before["state_dict"] = dict(before["state_dict"])
        assert_same_state(after, before)
        assert before.keys() == after.keys()
    assert (
        main(["convert", "adamw.dist", "--recipe", "tiny.yaml", "--to", "file", "--to", "adam-mini", "--out", "x"]) == 0
    )
    assert main(["convert", str(trained / "adamw"), "--out", "y"]) == 0
    assert_same_state({**load("x"), "state_dict": {}}, {**load("y"), "state_dict": {}})


class Shell(torch.nn.Module):
    """The names that a task gives its network."""

    def __init__(self, model):
        super().__init__()
        self.model = model


def network(config):
    from lightning_adam_mini.tasks.llm.model import build_config, build_model

    torch.manual_seed(1)
    return Shell(build_model(build_config("gpt2", config), None, "eager").float())


def set_gradients(module):
    """Gradients that depend on the name alone, also of sharded parameters."""
    from torch.distributed.tensor import distribute_tensor

    for number, parameter in enumerate(module.parameters()):
        gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        if hasattr(parameter, "device_mesh"):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.grad = gradient


def sharded_step(rank, config, source, target):
    """Load a folder as ModelParallelStrategy does, take a step, and write one in its layout."""
    from lightning.fabric.strategies.model_parallel import _distributed_checkpoint_save, _load_checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from lightning_adam_mini import AdamMini

    module = network(config)
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    optimizer = AdamMini(module, lr=1.0)
    for group in optimizer.param_groups:
        group["initial_lr"] = 1.0  # as a schedule leaves it
    rest = _load_checkpoint(
        source, {"state_dict": module, "optimizer_0": optimizer}, optimizer_states_from_list=True, weights_only=True
    )
    set_gradients(module)
    optimizer.step()
    state = {
        "state_dict": get_model_state_dict(module),
        "optimizer_0": get_optimizer_state_dict(module, optimizer),
    }
    _distributed_checkpoint_save(state, target)
    if rank == 0:
        torch.save(rest, target / "meta.pt")


@pytest.mark.slow
def test_a_sharded_run_continues_from_a_folder_and_one_process_from_its_own(work_dir, trained):
    """Through the functions of Lightning's strategy, on two ranks."""
    from lightning.fabric.strategies import model_parallel  # noqa: F401 - before the ranks are forked
    from torch.distributed import fsdp  # noqa: F401

    from lightning_adam_mini import AdamMini

    saved = checkpoint(trained / "mini")
    sizes = tiny_runs.RECIPE["model"]["init_args"]["config"]
    config = {**sizes, "vocab_size": len(saved["state_dict"]["model.lm_head.weight"])}
    assert main(["convert", str(trained / "mini"), "--to", "folder", "--out", "one.dist"]) == 0
    run_ranks(2, sharded_step, config, Path("one.dist").resolve(), Path("two.dist").resolve())
    assert len(list(Path("two.dist").glob("*.distcp"))) == 2
    assert main(["convert", "two.dist", "--to", "file", "--out", "two.ckpt"]) == 0

    module = network(config)
    module.load_state_dict(saved["state_dict"])
    optimizer = AdamMini(module)
    optimizer.load_state_dict(state_of(saved))
    set_gradients(module)
    optimizer.step()
    found = load("two.ckpt")
    assert found["global_step"] == 10
    assert found["optimizer_factory"] == saved["optimizer_factory"]
    for name, value in module.state_dict().items():
        torch.testing.assert_close(found["state_dict"][name], value, rtol=1e-5, atol=1e-6)
    assert state_of(found)["param_groups"] == optimizer.state_dict()["param_groups"]
    for number, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            torch.testing.assert_close(state_of(found)["state"][number][key], value, rtol=1e-5, atol=1e-8)
    command = ["convert", "two.dist", "--recipe", "tiny.yaml", "--to", "adamw", "--to", "file", "--out", "w.ckpt"]
    assert main(command) == 0
    assert run("fit", "--run_dir", "next", "--ckpt_path", "w.ckpt", "--trainer.max_steps", 12, *ADAMW) == 0


@pytest.mark.slow
def test_a_folder_of_fsdp1(work_dir, trained):
    """Weights under `model`, and second moments expanded to the parameters' shapes."""
    assert main(["convert", str(trained / "mini"), "--to", "adamw", "--out", "wide.ckpt"]) == 0
    assert main(["convert", str(trained / "mini"), "--to", "folder", "--out", "mini.dist"]) == 0
    from torch.distributed.checkpoint import save

    from lightning_adam_mini.cli.convert import _named
    from lightning_adam_mini.tasks.checkpoints.folders import read_folder, read_parameter_names

    found = read_folder(Path("mini.dist"))
    wide = state_of(load("wide.ckpt"))["state"]
    names = [name for group in read_parameter_names(Path("mini.dist")) for name in group]
    (numbered,) = found["optimizer_states"]
    state = _named({**numbered, "state": wide}, names)
    save({"model": found.pop("state_dict"), "optimizer_0": state}, checkpoint_id="fsdp1", no_dist=True)
    del found["optimizer_states"]
    torch.save(found, "fsdp1/meta.pt")
    assert main(["convert", "fsdp1", "--recipe", "tiny.yaml", "--to", "adam-mini", "--to", "file", "--out", "m"]) == 0
    before = state_of(checkpoint(trained / "mini"))
    for number, entry in state_of(load("m"))["state"].items():
        for key, value in before["state"][number].items():
            torch.testing.assert_close(entry[key], value, rtol=2e-7, atol=0)


@pytest.mark.slow
def test_what_is_there_is_replaced_only_when_asked(work_dir, trained, capsys):
    source, target = str(trained / "adamw"), work_dir / "new.ckpt"
    target.write_text("mine")
    assert main(["convert", source, "--out", "new.ckpt"]) == 1
    assert "new.ckpt exists; choose another --out, or give --overwrite" in error_line(capsys)
    assert target.read_text() == "mine"
    assert main(["convert", source, "--out", "new.ckpt", "--overwrite"]) == 0
    assert load(target)["optimizer_factory"]["name"] == "AdamMini"
    assert main(["convert", source, "--out", "new.ckpt", "--to", "folder", "--overwrite"]) == 1
    assert "only replaces a checkpoint folder" in error_line(capsys)
    for _ in range(2):
        assert main(["convert", source, "--out", "new.dist", "--to", "folder", "--overwrite"]) == 0
    assert not [path for path in work_dir.iterdir() if path.name.startswith(".new")]


def test_what_cannot_be_converted(work_dir, trained, capsys):
    (work_dir / "empty").mkdir()
    whole = (trained / "adamw" / "checkpoints" / "last.ckpt").read_bytes()
    (work_dir / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    assert main(["convert", str(trained / "adamw"), "--out", "part.dist", "--to", "folder"]) == 0
    shutil.copytree("part.dist", "lost.dist")
    shutil.copytree("part.dist", "headless.dist")
    (shard,) = Path("part.dist").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:1000])
    next(Path("lost.dist").glob("*.distcp")).unlink()
    (work_dir / "headless.dist" / ".metadata").write_bytes(b"x")
    other = {**tiny_runs.RECIPE["model"]["init_args"], "config": {"hidden_size": 16, "num_attention_heads": 2}}
    tiny_runs.write_recipe(work_dir, model={**tiny_runs.RECIPE["model"], "init_args": other})
    saved = checkpoint(trained / "adamw")
    torch.save({**saved, "optimizer_states": []}, "weights.ckpt")
    torch.save({**saved, "optimizer_factory": {"name": "Lion", "lr": 0.1}}, "lion.ckpt")
    recipe = ["--recipe", str(trained / "adamw" / "config.yaml")]
    capsys.readouterr()
    for arguments, message, code in (
        (["nowhere"], "nowhere: no such file or folder; give a run folder", 1),
        (["empty"], "empty: it holds no checkpoint; give a run folder", 1),
        (["cut.ckpt", *recipe], "cannot read the checkpoint cut.ckpt", 1),
        (["cut.ckpt"], "no config.yaml of a run next to cut.ckpt; give the recipe", 1),
        (["part.dist", *recipe], "cannot read the checkpoint part.dist", 1),
        (["lost.dist", "--to", "file"], "cannot read the checkpoint lost.dist", 1),
        (["headless.dist", "--to", "file"], "cannot read the checkpoint headless.dist", 1),
        (["weights.ckpt", *recipe], "holds the states of 0 optimizers", 1),
        (["lion.ckpt", *recipe], "was saved with Lion; states of AdamW, Adam and AdamMini are converted", 1),
        (
            [str(trained / "adamw"), "--recipe", "tiny.yaml"],
            "the checkpoint belongs to another model than tiny.yaml",
            1,
        ),
        ([str(trained / "adamw"), "--recipe", "nothing"], "--recipe nothing: no such file", 2),
        ([str(trained / "adamw"), "--to", "file"], "--to file: the source is a file already", 2),
        ([str(trained / "adamw"), "--to", "adamw", "--to", "adam-mini"], "--to: give one of adam-mini, adamw", 2),
        ([str(trained / "adamw"), "--optimizer.lr", "1"], "--optimizer.lr: the value of the checkpoint stays", 2),
        ([str(trained / "adamw"), "--optimizer.partition=x"], "optimizer.partition: 'x' is not one of auto", 2),
        ([str(trained / "adamw"), "--optimizer", "Lion"], "give the optimizer as --to adam-mini or --to adamw", 2),
        (["part.dist", "--to", "file", "--optimizer.partition=auto"], "an option of an optimizer needs --to", 2),
    ):
        assert main(["convert", *arguments, "--out", "target"]) == code, arguments
        assert message in error_line(capsys)
        assert not (work_dir / "target").exists()
    assert not [path for path in work_dir.iterdir() if path.name.endswith(".tmp")]


def test_the_command_makes_what_the_function_makes(work_dir, trained):
    assert main(["convert", str(trained / "adamw"), "--ckpt_path", "best", "--out", "new.ckpt"]) == 0
    from lightning_adam_mini import AdamMini

    saved = checkpoint(trained / "adamw")
    sizes = tiny_runs.RECIPE["model"]["init_args"]["config"]
    module = network({**sizes, "vocab_size": len(saved["state_dict"]["model.lm_head.weight"])})
    expected = from_adamw(state_of(saved), AdamMini(module), keep_hyperparameters=True)
    found = state_of(load("new.ckpt"))
    for number, entry in expected["state"].items():
        for key, value in entry.items():
            assert torch.equal(found["state"][number][key], value)
    assert json.dumps(found["param_groups"]) == json.dumps(expected["param_groups"])

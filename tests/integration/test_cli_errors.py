"""What the user did wrong is told in one line, with the remedy; the next try is not blocked."""

import json
import os
from pathlib import Path

import pytest
import yaml

pytest.importorskip("lightning.pytorch")  # its log goes where errors went when it was imported: not into a test's

from lightning_adam_mini.cli.main import main
from lightning_adam_mini.cli.run_folder import holds_run
from tiny_runs import checkpoint, error_line, run, start

COMMAND, VALUE = 2, 1  # exit codes: what is wrong


def assert_refused(code, capsys, expected_code, told, run_dir="run"):
    assert code == expected_code
    line = error_line(capsys)
    assert told in line
    assert len(line) < 400, "a line that somebody reads"
    assert not holds_run(Path(run_dir))


COMMANDS = [
    # The optimizer.
    (["--optimizer", "AdamMni"], COMMAND, "no class 'AdamMni'; did you mean AdamMini? Choose from: Ada"),
    (["--optimizer", "torch.optim.AdamW"], COMMAND, "no class 'torch.optim.AdamW'; did you mean AdamW?"),
    (["--optimizer.lrr", 1], COMMAND, "AdamMini has no option 'lrr'; did you mean lr? It has: lr, weight_decay"),
    (["--optimizer", "SGD", "--optimizer.betas", "[0.9,0.9]"], COMMAND, "SGD has no option 'betas'. It has: lr"),
    (["--optimizer.lr", "fast"], COMMAND, "optimizer.lr: expected a number, got fast"),
    (["--optimizer.lr", -1], VALUE, "lr must be a finite number of at least 0, not -1.0"),
    (["--optimizer.betas", "[0.9]"], COMMAND, "optimizer.betas: expected a tuple with 2 elements, got [0.9]"),
    (["--optimizer.partition", "transfomer"], COMMAND, "'transfomer' is not one of auto, transformer,"),
    (["--optimizer.partition", "transfomer"], COMMAND, "did you mean transformer?"),
    (["--optimizer.partition_overrides", '{"value": "wole"}'], COMMAND, "'wole' is not one of head, row, column"),
    (["--optimizer.partition_overrides", '{"vale": "whole"}'], VALUE, "'vale' matches no parameter"),
    (["--optimizer.partition_overrides", '{"re:x.*": "whole"}'], VALUE, "'re:x.*' matches no parameter"),
    (["--optimizer", "Lion", "--optimizer.betas", "[0.9,2]"], VALUE, "betas must be in [0, 1), not (0.9, 2.0)"),
    (["--optimizer.lr", "null"], COMMAND, "optimizer.lr must be a number, not null"),
    (["--optimizer.betas", "[0.9,null]"], COMMAND, "optimizer.betas must be a number, not null"),
    (["--optimizer.partition", "null"], COMMAND, "optimizer.partition must be one of auto, transformer,"),
    (["--optimizer.lr", "true"], COMMAND, "optimizer.lr: expected a number, got True"),
    (["--optimizer", "{lr: 1, lr: 2}"], COMMAND, "optimizer: YAML, line 1: duplicate key 'lr'"),
    (["--optimizer.help", "Adamw"], COMMAND, "optimizer: there is no class 'Adamw'; did you mean Adam"),
    # The schedule.
    (["--schedule.warmup", "null"], COMMAND, "schedule.warmup must be a whole number or a number, not null"),
    (["--schedule", "3"], COMMAND, "schedule holds options, such as --schedule.NAME VALUE"),
    (["--schedule.shape", "cosin"], COMMAND, "schedule.shape: 'cosin' is not one of cosine, linear, wsd, constant"),
    (["--schedule.floor", 2], VALUE, "floor is a fraction of the peak learning rate in [0, 1], not 2.0"),
    (["--schedule.warm_up", 1], COMMAND, "no option --schedule.warm_up; did you mean --schedule.warmup?"),
    # The model.
    (["--model", "LanguageModl"], COMMAND, "no class 'LanguageModl'; did you mean LanguageModel?"),
    (["--model.temprature", 1], COMMAND, "LanguageModel has no option 'temprature'; did you mean temperature?"),
    (["--model.architecture", "gtp2"], VALUE, "transformers has no architecture 'gtp2'; did you mean gpt2"),
    (["--model.config.hiden_size", 32], VALUE, "GPT2Config has no option 'hiden_size'; did you mean hidden_size"),
    (["--model.config.hidden_size", "wide"], VALUE, "hidden_size must be of type int, not 'wide'"),
    (["--model.config.hidden_size", 0], VALUE, "hidden_size must be at least 1, not 0"),
    (["--model.config.num_attention_heads", 3], VALUE, "3 attention heads do not divide the width 32"),
    (["--model.config.vocab_size", 10], VALUE, "the model's vocabulary 10; set model.config.vocab_size"),
    (["--model.init_from", "nowhere"], VALUE, "nowhere is not a local folder with a config.json"),
    (["--model.attention", "fast"], COMMAND, "model.attention: 'fast' is not one of sdpa, eager"),
    (["--model.sample_tokens", 0], VALUE, "sample_tokens and top_k must be at least 1"),
    (["--model.config.hidden_size", "true"], VALUE, "model.config.hidden_size must be of type int, not True"),
    (["--model", "lightning.pytorch.LightningModule"], COMMAND, "LightningModule, but no Task; derive it from"),
    (["--model", "nowhere.Model"], COMMAND, "no module 'nowhere' is in the working directory or on Python's path"),
    (["--model.help", "LanguageModl"], COMMAND, "did you mean LanguageModel? Choose from: "),
    # The data.
    (["--data.batch_size", "null"], COMMAND, "data.batch_size must be a whole number, not null"),
    (["--data.path", "null"], COMMAND, "data.path must be a text: it is missing, or null"),
    (["--data.path", ""], COMMAND, "data.path must be a file or a folder, not an empty text; `.` is the working"),
    (["--run_dir", ""], COMMAND, "run_dir must be a file or a folder, not an empty text"),
    (["--data.path.more", 3], COMMAND, "data.path has no options of its own, such as more"),
    (["--data", "torch.utils.data.Dataset"], COMMAND, "torch.utils.data.Dataset is no LightningDataModule"),
    (["--data", "TextFile"], COMMAND, "no class 'TextFile'; did you mean TextFiles?"),
    (["--data.contextlength", 16], COMMAND, "TextFiles has no option 'contextlength'; did you mean context_length?"),
    (["--data.path", "nowhere.txt"], VALUE, "nowhere.txt"),
    (["--data.context_length", 65], VALUE, "sequences of 65 tokens do not fit the model's 64 positions"),
    (["--data.context_length", 10**6], VALUE, "too few for one window"),
    (["--data.val_tokens", "all"], COMMAND, "data.val_tokens: expected a whole number, got all"),
    (["--data.vocab_size", 100], VALUE, "`vocab_size` must be at least 260"),
    # The trainer and the run.
    (["--trainer.devices", 2.5], VALUE, "trainer: `devices` selected with `CPUAccelerator` should be an int > 0"),
    (["--trainer", 3], COMMAND, "trainer holds options, such as --trainer.NAME VALUE"),
    (["--trainer.callbacks", "[null]"], COMMAND, "trainer.callbacks must be a Callback, not null"),
    (["--trainer.callbacks+=EarlyStopping"], COMMAND, "trainer.callbacks.monitor must be a text: it is missing"),
    (
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_acc"],
        VALUE,
        "EarlyStopping monitors 'val_acc', which LanguageModel does not log; it logs train_loss, val_loss, val_perp",
    ),
    (["--checkpoint.monitor", "val_acc"], VALUE, "checkpoint monitors 'val_acc', which LanguageModel does not log"),
    (["--trainer.callbacks.help", "EarlyStoping"], COMMAND, "no class 'EarlyStoping'; did you mean EarlyStopping?"),
    (["--trainer.max_stepz", 3], COMMAND, "no option --trainer.max_stepz; did you mean --trainer.max_steps?"),
    (["--trainer.max_steps", "1e3"], COMMAND, "trainer.max_steps: expected a whole number, got 1000.0"),
    (["--trainer.max_steps", -5], VALUE, "`max_steps` must be a non-negative integer or -1"),
    (["--trainer.precision", 17], COMMAND, "trainer.precision: '17' is not one of 64, 32, 16, transformer-engine"),
    (["--trainer.accelerator", "tpu"], VALUE, "torch_xla"),
    (["--trainer.strategy", "fsdp"], VALUE, "requires a GPU accelerator"),
    (["--trainer.callbacks+=Foo"], COMMAND, "trainer.callbacks: there is no class 'Foo'; give its full name"),
    (["--trainer.gradient_clip_algorithm", "foo"], VALUE, "`gradient_clip_algorithm` foo is invalid"),
    (["--checkpoint.save_top_k", -3], VALUE, "Invalid value for save_top_k=-3"),
    (["--performance.peak_flops", "many"], COMMAND, "performance.peak_flops: expected a number, got many"),
    (["--ckpt_path", "no.ckpt"], VALUE, "--ckpt_path no.ckpt: no such file"),
    (["--ckpt_path", "best"], VALUE, "--ckpt_path best: give a path"),
    (["--config", "llm/gpt2_tinny"], COMMAND, "no recipe of that name; did you mean llm/gpt2_tiny.yaml"),
    (["--config"], COMMAND, "expected one argument"),
    (["llm/gpt2_tiny"], COMMAND, "llm/gpt2_tiny belongs to no option; give RECIPE first, or as --config RECIPE"),
    (["--optimizer.partition", "transformer_rank_one"], COMMAND, "transformer_early, factored, slimadam"),
    (["--foo", 1], COMMAND, "there is no option --foo"),
]


@pytest.mark.parametrize(
    ("options", "code", "told"), [pytest.param(*case, id=" ".join(map(str, case[0]))) for case in COMMANDS]
)
def test_options(work_dir, capsys, options, code, told):
    assert_refused(run("fit", "--run_dir", "run", *options), capsys, code, told)


FILES = [
    ({"optimizer": {"class_path": "AdamMni"}}, COMMAND, "no class 'AdamMni'; did you mean AdamMini?"),
    ({"optimizer": "AdamMni"}, COMMAND, "no class 'AdamMni'; did you mean AdamMini?"),
    ({"optimizer": {"init_args": {"lrr": 1}}}, COMMAND, "AdamMini has no option 'lrr'; did you mean lr?"),
    ({"optimizer": {"init_args": {"lr": -1}}}, VALUE, "lr must be a finite number of at least 0, not -1.0"),
    ({"model": {"class_path": "no_such_package.Model"}}, COMMAND, "there is no class 'no_such_package.Model'"),
    ({"trainer": {"max_stepz": 1}}, COMMAND, "no option --trainer.max_stepz; did you mean --trainer.max_steps?"),
    ({"optimizer": {"init_args": {"lr": None}}}, COMMAND, "optimizer.lr must be a number, not null"),
    ({"optimizer": {"init_args": None}}, COMMAND, "--config more.yaml, line 2: `init_args:` is blank"),
    ({"optimizer": None}, COMMAND, "--config more.yaml: `optimizer:` is blank; give its options below it"),
    ({"data": {"init_args": {"batch_size": None}}}, COMMAND, "data.batch_size must be a whole number, not null"),
    ({"model": {"init_args": {"config": {"hidden_size": None}}}}, VALUE, "hidden_size must be at least 1, not null"),
    ({"trainer": {"accelerator": None}}, COMMAND, "trainer.accelerator must be a text or an Accelerator, not null"),
    ({"modell": 1}, COMMAND, "there is no option --modell; did you mean --model?"),
]


@pytest.mark.parametrize(("content", "code", "told"), [pytest.param(*case, id=json.dumps(case[0])) for case in FILES])
def test_values_in_a_file(work_dir, capsys, content, code, told):
    (work_dir / "more.yaml").write_text(yaml.safe_dump(content), "utf-8")
    assert_refused(run("fit", "--run_dir", "run", "--config", "more.yaml"), capsys, code, told)


OWN = "class_path: AdamW\ninit_args:\n  lr: 1.0\n  lr: 2.0\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("trainer:\n  max_steps: 3\n  max_steps: 4\n", "line 3: duplicate key 'max_steps', first in line 2"),
        ("trainer: {max_steps: 3}\nseed_everything: 1\ntrainer: {max_steps: 4}\n", "line 3: duplicate key 'trainer'"),
        ("model: {init_args: {config: {hidden_size: 8, hidden_size: 16}}}\n", "line 1: duplicate key 'hidden_size'"),
        ("optimizer: own.yaml\n", "own.yaml, line 4: duplicate key 'lr', first in line 3"),
    ],
)
def test_a_key_that_stands_twice(work_dir, capsys, content, told):
    (work_dir / "own.yaml").write_text(OWN, "utf-8")
    (work_dir / "more.yaml").write_text(content, "utf-8")
    assert_refused(run("fit", "--run_dir", "run", "--config", "more.yaml"), capsys, COMMAND, told)


@pytest.mark.parametrize("options", [["--optimizer=own.yaml"], ["--optimizer", "own.yaml"]])
def test_a_key_that_stands_twice_in_the_file_of_an_option(work_dir, capsys, options):
    (work_dir / "own.yaml").write_text(OWN, "utf-8")
    code = run("fit", "--run_dir", "run", *options)
    assert_refused(code, capsys, COMMAND, "own.yaml, line 4: duplicate key 'lr', first in line 3")


@pytest.mark.parametrize("content", ["", "just text", "- a\n- list\n", "trainer: [\n", "\x00"])
def test_a_file_that_is_no_configuration(work_dir, capsys, content):
    (work_dir / "more.yaml").write_text(content, "utf-8")
    assert_refused(run("fit", "--run_dir", "run", "--config", "more.yaml"), capsys, COMMAND, "config")


@pytest.mark.parametrize(("content", "told"), [("", "text.txt"), ("a b", "text.txt")])
def test_too_little_text(work_dir, capsys, content, told):
    (work_dir / "text.txt").write_text(content, "utf-8")
    assert_refused(run("fit", "--run_dir", "run"), capsys, VALUE, told)


def test_no_recipe(work_dir, capsys):
    assert_refused(main(["fit"]), capsys, COMMAND, "give a recipe: --config llm/gpt2_tiny.yaml")


def test_heads_and_tables_of_other_architectures(work_dir, capsys):
    llama = ["--run_dir", "run", "--model.architecture", "llama", "--model.config.num_key_value_heads"]
    assert_refused(run("fit", *llama, 3), capsys, VALUE, "3 key-value heads do not divide the 4 attention heads")


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_evaluation_of_no_run(work_dir, capsys, command):
    code = run(command, "--run_dir", "run", "--ckpt_path", "last")
    assert_refused(code, capsys, VALUE, "no checkpoint in run/checkpoints; name the run with --run_dir")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["recipes", "llm"], 2, "unrecognized arguments: llm"),
        (["recipes", "--all"], 2, "there is no option --all. `adam-mini recipes --help` lists all"),
        (["fitt"], 2, "unknown command 'fitt'"),
        (["export"], 2, "run_dir"),
        (["export", "nowhere"], 1, "nowhere holds no run: there is no config.yaml in it"),
        (["export", "run", "--foo"], 2, "--foo"),
    ],
)
def test_other_commands(work_dir, capsys, arguments, code, told):
    assert_refused(main(arguments), capsys, code, told)


def test_the_next_try_needs_no_cleaning(work_dir, capsys):
    for options in (["--optimizer.partition_overrides", '{"x": "row"}'], ["--model.config.vocab_size", 10]):
        assert run("fit", *options) == 1
        error_line(capsys)
    assert run("fit") == 0
    assert [path.name for path in (work_dir / "runs").iterdir()] == ["tiny"]
    assert checkpoint("runs/tiny")["global_step"] == 10


def test_a_start_that_fails_leaves_nothing(work_dir, capsys):
    before = {*work_dir.iterdir()}
    for options in (["--data.path", "nowhere"], ["--run_dir", "a/b", "--data.context_length", 65]):
        assert run("fit", *options) == 1
        error_line(capsys)
        assert {*work_dir.iterdir()} == before
    (work_dir / "a" / "c").mkdir(parents=True)
    assert run("fit", "--run_dir", "a/b", "--data.path", "nowhere") == 1
    assert [path.name for path in (work_dir / "a").iterdir()] == ["c"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "options", "told"),
    [
        ("ddp", ["--data.path", "nowhere"], "There is no file or folder nowhere"),
        ("fsdp2", ["--optimizer.partition_overrides", '{"vale": "whole"}'], "'vale' matches no parameter"),
    ],
)
def test_several_ranks_tell_an_error_once_and_leave_nothing(work_dir, strategy, options, told):
    ranks = ["--trainer.devices", 2, "--trainer.accelerator", "cpu", "--trainer.strategy", strategy]
    process = start("fit", "tiny.yaml", *ranks, *options, start_new_session=True)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert line.startswith("adam-mini: error: ")
    assert told in line
    assert "Traceback" not in err
    assert not Path("runs").exists()
    with pytest.raises(ProcessLookupError):  # all ranks are in its group
        os.killpg(process.pid, 0)


@pytest.mark.parametrize(
    ("recipe", "data", "told"),
    [
        ("tiny.yaml", "CallGraph", "LanguageModel takes token windows, and CallGraph gives graphs; give --data HFText"),
        ("vision/mnist5k", "StdlibText", "ImageClassifier takes labelled images, and StdlibText gives token windows"),
        ("graph/gcn", "Mnist5k", "NodeClassifier takes graphs, and Mnist5k gives labelled images; give --data CallG"),
        ("vision/mnist5k", "DigitImages", "ImageClassifier takes labelled images, and DigitImages gives images"),
    ],
)
def test_data_of_another_domain(work_dir, capsys, recipe, data, told):
    packaged = "lightning_adam_mini.tasks.{}.data"
    kind = {"CallGraph": "graph", "StdlibText": "llm", "Mnist5k": "vision", "DigitImages": "diffusion"}[data]
    code = main(["fit", "--config", recipe, "--data", f"{packaged.format(kind)}.{data}"])
    assert_refused(code, capsys, VALUE, told)
    assert not Path("runs").exists()


def test_the_place_of_an_error_on_demand(work_dir, monkeypatch):
    monkeypatch.setenv("ADAM_MINI_TRACEBACK", "1")
    with pytest.raises(ValueError, match="lr must be"):
        run("fit", "--optimizer.lr", -1)


def test_a_fault_of_the_program_keeps_its_traceback(work_dir, monkeypatch):
    """One line would hide where it arose."""

    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("lightning_adam_mini.tasks.llm.language_model.build_model", broken)
    with pytest.raises(ZeroDivisionError):
        run("fit")

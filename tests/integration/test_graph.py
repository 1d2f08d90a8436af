"""Training on graphs as a user types it: metrics, the best so far, resuming, predictions, and what is refused."""

import json

import pytest
import torch

pytest.importorskip("torch_geometric")

from lightning_adam_mini.cli.main import main
from lightning_adam_mini.tasks.graph import NodeClassifier
from lightning_adam_mini.tasks.graph.data import OgbArxiv
from lightning_adam_mini.tasks.metrics import read_metrics
from tiny_graphs import write_recipe
from tiny_runs import assert_same_state, checkpoint, error_line, run

SAMPLINGS = {"full": {}, "parts": {"sampling": "parts", "num_parts": 3}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder from which the command is called; it holds `tiny.yaml` and its graph."""
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of eight steps, with label reuse."""
    folder = tmp_path_factory.mktemp("trained")
    write_recipe(folder, model={"label_reuse": True, "mask_rate": 0.5}, data={"path": str(folder / "data")})
    options = ["--run_dir", folder / "one", "--data.cache_dir", folder / "cache"]
    assert run("fit", *options, config=str(folder / "tiny.yaml")) == 0
    return folder


@pytest.mark.slow
def test_the_metrics_of_every_validation_are_there_and_the_best_is_kept(trained):
    metrics = read_metrics(trained / "one")
    steps = [2, 4, 6, 8]
    names = ("val_loss", "val_accuracy", "train_accuracy", "best_val_accuracy", "test_accuracy_at_best")
    for name in names:
        assert list(metrics[name]) == steps, name
    accuracy = list(metrics["val_accuracy"].values())
    assert list(metrics["best_val_accuracy"].values()) == [max(accuracy[: n + 1]) for n in range(4)]
    assert list(metrics["train_loss"]) == list(range(1, 9))
    best = list(metrics["test_accuracy_at_best"].values())
    for n in range(1, 4):
        if accuracy[n] <= max(accuracy[:n]):
            assert best[n] == best[n - 1]


@pytest.mark.slow
def test_the_report_compares_with_what_needs_no_network(trained):
    result = json.loads((trained / "one" / "result.json").read_text("utf-8"))
    metrics = read_metrics(trained / "one")
    assert result["primary_metric"]["metric"] == "test_accuracy_at_best"
    assert result["primary_metric"]["mode"] == "max"
    assert result["primary_metric"]["curve"] == "val_accuracy"
    assert result["primary_metric"]["value"] == metrics["test_accuracy_at_best"][8]
    report = (trained / "one" / "report.md").read_text("utf-8")
    assert "test accuracy of the most frequent class" in report
    assert "test accuracy of label propagation" in report
    for picture in ("accuracy_curve.png", "accuracy_by_class.png"):
        assert (trained / "one" / picture).read_bytes().startswith(b"\x89PNG")


def test_the_test_accuracy_is_that_of_the_best_checkpoint(trained):
    """Computed again from the weights that were best, by a task of its own."""
    (best,) = (trained / "one" / "checkpoints").glob("best-*.ckpt")
    state = torch.load(best, weights_only=True)["state_dict"]
    data = OgbArxiv(path=str(trained / "data"), cache_dir=str(trained / "cache"))
    data.setup("fit")
    task = NodeClassifier(num_layers=2, hidden_size=16, label_reuse=True, mask_rate=0.5)
    task.model = task._build(data.num_features, data.num_classes)
    task.load_state_dict(state)
    graph = data.graph
    with torch.no_grad():
        found = task.eval()(graph).argmax(1)
    for nodes, name in ((graph.val, "best_val_accuracy"), (graph.test, "test_accuracy_at_best")):
        accuracy = (found[nodes] == graph.y[nodes]).float().mean()
        assert accuracy.item() == pytest.approx(
            max(read_metrics(trained / "one")[name].values())
            if name[0] == "b"
            else read_metrics(trained / "one")[name][8]
        )


def test_validation_test_and_prediction_of_a_checkpoint(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    options = ["--run_dir", "one", "--ckpt_path", "last", "--data.cache_dir", "cache"]
    before = read_metrics(trained / "one")
    for command in ("validate", "test"):
        assert run(command, *options) == 0
    after = read_metrics(trained / "one")
    assert after["val_accuracy"][8] == pytest.approx(before["val_accuracy"][8])
    assert 0 <= after["test_accuracy"][8] <= 1
    assert run("predict", *options) == 0
    rows = [json.loads(line) for line in (trained / "one" / "predictions.jsonl").read_text("utf-8").splitlines()]
    data = OgbArxiv(path="data", cache_dir="cache")
    data.setup("fit")
    assert [row["node"] for row in rows] == data.graph.test.tolist()
    assert all(0 < row["probability"] <= 1 for row in rows)
    hits = [int(row["class"]) == data.graph.y[row["node"]] for row in rows]
    assert sum(hits) / len(hits) == pytest.approx(after["test_accuracy"][8])
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.parametrize(("sampling", "first"), [("full", 5), ("parts", 10), ("parts", 9)])
def test_a_resumed_run_equals_an_uninterrupted_one(sampling, first, folder):
    """With dropout, dropped edges and a drawn mask; stopped between validations, within and at the end of an epoch."""
    model = {"edge_dropout": 0.1, "input_dropout": 0.1, "mask_rate": 0.5, "label_reuse": True}
    write_recipe(folder, data=SAMPLINGS[sampling], model=model)
    horizon = ["--schedule.horizon", 24]
    whole = 8 if sampling == "full" else 14
    assert run("fit", "--run_dir", "whole", "--trainer.max_steps", whole, *horizon) == 0
    assert run("fit", "--run_dir", "cut", "--trainer.max_steps", first, *horizon) == 0
    assert run("fit", "--run_dir", "cut", "--trainer.max_steps", whole, "--ckpt_path", "last", *horizon) == 0
    one, other = checkpoint("whole"), checkpoint("cut")
    # The cut run was validated where it stopped as well, and may have found its best there.
    for state in (one, other):
        for name in ("best_val_accuracy", "test_accuracy_at_best"):
            state["state_dict"].pop(name)
    assert one["loops"]["fit_loop"]["state_dict"] == other["loops"]["fit_loop"]["state_dict"]
    assert_same_state(one, other)
    metrics = [read_metrics(folder / name) for name in ("whole", "cut")]
    assert metrics[0]["train_loss"] == metrics[1]["train_loss"]
    for step, accuracy in metrics[0]["val_accuracy"].items():
        assert metrics[1]["val_accuracy"][step] == accuracy


@pytest.mark.slow
def test_the_best_so_far_survives_a_resume(folder):
    """With a learning rate that spoils the weights after the first part, the best is that of the first part."""
    assert run("fit", "--run_dir", "cut", "--trainer.max_steps", 20, "--schedule.horizon", 20) == 0
    before = read_metrics(folder / "cut")
    state = checkpoint("cut")
    state["state_dict"]["best_val_accuracy"].fill_(1.0)
    state["state_dict"]["test_accuracy_at_best"].fill_(0.125)
    torch.save(state, folder / "cut" / "checkpoints" / "last.ckpt")
    options = ["--trainer.max_steps", 24, "--schedule.horizon", 20, "--ckpt_path", "last"]
    assert run("fit", "--run_dir", "cut", *options) == 0
    after = read_metrics(folder / "cut")
    assert before["test_accuracy_at_best"][20] != 0.125
    assert [after["test_accuracy_at_best"][step] for step in (22, 24)] == [0.125, 0.125]


@pytest.mark.slow
def test_seeds_change_the_start_and_leave_the_split(folder):
    losses = []
    for seed in (0, 0, 1):
        name = f"run{len(losses)}"
        assert run("fit", "--run_dir", name, "--seed_everything", seed, "--trainer.max_steps", 2) == 0
        losses.append(read_metrics(folder / name)["train_loss"])
    assert losses[0] == losses[1] != losses[2]


def test_parts_train_and_the_whole_graph_evaluates(folder):
    """The validation of a sampled run is exact: one accuracy over all validation nodes."""
    options = ["--data.sampling", "parts", "--data.num_parts", 5, "--trainer.max_steps", 30]
    assert run("fit", "--run_dir", "parts", *options) == 0
    metrics = read_metrics(folder / "parts")
    assert max(metrics["train_loss"]) == 30
    accuracy = metrics["val_accuracy"][30]
    assert accuracy * 15 == pytest.approx(round(accuracy * 15), abs=1e-4)  # 15 validation nodes


@pytest.mark.parametrize("architecture", ["gat", "mlp"])
def test_the_other_architectures_train(architecture, folder):
    heads = ["--model.heads", 4] if architecture == "gat" else []
    options = ["--model.architecture", architecture, *heads, "--trainer.max_steps", 12]
    assert run("fit", "--run_dir", architecture, *options) == 0
    losses = list(read_metrics(folder / architecture)["train_loss"].values())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adafactor"])
def test_every_optimizer_takes_the_recipe(optimizer, folder):
    assert run("fit", "--run_dir", optimizer, "--optimizer", optimizer, "--trainer.max_steps", 2) == 0


def test_several_devices_are_refused_for_the_whole_graph(folder, monkeypatch, capsys):
    two = {"num_replicas": 2, "rank": 0}
    monkeypatch.setattr(OgbArxiv, "replicas", lambda self: two)
    assert run("fit", "--run_dir", "two") == 1
    assert "would each train on the same whole graph: use --trainer.devices 1, or" in error_line(capsys)
    assert run("fit", "--run_dir", "two", "--data.sampling", "parts", "--data.num_parts", 5) == 1
    assert "`num_parts` 5 must be a multiple of the 2 devices" in error_line(capsys)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--data.path", "nowhere"], "nowhere has neither ogbn_arxiv/raw nor arxiv/raw"),
        (["--model.architecture", "gin"], "'gin' is not one of gcn, gat, mlp"),
        (["--model.hidden_sise", "8"], "hidden_size"),
        (["--data.sampling", "neighbors"], "needs the package pyg-lib"),
        (["--model.label_reuse", "true"], "set mask_rate"),
        (["--trainer.precision", "64-true"], "trainer.precision 64-true would convert the graph"),
        (["--data.num_parts", 5], "`num_parts` is for sampling parts, but sampling is full"),
    ],
)
def test_wrong_input_is_told_in_one_line(options, told, folder, monkeypatch, capsys):
    monkeypatch.setattr("lightning_adam_mini.tasks.graph.graph.find_spec", lambda name: None)
    assert run("fit", *options) != 0
    assert told in error_line(capsys)
    assert not list(folder.rglob("metrics.jsonl"))


@pytest.mark.slow
def test_a_checkpoint_of_another_size_is_refused(folder, capsys):
    assert run("fit", "--run_dir", "one", "--trainer.max_steps", 2) == 0
    capsys.readouterr()
    assert run("fit", "--run_dir", "one", "--ckpt_path", "last", "--model.hidden_size", 32) == 1
    assert "the checkpoint belongs to another model" in error_line(capsys)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["full", "parts"])
def test_the_recipe_for_a_try_beats_label_propagation(sampling, tmp_path, monkeypatch):
    """The whole way on the standard library, in a quarter of the recipe's steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_ADAM_MINI_CACHE", str(tmp_path / "cache"))
    parts = ["--data.sampling", "parts", "--data.num_parts", "2"] if sampling == "parts" else []
    options = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "20", *parts]
    assert main(["fit", "--config", "graph/gcn.yaml", "--run_dir", "one", *options]) == 0
    assert read_metrics(tmp_path / "one")["test_accuracy_at_best"].popitem()[1] > 0.72

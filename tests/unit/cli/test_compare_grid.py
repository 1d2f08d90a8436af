"""The grid of a comparison: what runs, in which folder, with which command, and what is refused."""

import pytest
import yaml

from lightning_adam_mini.cli.compare.grid import Run, expand, format_lr, read_recipe
from lightning_adam_mini.cli.compare.notes import settings_of
from lightning_adam_mini.cli.compare.spec import (
    ComparisonPlan,
    OptimizerChoice,
    merge,
    parse_optimizers,
    read_plan,
    write_plan,
)
from tiny_runs import RECIPE


@pytest.fixture
def recipe(tmp_path):
    """`tiny.yaml`, whose learning rate is 1e-2."""
    optimizer = {"class_path": "lightning_adam_mini.factory.AdamMini", "init_args": {"lr": 1e-2, "weight_decay": 0.1}}
    path = tmp_path / "tiny.yaml"
    path.write_text("# A tiny one.\n" + yaml.safe_dump(RECIPE | {"optimizer": optimizer}), "utf-8")
    return str(path)


def plan_of(*recipes, optimizers=("AdamW", "AdamMini"), lrs=("1e-3", "3e-3"), seeds=(0, 1, 2), **others):
    return ComparisonPlan(recipes=recipes, optimizers=optimizers, lrs=lrs, seeds=seeds, **others)


def test_every_combination_runs_once(recipe):
    grid = expand(plan_of(recipe, "llm/gpt2_tiny"))
    runs = grid.tuning_runs()
    assert len(runs) == len(set(runs)) == 2 * 2 * 2 * 3
    assert {run.recipe for run in runs} == {recipe, "llm/gpt2_tiny"}
    assert len({grid.folder(run) for run in runs}) == len(runs)
    assert grid.final_runs({(recipe, "AdamW"): 1e-3}) == []


def test_other_seeds_run_at_the_best_learning_rate_alone(recipe):
    grid = expand(plan_of(recipe, num_tuning_seeds=1))
    assert {run.seed for run in grid.tuning_runs()} == {0}
    best = {(recipe, "AdamW"): 1e-3, (recipe, "AdamMini"): 3e-3}
    assert sorted(grid.final_runs(best)) == sorted(
        Run(recipe, label, lr, seed) for (_, label), lr in best.items() for seed in (1, 2)
    )


def test_folders_and_commands(recipe, tmp_path):
    grid = expand(plan_of("llm/gpt2_tiny.yaml", recipe, common=("trainer.max_steps=5",)))
    run = Run("llm/gpt2_tiny", "AdamMini", 1e-3, 2)
    assert str(grid.folder(run)) == "llm__gpt2_tiny/AdamMini/lr_1e-3/seed_2"
    arguments = grid.arguments(run, tmp_path)
    assert arguments[:5] == ["fit", "--config", "llm/gpt2_tiny", "--optimizer", "AdamMini"]
    assert {"--optimizer.lr=1e-3", "--seed_everything=2", "--data.seed=2", "--trainer.max_steps=5"} <= set(arguments)
    assert f"--run_dir={tmp_path}/llm__gpt2_tiny/AdamMini/lr_1e-3/seed_2" in arguments
    assert str(grid.folder(Run(recipe, "AdamW", 0.5, 0))) == "tiny/AdamW/lr_5e-1/seed_0"


@pytest.mark.parametrize(
    ("lr", "text"),
    [(1e-3, "1e-3"), (3.33e-4, "3.33e-4"), (0.5, "5e-1"), (10.0, "1e1"), (1e30, "1e30"), (12.5, "1.25e1")],
)
def test_learning_rates_as_one_writes_them(lr, text):
    assert format_lr(lr) == text
    assert float(text) == lr


def test_multiples_of_the_recipes_own_learning_rate(recipe):
    grid = expand(plan_of(recipe, "llm/gpt2_tiny", lrs=("x1", "x0.1", "x3")))
    assert grid.lrs[recipe, "AdamW"] == (1e-3, 1e-2, 3e-2)
    assert grid.lrs["llm/gpt2_tiny", "AdamW"] == (3e-4, 3e-3, 9e-3)


@pytest.mark.parametrize(
    ("text", "lr"), [("x1/3", 3.33e-3), ("x0.125", 1.25e-3), ("x0.33333", 3.33e-3), ("x2/3", 6.67e-3)]
)
def test_multiples_have_three_significant_digits(recipe, text, lr):
    assert expand(plan_of(recipe, lrs=(text,))).lrs[recipe, "AdamW"] == (lr,)


def test_a_third_of_the_recipes_learning_rate_is_written_plainly():
    grid = expand(plan_of("llm/gpt2_tiny", lrs=("x1/3",)))
    assert grid.lrs["llm/gpt2_tiny", "AdamW"] == (1e-3,)


def test_own_learning_rates_of_one_optimizer(recipe):
    grid = expand(plan_of(recipe, optimizers=("AdamW", "Lion"), lrs_of={"Lion": ("1e-4", "x0.03")}))
    assert grid.lrs == {(recipe, "AdamW"): (1e-3, 3e-3), (recipe, "Lion"): (1e-4, 3e-4)}
    with pytest.raises(ValueError, match="same number of learning rates, not AdamW 2, Lion 1"):
        expand(plan_of(recipe, optimizers=("AdamW", "Lion"), lrs_of={"Lion": ("1e-4",)}))


def test_items_of_optimizers():
    plain, overridden, labelled = parse_optimizers(
        [
            "AdamW",
            'AdamMini:partition_overrides={"value":"whole","mlp":"row"},betas=[0.9,0.99]',
            "factored=AdamMini:partition=factored,partition_overrides.value=whole",
        ]
    )
    assert plain == OptimizerChoice("AdamW", "AdamW")
    assert overridden.options == (("partition_overrides", '{"value":"whole","mlp":"row"}'), ("betas", "[0.9,0.99]"))
    assert (labelled.label, labelled.name, labelled.folder) == ("factored", "AdamMini", "factored")
    assert labelled.arguments == (
        *("--optimizer", "AdamMini", "--optimizer.partition=factored"),
        "--optimizer.partition_overrides.value=whole",
    )


REFUSED = [
    ({"optimizers": ("AdamWW",)}, "no such optimizer; did you mean AdamW"),
    ({"optimizers": ("adamw",)}, "no such optimizer; did you mean Adam"),
    ({"optimizers": ("torch.optim.AdamW",)}, "no OptimizerFactory; choose from"),
    ({"optimizers": ("nowhere.AdamW",)}, "no such class; did you mean AdamW"),
    ({"optimizers": ("AdamW:betass=[0.9,0.9]",)}, "AdamW has no option 'betass'; did you mean betas"),
    ({"optimizers": ("AdamW:betas",)}, "'betas' is not of the form option=value"),
    ({"optimizers": ("AdamW:",)}, "write NAME, NAME:option=value"),
    ({"optimizers": ("AdamW:lr=1",)}, "give learning rates by --lr"),
    ({"optimizers": ("AdamW", "AdamW")}, "AdamW is given twice"),
    ({"optimizers": ("a b=AdamW", "a_b=Lion")}, "a b and a_b would share a folder"),
    ({"lrs": ("0",)}, "--lr 0: a learning rate must be positive"),
    ({"lrs": ("-1e-3",)}, "must be positive"),
    ({"lrs": ("nan",)}, "must be positive and finite"),
    ({"lrs": ("fast",)}, "--lr fast: write a number, or a multiple"),
    ({"lrs": ("x1/0",)}, "--lr x1/0: write a number, or a multiple"),
    ({"lrs": ("x1/",)}, "--lr x1/: write a number, or a multiple"),
    ({"lrs": ("1/3",)}, "--lr 1/3: write a number, or a multiple"),
    ({"lrs": ("1e-3", "x0.1")}, "x0.1 is the learning rate 1e-3 a second time"),
    ({"lrs_of": {"Lion": ("1e-3", "3e-3")}}, "--lr-of Lion: no optimizer has this label"),
    ({"reference": "AdamWW"}, "--reference AdamWW: no optimizer has this label; did you mean AdamW"),
    ({"common": ("trainer.max_steps",)}, "write KEY=VALUE"),
    ({"common": ("--trainer.max_steps=1",)}, "write KEY=VALUE"),
    ({"common": ("optimizer.lr=1",)}, "the comparison sets optimizer.lr itself: give optimizers by"),
    ({"common": ("seed_everything=1",)}, "give --seeds"),
    ({"common": ("run_dir=x",)}, "each run has its own folder"),
    ({"common": ("ckpt_path=last",)}, "runs resume automatically"),
    ({"common": ("data.seed=5",)}, "give --seeds"),
    ({"common": ("data.init_args.seed=5",)}, "give --seeds"),
    ({"common": ("data=TextFiles",)}, "write a recipe with these data"),
    ({"common": ("data.class_path=TextFiles",)}, "write a recipe with these data"),
    ({"common": ("optimizer=SGD",)}, "give optimizers by --optimizers"),
    ({"common": ("optimizer.init_args.lr=1",)}, "give optimizers by --optimizers"),
]


@pytest.mark.parametrize(("changes", "expected"), [pytest.param(*case, id=str(case[0])) for case in REFUSED])
def test_what_is_refused(recipe, changes, expected):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the text is compared as it is
        expand(plan_of(recipe, **changes))
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("model: [", "this is not YAML"),
        ("a: 1", "no section `model`"),
        ("model: x\ntrainer: other.yaml", "it includes other.yaml"),
        ("model: x\noptimizer: {init_args: {lr: a}}", "lr is"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, content, expected):
    (tmp_path / "bad.yaml").write_text(content, "utf-8")
    with pytest.raises(ValueError, match=expected):
        read_recipe(str(tmp_path / "bad.yaml"))


def test_recipes_that_come_near_or_share_a_name(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"did you mean llm/gpt2_tiny\.yaml"):
        expand(plan_of("llm/gpt2_tinny"))
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "tiny.yaml"
    other.write_text("model: x", "utf-8")
    with pytest.raises(ValueError, match="have the same name"):
        expand(plan_of(recipe, str(other)))
    with pytest.raises(ValueError, match="no learning rate of its own"):
        expand(plan_of(str(other), lrs=("x1",)))


def test_optimizers_with_the_other_kind_of_decay_keep_their_own(recipe, tmp_path):
    grid = expand(plan_of(recipe, optimizers=("AdamW", "Lion", "SGD", "given=SGD:weight_decay=0.5", "Adam")))

    def decay(label):
        arguments = grid.arguments(Run(recipe, label, 1e-3, 0), tmp_path)
        return [argument for argument in arguments if "weight_decay" in argument]

    assert [decay(label) for label in ("AdamW", "Lion")] == [[], []]
    assert decay("SGD") == ["--optimizer.weight_decay=0.0001"]
    assert decay("Adam") == ["--optimizer.weight_decay=0.0"]
    assert decay("given") == ["--optimizer.weight_decay=0.5"]
    (note,) = settings_of(grid)
    assert "SGD 0.0001, Adam 0" in note
    assert "given" not in note


def test_other_options_of_data_are_the_users(recipe, tmp_path):
    grid = expand(plan_of(recipe, common=("data.batch_size=2", "data.init_args.num_workers=0")))
    assert {"--data.batch_size=2", "--data.init_args.num_workers=0"} <= set(
        grid.arguments(Run(recipe, "AdamW", 1e-3, 0), tmp_path)
    )


def test_reference_is_adamw_else_the_first(recipe):
    assert expand(plan_of(recipe, optimizers=("Lion", "mine=AdamW:eps=1e-6"))).reference == "mine"
    assert expand(plan_of(recipe, optimizers=("Lion", "AdamMini"))).reference == "Lion"
    assert expand(plan_of(recipe, reference="AdamMini")).reference == "AdamMini"


def test_plans_are_kept_and_extended(recipe, tmp_path):
    old = plan_of(recipe, lrs_of={"Lion": ("1e-4", "2e-4")}, created="then", folder="here", common=("a=1",))
    write_plan(old, tmp_path)
    assert read_plan(tmp_path) == old
    assert read_plan(tmp_path / "nowhere") is None
    more = merge(
        old, ComparisonPlan(optimizers=("AdamW", "Lion"), lrs=("1e-2",), seeds=(3,), lrs_of={"Lion": ("3e-4",)})
    )
    assert more.optimizers == ("AdamW", "AdamMini", "Lion")
    assert more.lrs == ("1e-3", "3e-3", "1e-2")
    assert more.lrs_of == {"Lion": ("1e-4", "2e-4", "3e-4")}
    assert more.seeds == (0, 1, 2, 3)
    assert (more.created, more.folder, more.common) == ("then", "here", ("a=1",))


def test_a_label_keeps_the_learning_rates_that_it_has_run_with(recipe):
    old = plan_of(recipe, optimizers=("AdamW", "mine=AdamMini"))
    more = merge(old, ComparisonPlan(optimizers=("Lion",), lrs_of={"mine": ("1e-2",), "Lion": ("1e-4", "2e-4")}))
    assert more.lrs_of == {"mine": ("1e-3", "3e-3", "1e-2"), "Lion": ("1e-4", "2e-4")}
    with pytest.raises(ValueError, match="not AdamW 2, mine 3, Lion 2"):
        expand(more)


def test_a_plan_does_not_mix_what_cannot_be_compared(tmp_path):
    old = plan_of("r", digests={"r": "1"}, common=("trainer.max_steps=5",))
    with pytest.raises(ValueError, match=r"began with --set trainer\.max_steps=5"):
        merge(old, ComparisonPlan(common=("trainer.max_steps=6",)))
    with pytest.raises(ValueError, match="began with no --set"):
        merge(plan_of("r"), ComparisonPlan(common=("trainer.max_steps=6",)))
    with pytest.raises(ValueError, match="the recipe r has changed"):
        merge(old, ComparisonPlan(digests={"r": "2"}))
    (tmp_path / "plan.json").write_text('{"recipes": []}', "utf-8")
    with pytest.raises(ValueError, match="no plan of this version"):
        read_plan(tmp_path)

"""Recipes of studies: each packaged one loads, and what is wrong is refused before any work."""

import pytest

pytest.importorskip("jsonargparse")

from lightning_adam_mini.cli.studies.common.outcome import Outcome, as_text, mean_and_spread, medians
from lightning_adam_mini.cli.studies.common.study import STUDIES, list_studies, load_study


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_a_recipe_that_loads(name):
    study = load_study(name)
    assert study.name == name
    assert len(study.settings.seeds) > 1, "a study reports the spread"
    title = list_studies()[name]
    assert title.endswith(".")
    assert len(title.split()) > 5


def test_no_recipe_is_without_a_study():
    assert set(list_studies()) == set(STUDIES)


def test_changes_replace_what_the_recipe_says():
    settings = load_study("studies/quadratic_cases.yaml", ["seeds=[7]", "tolerance=1e-3"]).settings
    assert (settings.seeds, settings.tolerance) == ([7], 1e-3)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("quadratic_case", "", "quadratic_case: no such file, and no study .* did you mean quadratic_cases"),
        ("quadratic_cases", "tolerence=1", "no setting 'tolerence'; did you mean tolerance"),
        ("quadratic_cases", "tolerance", "give KEY=VALUE"),
        ("quadratic_cases", "seeds=[", "is no YAML"),
        ("quadratic_cases", "seeds=many", "wrong setting: .*seeds.*many"),
        ("quadratic_cases", "seeds=[]", "seeds is empty"),
        ("quadratic_cases", "seeds=[1,1]", "give each value once"),
        ("quadratic_cases", "seeds=[-1]", r"seeds must be between 0 and 2\^63, not -1"),
        ("quadratic_cases", "seeds=[99999999999999999999]", r"seeds must be between 0 and 2\^63"),
        ("quadratic_cases", "top_eigenvalues=[1e17]", "top_eigenvalues: a condition number of 1e.17 is too large"),
        ("heterogeneous_mlp", "heterogeneity=[1, 1.0]", "give each value once"),
        ("diagonal_preconditioner", "angles=[0,.nan]", "angles is nan: give a finite number"),
        ("diagonal_preconditioner", "angles=[0.1,0.2]", "angles must ascend from 0"),
        ("diagonal_preconditioner", "angles=[0]", "angles must ascend from 0 .* to others"),
        ("three_block_quadratic", "eigenvalues=[[1,.inf]]", "eigenvalues is inf: give a finite number"),
        ("three_block_quadratic", "eigenvalues=[[1],[]]", "eigenvalues is empty"),
        ("three_block_quadratic", "eigenvalues=[[1],[1e12]]", "eigenvalues: a condition number of 1e.12 is too large"),
        ("three_block_quadratic", "betas=[0.9,1.0]", "betas must lie from 0 to below 1"),
        ("three_block_quadratic", "rates=[0.1,-1]", "rates must be above 0, not -1"),
        ("quadratic_cases", "tolerance=2", "between 0 and 1, not 2"),
        ("quadratic_cases", "top_eigenvalues=[100]", "at least 103"),
        ("three_block_quadratic", "iterations=0", "at least 1"),
        ("three_block_quadratic", "eigenvalues=[[1],[0]]", "eigenvalues must be positive"),
        ("diagonal_preconditioner", "condition_numbers=[1]", "above 1"),
        ("heterogeneous_mlp", "seeds=[0]", "seeds must be at least two"),
        ("heterogeneous_mlp", "sgd_rates=[0.1]", "as many"),
        ("heterogeneous_mlp", "heterogeneity=[0.5]", "heterogeneity must be at least 1, not 0.5"),
        ("heterogeneous_mlp", "width=0", "width must be at least 1, not 0"),
        ("leave_x_out", "seeds=[0]", "seeds must be at least two"),
        ("leave_x_out", "steps=0", "steps must be at least 1, not 0"),
        ("leave_x_out", "draws=0", "draws must be at least 1, not 0"),
        ("leave_x_out", "more_out=[1]", "more_out must be at least 2, not 1"),
        ("leave_x_out", "factors=[0]", "factors must be above 0, not 0"),
        ("trajectories", "rate=0", "rate must be above 0, not 0"),
        ("trajectories", "heads=0", "heads must be at least 1, not 0"),
        ("trajectories", "width=30", "width 30 must be a multiple of 8, twice the heads"),
        ("trajectories", "every=1000", "every must be between 1 and steps"),
        ("blockwise_gd", "sgd_rates=[0.1]", "as many"),
        ("blockwise_gd", "seeds=[0,1,2]", "seeds must be at least four"),
        ("sensitivity", "beta2s=[0.9,1]", "beta2s must be below 1, not 1"),
        ("sensitivity", "epss=[-1]", "epss must be at least 0, not -1"),
        ("sensitivity", "batch_size=-1", "batch_size must be at least 1"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(name, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_study(name, [change] if change else [])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study: command\nsettings: {}\n", "there is no study 'command'; studies are three_block"),
        ("study: quadratic_cases\n", "the keys `study` .* and `settings`"),
        ("study: quadratic_cases\nsettings: {seeds: [0]}\n", "settings lack top_eigenvalues, tolerance"),
        ("[", "is not YAML"),
    ],
)
def test_a_recipe_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        load_study(str(tmp_path / "own.yaml"))


def test_values_of_a_tuple_may_repeat():
    changes = ["betas=[0.9,0.9]", "eigenvalues=[[1,1,2],[1,1,2]]"]
    settings = load_study("three_block_quadratic", changes).settings
    assert settings.betas == (0.9, 0.9)
    assert settings.eigenvalues == [[1, 1, 2], [1, 1, 2]]


def test_medians_and_spread():
    rows = [{"a": 1, "b": x, "c": 0} for x in (3.0, 1.0, 8.0)] + [{"a": 2, "b": 5.0, "c": 0}]
    assert medians(rows, ("a",), ("b",)) == [{"a": 1, "b": 3.0}, {"a": 2, "b": 5.0}]
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert mean_and_spread([1.0]) == (1.0, 0.0)
    assert as_text(rows[:1]) == "a  b  c\n1  3  0"


def test_rows_of_two_tables_are_no_outcome():
    with pytest.raises(AssertionError, match="several tables"):
        Outcome([{"a": 1}, {"b": 1}], [], lambda figure: None)

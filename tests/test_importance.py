"""A dimension that matters is told from one that does not; one that exists in some trials only is assessed among those,
or not at all."""

import math
from collections.abc import Callable

import optuna
import pytest
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

from search.importance import MIN_TRIALS, Importance, importance


def study(trials: int, objective: Callable[[optuna.Trial], float], seed: int = 1) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=seed))
    made.optimize(objective, n_trials=trials)
    return made


def two_dimensions(trial: optuna.Trial) -> float:
    sigma, stages = trial.suggest_float("sigma", 1e-4, 1.0, log=True), trial.suggest_int("stages", 2, 12)
    return -((math.log10(sigma) + 2) ** 2) + 1e-3 * stages


def conditional(trial: optuna.Trial) -> float:
    """Sigma of linear layers exists, and matters, only where noise goes into linear layers."""
    kind, stages = trial.suggest_categorical("modules", ["rmsnorm", "linear"]), trial.suggest_int("stages", 2, 12)
    if kind == "rmsnorm":
        return 0.5 + 1e-3 * stages
    return 0.5 - (trial.suggest_float("sigma|linear", 0.0, 1.0) - 0.3) ** 2 + 1e-3 * stages


def by_name(rows: tuple[Importance, ...]) -> dict[str, Importance]:
    return {row.dimension: row for row in rows}


@pytest.mark.parametrize("direction", [1, -1])
def test_the_dimension_that_matters_stands_out_and_the_other_does_not(direction: int) -> None:
    rows = importance(study(60, lambda trial: direction * two_dimensions(trial)))
    assert [row.dimension for row in rows] == ["sigma", "stages"]
    sigma, stages = rows
    assert sigma.importance is not None
    assert stages.importance is not None
    assert sigma.importance > 0.75
    assert sigma.importance + stages.importance == pytest.approx(1)
    assert sigma.chance is not None
    assert stages.chance is not None
    assert sigma.importance > sigma.chance
    assert stages.importance < stages.chance
    assert {(row.trials, row.of, row.note) for row in rows} == {(60, 60, "")}


def test_shares_are_optunas() -> None:
    made = study(60, two_dimensions)
    expected = get_param_importances(made, evaluator=PedAnovaImportanceEvaluator(target_quantile=0.1))
    assert {row.dimension: row.importance for row in importance(made)} == pytest.approx(expected)


def test_a_dimension_of_some_trials_is_assessed_among_those() -> None:
    made = study(100, conditional)
    rows = by_name(importance(made))
    inner = rows["sigma|linear"]
    members = sum("sigma|linear" in trial.params for trial in made.trials)
    assert (inner.trials, inner.of) == (members, 100)
    assert inner.note == f"exists in {members} of 100 trials; its share is among these"
    assert inner.importance is not None
    assert inner.chance is not None
    assert inner.importance > inner.chance
    assert rows["modules"].trials == rows["stages"].trials == 100
    assert sum(rows[name].importance or 0 for name in ("modules", "stages")) == pytest.approx(1)
    assert list(rows)[-1] == "sigma|linear"  # shares of other trials do not stand among those of all


@pytest.mark.parametrize("trials", [0, 1, MIN_TRIALS - 1])
def test_too_few_trials_have_no_number(trials: int) -> None:
    rows = importance(study(trials, two_dimensions))
    assert len(rows) == (2 if trials else 0)
    for row in rows:
        assert (row.importance, row.chance) == (None, None)
        assert row.note == f"not assessable: too few trials ({trials} of at least {MIN_TRIALS})"


def test_enough_trials_do_not_help_a_dimension_that_few_of_them_have() -> None:
    rows = by_name(importance(study(MIN_TRIALS + 4, conditional)))
    assert rows["modules"].importance is not None
    assert rows["sigma|linear"].importance is None
    assert "too few trials" in rows["sigma|linear"].note


def test_trials_that_all_ended_alike_rank_nothing() -> None:
    def constant(trial: optuna.Trial) -> float:
        trial.suggest_float("sigma", 0, 1)
        return 0.5

    (row,) = importance(study(30, constant))
    assert (row.importance, row.note) == (None, "not assessable: all trials had the same result")


def test_a_dimension_whose_range_changed_is_not_assessable() -> None:
    made = study(25, lambda trial: trial.suggest_float("sigma", 0, 1) + trial.suggest_float("other", 0, 1))
    made.optimize(lambda trial: trial.suggest_float("sigma", 0, 2) + trial.suggest_float("other", 0, 1), n_trials=25)
    rows = by_name(importance(made))
    assert (rows["sigma"].importance, rows["sigma"].note) == (None, "not assessable: its range changed between trials")
    assert rows["other"].importance == 1.0  # the only one left


def test_failed_trials_do_not_count() -> None:
    made = study(40, two_dimensions)
    space = dict(made.trials[0].distributions)
    for state in (optuna.trial.TrialState.FAIL, optuna.trial.TrialState.PRUNED):
        made.add_trial(optuna.trial.create_trial(params={"sigma": 0.1, "stages": 3}, distributions=space, state=state))
    assert {row.of for row in importance(made)} == {40}


@pytest.mark.parametrize(("first", "directions"), [("a", ["maximize", "minimize"]), ("b", ["minimize", "maximize"])])
def test_of_several_objectives_the_first_one_ranks(first: str, directions: list[str]) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made = optuna.create_study(directions=directions, sampler=optuna.samplers.RandomSampler(seed=3))

    def objectives(trial: optuna.Trial) -> tuple[float, float]:
        a, b = trial.suggest_float("a", 0, 1), trial.suggest_float("b", 0, 1)
        return (a, b) if first == "a" else (b, a)

    made.optimize(objectives, n_trials=60)
    assert importance(made)[0].dimension == first


def test_what_the_best_trials_have_in_common_counts_and_not_the_worst() -> None:
    """The lowest are best here: `a` makes them, `b` makes the highest."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made = optuna.create_study(direction="minimize", sampler=optuna.samplers.RandomSampler(seed=2))
    made.optimize(
        lambda t: -float(t.suggest_float("a", 0, 1) > 0.75) + float(t.suggest_float("b", 0, 1) > 0.75), n_trials=80
    )
    assert importance(made)[0].dimension == "a"


def test_the_same_study_gives_the_same_rows() -> None:
    made = study(30, two_dimensions)
    assert importance(made) == importance(made)

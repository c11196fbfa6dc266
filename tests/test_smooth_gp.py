"""What is used of Optuna's inside, by name: a version that renames any of it fails here, and does not search worse in
silence."""

import math
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna._gp import acqf, gp, search_space

from search import smooth_gp
from search.smooth_gp import CANDIDATES, SmoothGP, log_prior


def test_the_private_names_are_there() -> None:
    stock = optuna.samplers.GPSampler(seed=0)
    assert callable(stock._log_prior)
    assert isinstance(stock._rng.rng, np.random.RandomState)
    assert callable(optuna.samplers.GPSampler._optimize_acqf)
    assert callable(acqf.BaseAcquisitionFunc.eval_acqf_no_grad)
    assert callable(search_space.SearchSpace.sample_normalized_params)
    assert {"inverse_squared_lengthscales", "kernel_scale", "noise_var"} <= set(
        gp.GPRegressor.__init__.__code__.co_varnames
    )


def asked(sampler: Any) -> dict[str, float]:
    """What it proposes after eight trials."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=sampler)
    domains = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in "xy"}
    rng = np.random.default_rng(0)
    for x, y in rng.random((8, 2)).tolist():
        value = (x - 0.3) ** 2 + (y - 0.6) ** 2
        study.add_trial(optuna.trial.create_trial(params={"x": x, "y": y}, distributions=domains, value=value))
    found: dict[str, float] = study.ask(domains).params
    return found


def test_optuna_fits_by_our_prior_and_asks_our_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[Any] = []
    drawn: list[Any] = []
    sample = search_space.SearchSpace.sample_normalized_params

    def prior(model: Any) -> Any:
        models.append(model)
        return log_prior(model)

    def candidates(self: Any, count: int, rng: Any) -> Any:
        drawn.append(sample(self, count, rng))
        return drawn[-1]

    monkeypatch.setattr(smooth_gp, "log_prior", prior)
    monkeypatch.setattr(search_space.SearchSpace, "sample_normalized_params", candidates)
    found = asked(SmoothGP(1))
    assert models, "the prior was asked"
    assert [len(points) for points in drawn] == [CANDIDATES]
    assert list(found.values()) in [pytest.approx(point) for point in drawn[0].tolist()]
    assert found == asked(SmoothGP(1))
    assert found != asked(optuna.samplers.GPSampler(seed=1, n_startup_trials=0))


def test_the_prior_is_log_normal_around_half_the_range() -> None:
    """Its density over a length scale, kernel and noise held, is quadratic in its log, with the top at one half."""

    class Model:
        kernel_scale, noise_var = torch.tensor(1.0), torch.tensor(0.01)

        def __init__(self, length: float) -> None:
            self.inverse_squared_lengthscales = torch.tensor([length**-2.0])

    values = {length: float(log_prior(Model(length))) for length in (0.25, 0.5, 1.0)}
    assert max(values, key=lambda length: values[length]) == 0.5
    for length in (0.25, 1.0):
        assert values[0.5] - values[length] == pytest.approx((2 * math.log(length / 0.5)) ** 2 / 2, rel=1e-4)


def test_it_computes_on_one_thread_and_gives_the_others_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def prior(model: Any) -> Any:
        seen.append(torch.get_num_threads())
        return log_prior(model)

    monkeypatch.setattr(smooth_gp, "log_prior", prior)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        asked(SmoothGP(1))
        assert (set(seen), torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)

"""Optuna's Gaussian process for few and noisy trials, with two changes (measured in docs/search-quality.md).

Its prior allows any length scale, so a model of ten noisy accuracies follows the noise; here length scales are
log-normal around half the range. And its search for the best expected improvement ends in the corners of the space,
where a model knows least; here the best of some quasi-random candidates is taken.

Optuna has no public name for either. What is used of its inside is used here alone, and `tests/test_smooth_gp.py` names
it: Optuna is pinned, and a version that renames any of it must fail there and not search worse in silence.
"""

import math
from typing import Any

import numpy as np
import optuna

CANDIDATES = 512


class SmoothGP(optuna.samplers.GPSampler):  # type: ignore[misc]
    """A sampler that models from its first trial on; whoever asks it has enough of them."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed, n_startup_trials=0)
        self._log_prior = log_prior

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
        """On one thread: it computes beside trials that have the cores, and its numbers do not depend on how many."""
        import torch  # as late as Optuna does: a sweep is read without it

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return super().sample_relative(study, trial, search_space)
        finally:
            torch.set_num_threads(threads)

    def _optimize_acqf(self, acqf: Any, best_params: Any) -> Any:
        """[dimensions]: the best of CANDIDATES points of the unit cube."""
        # [CANDIDATES, dimensions]
        candidates = acqf.search_space.sample_normalized_params(CANDIDATES, rng=self._rng.rng)
        return candidates[int(np.argmax(acqf.eval_acqf_no_grad(candidates)))]


def log_prior(model: Any) -> Any:
    """Of a model's kernel parameters: gamma for scale and noise (Optuna's own), log-normal for 1 / length scale^2."""
    inverse = model.inverse_squared_lengthscales
    scale, noise = model.kernel_scale, model.noise_var
    return -((inverse.log() - math.log(4)) ** 2).sum() / 2 + scale.log() - scale + 0.1 * noise.log() - 30 * noise

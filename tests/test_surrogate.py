"""The candidate is not the luckiest run: neighbours tell what an arm would come to again."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.gaussian_process.kernels import Matern

from search import surrogate
from search.arms import Arm, candidate_of, read_arms, write_arm
from search.surrogate import Seen, expected
from spaces.library import SPACES
from tests.written_sweeps import make_arm, outcome, study, write_trial

SPACE = SPACES["sigma"]
SIGMAS = np.geomspace(0.002, 0.04, 12)


def at(sigma: float, gain: float | None, *, held: int = 1, collapsed: int = 0) -> Seen:
    (module,) = [d for d in SPACE.dimensions if d.key == "noise.modules"]
    label = next(iter(module.domain.options))  # type: ignore[union-attr]
    named = next(d.name for d in SPACE.dimensions if d.key == "noise.sigma_start" and d.when and label in d.when.labels)
    params = {module.name: label, named: sigma, "noise.sigma_end": 0.0005}
    return Seen(params=params, gain=gain, held=held, collapsed=collapsed)


def hill(sigma: float) -> float:
    return 0.03 * float(np.exp(-(np.log(sigma / 0.008) ** 2)))


def test_the_kernel_is_matern_five_halves() -> None:
    x = np.random.default_rng(0).random((5, 2))
    distances = np.stack([(x[:, None, d] - x[None, :, d]) ** 2 for d in range(2)])
    logs = np.log([4.0, 1.0, 0.7, 0.3])  # length scales 1/2 and 1
    assert surrogate._kernel(distances, logs) == pytest.approx(0.7 * Matern([0.5, 1.0], nu=2.5)(x))


def test_the_luckiest_run_is_not_believed_where_its_neighbours_know_better() -> None:
    arms = [at(sigma, hill(sigma)) for sigma in SIGMAS]
    lucky = len(arms) - 1
    arms[lucky] = at(SIGMAS[lucky], 0.04)
    found = expected(SPACE, arms)
    assert max(range(12), key=lambda k: arms[k].gain or 0) == lucky
    best = max(range(12), key=lambda k: found[k].gain)
    assert abs(np.log(SIGMAS[best] / 0.008)) < 0.6
    assert all(what.holds == 1 for what in found), "nothing collapsed"


def test_a_run_that_held_among_runs_that_broke_held_by_chance() -> None:
    arms = [at(s, 0.01) if k < 6 or k == 9 else at(s, None, held=0, collapsed=1) for k, s in enumerate(SIGMAS)]
    found = expected(SPACE, arms)
    assert found[2].holds > 0.9 > 0.5 > found[9].holds


def test_replicates_speak_for_themselves() -> None:
    """Three runs move the posterior further from the neighbours than one."""
    others = [at(sigma, 0.0) for sigma in SIGMAS]
    gains = [expected(SPACE, [*others, at(0.009, 0.03, held=held)])[-1].gain for held in (1, 3, 10)]
    assert 0 < gains[0] < gains[1] < gains[2] < 0.03


def test_arms_without_a_place_keep_their_order_and_are_drawn_to_the_mean() -> None:
    arms = [Seen(params={}, gain=gain, held=3, collapsed=0) for gain in (0.01, 0.03, -0.02)]
    gains = [what.gain for what in expected(SPACE, arms)]
    assert gains[2] < gains[0] < gains[1]
    assert -0.02 < gains[2] < 0.02 / 3 < gains[1] < 0.03


def test_the_order_of_arms_does_not_matter() -> None:
    arms = [at(s, hill(s) + 0.01 * (k % 3), collapsed=int(k > 9)) for k, s in enumerate(SIGMAS)]
    forward, backward = expected(SPACE, arms), expected(SPACE, arms[::-1])[::-1]
    assert [what.gain for what in forward] == pytest.approx([what.gain for what in backward], abs=1e-6)
    assert [what.holds for what in forward] == pytest.approx([what.holds for what in backward], abs=1e-4)


def test_one_arm_alone_is_what_it_is() -> None:
    (alone,) = expected(SPACE, [at(0.01, 0.02)])
    assert (alone.gain, alone.holds) == (pytest.approx(0.02), 1.0)


def test_what_was_run_more_often_is_known_better() -> None:
    once, often = expected(SPACE, [at(0.01, 0.02), at(0.09, 0.021, held=8)])
    assert 0 < often.sd < once.sd


def test_the_candidate_of_a_sweep_is_the_one_with_the_most_to_expect(tmp_path: Path) -> None:
    """The arm with the largest difference lies at the edge at which runs break; every command asks the same rule."""
    config = study(tmp_path, trials=13, replicates=1, space=SPACE)
    arms: list[tuple[Arm, Any]] = [(make_arm(config, "control"), 280)]
    for number, sigma in enumerate(SIGMAS):
        right: Any = round(400 * (0.7 + hill(sigma)))
        ended = "collapsed" if number in (9, 11) else "completed"
        right = 250 if ended == "collapsed" else 300 if number == 10 else right
        plain = make_arm(config, f"c{number:02}", f"noise.sigma_start={sigma}", "noise.sigma_end=0.0005")
        arm = Arm(name=plain.name, origin="searcher", config=plain.config, params=at(sigma, None).params)
        arms.append((arm, (ended, right)))
    for number, (arm, given) in enumerate(arms):
        write_arm(config, number, arm)
        how, right = given if isinstance(given, tuple) else ("completed", given)
        write_trial(config, arm, 0, outcome(arm, 0, right, how))
    candidate = candidate_of(config, read_arms(config))
    assert candidate.arm.name in ("c04", "c05", "c06"), "c10 has the largest difference"
    assert candidate.difference is not None
    assert candidate.difference < 0.05


@pytest.mark.slow
def test_reading_a_sweep_imports_neither_ray_nor_torch_nor_optuna() -> None:
    code = "import search.arms, sys; print(sorted({'ray', 'torch', 'optuna'} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.strip() == "[]"

"""How quickly each searcher finds a good sigma, and how many trials it burns: a synthetic landscape with a known
answer.

    python -m tests.benchmarks.search_quality                every method, 100 seeds, about 5 minutes on one core
    python -m tests.benchmarks.search_quality --seeds 3      a look

The landscape lies over the shipped space `sigma`: a module kind, a sigma_start whose range depends on it, a sigma_end.
It imitates what was recorded: noise helps a little up to a limit of its module kind, near the limit collapses set in by
chance, runs of one configuration differ by 1.2 points, and a collapsed trial still answers questions (its accuracy is
that of the last clean weights), so that accuracy alone does not show that it collapsed:

    accuracy = 0.70 + gain exp(-(ln(sigma / best) / 0.6)^2) - 0.01 (ln(sigma_end / end) / ln 4)^2  + N(0, 0.012)
    P(collapse) = 1 / (1 + exp(-ln(sigma / limit) / 0.1));   a collapse: step 3, accuracy 0.66 + N(0, 0.012)

One seed is one landscape: `best` of each module kind lies anywhere in the middle 70 % of its (logarithmic) range, its
`limit` a factor 1.35 to 2.7 above, `end` anywhere in the middle 70 %, and one of the two kinds, by chance, has the gain
0.05, the other 0.03. The best accuracy is 0.75. Our own choices (priors and candidates of `gp`) were made on seeds 100
to 119.

Methods are driven directly, one trial after another, one replicate each, without Ray processes: ours through
`RinSearch`, the stock ones through Ray's own `OptunaSearch`. ASHA (Ray's own, rungs at steps 3, 9, 27, over random
search) sees a curve per trial: it climbs from 0.18 to its final accuracy, the faster the more noise (the recorded arms
that led at step 20 and lost at 29).

What is reported, per method: the trials until one ran to its end without a collapse at a configuration whose true
accuracy is within 1 % of the best; the same in full trials' worth of steps (a collapsed or stopped trial is short); the
share of trials that collapsed; and how far the configuration that a user would pick (the best accuracy seen without a
collapse) truly lies below the best. Results go to docs/search-quality.md, favourable or not.
"""

import argparse
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, quantiles, stdev
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from search.arms import Arm, candidate_of
from search.proposals import SEARCHERS
from search.store import MOST, StudyConfig
from spaces.errors import NoCandidate
from spaces.library import LINEAR_SIGMA, RMSNORM_SIGMA
from tests.searches import control, outcome, searcher
from trainable.hashing import stable_hash
from trainable.outcome import Ending

DOCS = Path(__file__).parents[2] / "docs"
COMMAND = "python -m tests.benchmarks.search_quality"
STEPS = 29
COLLAPSE_STEPS = 3
NOISE = 0.012
COLLAPSED = 0.66
OPTIMUM = 0.75
RANGES = {"rmsnorm": RMSNORM_SIGMA["W4A4"], "linear": LINEAR_SIGMA["W4A4"]}
SIGMA_END = (0.0001, 0.002)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One configuration of space `sigma`."""

    module: str
    sigma: float
    sigma_end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Landscape:
    """The truth behind one seed."""

    seed: int
    best: Mapping[str, float]
    limit: Mapping[str, float]
    gain: Mapping[str, float]
    end: float
    noise: float = NOISE
    """From run to run, a share."""

    def accuracy(self, setting: Setting) -> float:
        """The true one, of a run that does not collapse."""
        hill = self.gain[setting.module] * math.exp(-((math.log(setting.sigma / self.best[setting.module]) / 0.6) ** 2))
        return 0.70 + hill - 0.01 * (math.log(setting.sigma_end / self.end) / math.log(4)) ** 2

    def collapse_probability(self, setting: Setting) -> float:
        return 1 / (1 + math.exp(-math.log(setting.sigma / self.limit[setting.module]) / 0.1))

    def worth(self, setting: Setting) -> float:
        """What a run of it comes to in the mean, collapses included."""
        chance = self.collapse_probability(setting)
        return (1 - chance) * self.accuracy(setting) + chance * COLLAPSED

    def best_worth(self) -> float:
        """Over a fine grid of sigmas, with the best end."""
        return max(
            self.worth(Setting(module=module, sigma=float(sigma), sigma_end=self.end))
            for module, (low, high) in RANGES.items()
            for sigma in np.geomspace(low, high, 400)
        )

    def run(self, setting: Setting, replicate: int = 0) -> "Run":
        """The same configuration gives the same trial, whoever proposed it."""
        rng = np.random.default_rng(stable_hash("run", self.seed, setting, *([replicate] if replicate else [])))
        collapsed = bool(rng.random() < self.collapse_probability(setting))
        truth = self.accuracy(setting)
        measured = (COLLAPSED if collapsed else truth) + self.noise * float(rng.standard_normal())
        steps = COLLAPSE_STEPS if collapsed else STEPS
        pace = 6 / (1 + setting.sigma / self.limit[setting.module])
        return Run(truth=truth, collapsed=collapsed, accuracy=measured, steps=steps, pace=pace)


def landscape(seed: int) -> Landscape:
    rng = np.random.default_rng(stable_hash("landscape", seed))

    def inside(low: float, high: float) -> float:
        return float(low * (high / low) ** rng.uniform(0.15, 0.85))

    best = {module: inside(*ends) for module, ends in RANGES.items()}
    limit = {module: sigma * math.exp(rng.uniform(0.3, 1.0)) for module, sigma in best.items()}
    winner = rng.choice(list(RANGES))
    return Landscape(
        seed=seed,
        best=best,
        limit=limit,
        gain={module: 0.05 if module == winner else 0.03 for module in RANGES},
        end=inside(*SIGMA_END),
    )


HARDER_NOISE = 0.017


def hill(seed: int) -> Landscape:
    """That of the table of methods, with runs that differ by 1.7 points."""
    return replace(landscape(seed), noise=HARDER_NOISE)


def at_the_boundary(seed: int) -> Landscape:
    """Accuracy grows up to where half the runs collapse."""
    plain = hill(seed)
    return replace(plain, limit=plain.best)


def very_low(seed: int) -> Landscape:
    """Nine tenths of each range collapse; the hill lies in the rest."""
    plain = hill(seed)
    limit = {module: low * (high / low) ** 0.12 for module, (low, high) in RANGES.items()}
    return replace(plain, limit=limit, best={module: sigma / 1.35 for module, sigma in limit.items()})


def flat(seed: int) -> Landscape:
    """Noise changes nothing until it breaks the run."""
    return replace(hill(seed), gain=dict.fromkeys(RANGES, 0.0))


CONTROL = 0.70
RUNS = 24
NOISES = (0.01, 0.02, 0.04)
"""From run to run, a share, of the table of candidates."""
LANDSCAPES: dict[str, Callable[[int], Landscape]] = {
    "hill": hill,
    "best at the collapse boundary": at_the_boundary,
    "boundary at very low sigma": very_low,
    "flat": flat,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One trial."""

    truth: float
    """True accuracy of its configuration."""
    collapsed: bool
    accuracy: float
    """Measured at its end."""
    steps: int
    pace: float
    """Steps in which the distance to the final accuracy falls to 1/e; more noise climbs faster."""

    def curve(self, step: int) -> float:
        """Accuracy after some steps."""
        return 0.18 + (self.accuracy - 0.18) * (1 - math.exp(-step / self.pace)) / (
            1 - math.exp(-self.steps / self.pace)
        )


Search = Callable[[int, Landscape], Iterator[Run]]


# --- methods: each yields its trials, in order ------------------------------------------------------------------------


def ran(replicates: int) -> Arm:
    """The control, which the counts of this page leave out."""
    return replace(control(), results={number: outcome(CONTROL) for number in range(replicates)})


def ours(name: str) -> Search:
    def method(trials: int, truth: Landscape) -> Iterator[Run]:
        search = searcher(known=[ran(1)], trials=trials + 1, seed=truth.seed, searcher=name)
        for number in range(trials):
            suggestion = search.suggest(f"t{number}")
            if suggestion == Searcher.FINISHED:
                return
            assert isinstance(suggestion, dict)
            noise = suggestion["config"]["noise"]
            done = truth.run(
                Setting(module=noise["modules"][0], sigma=noise["sigma_start"], sigma_end=noise["sigma_end"])
            )
            how: Ending = "collapsed" if done.collapsed else "completed"
            search.ended[suggestion["arm"], 0] = outcome(done.accuracy, how)
            search.on_trial_complete(f"t{number}")
            yield done

    return method


def _define(trial: Any) -> None:
    module = trial.suggest_categorical("module", list(RANGES))
    low, high = RANGES[module]
    trial.suggest_float(f"sigma_{module}", low, high, log=True)
    trial.suggest_float("sigma_end", *SIGMA_END, log=True)


def _setting(drawn: Mapping[str, Any]) -> Setting:
    return Setting(module=drawn["module"], sigma=drawn[f"sigma_{drawn['module']}"], sigma_end=drawn["sigma_end"])


def stock(sampler: Callable[[int], Any], *, failed: bool) -> Search:
    """Ray's OptunaSearch; a collapse is told as an error (what an exception comes to) or as its accuracy."""

    def method(trials: int, truth: Landscape) -> Iterator[Run]:
        search = OptunaSearch(space=_define, metric="accuracy", mode="max", sampler=sampler(truth.seed))
        for number in range(trials):
            done = truth.run(_setting(search.suggest(f"t{number}")))
            error = done.collapsed and failed
            search.on_trial_complete(f"t{number}", None if error else {"accuracy": done.accuracy}, error=error)
            yield done

    return method


def asha(trials: int, truth: Landscape) -> Iterator[Run]:
    """Random search under Ray's ASHA, for as many steps as `trials` full trials have."""
    search = OptunaSearch(
        space=_define, metric="accuracy", mode="max", sampler=optuna.samplers.RandomSampler(seed=truth.seed)
    )
    scheduler = ASHAScheduler(
        time_attr="step", metric="accuracy", mode="max", max_t=STEPS, grace_period=3, reduction_factor=3
    )
    spent = number = 0
    while spent < trials * STEPS:
        done = truth.run(_setting(search.suggest(f"t{number}")))
        trial = SimpleNamespace(trial_id=f"t{number}")
        scheduler.on_trial_add(None, trial)
        steps = next(
            (
                step
                for step in range(1, done.steps)
                if scheduler.on_trial_result(None, trial, {"step": step, "accuracy": done.curve(step)})
                == TrialScheduler.STOP
            ),
            done.steps,
        )
        spent += steps
        number += 1
        yield replace(done, steps=steps)


METHODS: dict[str, Search] = {
    "`gp` (our default)": ours("gp"),
    **{f"`{name}`": ours(name) for name in SEARCHERS if name != "gp"},
    "stock OptunaSearch, TPE, a collapse is an exception": stock(
        lambda seed: optuna.samplers.TPESampler(seed=seed), failed=True
    ),
    "stock OptunaSearch, TPE, a collapse is its accuracy": stock(
        lambda seed: optuna.samplers.TPESampler(seed=seed), failed=False
    ),
    "stock OptunaSearch, GP, a collapse is its accuracy": stock(
        lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=5, warn_independent_sampling=False),
        failed=False,
    ),
    "stock random search": stock(lambda seed: optuna.samplers.RandomSampler(seed=seed), failed=False),
    "stock random search with ASHA": asha,
}


# --- what came of it --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One method with one seed."""

    reached_trials: float
    """Trials until a good one; infinite where there was none."""
    reached_cost: float
    """The same, in full trials' worth of steps."""
    trials: int
    collapsed: float
    """Share of trials."""
    regret: float
    """True accuracy of the best possible configuration less that of the one a user would pick."""


def score(runs: list[Run]) -> Score:
    finished = [r for r in runs if not r.collapsed and r.steps == STEPS]
    reached = next((i for i, r in enumerate(runs) if r in finished and r.truth >= 0.99 * OPTIMUM), None)
    pick = max(finished, key=lambda r: r.accuracy)
    return Score(
        reached_trials=math.inf if reached is None else reached + 1,
        reached_cost=math.inf if reached is None else sum(r.steps for r in runs[: reached + 1]) / STEPS,
        trials=len(runs),
        collapsed=mean(r.collapsed and r.steps == COLLAPSE_STEPS for r in runs),
        regret=OPTIMUM - pick.truth,
    )


def row(name: str, scores: list[Score], seconds: float) -> str:
    low, middle, high = quartiles([s.reached_trials for s in scores])
    cost = quartiles([s.reached_cost for s in scores])[1]
    never = sum(math.isinf(s.reached_trials) for s in scores)
    return (
        f"| {name} | {middle} ({low} to {high}) | {cost} | {never} of {len(scores)} | "
        f"{100 * mean(s.collapsed for s in scores):.0f} % | {100 * mean(s.regret for s in scores):.2f} | "
        f"{mean(s.trials for s in scores):.0f} | {seconds:.2f} |"
    )


def quartiles(values: list[float]) -> list[str]:
    """As text; a quartile that falls on a search that never got there says so."""
    cap = 1e9
    found = quantiles([min(v, cap) for v in values], n=4, method="inclusive")
    return ["never" if v > cap / 10 else f"{v:.3g}" for v in found]


# --- who is put forward ----------------------------------------------------------------------------------------------


def spent(truth: Landscape, runs: int, **how: int | None) -> tuple[StudyConfig, list[Arm]]:
    """A sweep of so many runs by `gp`, its control among them; `how`: replicates of each arm, or all that there are."""
    study = {"trials": runs // (how.get("replicates") or 1), "replicates": MOST, **how}
    search = searcher(known=[control()], seed=truth.seed, searcher="gp", **study)
    number = 0
    while isinstance(suggestion := search.suggest(f"t{number}"), dict):
        arm, replicate = suggestion["arm"], suggestion["replicate"]
        done = truth.run(setting_of(search.arms[suggestion["number"]]), replicate) if arm != "control" else None
        if done is None:
            rng = np.random.default_rng(stable_hash("control", truth.seed, replicate))
            search.ended[arm, replicate] = outcome(CONTROL + truth.noise * float(rng.standard_normal()))
        else:
            search.ended[arm, replicate] = outcome(done.accuracy, "collapsed" if done.collapsed else "completed")
        search.on_trial_complete(f"t{number}")
        number += 1
    assert number == runs, f"{number=} {runs=}"
    return search.study, search.arms


def setting_of(arm: Arm) -> Setting:
    noise = arm.config.noise
    return Setting(module=noise.modules[0], sigma=noise.sigma_start, sigma_end=noise.sigma_end)


def regrets(truth: Landscape, study: StudyConfig, arms: list[Arm]) -> tuple[float, float] | None:
    """Of the arm with the highest difference to its control, and of the candidate; None without an arm that held."""
    try:
        candidate = candidate_of(study, arms).arm
    except NoCandidate:
        return None
    held = [arm for arm in arms[1:] if arm.results and not any(run.collapsed for run in arm.results.values())]
    highest = max(held, key=lambda arm: mean(run.eval.accuracy for run in arm.results.values()))
    best = truth.best_worth()
    return best - truth.worth(setting_of(highest)), best - truth.worth(setting_of(candidate))


HOW: dict[str, dict[str, int | None]] = {
    "one each": {"replicates": 1},
    "three each": {"replicates": 3},
    "`--runs`": {"total": RUNS},
}


Cell = dict[str, list[tuple[float, float] | None]]
"""Of a landscape and a run sd: for each way to spend runs the regrets per seed."""


def cell(name: str, noise: float, seeds: int, first: int) -> Cell:
    truths = [replace(LANDSCAPES[name](first + seed), noise=noise) for seed in range(seeds)]
    return {how: [regrets(truth, *spent(truth, RUNS, **given)) for truth in truths] for how, given in HOW.items()}


def candidates(seeds: int, first: int, workers: int) -> Iterator[str]:
    """Rows of the table: a landscape, and how far runs differ."""
    places = [(name, noise) for name in LANDSCAPES for noise in NOISES]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        found = pool.map(cell, *zip(*places, strict=True), repeat(seeds), repeat(first))
        yield from candidate_rows(dict(zip(places, found, strict=True)))


def candidate_rows(found: Mapping[tuple[str, float], Cell]) -> Iterator[str]:
    """Over the seeds in which every way put something forward."""
    lost: dict[float, list[tuple[float, ...]]] = {noise: [] for noise in NOISES}
    for (name, noise), of_cell in found.items():
        whole = [pairs for pairs in zip(*of_cell.values(), strict=True) if all(pairs)]
        befores = [mean(pairs[n][0] for pairs in whole if pairs[n]) for n in range(len(HOW))]
        afters = [tuple(100 * pair[1] for pair in pairs if pair) for pairs in whole]
        lost[noise] += afters
        cells = (f"{100 * a:.2f} -> {mean(b):.2f}" for a, b in zip(befores, zip(*afters, strict=True), strict=True))
        yield f"| {name} | {100 * noise:g} | {' | '.join(cells)} |"
    everything = [*((f"{100 * noise:g}", of_noise) for noise, of_noise in lost.items())]
    for label, of_all in [*everything, ("all", [row for _, rows in everything for row in rows])]:
        *others, ours = zip(*of_all, strict=True)
        cells = []
        for other in others:
            won = [a - b for a, b in zip(other, ours, strict=True)]
            cells.append(
                f"{mean(other):.2f}: `--runs` {mean(won):+.2f} ± {stdev(won) / math.sqrt(len(won)):.2f} nearer"
            )
        yield f"| **all landscapes** | {label} | {' | '.join(cells)} | {mean(ours):.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=100, help="of the table of methods; 0 = not that one")
    parser.add_argument("--candidates", type=int, default=16, help="seeds of the table of candidates; 0 = not that one")
    parser.add_argument("--first", type=int, default=0, help="first seed; anything but 0 prints and writes nothing")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of the table of candidates")
    parser.add_argument("--only", default="", help="methods whose name contains this; prints, writes nothing")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = []
    for name, method in METHODS.items():
        if arguments.only not in name or not arguments.seeds:
            continue
        started = time.process_time()
        scores = [
            score(list(method(arguments.trials, landscape(arguments.first + seed)))) for seed in range(arguments.seeds)
        ]
        rows.append(row(name, scores, (time.process_time() - started) / sum(s.trials for s in scores)))
        print(rows[-1], flush=True)
    found = []
    for line in candidates(arguments.candidates, arguments.first, arguments.workers) if arguments.candidates else []:
        found.append(line)
        print(line, flush=True)
    if not arguments.only and not arguments.first:
        page = DOCS / "search-quality.md"
        methods, heading, put_forward = page.read_text(encoding="utf-8").partition(HEADING)
        if rows:
            methods = METHODS_PAGE.format(
                trials=arguments.trials, seeds=arguments.seeds, rows="\n".join(rows), machine=machine()
            )
        if found:
            put_forward = CANDIDATES_PAGE.format(rows="\n".join(found), seeds=arguments.candidates)
        page.write_text(methods + heading + put_forward, encoding="utf-8")


def machine() -> str:
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, optuna {optuna.__version__}, Python {platform.python_version()}"
    )


COLUMNS = (
    "method",
    "trials to reach within 1 % of the best: median (quartiles)",
    "the same in full trials' worth of steps",
    "never reached",
    "trials that collapsed",
    "pick's true distance from the best, points",
    "trials run",
    "CPU s per trial",
)
METHODS_PAGE = f"""# Search quality: how quickly a good sigma is found, and how many trials collapse on the way

Made by `{COMMAND}` ({{machine}}). The landscapes, their collapse regions and the methods are described at the top of
`tests/benchmarks/search_quality.py`. {{trials}} trials per search, {{seeds}} seeds (each a landscape of its own), one
replicate, one trial at a time. "Never" in a quartile: that search did not get there within its trials.

| {" | ".join(COLUMNS)} |
|{"---|" * len(COLUMNS)}
{{rows}}

Twenty seeds are too few to rank these methods: two runs of random search with other seeds differ by as much as the
methods do (the rows `random` and "stock random search" are the same method). ASHA's trials are cut short where faster
learning looks better: it needs more trials, which cost less each.

"""
HEADING = "## Who is put forward\n"
CANDIDATES_PAGE = f"""
How far the mean of what is put forward (a collapse counts {100 * COLLAPSED:g} %) truly lies below the best possible
one, in points: of the arm with the highest difference -> of the candidate, the one with the most to expect of another
run (`search/surrogate.py`). `gp`, {RUNS} runs in all, the control's among them: spent on one replicate of each
configuration, on three, or by `--runs {RUNS}` (`search/allocation.py`). {{seeds}} seeds per row, the same for all; runs
of one configuration differ by as many points as stands in the second column. The landscapes: `LANDSCAPES` in the
benchmark. The rule was chosen on other seeds.

| landscape | run sd | {" | ".join(HOW)} |
|{"---|" * (2 + len(HOW))}
{{rows}}

Three replicates each leave a third of the configurations to choose from, and lose by it. Against one replicate each
`--runs` is *not* shown to be better over all rows: the surrogate lends each configuration the runs of its neighbours,
so that a new one beside it teaches about as much as the old one again. Whether it gains where runs differ most, the
last rows say. What it gives beyond that are replicates of the control and of what is put forward, from which a report
can tell how far runs differ. A landscape in which neighbours say nothing of each other was not tried.

The same rule at 24, 30 and 48 runs, before there was `--runs`: [candidate.md](candidate.md).
"""

if __name__ == "__main__":
    main()

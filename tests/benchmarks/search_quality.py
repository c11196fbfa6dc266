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
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, quantiles, stdev
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from search.arms import Arm
from search.proposals import SEARCHERS
from search.surrogate import Seen, expected
from spaces.library import LINEAR_SIGMA, RMSNORM_SIGMA, SPACES
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
RUNS = (24, 30, 48)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One configuration of a search."""

    seen: Seen
    difference: float
    """Mean over its runs, as if its control were known; below all others where one collapsed."""
    worth: float
    """What another run would come to in the mean."""


def tried(truth: Landscape, runs: int, replicates: int) -> list[Tried]:
    """By `gp`, so many runs in all."""
    known = [ran(replicates)]
    search = searcher(known=known, trials=runs // replicates + 1, seed=truth.seed, searcher="gp", replicates=replicates)
    for number in range(runs // replicates * replicates):
        suggestion = search.suggest(f"t{number}")
        assert isinstance(suggestion, dict)
        noise = suggestion["config"]["noise"]
        setting = Setting(module=noise["modules"][0], sigma=noise["sigma_start"], sigma_end=noise["sigma_end"])
        done = truth.run(setting, suggestion["replicate"])
        how: Ending = "collapsed" if done.collapsed else "completed"
        search.ended[suggestion["arm"], suggestion["replicate"]] = outcome(done.accuracy, how)
        search.on_trial_complete(f"t{number}")
    return [_tried(truth, arm) for arm in search.arms[1:]]


def _tried(truth: Landscape, arm: Arm) -> Tried:
    noise = arm.config.noise
    gains = [ended.eval.accuracy - CONTROL for ended in arm.results.values() if not ended.collapsed]
    collapsed = len(arm.results) - len(gains)
    seen = Seen(params=arm.params, gain=mean(gains) if gains else None, held=len(gains), collapsed=collapsed)
    setting = Setting(module=noise.modules[0], sigma=noise.sigma_start, sigma_end=noise.sigma_end)
    return Tried(seen=seen, difference=-1.0 if collapsed else mean(gains), worth=truth.worth(setting))


def regrets(truth: Landscape, arms: list[Tried]) -> tuple[float, float] | None:
    """Of the arm with the highest difference, and of the one with the most to expect; None without an arm that held."""
    if all(arm.difference == -1.0 for arm in arms):
        return None
    promise = [what.holds * (CONTROL + what.gain) for what in expected(SPACES["sigma"], [arm.seen for arm in arms])]
    before = max(arms, key=lambda arm: arm.difference)
    after = max(zip(promise, arms, strict=True), key=lambda both: (both[1].difference > -1.0, both[0]))[1]
    best = truth.best_worth()
    return best - before.worth, best - after.worth


def candidates(seeds: int) -> Iterator[str]:
    """Rows of the table: landscape, replicates, and before and after for each number of runs."""
    for name, make in LANDSCAPES.items():
        for replicates in (1, 3):
            arms = {seed: tried(make(seed), RUNS[-1], replicates) for seed in range(seeds)}
            yield candidate_row(name, replicates, {seed: (make(seed), found) for seed, found in arms.items()})


def candidate_row(name: str, replicates: int, searched: Mapping[int, tuple[Landscape, list[Tried]]]) -> str:
    cells = []
    for runs in RUNS:
        both = [regrets(truth, arms[: runs // replicates]) for truth, arms in searched.values()]
        before, after = zip(*[pair for pair in both if pair is not None], strict=True)
        won = [b - a for b, a in zip(before, after, strict=True)]
        error = 100 * stdev(won) / math.sqrt(len(won))
        cells.append(f"{100 * mean(before):.2f} -> {100 * mean(after):.2f} (± {error:.2f})")
    return f"| {name} | {replicates} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="first seed; anything but 0 prints and writes nothing")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--candidates", type=int, default=30, help="seeds of the second table; 0 = not that one")
    parser.add_argument("--only", default="", help="methods whose name contains this; prints, writes nothing")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = []
    for name, method in METHODS.items():
        if arguments.only not in name:
            continue
        started = time.process_time()
        scores = [
            score(list(method(arguments.trials, landscape(arguments.first + seed)))) for seed in range(arguments.seeds)
        ]
        rows.append(row(name, scores, (time.process_time() - started) / sum(s.trials for s in scores)))
        print(rows[-1], flush=True)
    found = []
    for line in [] if arguments.only else candidates(arguments.candidates) if arguments.candidates else []:
        found.append(line)
        print(line, flush=True)
    if not arguments.only and not arguments.first:
        text = PAGE.format(
            command=COMMAND,
            trials=arguments.trials,
            seeds=arguments.seeds,
            rows="\n".join(rows),
            machine=machine(),
            candidates="\n".join(found),
            candidate_seeds=arguments.candidates,
        )
        (DOCS / "search-quality.md").write_text(text, encoding="utf-8")


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
PAGE = f"""# Search quality: how quickly a good sigma is found, and how many trials collapse on the way

Made by `{{command}}` ({{machine}}). The landscapes, their collapse regions and the methods are described at the top of
`tests/benchmarks/search_quality.py`. {{trials}} trials per search, {{seeds}} seeds (each a landscape of its own), one
replicate, one trial at a time. "Never" in a quartile: that search did not get there within its trials.

| {" | ".join(COLUMNS)} |
|{"---|" * len(COLUMNS)}
{{rows}}

Twenty seeds are too few to rank these methods: two runs of random search with other seeds differ by as much as the
methods do (the rows `random` and "stock random search" are the same method). ASHA's trials are cut short where faster
learning looks better: it needs more trials, which cost less each.

## Who is put forward

How far the candidate's own mean (a collapse counts {100 * COLLAPSED:g} %) lies below the best possible one, in points:
of the arm with the highest difference (before) -> of the one with the most to expect of another run
(`search/surrogate.py`); ± one standard error of what that wins. `gp`, {{candidate_seeds}} seeds per landscape,
runs that differ by {100 * HARDER_NOISE:g} points, the same number of runs spent on one replicate each or on three.
The landscapes: `LANDSCAPES` in the benchmark.

| landscape | replicates | {" | ".join(f"{runs} runs" for runs in RUNS)} |
|{"---|" * (2 + len(RUNS))}
{{candidates}}

With one replicate each there are three times the candidates to choose from, and the model lends each the runs of its
neighbours: at equal runs that is better everywhere but on the flat landscape, where three replicates see who breaks.
"""

if __name__ == "__main__":
    main()

"""Who may stop a trial early: the guard by table, the rules against Ray's own, the whole in real Tune."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, PopulationBasedTraining
from ray.tune.search import SearchGenerator

from search.schedulers import ETA, SCHEDULERS, StopWeak, below_median, halving, rungs
from search.searchers import Arm, RinSearch
from spaces.config import ConfigError
from spaces.library import SPACES, Choice, Dimension, Float, Int, Space, When
from spaces.reading import merge
from spaces.workloads import WORKLOADS


def space(*dimensions: Dimension) -> Space:
    return Space(name="mine", description="", dimensions=dimensions)


RATE = Dimension(key="grpo.learning_rate", domain=Float(low=5e-6, high=1e-4, log=True))
START = Dimension(key="noise.sigma_start", domain=Float(low=0.005, high=0.1, log=True))
END = Dimension(key="noise.sigma_end", domain=Float(low=0.0001, high=0.002, log=True))
STAGES = Dimension(key="noise.num_stages", domain=Int(low=3, high=12))
SHAPE = Dimension(key="noise.schedule", domain=Choice(options={name: name for name in ("qerl_code", "linear", "cosine", "log")}))
MODULES = Dimension(key="noise.modules", domain=Choice(options={"rmsnorm": ["rmsnorm"], "linear": ["linear"]}))
STEPS = Dimension(key="grpo.steps", domain=Int(low=10, high=29))


def base(every: int, **noise: Any) -> dict[str, Any]:
    return {"eval": {"every": every}, "noise": noise}


# --- the guard --------------------------------------------------------------------------------------------------------------------

# what, space, base, steps at which configurations may be ranked (29 steps; ten stages of 2.9 steps: the last begins in step 28)
ALLOWED: list[tuple[str, Space, dict[str, Any], tuple[int, ...]]] = [
    ("no noise at all", space(RATE), base(10, sigma_start=0.0), (10, 20)),
    ("constant noise from the first step", space(RATE), base(10, num_stages=1), (10, 20)),
    ("half quiet, half noisy: from step 16 on", space(RATE), base(5, num_stages=2), (20, 25)),
    ("the same decay everywhere: its last stage", space(RATE), base(2), (28,)),
    ("other starts that meet in sigma_end", space(START), base(2), (28,)),
    ("other starts and shapes that meet in sigma_end", space(START, SHAPE), base(4), (28,)),
    ("other numbers of stages: the latest last stage", space(STAGES), base(1), (28,)),
    ("few stages", space(START), base(3, num_stages=3), (21, 24, 27)),
    ("the paper's stages are of whole steps", space(RATE), base(1, schedule="qerl_paper"), (19, 20, 21, 22, 23, 24, 25, 26, 27, 28)),
]


@pytest.mark.parametrize(("where", "tree", "wanted"), [row[1:] for row in ALLOWED], ids=[row[0] for row in ALLOWED])
def test_configurations_are_ranked_only_after_their_noise_has_settled(where: Space, tree: dict[str, Any], wanted: tuple[int, ...]) -> None:
    assert rungs(where, tree) == wanted


# what, space, base, words of the reason
REFUSED: list[tuple[str, Space, dict[str, Any], str]] = [
    ("sigma_end differs", space(END), base(2), "different noise.*sigma 0.00"),
    ("module kinds differ", space(MODULES), base(2), "different noise.*sigma 0.0005 on .* sigma 0.0005 on "),
    (
        "noise against none",
        space(Dimension(key="noise.sigma_start", domain=Float(low=0.0, high=0.1))),
        base(2),
        "different noise.*no noise",
    ),
    ("constant noise of another size", space(START), base(2, num_stages=1), "different noise"),
    ("two stages: the second stays at the start", space(START), base(2, num_stages=2), "different noise"),
    ("the paper's last stage depends on the start", space(START), base(1, schedule="qerl_paper"), "different noise"),
    ("evaluated before the last stage alone", space(RATE), base(10), r"until step 28 of 29 and eval.every=10.*set eval.every=28"),
    ("as in the recorded runs", space(START), base(20), "steps 20 and 29"),
    ("evaluated at the end alone", space(RATE), base(0, sigma_start=0.0), "eval.every=0 evaluates at the end only"),
    ("evaluated at the end alone, in other words", space(RATE), base(29, sigma_start=0.0), "eval.every=29"),
    ("trials of other lengths", space(STEPS), base(2, sigma_start=0.0), "grpo.steps is searched"),
    (
        "a condition outside of the noise",
        space(
            Dimension(key="grpo.filter_groups", domain=Choice(options={"off": "off", "drop": "drop"})),
            Dimension(key="noise.sigma_end", domain=Float(low=0.0001, high=0.002), when=When(parent="grpo.filter_groups", value="drop")),
        ),
        base(2),
        "different noise",
    ),
    *((f"shipped space {name}", shipped, base(1), "different noise") for name, shipped in SPACES.items()),
]


@pytest.mark.parametrize(("where", "tree", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_scheduler_that_cannot_be_right_is_refused_with_the_reason_in_one_line(
    name: str, where: Space, tree: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        SCHEDULERS[name](where, tree)
    message = str(caught.value)
    assert message.startswith(f"--scheduler {name}: ")
    assert "--scheduler none" in message or "set eval.every" in message
    assert "\n" not in message


@pytest.mark.parametrize("where", SPACES.values(), ids=SPACES)
def test_no_scheduler_is_always_right(where: Space) -> None:
    scheduler = SCHEDULERS["none"](where, base(0), replicates=3)
    assert scheduler.on_trial_result(None, trial("c01"), report(1, 0.0)) == "CONTINUE"


@pytest.mark.parametrize("workload", WORKLOADS)
def test_each_workload_says_what_to_change(workload: str) -> None:
    """The remedy that the message names works."""
    settings = WORKLOADS[workload].settings
    tree = merge(settings, {"noise": {"sigma_start": 0.0}, "eval": {"every": 1}})
    assert rungs(space(RATE), tree) == tuple(range(1, tree.get("grpo", {}).get("steps", 29)))


# --- the rules --------------------------------------------------------------------------------------------------------------------


class FakeTrial:
    def __init__(self, arm: str, replicate: int, origin: str) -> None:
        self.trial_id = f"{arm}/{replicate}"
        self.config = {"arm": arm, "replicate": replicate, "origin": origin}


def trial(arm: str, replicate: int = 0, origin: str = "searcher") -> Any:
    return FakeTrial(arm, replicate, origin)


def report(steps_done: int, accuracy: float | None = None) -> dict[str, Any]:
    return {"rin/steps_done": float(steps_done)} | ({} if accuracy is None else {"eval/accuracy": accuracy})


def test_halving_decides_as_rays_asha_does() -> None:
    """With one replicate and the same rungs, over 200 random arms of which each goes on as long as it may."""
    spaced = (3, 9, 27)
    mine = StopWeak(rungs=spaced, replicates=1, rule=halving)
    rays = ASHAScheduler(time_attr="rin/steps_done", metric="eval/accuracy", mode="max", max_t=81, grace_period=3, reduction_factor=ETA)
    rng, decisions = random.Random(1), []
    for number in range(200):
        one = trial(f"c{number}")
        rays.on_trial_add(None, one)
        for step in spaced:
            result = report(step, rng.random())
            decision = mine.on_trial_result(None, one, result)
            assert decision == rays.on_trial_result(None, one, result)
            decisions.append(decision)
            if decision == "STOP":
                break
    assert decisions.count("STOP") > 100


def test_the_median_rule_decides_as_rays_does() -> None:
    """Ray's counts all trials at a step or beyond it; here the arms go step by step, all of them."""
    spaced = (5, 10, 15, 20)
    mine = StopWeak(rungs=spaced, replicates=1, rule=below_median)
    rays = MedianStoppingRule(time_attr="rin/steps_done", metric="eval/accuracy", mode="max", grace_period=5, min_samples_required=3)
    rng, decisions = random.Random(2), []
    live = [trial(f"c{number}") for number in range(40)]
    for one in live:
        rays.on_trial_add(None, one)
    controller = SimpleNamespace(get_live_trials=lambda: [])
    for step in spaced:
        for one in list(live):
            result = report(step, rng.random())
            decision = mine.on_trial_result(None, one, result)
            assert decision == rays.on_trial_result(controller, one, result)
            decisions.append(decision)
            if decision == "STOP":
                live.remove(one)
    assert 5 < decisions.count("STOP") < 80


# mine, others, stopped by halving, stopped by the median rule
RULES: list[tuple[list[float], list[list[float]], bool, bool]] = [
    ([0.1], [], False, False),  # nobody to compare with
    ([0.1], [[0.9]], True, False),  # the median rule wants three
    ([0.1], [[0.9], [0.9], [0.9]], True, True),
    ([0.9], [[0.9], [0.9], [0.9]], False, False),  # a tie is no reason
    ([0.75], [[0.9], [0.6], [0.5]], False, False),
    ([0.55], [[0.9], [0.6], [0.5]], True, True),
    ([0.8, 0.5], [[0.7, 0.7], [0.7, 0.7], [0.7, 0.7]], True, False),  # halving sees the rung, the median rule the best so far
]


@pytest.mark.parametrize(("mine", "others", "by_halving", "by_median"), RULES)
def test_rules(mine: list[float], others: list[list[float]], by_halving: bool, by_median: bool) -> None:
    assert (halving(mine, others), below_median(mine, others)) == (by_halving, by_median)


# --- configurations, not trials ---------------------------------------------------------------------------------------------------


def test_a_configuration_is_judged_when_all_its_replicates_have_reported() -> None:
    scheduler = StopWeak(rungs=(10, 20), replicates=3, rule=halving)
    for replicate in range(3):
        assert scheduler.on_trial_result(None, trial("good", replicate), report(10, 0.8)) == "CONTINUE"
    assert scheduler.on_trial_result(None, trial("weak", 0), report(10, 0.1)) == "CONTINUE"
    assert scheduler.on_trial_result(None, trial("weak", 1), report(10, 0.1)) == "CONTINUE"
    assert scheduler.on_trial_result(None, trial("weak", 2), report(10, 0.9)) == "STOP", "its median is 0.1"
    assert scheduler.on_trial_result(None, trial("weak", 0), report(11)) == "CONTINUE", "a step without an evaluation"
    assert scheduler.on_trial_result(None, trial("weak", 0), report(12, 0.1)) == "STOP", "at its next evaluation, be it a rung or not"


def test_one_weak_replicate_does_not_stop_a_good_configuration() -> None:
    scheduler = StopWeak(rungs=(10,), replicates=3, rule=halving)
    decisions = [scheduler.on_trial_result(None, trial("a", k), report(10, 0.5)) for k in range(3)]
    decisions += [scheduler.on_trial_result(None, trial("b", k), report(10, value)) for k, value in enumerate((0.9, 0.9, 0.0))]
    assert decisions == ["CONTINUE"] * 6


@pytest.mark.parametrize("origin", ["control", "point", "ablation", "confirm"])
def test_what_others_are_paired_with_is_neither_stopped_nor_ranked(origin: str) -> None:
    scheduler = StopWeak(rungs=(10,), replicates=1, rule=halving)
    assert scheduler.on_trial_result(None, trial("best", 0), report(10, 0.9)) == "CONTINUE"
    assert scheduler.on_trial_result(None, trial("fixed", 0, origin), report(10, 0.0)) == "CONTINUE"
    other = StopWeak(rungs=(10,), replicates=1, rule=halving)
    assert other.on_trial_result(None, trial("fixed", 0, origin), report(10, 1.0)) == "CONTINUE"
    assert other.on_trial_result(None, trial("c01", 0), report(10, 0.1)) == "CONTINUE", "nothing to compare with but the fixed arm"


def test_a_trial_is_stopped_at_a_rung_alone_and_never_at_its_end() -> None:
    scheduler = StopWeak(rungs=(10,), replicates=1, rule=halving)
    scheduler.on_trial_result(None, trial("good"), report(10, 0.9))
    for result in (report(9, 0.0), report(11, 0.0), report(10), {**report(10, 0.0), "done": True}):
        assert scheduler.on_trial_result(None, trial("weak"), result) == "CONTINUE"


@pytest.mark.parametrize("accuracy", [float("nan"), float("inf")])
def test_an_accuracy_that_is_not_finite_is_not_ranked(accuracy: float) -> None:
    scheduler = StopWeak(rungs=(10,), replicates=1, rule=halving)
    assert scheduler.on_trial_result(None, trial("broken"), report(10, accuracy)) == "CONTINUE"
    assert scheduler.on_trial_result(None, trial("weak"), report(10, 0.1)) == "CONTINUE", "nothing to compare with"


def test_rungs_of_asha_lie_a_factor_apart_and_those_of_the_median_rule_do_not() -> None:
    tree = base(3, sigma_start=0.0)
    assert "rungs (3, 9, 27)" in SCHEDULERS["asha"](space(RATE), tree).debug_string()
    assert "rungs (3, 6, 9, 12, 15, 18, 21, 24, 27)" in SCHEDULERS["median"](space(RATE), tree).debug_string()


def test_tune_refuses_population_schedulers_beside_any_search_algorithm() -> None:
    """Why there is no pbt here, among the reasons that `search/schedulers.py` gives."""
    assert set(SCHEDULERS) == {"none", "asha", "median"}
    scheduler = PopulationBasedTraining(metric="eval/accuracy", mode="max", hyperparam_mutations={"lr": [1, 2]})
    controller = SimpleNamespace(search_alg=SearchGenerator(searcher(12)))
    with pytest.raises(ValueError, match="Search algorithms cannot be used"):
        scheduler.on_trial_add(controller, trial("c01"))


# --- in Tune ------------------------------------------------------------------------------------------------------------------------


NINE_STEPS = merge(base(3, sigma_start=0.0), {"grpo": {"steps": 9}})


def searcher(configurations: int) -> RinSearch:
    control = Arm(name="control", origin="control", tree=merge(NINE_STEPS, {"grpo": {"learning_rate": 1e-7}}))
    return RinSearch(
        space=space(RATE), base=NINE_STEPS, fixed=[control], configurations=configurations, replicates=2, seed=0, searcher="qmc"
    )


@pytest.mark.slow
def test_in_real_tune_weak_configurations_end_early_and_are_told_as_pruned(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray import tune

    class Curve(tune.Trainable):  # type: ignore[misc]
        """Accuracy rises with the learning rate."""

        def setup(self, config: dict[str, Any]) -> None:
            self.done = 0

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.done = 0
            return True

        def save_checkpoint(self, checkpoint_dir: str) -> dict[str, int]:
            return {"done": self.done}

        def step(self) -> dict[str, Any]:
            self.done += 1
            accuracy = self.done * self.config["config"]["grpo"]["learning_rate"]
            result = report(self.done, accuracy if self.done % 3 == 0 else None)
            if self.done == 9:
                result |= {"done": True, "outcome": {"outcome": "completed", "eval": {"accuracy": accuracy}, "seconds": 1.0}}
            return result

    monkeypatch.setenv("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # as `search/study.py` does: the last result alone has an accuracy
    search = searcher(7)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        grid = tune.Tuner(
            Curve,
            tune_config=tune.TuneConfig(
                search_alg=search,
                scheduler=SCHEDULERS["asha"](space(RATE), NINE_STEPS, replicates=2),
                num_samples=14,
                max_concurrent_trials=2,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(name="t", storage_path=str(tmp_path), verbose=0),
        ).fit()
    finally:
        ray.shutdown()
    steps: dict[str, list[int]] = {}
    for result in grid:
        steps.setdefault(result.config["arm"], []).append(int(result.metrics["rin/steps_done"]))
    assert steps["control"] == [9, 9], "the worst of all runs to its end"
    stopped = {name for name, done in steps.items() if min(done) < 9}
    assert stopped, "some configuration is weak"
    assert all(step % 3 == 0 for name in stopped for step in steps[name]), "stopped at evaluations alone"
    rates = {arm.name: arm.tree["grpo"]["learning_rate"] for arm in search.arms}
    assert max(rates, key=lambda name: rates[name]) not in stopped
    states = {arm.name: t.state.name for arm, t in zip(search.arms[1:], search.study().trials, strict=True)}
    assert states == {name: "PRUNED" if name in stopped else "COMPLETE" for name in rates if name != "control"}
    assert not [t for t in search.study().trials if t.state.name == "RUNNING"]

"""The statistics that a scan is held against training by, and the runner behind them."""

import itertools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from spaces.errors import ConfigError
from tests.benchmarks import scan_runs
from tests.benchmarks.scan_runs import Row, Runner, Wanted, key_of, lift_arm, measure, next_sigma, read_rows
from tests.benchmarks.scan_statistics import (
    Array,
    correlations,
    over_seeds,
    smallest_seen,
    smallest_seen_corrected,
    spread_of,
)
from tests.benchmarks.scan_validity import findings, page


def table(effects: Array, sd: float, seeds: int = 5, seed: int = 0) -> Array:
    """Effects of layers [S, L], with noise and what all layers of a seed share."""
    rng = np.random.default_rng(seed)
    return np.asarray(effects + rng.normal(0, sd, (seeds, len(effects))) + rng.normal(0, 0.05, (seeds, 1)))


def test_rho_and_its_exact_p_are_scipys_also_with_ties() -> None:
    effect = np.array([0.3, 0.1, 0.5, 0.1, -0.2, 0.4])
    scores = {"a": (3.0, 1.0, 2.0, 2.0, 0.0, 9.0), "b": (1.0, 5.0, 2.0, 4.0, 6.0, 3.0)}
    for found in correlations(scores, effect, effect[None]):
        values = scores[found.score]
        exact = stats.permutation_test(
            (values,), lambda x: stats.spearmanr(x, effect).statistic, permutation_type="pairings", n_resamples=np.inf
        )
        assert found.rho == pytest.approx(stats.spearmanr(values, effect).statistic)
        by_hand = [abs(stats.spearmanr(order, effect).statistic) for order in itertools.permutations(values)]
        assert found.p == pytest.approx(np.mean(np.array(by_hand) >= abs(found.rho) - 1e-9))
        assert found.p == pytest.approx(exact.pvalue, abs=0.02)  # scipy doubles one side


def test_the_correction_of_one_score_is_none_and_of_copies_is_none() -> None:
    effect = np.array([1.0, 3.0, 2.0, 5.0, 4.0, 6.0])
    alone = correlations({"a": (1, 2, 3, 4, 5, 6)}, effect, effect[None])[0]
    assert alone.p_corrected == alone.p
    copies = correlations({"a": (1, 2, 3, 4, 5, 6), "b": (1, 4, 9, 16, 25, 36)}, effect, effect[None])
    assert [c.p_corrected for c in copies] == [alone.p, alone.p]
    other = correlations({"a": (1, 2, 3, 4, 5, 6), "b": (2, 6, 1, 3, 5, 4)}, effect, effect[None])[0]
    assert other.p < other.p_corrected <= 2 * other.p


def test_a_score_without_ranks_is_left_out() -> None:
    effect: Array = np.arange(5, dtype=np.float64)
    assert [c.score for c in correlations({"flat": (0,) * 5, "a": (1, 2, 3, 5, 4)}, effect, effect[None])] == ["a"]


def test_f_is_that_of_a_block_design() -> None:
    effects = table(np.array([0.0, 0.02, 0.01, 0.04]), 0.01)
    found = spread_of(effects)
    # Of two units the block design is a paired t test; of more, the rest of seeds and units is what is left.
    assert spread_of(effects[:, :2]).p_f == pytest.approx(stats.ttest_rel(effects[:, 0], effects[:, 1]).pvalue)
    rest = effects - effects.mean(0) - effects.mean(1, keepdims=True) + effects.mean()
    within = (rest**2).sum() / 12
    assert found.f == pytest.approx(5 * effects.mean(0).var(ddof=1) / within)
    assert found.p == pytest.approx(found.p_f, abs=0.02)
    assert spread_of(effects + 10 * np.arange(5)[:, None]).f == pytest.approx(found.f)  # the seed's own part cancels


def test_effects_that_are_all_alike_are_no_difference() -> None:
    alike = spread_of(np.full((3, 5), 0.1) + np.arange(3)[:, None])  # all zones broke at one step
    assert (alike.p_f, alike.p, alike.reliability, math.isnan(alike.f)) == (1.0, 1.0, 0.0, True)
    certain = spread_of(np.tile(np.arange(5) / 10, (3, 1)))
    assert (certain.p_f, certain.f, certain.reliability) == (0.0, math.inf, 1.0)


def test_chance_alone_is_told_from_layers_as_often_as_the_level_says() -> None:
    found = [spread_of(table(np.zeros(8), 0.02, seed=seed)) for seed in range(100)]
    assert sum(s.p_f < 0.05 for s in found) <= 11  # of 5 expected
    assert np.mean([s.reliability for s in found]) < 0.35


def test_a_planted_correlation_is_found_after_correction_and_a_null_is_not() -> None:
    rng = np.random.default_rng(1)
    scores = {f"noise{i}": tuple(rng.normal(size=8)) for i in range(20)}
    planted = scores | {"true": tuple(np.arange(8.0))}
    effects = table(np.linspace(0, 0.14, 8), 0.015)
    assert spread_of(effects).p_f < 0.001
    best = min(correlations(planted, effects.mean(0), over_seeds(effects)), key=lambda c: c.p)
    assert best.score == "true"
    assert best.p_corrected < 0.05
    assert 0.5 < best.low <= best.rho <= best.high <= 1
    hits = 0
    for seed in range(20):
        null = table(np.zeros(8), 0.015, seed=seed)
        hits += min(c.p_corrected for c in correlations(scores, null.mean(0), over_seeds(null)[:10])) <= 0.05
    assert hits <= 4  # of 1 expected


def test_what_few_units_can_show() -> None:
    assert smallest_seen(3) is None  # 2 of 6 orders
    assert smallest_seen(5) == pytest.approx(1.0)
    assert smallest_seen(8) == pytest.approx(0.738, abs=1e-3)  # of tables of Spearman's rho
    many = {str(i): tuple(np.random.default_rng(i).normal(size=8)) for i in range(30)}
    corrected = smallest_seen_corrected(many, 8)
    assert corrected is not None
    assert corrected > 0.738


def test_the_page_says_first_whether_layers_differ_and_finds_what_was_planted() -> None:
    """Layers gain 2 points each more than the one before; noise breaks runs above sigma 0.03."""
    rng = np.random.default_rng(0)

    def ran(wanted: list[Wanted]) -> list[Row]:
        rows = Fake(limit=0.03)(wanted)
        layers = [lifted_in(run) for run in wanted]
        gains = [0.02 * sum(lifted) + rng.normal(0, 0.01) for lifted in layers]
        return [replace(r, accuracy=0.4 + gain, accuracy_bf16=0.5) for r, gain in zip(rows, gains, strict=True)]

    scores = {"up": range(8), "flat": [1] * 8, "other": [3, 1, 4, 1, 5, 9, 2, 6]}
    rows = measure({}, 8, 3, ran)
    found = findings(
        [r if "lift" in r.arm else replace(r, accuracy_bf16=0.5 + rng.normal(0, 0.01)) for r in rows], 8, scores
    )
    text = page(found, "Scan: planted.")
    assert text.index("can layers be told apart") < text.index("Every score")
    assert "| up | +1.00" in text
    assert "| flat | no ranks" in text
    assert found.boundaries["last"].status == "bracketed"
    assert found.layers["deployed"].means == pytest.approx(0.02 * np.arange(8), abs=0.03)


def test_one_seed_is_no_finding() -> None:
    with pytest.raises(ConfigError, match="1 whole seeds are there, two are needed"):
        findings(measure({}, 8, 1, Fake(limit=1)), 8, {"up": range(8)})


# --- the runner -------------------------------------------------------------------------------------------------------


def row(run: Wanted, code: str, outcome: str = "completed") -> Row:
    return Row(
        key=key_of(run.config, code),
        code=code,
        arm=run.arm,
        seed=run.config.seed,
        sigma=run.config.noise.sigma_start,
        outcome=outcome,
        rule="",
        steps=29,
        accuracy=0.6,
        accuracy_bf16=0.7,
        accuracy_start=0.1,
        accuracy_bf16_start=0.2,
        seconds=1.0,
    )


def lifted_in(run: Wanted) -> tuple[int, ...]:
    layers = run.config.quant.skip_layers
    assert isinstance(layers, tuple)
    return layers


class Fake:
    """Collapses above a sigma; remembers what was asked for."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.wanted: list[Wanted] = []

    def __call__(self, wanted: list[Wanted]) -> list[Row]:
        self.wanted += wanted
        return [
            row(run, "x", "collapsed" if run.config.noise.sigma_start > self.limit else "completed") for run in wanted
        ]


def test_every_layer_and_zone_is_lifted_with_every_seed_and_stairs_close_in_on_the_boundary() -> None:
    fake = Fake(limit=0.03)
    rows = measure({}, 8, 5, fake)
    lifted = {arm: sorted(r.seed for r in rows if r.arm == arm) for arm in {r.arm for r in rows if "lift" in r.arm}}
    assert lifted == {lift_arm(layers): [0, 1, 2, 3, 4] for layers in [*([i] for i in range(8)), [1, 2], [3, 4, 5]]}
    for run in fake.wanted:
        if run.arm.startswith("lift"):
            assert run.arm == lift_arm(lifted_in(run))
    climbed = [r.sigma for r in rows if r.arm.startswith("noise-last") and r.sigma != 0.05]
    assert set(climbed) == {0.03536, 0.025}  # to both sides of the limit
    assert len({r.key for r in rows}) == len(rows)


def test_a_stair_goes_down_after_a_collapse_and_up_after_none() -> None:
    run = Fake(limit=1).__call__
    (held,) = run([Wanted(arm="a", config=scan_runs.noisy({"seed": 0}, "last", 0.05).config)])
    assert next_sigma([]) == 0.05
    assert next_sigma([held]) == 0.07071
    assert next_sigma([held, replace(held, outcome="collapsed")]) == 0.05


class Now:
    """A pool that runs in this process."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def submit(self, function, *arguments):  # type: ignore[no-untyped-def]
        from concurrent.futures import Future

        future: Future[Row] = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, **_: object) -> None: ...


def test_a_killed_measurement_goes_on_and_rows_of_other_code_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    code = ["new"]

    def run_one(run: Wanted, code: str) -> Row:
        ran.append(run.config.seed)
        return row(run, code)

    monkeypatch.setattr(scan_runs, "ProcessPoolExecutor", Now)
    monkeypatch.setattr(scan_runs, "run_one", run_one)
    monkeypatch.setattr(scan_runs, "code_version", lambda: code[0])
    wanted = [scan_runs.lifts({"seed": seed, "noise": {"sigma_start": 0.0}}, 8)[0] for seed in range(4)]
    path = tmp_path / "rows.jsonl"
    old = row(wanted[3], "old")
    path.write_text(json.dumps(asdict(old)) + "\n")
    with Runner(path, 1) as runner:
        runner(wanted[:2])
    with path.open("a") as file:
        file.write(json.dumps(asdict(row(wanted[2], "new")))[:-20])  # cut off by a kill
    with Runner(path, 1) as runner:
        assert [r.seed for r in runner(wanted)] == [0, 1, 2, 3]
    assert ran == [0, 1, 2, 3]
    assert len(read_rows(path, "new")) == 4
    assert list(read_rows(path, "old").values()) == [old]
    code[0] = "newer"
    with Runner(path, 1) as runner:
        runner(wanted[:1])
    assert ran == [0, 1, 2, 3, 0]


def test_another_setting_is_another_key() -> None:
    first, second = scan_runs.lifts({"seed": 0, "noise": {"sigma_start": 0.0}}, 8)[:2]
    assert len({key_of(first.config, "a"), key_of(second.config, "a"), key_of(first.config, "b")}) == 3
    assert len(scan_runs.code_version()) == 12

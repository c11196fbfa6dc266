"""Whether verdicts can be believed: simulated sweeps whose truth is known, from the choice of a winner to its
confirmation.

    python -m tests.benchmarks.calibration                         2,000 simulations per cell -> docs/calibration.md
    python -m tests.benchmarks.calibration --simulations 200 --out /tmp/calibration.md

A world has questions of different difficulty (chance of a right answer 0.15 to 0.85, mean 0.75, the same questions for
all arms and seeds of a test), run-to-run luck (half of its variance belongs to the seed and is shared by arms, half to
the run alone, so that the paired difference spreads by the run-to-run sd), and answers drawn from the resulting
chances. A test set has 2,048 questions; confirmation uses fresh seeds and other questions than the sweep, and asks
`search/sequential.py` what `rin confirm` asks. Nothing here asserts: docs/calibration.md says what is required and what
was found.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.power import TTestPower

from search.sequential import CONFIRM, SequentialRule, sequential_compare
from search.statistics import Comparison, Replicate, adjust, compare, compare_arms

DOCS = Path(__file__).parents[2] / "docs"
QUESTIONS = 2048
SPREADS = (0.0, 0.01, 0.02, 0.04)
REPLICATES = (3, 5, 8)
ARMS = (1, 5, 20)
EFFECTS = (0.01, 0.02, 0.04)
MARGIN = 0.01

# Difficulty: 0.15 + 0.7 * Beta(6, 1), as 64 equally frequent chances.
CHANCES = 0.15 + 0.7 * stats.beta(6, 1).ppf((np.arange(64) + 0.5) / 64)
CHANCES += 0.75 - CHANCES.mean()
ANSWERING = float(2 * (CHANCES * (1 - CHANCES)).mean() / QUESTIONS)
"""Variance of a paired difference from answering alone, arms and seeds without luck."""

Answers = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Example: World(sd=0.02): two points from run to run."""

    sd: float
    """Run-to-run, a share."""
    lean: float = 0.0
    """How much each arm's chance of answering a question differs from arm to arm by the question alone; a share."""
    copies: bool = False
    """Seeds change nothing: every replicate of an arm answers alike."""
    heavy: bool = False
    """Luck with heavy tails (t with 3 df, the same sd)."""

    def luck(self, rng: np.random.Generator, arms: int, replicates: int) -> NDArray[np.float64]:
        """[arms, replicates]"""

        def draw(*shape: int) -> NDArray[np.float64]:
            return rng.standard_t(3, shape) / math.sqrt(3) if self.heavy else rng.standard_normal(shape)

        return self.sd * math.sqrt(0.5) * (draw(1, replicates) + draw(arms, replicates))

    def accuracies(
        self, rng: np.random.Generator, arms: int, replicates: int, effect: float = 0.0
    ) -> NDArray[np.float64]:
        """[arms, replicates] on one draw of questions; the last arm is the control, the others are better by
        `effect`."""
        of_kind = rng.multinomial(QUESTIONS, np.full(len(CHANCES), 1 / len(CHANCES)))
        luck = self.luck(rng, arms, replicates)
        luck[:-1] += effect
        right = rng.binomial(of_kind, np.clip(CHANCES + luck[..., None], 0, 1))
        return np.asarray(right.sum(axis=-1) / QUESTIONS)

    def answers(self, rng: np.random.Generator, replicates: int, effect: float = 0.0) -> tuple[Answers, Answers]:
        """[replicates, questions] of treated and control on one draw of questions."""
        chances = CHANCES[rng.integers(len(CHANCES), size=QUESTIONS)].astype(np.float32)
        sides = []
        for luck, sign in zip(self.luck(rng, 2, replicates).astype(np.float32), (1, -1), strict=True):
            mine = chances + np.float32(effect if sign > 0 else 0)
            if self.lean:
                mine = mine + np.float32(sign * self.lean / 2) * rng.choice(np.array([-1, 1], np.float32), QUESTIONS)
            drawn = 1 if self.copies else replicates
            right = rng.random((drawn, QUESTIONS), np.float32) < mine + luck[:drawn, None]
            sides.append(np.repeat(right, replicates, axis=0) if self.copies else right)
        return sides[0], sides[1]


def confirmed(sides: tuple[Answers, Answers], rule: SequentialRule) -> Comparison:
    """What `rin confirm` says when these replicates come in one after the other and the last look ends it."""
    return sequential_compare(*(side.mean(axis=1).tolist() for side in sides), rule=rule, margin=MARGIN, correct=sides)


def judged(sides: tuple[Answers, Answers]) -> Comparison:
    return compare(*(side.mean(axis=1).tolist() for side in sides), margin=MARGIN, correct=sides)


@dataclass(slots=True)
class Tally:
    """What came out of one cell."""

    truth: float
    verdicts: Counter[str]
    held: int = 0
    replicates: int = 0
    simulations: int = 0

    def add(self, result: Comparison) -> None:
        self.verdicts[result.verdict] += 1
        self.held += result.low <= self.truth <= result.high
        self.replicates += result.replicates
        self.simulations += 1

    def share(self, *verdicts: str) -> float:
        return sum(self.verdicts[verdict] for verdict in verdicts) / self.simulations

    @property
    def false(self) -> float:
        """Better or worse where there is no difference; worse where there is a gain."""
        return self.share("better", "worse") if self.truth == 0 else self.share("worse")

    @property
    def coverage(self) -> float:
        return self.held / self.simulations


def tally(count: int, truth: float, once: Callable[[], Comparison]) -> Tally:
    result = Tally(truth=truth, verdicts=Counter())
    for _ in range(count):
        result.add(once())
    return result


def pooled(tallies: Sequence[Tally]) -> Tally:
    return Tally(
        truth=tallies[0].truth,
        verdicts=sum((t.verdicts for t in tallies), Counter()),
        held=sum(t.held for t in tallies),
        replicates=sum(t.replicates for t in tallies),
        simulations=sum(t.simulations for t in tallies),
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def points(share: float) -> str:
    return f"{100 * share:g}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(str(cell) for cell in row) + " |"
    yield ""


# The whole way: sweep, winner, confirmation. The truth is that no arm differs from the control.


def whole_way(count: int, rng: np.random.Generator) -> Iterator[str]:
    rows, flattered = [], []
    by_rule: dict[str, list[Tally]] = {"sequential": [], "once": []}
    for sd in SPREADS:
        for replicates in REPLICATES:
            for arms in ARMS:
                world, promised = World(sd=sd), []
                tallies = [Tally(truth=0.0, verdicts=Counter()) for _ in range(2)]
                for _ in range(count):
                    sweep = world.accuracies(rng, arms + 1, replicates)
                    winner = int(np.argmax(np.median(sweep[:-1], axis=1)))
                    promised.append(compare(sweep[winner].tolist(), sweep[-1].tolist(), margin=MARGIN))
                    # Fresh seeds and other questions: the winner is an arm like any other.
                    tallies[0].add(confirmed(world.answers(rng, CONFIRM.looks[-1]), CONFIRM))
                    tallies[1].add(confirmed(world.answers(rng, replicates), SequentialRule(looks=(replicates,))))
                by_rule["sequential"].append(tallies[0])
                by_rule["once"].append(tallies[1])
                looking, once = tallies
                cells = [looking.false, looking.coverage, looking.share("same")]
                ends = [f"{looking.replicates / count:.1f}", percent(once.false), percent(once.coverage)]
                rows.append([points(sd), replicates, arms, *map(percent, cells), *ends])
                gain = float(np.mean([c.difference for c in promised]))
                claims = float(np.mean([c.verdict == "better" for c in promised]))
                flattered.append([points(sd), replicates, arms, f"{100 * gain:+.2f}", percent(claims)])
    yield "## The whole way, without a true difference"
    yield ""
    yield (
        "A sweep of so many arms with so many replicates; its winner by median accuracy; "
        "confirmation with fresh seeds on other"
    )
    yield (
        f"questions, by the default rule (looks at {', '.join(map(str, CONFIRM.looks))} replicates) and, "
        "apart, with the sweep's number"
    )
    yield (
        "of replicates looked at once. *False*: better or worse. Required: at most 6 % from confirmation. "
        "The rule's interval holds for"
    )
    yield "all looks together, so at the look where it ends it may hold the truth more often than in 95 %."
    yield ""
    head = [
        "sd, points",
        "replicates",
        "arms",
        "false %",
        "interval holds %",
        "same %",
        "replicates used",
        "once: false %",
        "once: interval holds %",
    ]
    yield from table(head, rows)
    for name, text in (("sequential", "by the default rule"), ("once", "looked at once")):
        cells = by_rule[name]
        everything = pooled(cells)
        worst, least, most = max(t.false for t in cells), min(t.coverage for t in cells), max(t.coverage for t in cells)
        yield (
            f"- {text}: {percent(everything.false)} % false over all {everything.simulations:,}, "
            f"at most {percent(worst)} % in a cell; intervals hold the truth in {percent(everything.coverage)} % "
            f"({percent(least)} to {percent(most)} in a cell)"
        )
    chance = 100 * math.sqrt(0.05 * 0.95 / count)
    yield (
        f"- a cell that is wrong in exactly 5 % comes out as 5 ± {chance:.1f} "
        f"(one standard error of {count:,} simulations)"
    )
    yield ""
    yield "What the same sweeps promise before confirmation (the truth is 0):"
    yield ""
    head = [
        "sd, points",
        "replicates",
        "arms",
        "winner's gain over control on the selection questions, points",
        "a paired t test of it says better, %",
    ]
    yield from table(head, flattered)


def known_differences(count: int, rng: np.random.Generator) -> Iterator[str]:
    rows, gaps, coverages = [], [], []
    power = TTestPower()
    for sd in SPREADS:
        for replicates in REPLICATES:
            for effect in EFFECTS:
                world = World(sd=sd)

                def once(world: World = world, replicates: int = replicates, effect: float = effect) -> Comparison:
                    return judged(world.answers(rng, replicates, effect))

                found = tally(count, effect, once)
                theory = float(power.power(effect / math.sqrt(sd**2 + ANSWERING), replicates, 0.05))
                measured = found.share("better", "worse")
                gaps.append(measured - theory)
                coverages.append(found.coverage)
                rows.append(
                    [
                        points(sd),
                        replicates,
                        points(effect),
                        percent(measured),
                        percent(theory),
                        percent(found.coverage),
                    ]
                )
    yield "## Known differences: power and coverage of the paired comparison"
    yield ""
    yield (
        "`compare` with the answers, looked at once; "
        "theory: paired t test (statsmodels `TTestPower`) at the world's own spread."
    )
    yield "Required: coverage 93 to 97 %."
    yield ""
    yield from table(
        ["sd, points", "replicates", "true difference, points", "found %", "theory %", "interval holds %"], rows
    )
    extremes = percent(min(coverages)), percent(max(coverages))
    mean = 100 * float(np.mean(gaps))
    yield f"- found minus theory: {100 * min(gaps):+.1f} to {100 * max(gaps):+.1f} percentage points, mean {mean:+.1f}"
    yield (
        f"- intervals hold the truth in {percent(float(np.mean(coverages)))} % "
        f"({extremes[0]} to {extremes[1]} in a cell)"
    )
    yield ""


def confirmation_finds(count: int, rng: np.random.Generator) -> Iterator[str]:
    rows = []
    for sd in SPREADS:
        for effect in (0.0, MARGIN, 0.02, 0.04):
            world = World(sd=sd)
            found = tally(
                count,
                effect,
                lambda world=world, effect=effect: confirmed(world.answers(rng, CONFIRM.looks[-1], effect), CONFIRM),
            )
            verdicts = [percent(found.share(word)) for word in ("better", "worse", "same", "undecided")]
            rows.append(
                [points(sd), points(effect), *verdicts, f"{found.replicates / count:.1f}", percent(found.coverage)]
            )
    yield "## What confirmation finds"
    yield ""
    yield (
        f"The default rule. With a true difference of {points(MARGIN)} point, the margin itself, `same` is false; "
        "only one side of the"
    )
    yield "interval can err so, hence at most 2.5 %."
    yield ""
    head = [
        "sd, points",
        "true difference, points",
        "better %",
        "worse %",
        "same %",
        "undecided %",
        "replicates used",
        "interval holds %",
    ]
    yield from table(head, rows)


def hard_worlds(count: int, rng: np.random.Generator) -> Iterator[str]:
    worlds = [
        ("seeds change nothing: replicates are copies", World(sd=0.0, copies=True)),
        ("arms suit different questions (±5 points each)", World(sd=0.0, lean=0.10)),
        ("arms suit different questions (±10 points each)", World(sd=0.0, lean=0.20)),
        ("the same, sd 2", World(sd=0.02, lean=0.20)),
        ("luck with heavy tails, sd 2", World(sd=0.02, heavy=True)),
    ]
    rows = []
    for name, world in worlds:
        for replicates in REPLICATES:
            with_answers, without = (Tally(truth=0.0, verdicts=Counter()) for _ in range(2))
            for _ in range(count):
                sides = world.answers(rng, replicates)
                with_answers.add(judged(sides))
                accuracies = [side.mean(axis=1).tolist() for side in sides]
                without.add(compare(*accuracies, margin=MARGIN, questions=QUESTIONS))
            cells = [percent(t) for tallied in (with_answers, without) for t in (tallied.false, tallied.coverage)]
            rows.append([name, replicates, *cells])
    yield "## Worlds in which replicates do not see everything"
    yield ""
    yield (
        "No difference over all questions there are, looked at once; "
        "what an arm owes to these 2,048 questions, its replicates repeat."
    )
    yield "With the answers the interval knows it; with the number of questions alone only copies are recognised."
    yield ""
    head = ["world", "replicates", "false %", "interval holds %", "number of questions alone: false %", "holds %"]
    yield from table(head, rows)


def unmatched_seeds(count: int, rng: np.random.Generator) -> Iterator[str]:
    rows = []
    for sd in SPREADS:
        for treated, control, common in ((5, 4, 3), (6, 7, 4), (8, 5, 5)):
            world = World(sd=sd)

            def once(
                effect: float,
                world: World = world,
                treated: int = treated,
                control: int = control,
                common: int = common,
            ) -> Comparison:
                both = world.accuracies(rng, 2, treated + control - common, effect)
                runs = [
                    [Replicate(seed=k, accuracy=float(a), collapsed=False) for k, a in enumerate(arm)] for arm in both
                ]
                return compare_arms(runs[0][:treated], runs[1][treated - common :], margin=MARGIN).primary

            none, some = (
                tally(count, 0.0, lambda once=once: once(0.0)),
                tally(count, 0.02, lambda once=once: once(0.02)),
            )
            name = f"{treated} and {control}, {common} in common"
            rows.append(
                [points(sd), name, percent(none.false), percent(none.coverage), percent(some.share("better", "worse"))]
            )
    yield "## Arms whose seeds do not all match"
    yield ""
    yield "`compare_arms` on the seeds of both; *found*: better or worse where the true difference is 2 points."
    yield ""
    yield from table(["sd, points", "replicates", "false %", "interval holds %", "found %"], rows)


def many_arms(count: int, rng: np.random.Generator) -> Iterator[str]:
    rows = []
    for arms in ARMS:
        world, plain, corrected = World(sd=0.02), 0, 0
        for _ in range(count):
            sweep = world.accuracies(rng, arms + 1, 5).tolist()
            each = {str(k): compare(sweep[k], sweep[-1], margin=MARGIN) for k in range(arms)}
            plain += any(c.verdict in ("better", "worse") for c in each.values())
            corrected += any(c.verdict in ("better", "worse") for c in adjust(each).values())
        rows.append([arms, percent(plain / count), percent(corrected / count)])
    yield "## Many arms against one control"
    yield ""
    yield "Sd 2 points, 5 replicates, no difference: share of sweeps in which any arm is called better or worse."
    yield ""
    yield from table(["arms", "each by itself %", "adjusted (Holm) %"], rows)


def mcnemar(a: Answers, b: Answers) -> float:
    """p of McNemar's (1947) exact test: of two checkpoints that are right equally often on questions like these."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def naive_ways(count: int, rng: np.random.Generator) -> Iterator[str]:
    """McNemar as if questions were the replicates, and an ordinary interval looked at again and again."""
    rows = []
    for sd in SPREADS:
        world, pooled_three, single, peeking = World(sd=sd), 0, 0, 0
        for _ in range(count):
            a, b = world.answers(rng, CONFIRM.looks[-1])
            pooled_three += mcnemar(a[:3], b[:3]) < 0.05
            single += mcnemar(a[0], b[0]) < 0.05
            differences = a.mean(axis=1) - b.mean(axis=1)
            peeking += any(stats.ttest_1samp(differences[:look], 0).pvalue < 0.05 for look in CONFIRM.looks)
        rows.append([points(sd), percent(pooled_three / count), percent(single / count), percent(peeking / count)])
    yield "## How far off the naive ways are"
    yield ""
    yield "No difference between the configurations; share of false differences at a nominal 5 %."
    yield ""
    looks = ", ".join(map(str, CONFIRM.looks))
    head = [
        "sd, points",
        "McNemar pooled over 3 seeds %",
        "McNemar on a single seed %",
        f"95 % interval looked at with {looks} replicates %",
    ]
    yield from table(head, rows)


PARTS = (whole_way, known_differences, confirmation_finds, hard_worlds, unmatched_seeds, many_arms, naive_ways)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=2000, help="per cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DOCS / "calibration.md")
    options = parser.parse_args()
    started = time.perf_counter()
    lines = [
        "# Calibration: can the verdicts be believed?",
        "",
        (
            f"Made by `python -m tests.benchmarks.calibration --simulations {options.simulations} --seed "
            f"{options.seed}`: simulated sweeps"
        ),
        (
            f"with a known truth, {options.simulations:,} per row, {QUESTIONS:,} questions, accuracies near 75 %. "
            "*sd*: run-to-run, of one"
        ),
        (
            f"accuracy, in points; the chance in answering adds an sd of {100 * math.sqrt(ANSWERING):.2f} points "
            "to every paired difference."
        ),
        "How the worlds are made: `tests/benchmarks/calibration.py`.",
        "",
    ]
    for part, stream in zip(PARTS, np.random.SeedSequence(options.seed).spawn(len(PARTS)), strict=True):
        begun = time.perf_counter()
        lines += part(options.simulations, np.random.default_rng(stream))
        print(f"{part.__name__}: {time.perf_counter() - begun:.0f} s", flush=True)
    options.out.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(f"{options.out}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()

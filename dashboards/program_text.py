"""A programme's documents in Markdown: a log of each experiment and one summary over all of them.

They are the experiment plan's templates, filled from results by nobody's hand: no sentence without a number behind it,
and `not measured` where there is none. Pure functions from records to text.
"""

import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

from dashboards.tables import duration
from search.hypotheses import PRIOR_SD, PRIOR_SDS, Belief
from search.improvement import Correlation, Spearman
from search.program import Decision, Run, Walk, rule_of
from search.program_report import Beside, Dynamics, ExperimentRow, FamilyReport, HypothesisRow, ProgramReport
from search.statistics import Comparison
from spaces.naming import describe_noise
from spaces.reading import as_tree, dump_yaml
from trainable.metrics import GRAD_NORM, LOSS, REWARD
from trainable.outcome import in_step

SUMMARY = "summary.md"
NOT_MEASURED = "not measured"
MARKS = {"confirmed": "✓ confirmed", "rejected": "✗ rejected", "inconclusive": "~ inconclusive"}
SIMILAR = 0.005
"""A difference within half a point is called similar, as in the plan (+-0.5 %)."""
UNSTABLE = 3.0
"""A gradient norm is called unstable from so many times its median on."""


def documents(report: ProgramReport) -> dict[str, str]:
    """File name -> Markdown: the summary, then a log of every experiment."""
    files = {SUMMARY: summary(report)}
    for family in report.families:
        for row in family.experiments:
            files[_file(family, row)] = experiment_log(report, family, row)
    return files


def _file(family: FamilyReport, row: ExperimentRow) -> str:
    return f"{family.mode.lower()}-{row.name}.md" if family.mode else f"{row.name}.md"


# --- one experiment ---------------------------------------------------------------------------------------------------


def experiment_log(report: ProgramReport, family: FamilyReport, row: ExperimentRow) -> str:
    """The plan's execution log."""
    experiment, mode = row.experiment, f" in {family.mode}" if family.mode else ""
    beliefs = _beliefs(family)
    tested = ", ".join(f"{name} ({_says(family, name)})" for name in experiment.tests) or "none of the programme's"
    lines = [f"# {row.name}{mode}: {experiment.about or 'no description'}", ""]
    lines += [
        f"- {report.registered}",
        f"- Study: {report.study.name}, workload {report.study.workload}",
        f"- Hypotheses tested: {tested}",
        f"- Confidence before the experiment: {_share(experiment.confidence) or 'none was given'}",
        "",
    ]
    if not row.arm:
        lines += ["## Not run", "", f"{_sentence(row.why_not)} Results: {NOT_MEASURED}.", ""]
        return "\n".join([*lines, *_prediction(row), *_statuses(row, beliefs)])
    lines += [*_configuration(row), *_prediction(row), *_execution(row), *_results(family, row)]
    lines += [*_statuses(row, beliefs), *_correlated(family, row), *_compared(family, row), *_next(row)]
    return "\n".join(lines)


def _configuration(row: ExperimentRow) -> Iterator[str]:
    assert row.config is not None
    yield from ("## Configuration", "")
    over = f", over the winner {row.base}" if row.base else ""
    noise, policy = describe_noise(row.config), row.config.grpo.filter_groups
    yield f"Noise {noise}, filter {policy}{over}; arm `{row.arm}`, control `{row.control}`."
    tree = as_tree(row.config)
    tree.pop("seed", None)
    yield from ("", "<details><summary>every setting</summary>", "", "```yaml", dump_yaml(tree).rstrip(), "```", "")
    yield from ("</details>", "")


def _prediction(row: ExperimentRow) -> Iterator[str]:
    expected, success = row.experiment.expected, row.experiment.success
    yield from ("## Registered prediction", "")
    yield (
        f"- Expected gain on the measured control: {expected[0]:+g} to {expected[1]:+g} points"
        if expected
        else "- Expected gain on the measured control: none was registered"
    )
    if success is not None:
        words = f"minimum from {success.minimum:+g}, good from {success.good:+g}, excellent from {success.excellent:+g}"
        yield f"- Called {words} points"
    yield ""


def _execution(row: ExperimentRow) -> Iterator[str]:
    yield from (
        "## Execution",
        "",
        "| replicate | seed | started (UTC) | worked on | attempts | ended |",
        "|---|---|---|---|---|---|",
    )
    for trial in row.trials:
        state, attempts = trial.state, trial.state.attempts
        started = (
            datetime.fromtimestamp(attempts[0].started, UTC).strftime("%Y-%m-%d %H:%M:%S") if attempts else NOT_MEASURED
        )
        ended: str = state.status
        if state.outcome is not None and state.outcome.collapsed:
            ended += f" by `{state.rule}` {in_step(state.step - 1, state.outcome.config.grpo.steps)}"
        cells = (trial.replicate, trial.seed, started, duration(3600 * state.hours), len(attempts), ended)
        yield f"| {' | '.join(map(str, cells))} |"
    yield ""


def _results(family: FamilyReport, row: ExperimentRow) -> Iterator[str]:
    runs = len(row.trials)
    yield from ("## Results", "", "Greedy accuracy of the clean model, mean over replicates.", "")
    yield f"- Step 0: {_percent(row.start)}"
    for step in (10, 20):
        found = row.at.get(step)
        yield (
            f"- Step {step}: {_percent(found[0])} ({_count(found[1], 'replicate')})"
            if found
            else f"- Step {step}: {NOT_MEASURED} ({_why_no_step(row, step)})"
        )
    at_stop = f", {row.collapsed} of them with the accuracy at their stop" if row.collapsed else ""
    yield f"- End: {_percent(row.end)} ({_count(runs, 'replicate')}{at_stop})"
    yield f"- vs its control, `{row.control}`: {_beside(row.beside_control)}"
    yield f"- vs best before it: {_beside(row.beside_best) if row.best_before else 'no experiment before it held'}"
    if row.experiment.success is not None and row.beside_control is not None:
        yield f"- Success: {_reached(row)}"
    level = rule_of(family.walk.programme, family.walk.families).level
    yield f"- Decides (at this comparison's part of the level, {100 * level:.2g} %): {_judged(row)}"
    yield from ("", "**Training dynamics**, mean over replicates", "")
    yield f"- Reward: {_moved(row.dynamics.get(REWARD))}"
    yield f"- Gradient norm: {_norm(row.dynamics.get(GRAD_NORM))}"
    yield f"- Loss: {_loss(row.dynamics.get(LOSS))}"
    yield ""


def _why_no_step(row: ExperimentRow, step: int) -> str:
    last = max((trial.state.step for trial in row.trials), default=0)
    if last < step:
        return f"no replicate came further than step {last}"
    assert row.config is not None
    return f"eval.every={row.config.eval.every}"


def _reached(row: ExperimentRow) -> str:
    if row.collapsed == len(row.trials):
        return "none of its words: every run collapsed"
    if row.collapsed:
        return f"none of its words: {row.collapsed} of {len(row.trials)} runs collapsed"
    shown = row.judged is not None and row.judged.verdict == "better"
    return (
        f"{row.reached or 'below its minimum'} by the mean seen{'' if shown else ', which is not shown to be a gain'}"
    )


def _judged(row: ExperimentRow) -> str:
    if row.judged is not None:
        return interval(row.judged)
    if row.collapsed:
        return f"collapsed in {row.collapsed} of {len(row.trials)} runs, so it is not compared further"
    return "no look has been reached"


def _statuses(row: ExperimentRow, beliefs: Mapping[str, tuple[HypothesisRow, Belief]]) -> Iterator[str]:
    yield from ("## Hypothesis status", "")
    if not row.experiment.tests:
        yield from ("It tests none of the programme's hypotheses.", "")
        return
    for name in row.experiment.tests:
        hypothesis, belief = beliefs[name]
        yield f"- **{name}** ({hypothesis.says[name]}): {MARKS[belief.status]}. {_reasoning(hypothesis, belief)}"
    yield ""


def _reasoning(row: HypothesisRow, belief: Belief) -> str:
    weighed = row.weighed
    moved = f"Confidence {_share(belief.confidence)}, made to sum to one {100 * belief.prior:.0f} %"
    if weighed.not_tested:
        return f"{_sentence(weighed.not_tested)} {moved}, and so it stays."
    means = ", ".join(f"{arm} {_percent(mean)}" for arm, mean in weighed.means.items())
    why = f" {_sentence(belief.reason)}" if belief.reason else ""
    return (
        f"Mean accuracy over {_count(len(weighed.seeds), 'common seed')}: {means}. {moved} -> "
        f"{_probability(belief.posterior)}, {_factor(belief)}.{why}"
    )


def _correlated(family: FamilyReport, row: ExperimentRow) -> Iterator[str]:
    yield from ("## SRDD correlation", "")
    found = row.correlation
    if found is None:
        yield from (f"{_sentence(NOT_MEASURED)} No final weights of this arm were scanned.", "")
        return
    yield (
        f"Scan of the model before training against the final weights of {_count(found.replicates, 'replicate')}, "
        f"{found.layers} layers, errors of the residual stream behind each layer."
    )
    yield ""
    yield f"- Did the middle zone improve more? {_zones(found)}"
    yield f"- Improvement of relative error against relative error before: {_spearman(found.by['relative_error'])}"
    yield f"- Improvement of deadzone against deadzone before: {_spearman(found.by['deadzone'])}"
    if (plain := family.controls.get(row.control)) is not None:
        scanned = f"without noise ({_count(plain.replicates, 'replicate')})"
        yield f"- Its control {row.control}, {scanned}: {_spearman(plain.by['relative_error'])}; {_zones(plain)}"
    yield ""


def _zones(found: Correlation) -> str:
    more = "more" if found.middle > found.elsewhere else "less"
    return (
        f"{100 * found.middle:+.2f} points of relative error there, {100 * found.elsewhere:+.2f} elsewhere: {more} "
        "(a positive number is less error)"
    )


def _spearman(found: Spearman) -> str:
    if math.isnan(found.r):
        return f"{NOT_MEASURED}: one side does not vary over layers"
    said = "no rank correlation is shown" if found.low <= 0 <= found.high else "more" if found.r > 0 else "less"
    said = {"more": "layers with more error improved more", "less": "layers with more error improved less"}.get(
        said, said
    )
    return f"Spearman {found.r:+.2f} [{found.low:+.2f}, {found.high:+.2f}]: {said}"


def _compared(family: FamilyReport, row: ExperimentRow) -> Iterator[str]:
    yield from ("## Comparison", "")
    yield f"- vs control (no noise): {_word(row.beside_control)}"
    for other in family.ran:
        if other.name != row.name and other.name in row.beside:
            yield f"- vs {other.name}: {_word(row.beside[other.name])}"
    best = family.best
    yield f"- Best so far: {_best_words(best)}"
    yield (
        f"- Gap to NVFP4 (e13g): {NOT_MEASURED}, it is no experiment of this programme"
        if "e13g" not in family.walk.programme.experiments
        else ""
    )
    yield ""


def _best_words(best: ExperimentRow | None) -> str:
    if best is None:
        return "none: no experiment held in all its runs"
    assert best.config is not None
    assert best.beside_control is not None
    gain = f"{_beside(best.beside_control)} over {best.control}"
    return f"{best.name}, {_percent(best.end)}, {gain} (noise {describe_noise(best.config)})"


def _next(row: ExperimentRow) -> Iterator[str]:
    yield from ("## Next step", "")
    if row.decision is None:
        yield from ("Nothing has been decided after it yet.", "")
        return
    made = row.decision
    yield f"- {_decided(made)}"
    if made.skipped:
        yield f"- Became pointless: {', '.join(made.skipped)}"
    anomalies = [
        *(
            f"replicate {trial.replicate} took {len(trial.state.attempts)} attempts"
            for trial in row.trials
            if len(trial.state.attempts) > 1
        ),
        *dict.fromkeys(w for trial in row.trials if trial.state.outcome for w in trial.state.outcome.receipt.warnings),
    ]
    yield f"- Anomalies: {'; '.join(anomalies) or 'none was recorded'}"
    yield ""


# --- all of them ------------------------------------------------------------------------------------------------------


def summary(report: ProgramReport) -> str:
    """The plan's cross-experiment analysis."""
    lines = [f"# Programme {report.programme.name}: what it came to", ""]
    lines += [f"{_sentence(report.registered)} Study {report.study.name}, workload {report.study.workload}."]
    lines += [f"All trials together: {report.hours:.2f} trial-slot hours.", ""]
    for family in report.families:
        lines += _family(family, several=len(report.families) > 1)
    return "\n".join([*lines, *sigma_lines(report)])


def _family(family: FamilyReport, *, several: bool) -> Iterator[str]:
    if several:
        yield from (f"# {family.mode}", "")
    yield from ("## Outcome", "", *outcome_lines(family), "")
    yield from ("## Decision path", "", *path_lines(family.walk), "")
    yield from ("## Comparison", "", *comparison_lines(family), "")
    yield from ("## Hypotheses", "", *tracker_lines(family), "")
    yield from ("## Errors of layers and their improvement", "", *_correlations(family), "")
    yield from ("## What remains, re-ranked", "", *_ranked(family), "")


def outcome_lines(family: FamilyReport) -> Iterator[str]:
    """How it ended, and how large the best gain is."""
    walk, last = family.walk, family.walk.next
    if isinstance(last, Run):
        wanted = ", ".join(f"{name} to {count} replicates" for name, count in last.replicates.items())
        yield f"It has not ended: phase {last.phase} is next ({wanted}; {len(last.missing)} runs)."
    elif (scenario := walk.scenario) is not None:
        yield f"Scenario {last.scenario}, {scenario.title}, since {last.because}: {scenario.says}."
        yield f"To do next: {scenario.next or 'the programme names nothing'}."
    else:
        yield f"None of the scenarios {', '.join(walk.programme.scenarios)}: {last.because}."
    best = family.best
    yield f"Best experiment: {_best_words(best)}."
    if best is not None and best.beside_control is not None and walk.programme.success:
        gain = 100 * best.beside_control.difference
        words = [word for word, least in walk.programme.success.items() if gain >= least]
        first, least = next(iter(walk.programme.success.items()))
        said = f"called {words[-1]}" if words else f"below what is called {first} (from {least:+g})"
        shown = best.judged is not None and best.judged.verdict == "better"
        doubt = "" if shown else ", and is not shown to be a gain"
        yield f"Its gain of {gain:+.2f} points is {said}{doubt}."


def path_lines(walk: Walk) -> Iterator[str]:
    """A line per decision."""
    if not walk.decisions:
        yield "No decision has been made."
    for number, made in enumerate(walk.decisions, 1):
        yield f"{number}. {_decided(made)}"
        yield from (f"   - {fact}" for fact in made.facts)
        if made.winner:
            yield f"   - winner: {made.winner}"
        if made.skipped:
            yield f"   - skipped: {', '.join(made.skipped)}"


def _decided(made: Decision) -> str:
    asked = f"since {made.when}" if made.when else "since no other rule's condition is shown"
    return f"Phase {made.phase} -> {made.go}, {asked}: {made.because}"


def comparison_lines(family: FamilyReport) -> Iterator[str]:
    """A row per experiment, those that did not run with the reason."""
    yield "| experiment | noise | runs | collapsed | step 0 | step 10 | step 20 | end | vs control | decides |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in family.ran:
        assert row.config is not None
        at = [_percent(row.at[step][0]) if step in row.at else NOT_MEASURED for step in (10, 20)]
        broke = f"{row.collapsed} (`{'`, `'.join(row.rules)}`)" if row.collapsed else "0"
        over = f" over {row.base}" if row.base else ""
        first = (f"{row.name}{over}", describe_noise(row.config), str(len(row.trials)), broke, _percent(row.start))
        cells = (*first, *at, _percent(row.end), _beside(row.beside_control), _judged(row))
        yield f"| {' | '.join(cells)} |"
    for row in family.experiments:
        if not row.arm:
            yield f"| {row.name} | {NOT_MEASURED} | 0 | | | | | | | {row.why_not} |"
    level = rule_of(family.walk.programme, family.walk.families).level
    yield ""
    yield (
        f"A difference is the mean over common seeds, collapsed runs with the accuracy at their stop. `decides` is at "
        f"{100 * level:.2g} %, this comparison's part of {100 * family.walk.programme.replicates.level:g} % over all "
        f"{len(family.walk.programme.comparisons())} comparisons that the programme may make."
    )


def tracker_lines(family: FamilyReport) -> Iterator[str]:
    """The hypothesis status tracker."""
    sds = "/".join(f"{100 * sd:g}" for sd in PRIOR_SDS)
    yield f"| | says | plan's confidence | before | after | prior {sds} points | Bayes factor | status |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in family.hypotheses:
        reasons = {belief.reason for belief in row.weighed.beliefs}
        shared = f"{_sentence(reasons.pop())}" if len(reasons) == 1 and reasons != {""} else ""
        yield f"| **{row.name}** | {' '.join(filter(None, (row.question, _measured(row))))} | | | | | | {shared} |"
        for belief in row.weighed.beliefs:
            by_sd = (
                " / ".join(_probability(share) for _, share in belief.by_sd)
                if not row.weighed.not_tested
                else NOT_MEASURED
            )
            after = _probability(belief.posterior) if not row.weighed.not_tested else NOT_MEASURED
            factor = NOT_MEASURED if belief.bayes_factor is None else _number(belief.bayes_factor)
            reason = f": {belief.reason}" if belief.reason and not shared else ""
            yield (
                f"| {belief.name} | {row.says.get(belief.name, '')} | {_share(belief.confidence)} | "
                f"{100 * belief.prior:.0f} % | {after} | {by_sd} | {factor} | {MARKS[belief.status]}{reason} |"
            )
    yield ""
    spreads = sorted({(row.weighed.spread.sd, row.weighed.spread.df) for row in family.hypotheses})
    told = ", ".join(f"{100 * sd:.2f} points ({df:g} degrees of freedom)" for sd, df in spreads)
    yield (
        f"Before: the plan's confidences as odds, with no difference at odds of 1, made to sum to one. After: effects "
        f"N(0, {100 * PRIOR_SD:g} points), run-to-run spread of a difference {told or NOT_MEASURED}. Bayes factors are "
        "against no difference. Confirmed from 95 %, rejected up to 5 %."
    )


def _measured(row: HypothesisRow) -> str:
    if row.weighed.not_tested:
        return ""
    means = ", ".join(f"{arm} {_percent(mean)}" for arm, mean in row.weighed.means.items())
    return f"({_count(len(row.weighed.seeds), 'common seed')}: {means})"


def _correlations(family: FamilyReport) -> Iterator[str]:
    rows = [(name, found) for name, found in family.controls.items()]
    rows += [(row.name, row.correlation) for row in family.ran if row.correlation is not None]
    if not rows:
        yield f"{_sentence(NOT_MEASURED)} No final weights were scanned."
        return
    yield "| arm | replicates | relative error | deadzone | middle zone | elsewhere |"
    yield "|---|---|---|---|---|---|"
    for name, found in rows:
        cells = " | ".join(f"{one.r:+.2f} [{one.low:+.2f}, {one.high:+.2f}]" for one in found.by.values())
        yield f"| {name} | {found.replicates} | {cells} | {100 * found.middle:+.2f} | {100 * found.elsewhere:+.2f} |"
    yield ""
    yield (
        f"Spearman over {rows[0][1].layers} layers, of the error before training against its improvement, with a 95 % "
        "interval; mean improvement of relative error in points. A control shows what training does without noise."
    )


def _ranked(family: FamilyReport) -> Iterator[str]:
    if not family.ranks:
        yield "Every experiment has run."
        return
    yield "| rank | experiment | plan's priority | confidence before | now | why it has not run |"
    yield "|---|---|---|---|---|---|"
    for number, rank in enumerate(family.ranks, 1):
        now = NOT_MEASURED if rank.now is None else _probability(rank.now)
        before = _share(rank.before) or "none given"
        yield f"| {number} | {rank.name} | {rank.priority} | {before} | {now} | {rank.why_not} |"


def sigma_lines(report: ProgramReport) -> Iterator[str]:
    """How much noise each precision stands."""
    yield from ("## Sigma guidelines per mode", "")
    if not report.sigmas:
        yield f"{_sentence(NOT_MEASURED)} No run had one sigma on all layers."
    for boundary in report.sigmas:
        runs = f"{_count(boundary.runs, 'run')}, {boundary.collapsed} collapsed"
        yield f"- {boundary.mode.upper()}, noise on {boundary.kind} ({runs}): {boundary.words()}"
    measured = {boundary.mode.upper() for boundary in report.sigmas}
    table = report.programme.table
    for mode in () if table is None else table.sigmas:
        if mode not in measured:
            yield f"- {mode}: {NOT_MEASURED} (rin program run --modes {mode})"
    yield ""


# --- words ------------------------------------------------------------------------------------------------------------


def interval(found: Comparison) -> str:
    """Example: `undecided, +1.20 points [-0.31, +2.71], 8 replicates`."""
    low, high = (f"{100 * end:+.2f}" if math.isfinite(end) else "..." for end in (found.low, found.high))
    seen = f"{100 * found.difference:+.2f} points [{low}, {high}]"
    return f"{found.verdict}, {seen}, {_count(found.replicates, 'replicate')}"


def _beliefs(family: FamilyReport) -> dict[str, tuple[HypothesisRow, Belief]]:
    return {belief.name: (row, belief) for row in family.hypotheses for belief in row.weighed.beliefs if belief.arm}


def _says(family: FamilyReport, name: str) -> str:
    return next(row.says[name] for row in family.hypotheses if name in row.says)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s'[: number != 1]}"


def _percent(share: float | None) -> str:
    return NOT_MEASURED if share is None else f"{100 * share:.1f} %"


def _share(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _probability(share: float) -> str:
    """Not 0 or 100 % where it is neither."""
    return "< 0.1 %" if share < 0.001 else "> 99.9 %" if share > 0.999 else f"{100 * share:.1f} %"


def _number(value: float) -> str:
    return "< 0.001" if value < 0.001 else "> 1000" if value > 1000 else f"{value:.3g}"


def _factor(belief: Belief) -> str:
    assert belief.bayes_factor is not None
    return f"Bayes factor {_number(belief.bayes_factor)} against no difference"


def _beside(found: Beside | None) -> str:
    if found is None:
        return f"{NOT_MEASURED}: no common seed"
    return f"{100 * found.difference:+.2f} points ({_count(found.pairs, 'pair')})"


def _word(found: Beside | None) -> str:
    if found is None:
        return _beside(found)
    word = "similar" if abs(found.difference) <= SIMILAR else "higher" if found.difference > 0 else "lower"
    return f"{word}, {_beside(found)}"


def _moved(found: Dynamics | None) -> str:
    return NOT_MEASURED if found is None else f"{found.first:.3f} at the first step, {found.last:.3f} at the last"


def _norm(found: Dynamics | None) -> str:
    if found is None:
        return NOT_MEASURED
    times = found.largest / found.middle if found.middle > 0 else math.inf
    word = "unstable" if times >= UNSTABLE else "stable"
    return f"median {found.middle:.3g}, largest {found.largest:.3g} ({times:.1f} times the median: {word})"


def _loss(found: Dynamics | None) -> str:
    if found is None:
        return NOT_MEASURED
    moved = abs(found.last - found.first)
    word = "oscillating" if found.turns > moved else "smooth"
    return f"{found.first:+.3g} -> {found.last:+.3g}, changes from step to step spread by {found.turns:.3g} ({word})"

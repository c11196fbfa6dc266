"""A sweep as pandas frames, for a question of one's own: in a notebook, or as CSV files.

    from dashboards.frames import load

    sweep = load()                      # the newest in runs; load("NAME", store="/data/runs") another one
    sweep.answer                        # the sentence that its page begins with
    sweep.trials                        # a frame; sweep.columns says what each column means
    sweep.comparisons                   # differences to the control, the numbers of `rin report`
    sweep.figure("forest")              # the page's figures, by the names in sweep.figures

Read from the sweep's own files: no server, no Ray, no torch. Tidy: a row is one arm, one trial, one step, one
completion, one noised weight, one comparison; `arm` and `replicate` join them. Metrics have the names under which they
are tracked, settings their dotted keys, units stand in names; accuracies, differences and doses are shares. Of settings
there are those of the noise, and whichever differ between arms, as they were written down.

NaN rule: what was not measured, and what was measured and is no number, are both NaN; a trial that ended by the latter
says so in its `rule` and `evidence`. An interval that is open on a side is infinite there.

Left out: weights and answers question by question, which lie in each trial's `outcome.json`.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from dashboards.answer import answer_of
from dashboards.figures import Figure
from dashboards.page import SECTIONS, Material, read_material
from dashboards.tables import fields_of
from search.arms import measured
from search.confirm import Confirmation
from search.finding import Finding
from search.program_study import read_state
from search.report import ArmReport, StudyReport, screening
from search.statistics import Comparison
from search.store import StudyConfig, absolute_store, check_store, is_driven, load_study_config, newest_study
from spaces.errors import ConfigError
from spaces.naming import describe_noise
from spaces.reading import as_tree, flatten
from trainable import pass_at_k
from trainable.disk.trial_folder import TrialState
from trainable.metrics import ACCURACY, DOSE, EVAL, METRICS, PASS_AT, REWARD, TRIAL_SECONDS, unit_of
from trainable.outcome import Outcome, StepReport

ARM, REPLICATE = "name of the configuration: control, a point's, c07", "from 0; the same number has the same seed"
START = f"{ACCURACY}_start"

COLUMNS: dict[str, dict[str, tuple[str, str]]] = {
    "arms": {
        "arm": ("str", ARM),
        "origin": ("str", "control, point, searcher, ablation or winner"),
        "control": ("str", "the arm that it is compared with; empty for a control"),
        "candidate": ("bool", "whether it is the candidate"),
        "status": ("str", "how its trials stand, e.g. 2 completed, 1 collapsed"),
        "rules": ("str", "rules by which trials collapsed, separated by commas"),
        "replicates": ("int64", "trials that ended with an accuracy, collapsed ones included"),
        "missing": ("int64", "trials that failed, were stopped, or are still to run"),
        "collapsed": ("int64", "trials that collapsed"),
        "measure": ("str", "what arms are compared by: accuracy, or pass@k"),
        "score": ("float64", "by the measure, at the end or the collapse; share, mean over replicates"),
        "score_start": ("float64", "the same before training"),
        ACCURACY: ("float64", "greedy, of the clean model at the end or the collapse; share, mean over replicates"),
        START: ("float64", "the same before training"),
        DOSE: (
            "float64",
            "over the size of the weights, in the loudest stage that ran; a share, mean over weights and replicates",
        ),
        "hours": ("float64", "of all its trials, in trial-slot hours, or GPU hours where trials have GPUs"),
        "mode": ("str", "precision of weights and activations, e.g. W4A4"),
        "noise": ("str", "in words"),
        "noise.modules": ("str", "where noise goes, separated by commas"),
        "noise.layers": ("str", "all, or layers, or the rule that chooses them from a scan"),
        "noise.sigma_start": ("float64", "sigma of the first noisy step, in the unit noise.scale"),
        "noise.sigma_end": ("float64", "sigma of the last noisy step"),
    },
    "trials": {
        "arm": ("str", ARM),
        "replicate": ("int64", REPLICATE),
        "seed": ("int64", "of the trial"),
        "status": ("str", "waiting, running, completed, collapsed, stopped or failed"),
        "counted": ("bool", "whether the report counts it: it ended by itself (completed, collapsed) with an accuracy"),
        "rule": ("str", "by which it collapsed, or failed"),
        "evidence": ("str", "what the rule saw by which it collapsed"),
        "reason": ("str", "why it failed"),
        "steps_done": ("int64", "steps done"),
        "alarms": ("int64", "rules that fired without ending it (collapse.mode=monitor)"),
        "hours": ("float64", "in which a process worked on it"),
        "attempts": ("int64", "processes that did"),
        "score": ("float64", "by the measure by which arms are compared; a share"),
        "score_start": ("float64", "the same before training"),
        DOSE: (
            "float64",
            "applied noise over the size of the weights; share, mean over weights in the loudest stage that ran",
        ),
    },
    "steps": {
        "arm": ("str", ARM),
        "replicate": ("int64", REPLICATE),
        "step": ("int64", "from 0"),
        "time": ("datetime64[ms, UTC]", "at its end"),
        "rule": ("str", "that fired in this step; empty where none did"),
        "evidence": ("str", "what that rule saw"),
    },
    "completions": {
        "arm": ("str", ARM),
        "replicate": ("int64", REPLICATE),
        "step": ("int64", "from 0"),
        "number": ("int64", "among those that were kept of the step, from 0"),
        "prompt": ("str", "what was asked"),
        "completion": ("str", "what the noisy policy wrote"),
        "answer": ("str", "the right one"),
        "reward": ("float64", "of the completion"),
    },
    "effects": {
        "arm": ("str", ARM),
        "replicate": ("int64", REPLICATE),
        "stage": ("int64", "of the noise schedule"),
        "step": ("int64", "the stage's first, in which this was measured"),
        "weight": ("str", "name of the noised weight"),
        "layer": ("Int64", "decoder block; missing for a weight outside of them"),
        "kind": ("str", "of module: linear, rmsnorm, ..."),
        "sigma_nominal": ("float64", "std that was asked for, in weight units"),
        "sigma_applied": ("float64", "rms change of the deployed weight, after cast and quantisation, in weight units"),
        "dose": ("float64", "the same over rms of the weight; a share"),
        "changed": ("float64", "share of its numbers that differ; of a quantised weight, of its 4-bit codes"),
    },
    "comparisons": {
        "judged_by": ("str", "sweep (screening), controls (among themselves), confirmation, programme (its own rules)"),
        "arm": ("str", ARM),
        "experiment": ("str", "of a programme, which ran as this arm; else empty"),
        "control": ("str", "what it is compared with"),
        "measure": ("str", "accuracy, or pass@k"),
        "main": ("bool", "whether by the measure that decides; pass@k is shown beside it"),
        "difference": ("float64", "arm minus control; share, mean over common seeds"),
        "low": ("float64", "lower end of its interval, corrected for arms that share the control, or for looks"),
        "high": ("float64", "upper end; below three replicates the interval is not known, whatever stands here"),
        "p": ("float64", "of no difference, two-sided, corrected alike"),
        "sd": ("float64", "std of the difference from seed to seed, the questions' part included; a share"),
        "replicates": ("int64", "pairs: seeds that both have"),
        "unpaired": ("int64", "trials whose seed the other has not; they are not looked at"),
        "needs": ("Int64", "about how many more replicates until it is decided; missing where it is, or none would do"),
        "family": ("Int64", "arms that share the control"),
        "verdict": ("str", "ahead, behind, same, undecided; better, worse of a confirmation or a programme alone"),
        "words": ("str", "the verdict as the report says it"),
        "risk_high": ("float64", "largest collapse probability of the arm that its runs do not exclude"),
        "risk_tipping": ("float64", "collapse probability that would cancel the gain; missing without a gain"),
    },
}
"""Frame -> column -> its type and what it means. Besides these there are metrics by tracked name, in `trials` (at the
end or the stop) and in `steps`, and in `arms` settings by dotted key."""
OF_ALL = ("importance", "hours")
"""Figures that are about a sweep as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Sweep:
    """A sweep, ablation, confirmation or programme, as far as it was when it was read."""

    arms: pd.DataFrame
    trials: pd.DataFrame
    """Every one that was decided on, those that have not begun included."""
    steps: pd.DataFrame
    """Of a trial that has not ended, as far as its newest checkpoint."""
    completions: pd.DataFrame
    """Those that trials kept: a few of each step."""
    effects: pd.DataFrame
    """The receipt, weight by weight, of trials that have ended."""
    comparisons: pd.DataFrame
    material: Material
    """What the page is made of."""
    running: bool

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def config(self) -> StudyConfig:
        """The study, as `study.json` holds it."""
        return self.material.config

    @property
    def report(self) -> StudyReport:
        """All that `rin report` knows, with each arm's whole configuration."""
        return self.material.report

    @property
    def answer(self) -> str:
        """Does noise help, in the sentence that the page begins with."""
        return answer_of(self.report, self.material.confirmation).sentence

    @property
    def frames(self) -> dict[str, pd.DataFrame]:
        return {name: getattr(self, name) for name in COLUMNS}

    @property
    def columns(self) -> pd.DataFrame:
        """What each column of each frame means."""
        rows = [
            (name, column, str(frame[column].dtype), meaning(name, column))
            for name, frame in self.frames.items()
            for column in frame
        ]
        return pd.DataFrame(rows, columns=["frame", "column", "type", "meaning"])

    @property
    def figures(self) -> list[str]:
        """Names of its figures."""
        return [figure.name for figure in _drawn(self.material)]

    def figure(self, name: str, arms: Iterable[str] | None = None) -> Any:
        """A figure of the page as plotly's. `arms`: only these, with their controls; verdicts and intervals stay those
        of the whole sweep. Raises ConfigError for a figure, or an arm, that there is none of.

        Example: sweep.figure("collapse-sigma-W4A4-linear", arms=sweep.arms.query("`noise.sigma_end` < 0.001").arm)
        """
        from plotly.graph_objects import Figure as Drawn

        if arms is not None and name in OF_ALL:
            raise ConfigError(f"figure {name}: is of the sweep as a whole; leave arms out")
        material = self.material if arms is None else only(self.material, list(arms))
        names = []
        for figure in _drawn(material):
            names.append(figure.name)
            if figure.name == name:
                return Drawn({"data": figure.data, "layout": {**figure.layout, **WHITE}})
        raise ConfigError(f"figure {name}: there is none of that name; there are {', '.join(names) or 'none'}")

    def __repr__(self) -> str:
        state = ", which is running: this is how far it was" if self.running else ""
        sizes = ", ".join(f"{len(frame)} {name}" for name, frame in self.frames.items())
        return f"{self.config.kind} {self.name}{state}: {sizes}"


WHITE = {"paper_bgcolor": "#ffffff", "plot_bgcolor": "#ffffff"}


def load(name: str | None = None, store: str = "runs") -> Sweep:
    """A sweep, ablation, confirmation or programme by its name; without one the newest in the store that is no
    confirmation. Raises ConfigError for one that does not exist, that is damaged, or that another version wrote."""
    place = absolute_store(store)
    check_store(place)
    config = load_study_config(place, name) if name else newest_study(place, confirmations=False)
    running = is_driven(config)
    return frames_of(read_material(config), running=running)


def frames_of(material: Material, *, running: bool = False) -> Sweep:
    return Sweep(
        arms=_frame("arms", _arm_rows(material.report)),
        trials=_frame("trials", _trial_rows(material)),
        steps=_frame("steps", _step_rows(material)),
        completions=_frame("completions", _completion_rows(material)),
        effects=_frame("effects", _effect_rows(material)),
        comparisons=_frame("comparisons", _comparison_rows(material)),
        material=material,
        running=running,
    )


def write_csv(sweep: Sweep, folder: Path) -> list[Path]:
    """A file for each frame, and columns.csv, which says what their columns mean. UTF-8 and with a head; what is
    missing is empty. Raises ConfigError for a folder that cannot be written."""
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, frame in {**sweep.frames, "columns": sweep.columns}.items():
            files.append(folder / f"{name}.csv")
            frame.to_csv(files[-1], index=False, encoding="utf-8", lineterminator="\n")
    except OSError as error:
        raise ConfigError(f"--csv {folder}: {error.strerror}; give a folder of yours") from None
    return files


# --- figures ----------------------------------------------------------------------------------------------------------


def _drawn(material: Material) -> Iterator[Figure]:
    """Those of the page, in its order, folded ones included."""
    for make in SECTIONS.values():
        section = make(material)
        for block in section.blocks if section is not None else ():
            yield from block.figures


def only(material: Material, names: Sequence[str]) -> Material:
    """Of these arms and their controls. Raises ConfigError for one that there is none of."""
    report = material.report
    rows = {row.arm: row for row in report.arms}
    if unknown := [name for name in names if name not in rows]:
        raise ConfigError(f"arms: {unknown[0]} is none of {report.config.name}; it has {', '.join(rows) or 'none'}")
    kept = {*names, *(rows[name].control for name in names)}
    return replace(
        material,
        report=replace(report, arms=tuple(row for row in report.arms if row.arm in kept), tolerance=()),
        arms=[arm for arm in material.arms if arm.name in kept],
        runs=[run for run in material.runs if run.arm in kept],
    )


# --- rows -------------------------------------------------------------------------------------------------------------


def _frame(name: str, rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Its documented columns first, of their types even where nothing is known; then metrics, then settings."""
    frame, known = pd.DataFrame(list(rows)), COLUMNS[name]
    more = [column for column in METRICS if column in frame and column not in known]
    more += sorted(column for column in frame if column not in (*known, *more))
    frame = frame.reindex(columns=[*known, *more])
    for column, (kind, _) in known.items():
        frame[column] = (frame[column].fillna("") if kind == "str" else frame[column]).astype(kind)
    metrics = [column for column in more if "/" in column]
    frame[metrics] = frame[metrics].astype("float64")
    return frame


def _arm_rows(report: StudyReport) -> Iterator[dict[str, Any]]:
    trees = [flatten(as_tree(row.config)) for row in report.arms]
    keys = {key for tree in trees for key in tree}
    differ = {key for key in keys if len({_cell(tree.get(key)) for tree in trees}) > 1}
    shown = sorted((differ | {key for key in COLUMNS["arms"] if key.startswith("noise.")}) - {"seed"})
    words = {key for key in shown if any(isinstance(_cell(tree.get(key)), str) for tree in trees)}
    for row, tree in zip(report.arms, trees, strict=True):
        cells = {key: _cell(tree.get(key)) for key in shown}
        yield {
            "arm": row.arm,
            "origin": row.origin,
            "control": row.control,
            "candidate": row.candidate,
            "status": row.status,
            "rules": ",".join(row.rules),
            "replicates": row.replicates,
            "missing": row.missing,
            "collapsed": row.collapsed,
            "measure": row.measure,
            "score": row.score,
            "score_start": row.score_start,
            ACCURACY: row.accuracy,
            START: row.start,
            DOSE: row.dose,
            "hours": row.hours,
            "mode": row.config.quant.mode,
            "noise": describe_noise(row.config),
            **{key: str(cell) if key in words and cell is not None else cell for key, cell in cells.items()},
        }


def _cell(value: Any) -> Any:
    """A setting in one cell: a list of plain values by commas, anything else that is no plain value as JSON."""
    if isinstance(value, list) and all(isinstance(one, str | int | float) for one in value):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, list | dict) else value


def _trial_rows(material: Material) -> Iterator[dict[str, Any]]:
    reports = {(run.arm, run.replicate): run.reports for run in material.runs}
    for row, arm in zip(material.report.arms, material.arms, strict=True):
        for replicate, state in enumerate(row.trials):
            seen = None if state.outcome is None else measured(state.outcome, row.measure)
            yield {
                "arm": row.arm,
                "replicate": replicate,
                "seed": material.config.seed_of(replicate),
                "status": state.status,
                "counted": replicate in arm.results and seen is not None,
                "rule": state.rule,
                "evidence": _evidence(state, reports.get((row.arm, replicate), ())),
                "reason": state.reason,
                "steps_done": state.step,
                "alarms": 0 if state.outcome is None else len(state.outcome.alarms),
                "hours": state.hours,
                "attempts": len(state.attempts),
                "score": None if seen is None else seen.share,
                "score_start": None if seen is None else seen.start,
                **({} if state.outcome is None else _ending(state.outcome)),
            }


def _evidence(state: TrialState, reports: Sequence[StepReport]) -> str:
    return reports[-1].verdict.evidence if state.status == "collapsed" and reports else ""


def _ending(outcome: Outcome) -> dict[str, float | None]:
    """By tracked name."""
    scores, samples = outcome.eval, outcome.config.eval.samples
    named = {field.name: getattr(scores, field.name) for field in fields(scores)}
    found = {f"{EVAL}{name}": value for name, value in named.items() if isinstance(value, int | float)}
    found |= {f"{EVAL}{name}": value for name, value in scores.parts.items()}
    found |= {f"{EVAL}{name}_start": value for name, value in scores.parts_start.items()}
    found |= pass_at_k.metrics(scores.right, samples)
    found |= {f"{name}_start": value for name, value in pass_at_k.metrics(scores.right_start, samples).items()}
    return {DOSE: outcome.receipt.dose, **found, TRIAL_SECONDS: outcome.seconds}


def _step_rows(material: Material) -> Iterator[dict[str, Any]]:
    for run in material.runs:
        for report in run.reports:
            yield {
                "arm": run.arm,
                "replicate": run.replicate,
                "step": report.step,
                "time": report.time_ms,
                "rule": report.verdict.rule,
                "evidence": report.verdict.evidence,
                **report.signals,
            }


def _completion_rows(material: Material) -> Iterator[dict[str, Any]]:
    for run in material.runs:
        for report in run.reports:
            for number, sample in enumerate(report.samples):
                yield {
                    "arm": run.arm,
                    "replicate": run.replicate,
                    "step": report.step,
                    "number": number,
                    "prompt": _text(sample.prompt),
                    "completion": _text(sample.completion),
                    "answer": _text(sample.answer),
                    "reward": sample.reward,
                }


def _text(text: str) -> str:
    """A model may write half of a surrogate pair, for which UTF-8 has no bytes and a frame no place: `\\ud800`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _effect_rows(material: Material) -> Iterator[dict[str, Any]]:
    for row in material.report.arms:
        for replicate, state in enumerate(row.trials):
            for effect in () if state.outcome is None else state.outcome.receipt.effects:
                yield {
                    "arm": row.arm,
                    "replicate": replicate,
                    "stage": effect.stage,
                    "step": effect.step,
                    "weight": effect.name,
                    "layer": effect.layer,
                    "kind": effect.kind,
                    "sigma_nominal": effect.nominal,
                    "sigma_applied": effect.applied,
                    "dose": effect.applied_relative,
                    "changed": effect.changed,
                }


def _comparison_rows(material: Material) -> Iterator[dict[str, Any]]:
    """What `rin report` compares, by what it compares with; of a sweep what its confirmation found, too."""
    config, report = material.config, material.report
    if config.kind == "confirm":
        assert material.confirmation is not None
        yield _confirmed(material.confirmation)
    elif config.kind == "program":
        yield from _experiments(config)
    else:
        for row in report.arms:
            yield from _screened(row)
        if material.confirmation is not None:
            yield _confirmed(material.confirmation)
        for pair in report.controls:
            apart = {"judged_by": "controls", "arm": pair.control, "control": pair.other, "measure": config.measure}
            yield {**apart, "main": True, **_compared(pair.comparison)}


def _screened(row: ArmReport) -> Iterator[dict[str, Any]]:
    """By the measure, and by pass@k where answers were sampled."""
    named = {"judged_by": "sweep", "arm": row.arm, "control": row.control}
    if row.corrected is not None and row.finding is not None:
        found = {**_compared(row.corrected), "family": row.family, **_said(row.finding, screened=True)}
        yield {**named, "measure": row.measure, "main": True, **found}
    for measure, one in row.beside.items():
        found = {**_compared(one.corrected), "family": one.family, **_said(one.finding, screened=True)}
        yield {**named, "measure": measure, "main": False, **found}


def _confirmed(state: Confirmation) -> dict[str, Any]:
    named = {"judged_by": "confirmation", "arm": state.winner, "control": state.control}
    none_yet = {"verdict": state.comparison.verdict, "words": state.comparison.words()}
    said = none_yet if state.finding is None else _said(state.finding, screened=False)
    return {**named, "measure": state.config.measure, "main": True, **_compared(state.comparison), **said}


def _experiments(config: StudyConfig) -> Iterator[dict[str, Any]]:
    """Each that has run, against its control, at the last look that both have had; one that collapsed is not compared,
    and nothing is beside a control that does."""
    for walk in read_state(config).walks.values():
        for name in walk.shown:
            entry, compared = walk.entries[name], walk.compare(name)
            named = {"judged_by": "programme", "arm": entry.arm, "experiment": name, "control": entry.control}
            assert compared is not None
            if walk.collapsed(name) or walk.without_measure(name):
                word = "collapsed" if walk.collapsed(name) else "its control collapsed"
                compared = Comparison(difference=math.nan, replicates=0)
            else:
                word = compared.words()
            found = {**_compared(compared), "verdict": word.partition(",")[0], "words": word}
            yield {**named, "measure": config.measure, "main": True, **found}


def _compared(seen: Comparison) -> dict[str, Any]:
    names = ("difference", "low", "high", "p", "sd", "replicates", "unpaired", "needs")
    return fields_of(seen, *names)


def _said(finding: Finding, *, screened: bool) -> dict[str, Any]:
    said = screening if screened else str
    return {
        "verdict": said(finding.verdict),
        "words": said(finding.words()),
        "risk_high": finding.risk_high,
        "risk_tipping": finding.tipping,
    }


# --- what columns mean ------------------------------------------------------------------------------------------------


def meaning(frame: str, column: str) -> str:
    """Of a column of a frame, a metric or a setting. Raises KeyError for one that has none."""
    if column in COLUMNS[frame]:
        return COLUMNS[frame][column][1]
    if "/" in column:
        return _metric(column)
    return "setting of a trial that differs between arms"


def _metric(name: str) -> str:
    if name in METRICS:
        return f"{METRICS[name]} ({unit_of(name)})".replace(" ()", "")
    plain, before, _ = name.partition("_start")
    when = " before step 0" if before else ""
    if numbered := re.fullmatch(rf"{PASS_AT}(\d+)(_low|_high|)", plain):
        told = METRICS[f"{PASS_AT}K{numbered[2]}"].replace("pass@K", f"pass@{numbered[1]}")
        return f"{told.replace('of K samples', f'of {numbered[1]} samples')}{when} (share)"
    if plain.startswith(f"{REWARD}/"):
        return f"mean of the task's reward function {name.removeprefix(f'{REWARD}/')}"
    if plain.startswith(EVAL):
        return f"mean of the task's reward function {plain.removeprefix(EVAL)}, of the clean model{when}"
    raise KeyError(name)

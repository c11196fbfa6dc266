"""What a trial reports and how it ended: plain records, which read and write as JSON without torch.

The sweep, its report and its views know a trial by these records alone. A status is one of six words; `stopped` and
`failed` are said of a trial that has no outcome yet and may go on, `completed` and `collapsed` are outcomes and final.

NaN rule: what was measured is kept as it was, NaN and infinities included (JSON in Python's dialect); readers decide.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, Literal

from pydantic import TypeAdapter

from spaces.config import TrialConfig
from spaces.reading import as_tree, read_config
from trainable.metrics import SIGMA, STEPS_DONE

Ending = Literal["completed", "collapsed", "stopped"]
"""completed: all steps were made; collapsed: a rule ended it; stopped: from outside, and evaluated as it left."""
Status = Literal["waiting", "running", "completed", "collapsed", "stopped", "failed"]
"""Of a trial of a sweep, whether or not it has an outcome."""
STATUSES: dict[Status, str] = {
    "waiting": "It has not begun, or waits for its turn to go on.",
    "running": "Some process works on it.",
    "completed": "All steps were made. Final.",
    "collapsed": "A collapse rule ended it: a result, with a rule, a step and evidence. Final.",
    "stopped": "Ended from outside (Ctrl-C, a spent budget, a killed process), saved; `rin resume` goes on with it.",
    "failed": "An error or the machine, and never a finding; `rin resume` tries it again.",
}


def in_step(step: int, steps: int) -> str:
    """`in step 3, the 4th of 29`: steps count from 0, and people from 1."""
    number = step + 1
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"in step {step}, the {number}{ending} of {steps}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CollapseVerdict:
    """Example: CollapseVerdict(collapsed=True, rule="entropy_high", evidence="entropy 2.56 nats, baseline 0.31, 3 steps
    in a row")."""

    collapsed: bool
    rule: str = ""
    evidence: str = ""


HEALTHY = CollapseVerdict(collapsed=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One completion, for people to read."""

    step: int
    prompt: str
    completion: str
    answer: str
    reward: float
    correct: bool | None = None
    """None of a sweep that was made before this was written down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one step did."""

    step: int
    sigma: float
    signals: Mapping[str, float]
    """By tracked name, e.g. gen/entropy; eval/accuracy in steps that evaluate."""
    verdict: CollapseVerdict
    seconds: float
    samples: tuple[Sample, ...]
    """A few completions."""
    time_ms: int
    """Unix milliseconds at its end."""

    def as_tree(self) -> dict[str, Any]:
        """Of `rin trial --json`."""
        return {name: value for name, value in asdict(self).items() if name not in ("samples", "time_ms")}

    def as_record(self) -> dict[str, Any]:
        """Flat, as it is written down and handed to Tune: metrics by tracked name, and what belongs to the step."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "time_ms": self.time_ms,
            "rule": self.verdict.rule,
            "evidence": self.verdict.evidence,
            "samples": [asdict(sample) for sample in self.samples],
            **self.signals,
            STEPS_DONE: float(self.step + 1),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "StepReport":
        """Raises KeyError or TypeError for what `as_record` did not write."""
        rule = record["rule"]
        signals = {name: float(value) for name, value in record.items() if "/" in name and name != STEPS_DONE}
        return cls(
            step=record["step"],
            sigma=signals[SIGMA],
            signals=signals,
            verdict=CollapseVerdict(collapsed=bool(rule), rule=rule, evidence=record["evidence"]),
            seconds=record["seconds"],
            samples=tuple(Sample(**sample) for sample in record["samples"]),
            time_ms=record["time_ms"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """The beginning of a trial that another trial of its sweep has computed (`prefix.py`).

    Example: Shared(trial="control-0", steps=3, seconds=2.4)
    """

    trial: str
    """Name of its folder."""
    steps: int
    """Whole steps; 0: the start alone, which is evaluated before step 0."""
    seconds: float
    """That they took there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Evaluation of the clean model at the end (or the stop) and, `_start`, before step 0; accuracies are shares of the
    questions.

    Example: Scores(accuracy=0.734, accuracy_bf16=0.81, accuracy_start=0.184, n=2048, correct=(1, 0, ...), ...)
    """

    accuracy: float
    """Greedy, in the deployed precision."""
    accuracy_bf16: float
    """Unquantised forward of the master weights, in the model's dtype."""
    parts: Mapping[str, float]
    """Mean of each reward function of the task."""
    accuracy_start: float
    accuracy_bf16_start: float
    parts_start: Mapping[str, float]
    n: int
    """Questions."""
    correct: tuple[int, ...]
    """Per question, in the fixed order of the split: 1 = right."""
    right: tuple[int, ...] = ()
    """Per question, in the same order: how many of its eval.samples samples are right (`pass_at_k.py`); empty where
    none were drawn, and of a trial that was stopped from outside."""
    right_start: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """To the questions of the evaluation, for people to read. Example: Answers(questions=("1+2=",), expected=("3",),
    given=("4",), correct=(0,))"""

    questions: tuple[str, ...]
    expected: tuple[str, ...]
    given: tuple[str, ...]
    correct: tuple[int, ...]

    def as_table(self) -> dict[str, Any]:
        """The questions that were answered wrongly first, as MLflow shows a table."""
        rows = zip(self.questions, self.expected, self.given, self.correct, strict=True)
        numbered = [[number, *row[:3], "yes" if row[3] else "no"] for number, row in enumerate(rows)]
        columns = ["number", "question", "answer", "completion", "correct"]
        return {"columns": columns, "data": sorted(numbered, key=lambda row: (row[-1] == "yes", row[0]))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What noise did to one weight in the first rollout of a stage."""

    stage: int
    """Of the schedule."""
    step: int
    """First one of the stage."""
    name: str
    """Of the weight."""
    layer: int | None
    """Its decoder block; null beside the blocks."""
    kind: str
    """As in noise.modules."""
    nominal: float
    """Sigma asked for, in weight units."""
    applied: float
    """Measured rms change of the deployed weight, after cast and quantisation."""
    applied_relative: float
    """The same over rms(W)."""
    changed: float
    """Share of weights that differ: for a quantised weight with noise before it, the share of 4-bit codes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Example: LeftOut(name="model.layers.*.mlp.gate", weights=16384, reason="MixtralTopKRouter computes with it
    itself")."""

    name: str
    """A pattern that `quant.exclude` takes."""
    weights: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """What became of the weights of the decoder blocks' matrices: weights = quantized + excluded + left."""

    weights: int = 0
    quantized: int = 0
    """Of layers whose weights or inputs are quantised."""
    excluded: int = 0
    """Named by quant.exclude or quant.skip_layers."""
    left_out: tuple[LeftOut, ...] = ()

    @property
    def left(self) -> int:
        return sum(entry.weights for entry in self.left_out)

    def as_tree(self) -> dict[str, Any]:
        return {**asdict(self), "left": self.left}


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """A setting that was taken from a scan.

    Example: Followed(setting="noise.layers", rule="srdd:top2", value=(3, 5), scan="5b0c...", fingerprint="9a1f...",
    score="relative_error", scores=(0.31, 0.29, 0.33, 0.36, ...))
    """

    setting: str
    rule: str
    """As it was given."""
    value: tuple[int | float, ...]
    """What the trial ran with, as in its configuration."""
    scan: str
    """Name of the scan: a hash of the weights, the mode and the prompts that it is of."""
    fingerprint: str
    """Of the weights that were scanned."""
    score: str
    scores: tuple[float, ...]
    """Of each layer; larger is worse."""

    def __str__(self) -> str:
        return f"{self.setting} = {list(self.value)} from {self.rule}, scan {self.scan}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectReceipt:
    """Proof of what a trial did to its weights."""

    quantized: tuple[str, ...]
    """Layers that compute in few bits."""
    coverage: Coverage
    """How much of the blocks that is, and what became of the rest."""
    adapted: tuple[str, ...]
    """Layers with an adapter beside them."""
    norms: Mapping[str, int]
    """What the model has in norms, and how often, e.g. {"rmsnorm, gain 1 + w, pre_norm": 52}."""
    arithmetic: tuple[Mapping[str, Any], ...]
    """How those layers compute, as fields of `quantization.Arithmetic`: one, unless some compute otherwise than others.
    """
    noised: tuple[str, ...]
    """Weights that got noise in some step."""
    moved: Mapping[str, float]
    """Share of the trained weights that differ from the start, as the model computes with them, of `matrices` and of
    `vectors` (gains, biases); of large tensors evenly spaced ones are looked at."""
    effects: tuple[Effect, ...]
    """What noise did, for each stage and weight."""
    warnings: tuple[str, ...]
    """What a reader should know, e.g. that in a stage no noise arrived."""
    forward: Mapping[str, Any]
    """How far training and sampling are from transformers' own forward, unquantised, as fields of `parity.Agreement`.
    """
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Who generated: backend; of vLLM also where it ran, GiB of its key/value cache, those that the batch would need,
    and how it slept. Empty in what an earlier version wrote."""
    followed: tuple[Followed, ...] = ()
    """Settings that were taken from a scan."""

    @property
    def dose(self) -> float | None:
        """Applied noise over the size of the weights, mean over weights, in the loudest stage that ran; None without
        noise. Not the mean over stages: a run that collapsed in the first of them would stand higher than one that held
        the same noise and went on to the quiet ones. NaN where an effect is."""
        stages: dict[int, list[float]] = defaultdict(list)
        for effect in self.effects:
            stages[effect.stage].append(effect.applied_relative)
        doses = [fmean(applied) for applied in stages.values()]
        return max(doses, key=lambda dose: math.inf if math.isnan(dose) else dose) if doses else None

    def as_tree(self) -> dict[str, Any]:
        return {**asdict(self), "coverage": self.coverage.as_tree()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A rule that fired without stopping the trial (collapse.mode=monitor)."""

    step: int
    rule: str
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a trial ended."""

    outcome: Ending
    rule: str
    """Of the collapse; empty otherwise."""
    step: int
    """Steps done."""
    eval: Scores
    receipt: EffectReceipt
    alarms: tuple[Alarm, ...]
    config: TrialConfig
    """As it ran, with the thread count that was in force."""
    seconds: float

    @property
    def collapsed(self) -> bool:
        return self.outcome == "collapsed"

    def as_tree(self) -> dict[str, Any]:
        return {**asdict(self), "receipt": self.receipt.as_tree(), "config": as_tree(self.config)}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> "Outcome":
        """Raises KeyError, TypeError or ValueError for what `as_tree` did not write."""
        return _OUTCOME.validate_python({**tree, "config": read_config(tree["config"])})


_OUTCOME = TypeAdapter(Outcome)

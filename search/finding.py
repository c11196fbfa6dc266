"""What accuracies and collapses say together: the verdict in two parts.

**Why the accuracies alone do not do.** An arm that collapses in one run of ten may show five runs without a collapse
(59 % of all times), and these are ahead of the control by what the collapses cost: the t interval of five good runs
knows nothing of the sixth. Simulated with a true mean difference of 0, collapses of 5 to 20 % and drops of 30 points,
`better` from accuracies alone was false in 33 to 44 %, and no false one had a collapse among its runs. No interval of
what was seen mends that. So a gain is told with the collapse risk that its runs do not exclude.

**The bound**: the upper end of the exact 95 % interval (Clopper & Pearson 1934) of the arm's collapse probability; 17 %
for none in 20. Several arms share one error: each has its part (Bonferroni).

**The tipping point**: the collapse risk p at which the gain is gone,

    (1 - p) held + p collapsed = control        p = (held - control) / (held - collapsed)

with the mean accuracies of the arm's runs that held and of all control runs, and of a collapsed run the lowest accuracy
that any has shown, in the sweep or its confirmation. Where none has been seen, nobody knows what one costs, and it
counts as worth nothing at all: 0.

`better` is said where the bound lies below the tipping point. Elsewhere the accuracies have shown a gain *where it
holds*, and the words say which risk is not excluded. `same` is treated alike: the point where the arm falls out of the
margin. `worse` is told as it is: collapses of the arm that were not seen would only make it worse.

A decision at a look stands, and runs of the same round may collapse after it. Where collapses as often as *seen* would
cancel the gain, the words say that, and not only that a risk is not excluded. And *where it holds* needs runs that
held: without one of the arm there is no gain, without one of both there is no `same`. That is undecided.

What this keeps to is counted in docs/calibration.md: false `better` in worlds with rare collapses and with skewed
differences, and what it costs in power. Left out: an assumption about what a collapse costs at most (the accuracy
before training, say), which would buy power with what nobody has seen.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from scipy import special

from search.power import MAX_REPLICATES
from search.replicates import Replicate
from search.statistics import Comparison

FindingVerdict = Literal["better", "better where it holds", "same", "same where it holds", "worse", "undecided"]
VERDICTS: dict[FindingVerdict, str] = {
    "better": "The interval lies above 0, and the collapse risk that would cancel the gain is excluded.",
    "better where it holds": "The interval lies above 0; a collapse risk that would cancel the gain is not excluded.",
    "same": "The whole interval lies within the margin (1 point), and no collapse risk takes the arm out of it.",
    "same where it holds": "The interval lies within the margin; a collapse risk that matters is not excluded.",
    "worse": "The interval lies below 0.",
    "undecided": "None of these, fewer than three pairs of runs, or none that held; it says why, or how many more.",
}
LEVEL = 0.05
"""Of the exact interval, both sides: its upper end is exceeded in 2.5 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Example: Finding(verdict="better where it holds", accuracies=Comparison(verdict="better", ...), collapsed=0,
    runs=20, risk_high=0.168, tipping=0.046, worth=0.0, worth_seen=False, needs=58)."""

    verdict: FindingVerdict
    accuracies: Comparison
    """What the accuracies alone say."""
    collapsed: int
    runs: int
    risk_high: float
    """The largest collapse probability of the arm that its runs do not exclude."""
    tipping: float | None
    """The collapse probability that would cancel the gain, or take the arm out of the margin where it is the same; None
    without a gain, and without a run that held."""
    worth: float
    """Accuracy that a collapsed run is taken to have: the lowest that any has shown, else 0."""
    worth_seen: bool
    needs: int | None
    """How many more replicates without a collapse would bring the bound below the tipping point; None where it is, and
    where no number would do."""
    unheld: str = ""
    """Why it is undecided though the accuracies are not: whose runs all collapsed."""

    @property
    def qualified(self) -> bool:
        return self.verdict in ("better where it holds", "same where it holds")

    @property
    def cancelled(self) -> bool:
        """Collapses as often as seen would cancel it."""
        return self.qualified and self.tipping is not None and self.collapsed / self.runs >= self.tipping

    @property
    def caveat(self) -> str:
        """Of a verdict `where it holds`; empty elsewhere."""
        if self.cancelled:
            return f"collapses as often as seen ({self.collapsed} of {self.runs} runs) would {self._gone}"
        return f"a collapse risk up to {percent(self.risk_high)} is not excluded" if self.qualified else ""

    @property
    def _gone(self) -> str:
        return "cancel the gain" if self.accuracies.verdict == "better" else "take it out of the margin"

    def settled(self, last: int) -> bool:
        """No look up to that many replicates could change what is said: the accuracies are decided, and the collapse
        risk is excluded or will not be by then."""
        if self.verdict != "better where it holds":
            return self.verdict != "undecided"
        return self.needs is None or self.runs + self.needs > last

    def words(self) -> str:
        """Example: `better where it holds; a collapse risk up to 17 % is not excluded`."""
        if self.unheld:
            return f"undecided: {self.unheld}"
        said = self.accuracies.words()
        return f"{said} where it holds; {self.caveat}" if self.qualified else said

    def risk_words(self) -> str:
        """Bound, tipping point and what it would take; empty where nothing hangs on it."""
        if self.verdict in ("worse", "undecided") or self.tipping is None:
            return ""
        worth = (
            f"worth {percent(self.worth)} (the lowest accuracy of one that was seen)"
            if self.worth_seen
            else "worth nothing (none was seen, so what one costs is not known)"
        )
        more = "" if self.needs is None else f"; {self.needs} more replicates without a collapse would exclude that"
        return (
            f"collapse risk: {self.collapsed} of {self.runs} runs, up to {percent(self.risk_high)} is not excluded; "
            f"{percent(self.tipping)} would {self._gone} if a collapsed run is {worth}{more}"
        )


def find(
    accuracies: Comparison,
    treated: Sequence[Replicate],
    control: Sequence[Replicate],
    *,
    collapsed_elsewhere: float | None = None,
    arms: int = 1,
) -> Finding:
    """The verdict of accuracies, joined with the collapse risk of the arm.

    `treated`, `control`: the runs behind it, at least one of each. `collapsed_elsewhere`: the lowest accuracy of a
    collapsed run of the same sweep. `arms`: how many are compared with the control; `better` is to be false for any of
    them with the level that one would have.
    """
    collapsed, runs = sum(run.collapsed for run in treated), len(treated)
    seen = [worth for worth in (lowest_collapsed([*treated, *control]), collapsed_elsewhere) if worth is not None]
    worth = min(seen, default=0.0)
    held = [run.accuracy for run in treated if not run.collapsed]
    slack = accuracies.margin if accuracies.verdict == "same" else 0.0
    tipping = _tipping(fmean(held), fmean(run.accuracy for run in control) - slack, worth) if held else None
    level = LEVEL / arms
    bound = risk_bound(collapsed, runs, level)
    excluded = tipping is not None and bound < tipping
    unheld = _unheld(accuracies, treated, control)
    verdict: FindingVerdict = "undecided" if unheld else accuracies.verdict
    if not excluded and verdict == "better":
        verdict = "better where it holds"
    elif not excluded and verdict == "same":
        verdict = "same where it holds"
    return Finding(
        verdict=verdict,
        accuracies=accuracies,
        collapsed=collapsed,
        runs=runs,
        risk_high=bound,
        tipping=tipping,
        worth=worth,
        worth_seen=bool(seen),
        needs=_needs(collapsed, runs, level, tipping) if "where" in verdict and tipping is not None else None,
        unheld=unheld,
    )


def lowest_collapsed(runs: Iterable[Replicate]) -> float | None:
    """Accuracy of the collapsed run that was left with the least; None where none collapsed."""
    return min((run.accuracy for run in runs if run.collapsed), default=None)


def risk_bound(collapsed: int, runs: int, level: float = LEVEL) -> float:
    """Upper end of the exact two-sided interval: the largest probability at which so few collapses are not too rare."""
    return 1.0 if collapsed >= runs else float(special.betaincinv(collapsed + 1, runs - collapsed, 1 - level / 2))


def percent(share: float) -> str:
    """Two digits: `17 %`, `4.6 %`."""
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"


def _unheld(accuracies: Comparison, treated: Sequence[Replicate], control: Sequence[Replicate]) -> str:
    """What is said of accuracies that are better or the same where nothing held; empty elsewhere."""
    arm, plain = (all(run.collapsed for run in runs) for runs in (treated, control))
    if accuracies.verdict == "same" and arm and plain:
        return "no run held, neither of it nor of its control"
    if accuracies.verdict in ("better", "same") and arm:
        return "no run of it held"
    return "no run of its control held" if accuracies.verdict == "same" and plain else ""


def _tipping(held: float, control: float, worth: float) -> float | None:
    """None without a gain; 1 where a collapsed run is worth no less than the control."""
    if held <= control:
        return None
    return min(1.0, (held - control) / (held - worth)) if held > worth else 1.0


def _needs(collapsed: int, runs: int, level: float, tipping: float) -> int | None:
    if risk_bound(collapsed, MAX_REPLICATES, level) >= tipping:
        return None
    enough = bisect_left(range(MAX_REPLICATES), True, lo=runs, key=lambda n: risk_bound(collapsed, n, level) < tipping)
    return enough - runs

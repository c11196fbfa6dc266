"""What follows a sweep by itself: the confirmation of its candidate.

A sweep's own runs cannot say that noise helps: its candidate was chosen and judged on the same questions. So a sweep
that is asked for as it is by default does not end there. `study.json` says up to how many pairs its candidate is
confirmed (`confirm_pairs`), and whoever drives the sweep to its end goes on with that: `rin sweep`, `rin resume` after
an interruption in either part, a cluster's job. Nothing else is written down: the confirmation is the study
NAME-confirm, as `rin confirm NAME` begins and reads it, planned with all of its looks. Here it pauses at the last look
within those pairs, and `rin confirm NAME` takes the looks that are left: the error level is that of the one plan,
whoever runs its parts.

One budget holds for both parts. Where a confirmation could not say anything there is none, and why is said: trials are
missing, nothing held, the budget is spent, the control itself collapsed, beside which nothing helps or hurts, it has
one of an earlier candidate, from before it was extended, or one of another sweep has the name.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from search.arms import Arm, Candidate, candidate_of, read_arms, replicates_of, unfinished
from search.confirm import Confirmation, confirm_command, confirmation_of, in_its_place
from search.ledger import read_ledger
from search.store import StudyConfig, confirmation_name, is_driven
from spaces.errors import NoCandidate

SHORT_SECONDS = 120.0
"""A trial that takes no longer is short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowUp:
    """Example: FollowUp(candidate=Candidate(...), arm=None, taken=False, budget_hours=None, why_not="")"""

    candidate: Candidate | None
    arm: str | None
    """Of the confirmation: the candidate's name where NAME-confirm-ARM is its own, which somebody began."""
    taken: bool
    """Whether all looks that it takes by itself are behind."""
    budget_hours: float | None
    """What is left of the sweep's; None without one."""
    why_not: str
    """Empty where the candidate is confirmed now."""

    @property
    def stepwise(self) -> bool:
        """Whether it is worth to stop at each look: where trials are short, starting their processes again takes longer
        than the pairs that a decision would save."""
        assert self.candidate is not None
        outcomes = (*self.candidate.arm.results.values(), *self.candidate.control.results.values())
        return max(outcome.seconds for outcome in outcomes) > SHORT_SECONDS


def follow_up(config: StudyConfig, arms: Sequence[Arm]) -> FollowUp | None:
    """Of a sweep that nobody runs; None where none was asked for."""
    if not config.confirm_pairs:
        return None
    if unfinished(config, arms):
        return _none("trials of the sweep are missing")
    try:
        candidate = candidate_of(config, arms)
    except NoCandidate:
        return _none("no configuration with noise has completed all its replicates")
    if all(run.collapsed for run in replicates_of(config, candidate.control)):
        control = candidate.control.name
        return _none(
            f"{control} itself collapsed, and beside a control that does not hold noise neither helps nor hurts"
        )
    state = confirmation_of(config)
    if state is not None and state.winner != candidate.arm.name:  # the sweep was extended since
        return _none(
            f"{state.config.name} confirms {state.winner}, which was the candidate when it began; now it is "
            f"{candidate.arm.name}: {confirm_command(config, candidate.arm.name)}"
        )
    if state is None and (why := in_its_place(config)):
        return _none(why)
    arm = None if state is None or state.config.name == confirmation_name(config.name) else candidate.arm.name
    left = None if config.budget_hours is None else config.budget_hours - read_ledger(config, arms).hours
    if state is not None and state.taken(config.confirm_pairs):  # whatever it cost
        return FollowUp(candidate=candidate, arm=arm, taken=True, budget_hours=None, why_not="")
    if left is not None and left <= 0:
        return _none(f"the budget of {config.budget_hours:g} hours is spent")
    if state is not None and _has_spent(state, left):
        larger = config.go_on if left is not None else state.config.go_on
        return _none(f"the budget of {state.config.name} is spent; with a larger one: {larger} --budget HOURS")
    return FollowUp(candidate=candidate, arm=arm, taken=False, budget_hours=left, why_not="")


def second_part(config: StudyConfig, arms: Sequence[Arm]) -> str:
    """What is to be done about the confirmation of a sweep that nobody runs; empty where nothing is."""
    follow = follow_up(config, arms)
    if follow is None or follow.candidate is None:
        return ""
    state = confirmation_of(config)
    if state is not None and is_driven(state.config):
        return f"its candidate is being confirmed: rin status {state.config.name}"
    if state is not None and state.taken(config.confirm_pairs):
        left = "a later look of its confirmation is not finished; go on: "
        return f"{left}{state.config.go_on}" if state.unfinished else ""
    return f"its candidate is not confirmed yet; go on: {config.go_on}"


def _has_spent(state: Confirmation, left: float | None) -> bool:
    """What is left of the sweep's budget; without one, its own."""
    limit = state.config.budget_hours if left is None else left
    return limit is not None and read_ledger(state.config, read_arms(state.config)).hours >= limit


def _none(why: str) -> FollowUp:
    return FollowUp(candidate=None, arm=None, taken=False, budget_hours=None, why_not=why)

"""What ends a trial without an outcome, and is neither its model's doing nor the user's mistake nor a bug."""


class TrialFailed(Exception):
    """The trial cannot go on, and not because of its model: neither a collapse nor a bug. Its rule says what broke."""

    def __init__(self, rule: str, reason: str) -> None:
        assert rule in FAILURES, rule
        super().__init__(rule, reason)  # as Ray needs it to carry it to the driver
        self.rule, self.reason = rule, reason

    def __str__(self) -> str:
        return f"{self.rule}: {self.reason}"


FAILURES: dict[str, str] = {
    "hang": "A rollout, update, evaluation or loading took longer than `hang_seconds`, again and again.",
    "engine": "The engine that generates (vLLM) did not start, or died twice.",
    "rollout_mismatch": "The engine that generates does not compute what training computes.",
    "reward": "The process of a reward died, or was too late, twice.",
    "ranks": "One of the processes that compute the trial together (`parallel.ranks`) died, or was too late.",
}
"""What a trial can fail by besides an error: its rule, and what that means."""

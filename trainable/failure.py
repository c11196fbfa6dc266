"""What ends a trial without an outcome, and is neither its model's doing nor the user's mistake nor a bug."""


class TrialFailed(Exception):
    """The trial cannot go on, and not because of its model: neither a collapse nor a bug. Its rule says what broke."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(rule, reason)  # as Ray needs it to carry it to the driver
        self.rule, self.reason = rule, reason

    def __str__(self) -> str:
        return f"{self.rule}: {self.reason}"

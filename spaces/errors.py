"""The user's mistake, apart from everything that takes time to import: `rin --help` needs it and nothing else."""


class ConfigError(ValueError):
    """The user's mistake, in one line (whatever the value looked like): the key, the value and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class NoCandidate(Exception):
    """No configuration with noise completed all its replicates: nothing to confirm, take apart or take home. One line;
    exit code 1."""

"""What a rollout leaves behind: completions, judged completions, groups of them, and what a filter kept of the groups.

Records alone, without torch: whoever generates (our own modules, vLLM, a child process) makes completions, and whoever
learns, measures or judges reads episodes; neither needs to know the other, nor the method that learns from them.
"""

from dataclasses import dataclass

from trainable.tasks.task import Question, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What was sampled for one prompt; the end token, where it came, is the last id."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]
    """Log-prob of each id under the sampling distribution, in nats."""
    entropy: float
    """Mean entropy of that distribution over the completion, in nats per token."""
    finished: bool
    """Ended by the end token, not by the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One completion of one question, judged.

    Example: Episode(question=Question(prompt="12+3=", answer="15"), prompt_ids=(3, 4, 12, 5, 14), text="15", ...)
    """

    question: Question
    prompt_ids: tuple[int, ...]
    completion: Completion
    text: str
    score: Score


Group = tuple[Episode, ...]
"""All completions of one question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterOutcome:
    """What the filter made of all batches of a step so far."""

    groups: tuple[Group, ...]
    """To be trained on, at most `wanted`."""
    generated: int
    all_wrong: int
    """Groups without variance whose answers are all wrong."""
    all_right: int
    enough: bool
    """Whether the policy is content (otherwise: sample another batch, or give up)."""

    @property
    def rejected_as_wrong(self) -> bool:
        """Too few groups, and mostly because nothing was right: generation has collapsed. The opposite is success."""
        return not self.enough and self.all_wrong >= self.all_right

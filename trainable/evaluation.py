"""How good the clean model is: greedy answers to a fixed set of questions, and sampled ones for pass@k.

Always without noise (the product's earlier cousins left it on), always on the same questions for every arm and seed, so
that two checkpoints can be compared question by question. `accuracy` is in the deployed precision, `accuracy_bf16` is
the unquantised forward of the master weights in the model's dtype. Samples (`eval.samples`) are drawn in the deployed
precision at the rollout's temperature, from a generator of their own: no other number of a trial hangs on them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from spaces.config import TrialConfig
from trainable.engines.backend import Backend, TorchBackend
from trainable.engines.engine import Request
from trainable.episode import Group
from trainable.policy.policy import Policy, deployed
from trainable.rollout import encode_prompts, judge
from trainable.signals import mean_parts
from trainable.tasks.task import Question, Score, Task
from trainable.team import Team


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Example: Evaluation(correct=(1, 0, 1), parts={"strict": 0.67, "flexible": 1.0}).accuracy == 2 / 3."""

    correct: tuple[int, ...]
    """Per question, in the fixed order of the split: 1 = right."""
    parts: dict[str, float]
    """Mean of each of the task's marks, e.g. strict and flexible extraction, over the answers that have it."""
    right: tuple[int, ...] = ()
    """Per question: how many of its samples are right; empty where none were drawn."""
    answers: tuple[str, ...] = ()
    """Per question what was said; not kept of an evaluation that training goes on from."""

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)


def evaluate(
    policy: Policy,
    task: Task,
    questions: list[Question],
    config: TrialConfig,
    backend: Backend | None = None,
    team: Team | None = None,
) -> Evaluation:
    """Greedy answers in the deployed precision, by the policy's own modules where no backend is given, and by one
    process where no team is."""

    backend = backend or TorchBackend()

    def answered(share: range) -> list[tuple[Score, str]]:
        arguments = (policy, task, questions[share.start : share.stop], config, backend)
        return [(group[0].score, group[0].text) for group in _answers(*arguments, answers=1, temperature=0.0)]

    team = team or Team(0, 1, config.parallel.ranks)
    with _asked(policy, backend):
        answers = team.share_out("evaluation", len(questions), answered)
    scores = [score for score, _ in answers]
    return Evaluation(
        correct=tuple(int(score.correct) for score in scores),
        parts=mean_parts(scores),
        answers=tuple(text for _, text in answers),
    )


def count_right(
    policy: Policy,
    task: Task,
    questions: list[Question],
    config: TrialConfig,
    backend: Backend,
    team: Team,
    *,
    step: int,
    on_part: Callable[[], None],
) -> tuple[int, ...]:
    """Per question: how many of `eval.samples` sampled answers are right. `step`: steps done, which name the draw.
    `on_part` hears each `eval.batch_size` answers begin: all of them may take longer than a hang is waited for."""
    samples, temperature, shared = config.eval.samples, config.rollout.temperature, config.parallel.ranks > 1
    at_once = max(1, config.eval.batch_size // samples)

    def counted(share: range) -> list[int]:
        counts: list[int] = []
        for start in share[::at_once]:  # what is sampled is counted and forgotten
            on_part()
            part = questions[start : min(start + at_once, share.stop)]
            draw, first = ("pass@k", config.seed, step, *(() if shared else (start,))), start if shared else 0
            arguments = (policy, task, part, config, backend)
            groups = _answers(*arguments, answers=samples, temperature=temperature, draw=draw, first=first)
            counts += [sum(episode.score.correct for episode in group) for group in groups]
        return counts

    with _asked(policy, backend):
        return tuple(team.share_out("pass@k", len(questions), counted))


@contextmanager
def _asked(policy: Policy, backend: Backend) -> Iterator[None]:
    """All that is asked inside is asked of the clean model; processes that share it out come and leave together."""
    with deployed(policy):
        backend.sync(policy)
        yield


def _answers(
    policy: Policy,
    task: Task,
    questions: list[Question],
    config: TrialConfig,
    backend: Backend,
    *,
    answers: int,
    temperature: float,
    draw: Sequence[object] = (),
    first: int = 0,
) -> list[Group]:
    """Judged answers, inside `_asked`."""
    prompts = encode_prompts(policy, questions, config.task, config.rollout.max_prompt_tokens)
    request = Request(
        prompts=prompts,
        group_size=answers,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=temperature,
        batch_size=config.eval.batch_size,
        draw=draw,
        first=first,
        each_token=config.parallel.ranks > 1,
    )
    return judge(policy, task, questions, prompts, backend.generate(policy, request))

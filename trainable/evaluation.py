"""How good the clean model is: greedy answers to a fixed set of questions.

Always without noise (the product's earlier cousins left it on), always on the same questions for every arm and seed, so
that two checkpoints can be compared question by question. `accuracy` is in the deployed precision, `accuracy_bf16` is
the unquantised forward of the master weights in the model's dtype.
"""

from dataclasses import dataclass

from spaces.config import TrialConfig
from trainable.engines.backend import Backend, TorchBackend
from trainable.engines.engine import Request
from trainable.policy.policy import Policy, deployed
from trainable.rollout import encode_prompts, judge
from trainable.signals import mean_parts
from trainable.tasks.task import Question, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Example: Evaluation(correct=(1, 0, 1), parts={"strict": 0.67, "flexible": 1.0}).accuracy == 2 / 3."""

    correct: tuple[int, ...]
    """Per question, in the fixed order of the split: 1 = right."""
    parts: dict[str, float]
    """Mean of each of the task's marks, e.g. strict and flexible extraction, over the answers that have it."""

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)


def evaluate(
    policy: Policy, task: Task, questions: list[Question], config: TrialConfig, backend: Backend | None = None
) -> Evaluation:
    """Greedy answers in the deployed precision, by the policy's own modules where no backend is given."""
    backend = backend or TorchBackend()
    prompts = encode_prompts(policy, questions, config.task, config.rollout.max_prompt_tokens)
    greedy = Request(
        prompts=prompts,
        group_size=1,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=0.0,
        batch_size=config.eval.batch_size,
    )
    with deployed(policy):
        backend.sync(policy)
        groups = backend.generate(policy, greedy)
    judged = judge(policy, task, questions, prompts, groups)
    scores = [group[0].score for group in judged]
    return Evaluation(
        correct=tuple(int(score.correct) for score in scores),
        parts=mean_parts(scores),
    )

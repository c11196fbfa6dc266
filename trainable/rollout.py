"""From questions to completions: sampling with the modules that are trained.

The policy generates with its own QuantLinear layers, so rollout and training share one arithmetic: same format, same
scale rule, same position ids on left-padded batches. Each prompt is prefilled once for its whole group; the key/value
cache is then repeated. Sampled log-probs are taken at the sampling temperature from the distribution that was really
sampled from (the noisy one), which is what an importance weight needs in its denominator. No top-k or top-p: truncation
would bias that ratio.

Shapes: P = prompts, G = completions per prompt, B = P * G, L = prompt tokens (left-padded), T = completion tokens, V =
vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from random import Random
from typing import Any

import torch

from spaces.config import ConfigError, TaskConfig
from trainable.engines.engine import Request
from trainable.episode import Completion, Episode, Group
from trainable.forward.decoder import decoder
from trainable.forward.transformer import left_padded
from trainable.philox import key_of, uniforms_at
from trainable.policy.policy import Policy
from trainable.prompts import is_templated, prompt_text
from trainable.seeds import generator
from trainable.tasks.task import Answer, FiniteTask, ProceduralTask, Question, Split, Task

_WORTH_RETIRING = 0.25
"""Share of the rows in work that have ended, from which it pays to copy the cache of the others."""


def encode_prompts(policy: Policy, questions: Sequence[Question], task: TaskConfig, limit: int) -> list[list[int]]:
    """Token ids per prompt. Raises ConfigError for one longer than `limit` tokens."""
    encoded = _encode(policy, questions, task)
    longest, question = max(zip(map(len, encoded), questions, strict=True), key=lambda pair: pair[0])
    if longest > limit:
        raise ConfigError(
            f"rollout.max_prompt_tokens={limit}: the prompt of {question.name} has {longest} "
            f"tokens; raise it to at least that, or set task.too_long=leave_out"
        )
    return encoded


@dataclass(slots=True)
class TooLong:
    """How many questions were left out since it was last asked."""

    count: int = 0

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


def without_too_long(policy: Policy, task: Task, config: TaskConfig, limit: int, left_out: TooLong) -> Task:
    """The task without questions whose prompts are longer than `limit` tokens: of a data set they go now, of an endless
    one as they are drawn."""

    def fitting(questions: Sequence[Question]) -> list[Question]:
        fit = [
            question
            for some in in_chunks(questions)
            for question, ids in zip(some, _encode(policy, some, config), strict=True)
            if len(ids) <= limit
        ]
        left_out.count += len(questions) - len(fit)
        return fit

    if isinstance(task, FiniteTask):
        return replace(task, questions={split: fitting(questions) for split, questions in task.questions.items()})
    assert isinstance(task, ProceduralTask), task
    drawn = task.draws

    def draws(rng: Random, split: Split) -> Iterator[Question | None]:
        for question in drawn(rng, split):
            yield question if question is not None and fitting([question]) else None

    return replace(task, draws=draws)


def in_chunks(questions: Sequence[Question], size: int = 1024) -> Iterator[Sequence[Question]]:
    """The tokens of a whole data set would take many times its own memory."""
    return (questions[start : start + size] for start in range(0, len(questions), size))


def _encode(policy: Policy, questions: Sequence[Question], task: TaskConfig) -> list[list[int]]:
    """Raises ConfigError for a token that the model has no embedding of."""
    tokenizer: Any = policy.tokenizer
    encoded: list[list[int]] = [[]] * len(questions)
    for templated in (False, True):  # a template writes special tokens itself
        rows = [row for row, question in enumerate(questions) if is_templated(question, task) == templated]
        texts = [prompt_text(tokenizer, questions[row], task) for row in rows]
        if rows:
            ids = tokenizer(texts, add_special_tokens=not templated)["input_ids"]
            for row, one in zip(rows, ids, strict=True):
                encoded[row] = one
    for row, ids in enumerate(encoded):
        if ids[:2] == [tokenizer.bos_token_id] * 2:  # the prompt was written with one, and the tokenizer adds one
            encoded[row] = ids[1:]
    known, last = policy.network.get_input_embeddings().num_embeddings, max(max(ids, default=0) for ids in encoded)
    if last >= known:
        raise ConfigError(
            f"task.chat={str(task.chat).lower()}: a prompt has {tokenizer.convert_ids_to_tokens(last)} (token {last}), "
            f"and the model embeddings for {known} tokens; give the tokenizer of this model"
        )
    return encoded


@torch.no_grad()
def generate(policy: Policy, request: Request) -> list[list[Completion]]:
    """`group_size` completions for each prompt. Call it inside `deployed`."""
    drawn = request.temperature > 0
    source = generator(*request.draw, device=policy.device) if drawn and not request.each_token else None
    at_once = max(1, request.batch_size // request.group_size)
    groups: list[list[Completion]] = []
    for start in range(0, len(request.prompts), at_once):
        prompts = request.prompts[start : start + at_once]
        own = draws(request, start, len(prompts), policy.device) if drawn and request.each_token else None
        groups += _generate_chunk(policy, request, prompts, source, own)
    return groups


def draws(request: Request, start: int, prompts: int, device: torch.device) -> torch.Tensor:
    """For so many prompts from number `start` of the request on: each token's own number, uniform on (0, 1), by the
    places of prompt, completion and token among all that are sampled under that name. -> [B, T], fp64 with 46 random
    bits: of the 23 of one number, some tokens of a large vocabulary would have too few."""
    key = key_of(*request.draw)
    prompt = torch.arange(request.first + start, request.first + start + prompts, device=device)[:, None, None]
    completion = torch.arange(request.group_size, device=device)[:, None]
    place = (prompt, completion, torch.arange(request.max_new_tokens, device=device))
    coarse, fine = (uniforms_at(key, *place, part).double() for part in range(2))
    return (coarse + (fine - 0.5) * 2.0**-23).view(-1, request.max_new_tokens)


def _generate_chunk(
    policy: Policy,
    request: Request,
    prompts: Sequence[Sequence[int]],
    source: torch.Generator | None,
    own: torch.Tensor | None,
) -> list[list[Completion]]:
    """`source` for all tokens, or `own` [B, T] numbers of each; neither: greedy."""
    longest = request.max_new_tokens
    ends = torch.tensor(policy.ends, device=policy.device)
    ids, mask = left_padded(prompts, policy.tokenizer.pad_token_id, policy.device)  # [P, L]
    forward = decoder(policy, longest)
    logits = forward.prefill(ids, mask, request.group_size)  # [B, V]
    rows = torch.arange(len(logits), device=policy.device)  # the completions in work
    tokens = torch.full((len(logits), longest), policy.ends[0], device=policy.device)  # [B, T] each
    logps, entropies = torch.zeros_like(tokens, dtype=torch.float32), torch.zeros_like(tokens, dtype=torch.float32)
    ended = torch.zeros_like(rows, dtype=torch.bool)
    for column in range(longest):
        token, logp, entropy = sample(logits, request.temperature, source if own is None else own[rows, column])
        tokens[rows, column], logps[rows, column], entropies[rows, column] = token, logp, entropy
        ended |= torch.isin(token, ends)
        going = (~ended).nonzero()[:, 0]
        if len(going) == 0 or column + 1 == longest:
            break
        if len(going) <= (1 - _WORTH_RETIRING) * len(rows):
            forward.keep(going)
            rows, token, ended = rows[going], token[going], ended[going]
        logits = forward.step(token)
    return _completions(tokens, logps, entropies, ends, request.group_size)


def sample(
    logits: torch.Tensor, temperature: float, source: torch.Generator | torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token, its log-prob and the entropy of the distribution, [B] each, from logits [B, V]; computed in fp32.
    `source`: a generator, or a number on (0, 1) for each row, [B].

    A row of logits that is not finite gives some token, and NaN as log-prob and entropy: the signals then say
    `nonfinite`.
    """
    distribution = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)  # [B, V]
    probability = distribution.exp()
    entropy = -(probability * distribution.clamp(min=-1e30)).sum(-1)
    if temperature == 0:
        token = distribution.argmax(-1)
    elif isinstance(source, torch.Tensor):
        token = _where(probability.nan_to_num(nan=1.0), source)
    else:
        token = torch.multinomial(probability.nan_to_num(nan=1.0), 1, generator=source)[:, 0]
    return token, distribution.gather(-1, token[:, None])[:, 0], entropy


def _where(probability: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token [B] whose part of the sum over [B, V] holds that share of it; none of probability 0. In fp64: a sum of
    150,000 terms in fp32 would lose the rare ones."""
    below = probability.double().cumsum(-1)  # [B, V]
    token = torch.searchsorted(below, uniform[:, None] * below[:, -1:], right=True)[:, 0]
    return token.clamp(max=probability.shape[1] - 1)


def _completions(
    tokens: torch.Tensor, logps: torch.Tensor, entropies: torch.Tensor, ends: torch.Tensor, group_size: int
) -> list[list[Completion]]:
    """Cut rows [B, T] behind their first end token and gather them in groups."""
    is_end = torch.isin(tokens, ends)
    lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, tokens.shape[1]).tolist()
    finished = is_end.any(1).tolist()
    rows = zip(tokens.tolist(), logps.tolist(), entropies.tolist(), lengths, finished, strict=True)
    flat = [
        Completion(ids=tuple(t[:n]), logps=tuple(p[:n]), entropy=sum(h[:n]) / n, finished=ended)
        for t, p, h, n, ended in rows
    ]
    return [flat[i : i + group_size] for i in range(0, len(flat), group_size)]


def judge(
    policy: Policy,
    task: Task,
    questions: Sequence[Question],
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Completion]],
) -> list[Group]:
    """Decode and score, all completions at once. What a reward raises propagates."""
    decode: Callable[..., list[str]] = policy.tokenizer.batch_decode
    asked = [question for question, group in zip(questions, groups, strict=True) for _ in group]
    completions = [completion for group in groups for completion in group]
    texts = decode([completion.ids for completion in completions], skip_special_tokens=True)
    answers = [
        Answer(question=question, text=text, ids=completion.ids)
        for question, text, completion in zip(asked, texts, completions, strict=True)
    ]
    rows = iter(zip(answers, completions, task.scores(answers), strict=True))
    return [
        tuple(
            Episode(
                question=answer.question,
                prompt_ids=tuple(prompt),
                completion=completion,
                text=answer.text,
                score=score,
            )
            for answer, completion, score in islice(rows, len(group))
        )
        for prompt, group in zip(prompts, groups, strict=True)
    ]

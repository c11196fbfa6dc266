"""One trial: GRPO with 4-bit linear layers and noise in the rollouts. Read this first.

    at load         numbers in the place of what is to be taken from a scan of the model (`following.py`);
                    prove that training and sampling compute the model that transformers computes
    before step 0   evaluate; sample a noise-free rollout as baseline of the collapse rules (not trained on);
                    prove that an engine which generates computes what training computes (again after every restore)
    every step      sigma = schedule(step)
                    sample groups from the quantised policy with noise in some weights
                    reward, filter, advantages
                    update clean weights: 4-bit forward, straight-through backward
                    measure signals, judge them: goes on, or has collapsed
    at the end      evaluate again, also when the trial was stopped: clean weights, no noise, same questions

The noise is in the rollout alone. Learning and evaluation never see it; nothing of it is left behind
(`noise.injected`). A collapse ends the trial with partial results; an exception is a bug. Everything random comes from
(seed, step, purpose), so a trial restored from `state_dict` continues bit for bit.
"""

import copy
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from pydantic import TypeAdapter

from spaces.config import ConfigError, TrialConfig
from spaces.schedules import is_quiet
from trainable import pass_at_k
from trainable.collapse import CollapseDetector
from trainable.disk.checkpoint import digest_of
from trainable.disk.folder import Folder
from trainable.engines import gate
from trainable.engines.backend import start_backend
from trainable.engines.engine import Request
from trainable.episode import FilterOutcome, Group
from trainable.evaluation import Evaluation, count_right, evaluate
from trainable.following import follow
from trainable.forward.logps import Batch, clean_logps, make_batch
from trainable.forward.transformer import forward_of
from trainable.grpo import filter_groups, group_advantages, shaped_rewards, update
from trainable.masters import MasterAdamW, Rows, followed, moved_shares
from trainable.metrics import (
    ACCURACY,
    EVAL,
    ROLLOUT_SECONDS,
    STEP_SECONDS,
    TOKENS_PER_SECOND,
    TOO_LONG,
    UPDATE_SECONDS,
)
from trainable.negative_controls import check_reward, learned_from
from trainable.noise import effects_of, injected, noise_targets, sigma_at, stage_begins
from trainable.outcome import (
    HEALTHY,
    Alarm,
    Answers,
    CollapseVerdict,
    Effect,
    EffectReceipt,
    Outcome,
    Sample,
    Scores,
    Shared,
    StepReport,
)
from trainable.parity import doubts, load_checked
from trainable.philox import GENERATOR
from trainable.policy.embedded import Progress
from trainable.policy.policy import Policy, decoder_blocks, deployed, unquantized, without_adapters
from trainable.receipt import receipt_of
from trainable.rollout import TooLong, encode_prompts, in_chunks, judge, without_too_long
from trainable.seeds import generator
from trainable.sharding import is_shard, local, rows_like, shard, whole_like
from trainable.signals import Signals, UpdateMetrics, measure
from trainable.tasks.contract import check_contract
from trainable.tasks.table import build_task
from trainable.tasks.task import FiniteTask, Question
from trainable.team import ALONE, Team, bits_of

_SAMPLES_PER_STEP = 4
_NEARLY_ALL = 0.9
_BASELINE_STEP = -1  # names the baseline's random draws


@dataclass(slots=True, kw_only=True)
class Progression:
    """All that a trial remembers besides weights and optimizer."""

    next_step: int = 0
    updates: int = 0
    seconds: float = 0.0
    verdict: CollapseVerdict | None = None
    """Of a collapse that ended the trial."""
    alarms: list[Alarm] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """Of loading."""
    start_warnings: list[str] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)
    """Of engines; a line for each."""
    start: tuple[Evaluation, Evaluation] | None = None
    """Before step 0: in the deployed precision, unquantised."""
    end: tuple[Evaluation, Evaluation] | None = None
    opening: dict[str, float] = field(default_factory=dict)
    """Metrics of the start, until the first step has reported them."""
    shared: Shared | None = None
    """What of all this another trial has computed (`prefix.py`)."""


_PROGRESSION = TypeAdapter(Progression)
"""Reads what `asdict` made of one, and JSON of that."""


class Trial:
    """A trial that is driven step by step; `run_trial` is the loop over it."""

    def __init__(
        self,
        config: TrialConfig,
        progress: Progress | None = None,
        on_phase: Callable[[str], None] = lambda phase: None,
        scans: Folder | None = None,
        team: Team = ALONE,
    ) -> None:
        """`on_phase` hears what begins: rollout, update, evaluate, and engine (another one, in the midst of those).
        `scans`: those of the trial's sweep. `team`: with whom it is computed; each of them makes the same calls, and
        has the same numbers after each.

        Raises ConfigError for whatever the configuration promises and the model or this machine does not have,
        TrialFailed for an engine that does not start. Call `close` in the end.
        """
        assert team.size <= config.parallel.ranks, f"{team=} {config.parallel=}"
        self.team = replace(team, shares=config.parallel.ranks)
        self.final: dict[str, torch.Tensor] = {}  # what learned, once the outcome of the end was asked for
        with self.team.agreed("loading"):
            self._load(config, progress, on_phase, scans)

    def _load(
        self, config: TrialConfig, progress: Progress | None, on_phase: Callable[[str], None], scans: Folder | None
    ) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config = config.model_copy(update={"threads": torch.get_num_threads()})
        self.on_phase = on_phase
        self.task = build_task(config.task)
        check_reward(config.grpo.reward, self.task)
        self.questions = self.task.held_out(config.eval.split, config.eval.questions, config.eval.draw)
        if self.task.foreign is not None:
            self.task.foreign.open()
            reward = self.config.task.model_copy(update={"reward_sha256": self.task.foreign.hashes})
            self.config = self.config.model_copy(update={"task": reward})
        self.rows = self.task.fingerprint()
        self.config, self.followed = follow(self.config, self.task, scans, progress)
        config = self.config  # numbers alone
        self.policy, self.agreement = load_checked(config, progress)
        self.left_out = TooLong()
        self._measure_questions()
        self.targets = noise_targets(self.policy, config.noise)
        copied = config.grpo.kl_beta > 0 and config.model.adapter == "full"
        self.reference = copy.deepcopy(self.policy) if copied else None  # with adapters it is the base beside them
        self.base = digest_of(self._not_in_checkpoints())
        if config.parallel.weights == "sharded":
            self._shard()
        parameters = list(self.policy.trainable().values())
        grpo = config.grpo
        self.start_weights = followed(self.policy.trainable())
        self.optimizer = MasterAdamW(
            parameters, lr=grpo.learning_rate, betas=(0.9, grpo.adam_beta2), weight_decay=grpo.weight_decay, fused=True
        )
        self.detector = CollapseDetector(config=config.collapse)
        self.so_far = Progression(warnings=[*self.task.warnings, *doubts(self.agreement)])
        self._check_contract()
        self.backend = start_backend(self.config, self.policy, self._tell_death)
        self.agreed = self.backend.engine is None  # an engine has yet to show that it computes what training computes
        self.team.check_same("threads", self.config.threads)
        self._compare("settings, rows or weights at the start", self.config, self.rows)

    @property
    def begun(self) -> bool:
        """The start is evaluated."""
        return self.so_far.start is not None

    @property
    def done(self) -> bool:
        """All steps are made, or the trial has collapsed."""
        return self.so_far.verdict is not None or self.so_far.next_step >= self.config.grpo.steps

    def close(self) -> None:
        """Free an engine, and end the process of a reward."""
        self.backend.close()
        if self.task.foreign is not None:
            self.task.foreign.close()

    def begin(self) -> None:
        """Before step 0: evaluate the start and take the noise-free baseline. `step` does it where nobody has, and the
        first report tells what it came to."""
        started = time.perf_counter()
        with self.team.agreed("start"):
            opening = self._open()
        seconds = time.perf_counter() - started
        self.so_far.opening = {**opening, STEP_SECONDS: seconds}
        self.so_far.seconds += seconds

    def step(self) -> StepReport:
        """One rollout with all its updates; before the first one it begins, and the last one evaluates.

        Raises TrialFailed when the engine that generates does not agree with training, or died twice in this step.
        """
        with self.team.agreed("step"):
            return self._step()

    def _step(self) -> StepReport:
        assert not self.done, "the trial has ended"
        if not self.begun:
            self.begin()
        self.backend.begin_step()
        started, step = time.perf_counter(), self.so_far.next_step
        metrics, self.so_far.opening = self.so_far.opening, {}
        opened = metrics.pop(STEP_SECONDS, 0.0)
        if not self.agreed:
            metrics |= self._agree(self._generate(_BASELINE_STEP, 0, gate.prompts_for(self.config)))
        self.so_far.end = None  # an outcome that was asked for in between is of other weights
        begun = time.perf_counter()
        sigma = sigma_at(self.config.noise, step, self.config.grpo.steps)

        groups, filtered, batches = self._sample(step)
        sampled = time.perf_counter()
        batch = self._batch(filtered.groups or groups)
        learned = self._learn(step, batch) if filtered.groups and not self._gives_up(filtered) else None
        updated = time.perf_counter()
        signals = self._measure(groups, batch, filtered, batches, sigma, learned)

        verdict = self._judge(step, signals, filtered)
        if self.config.task.too_long == "leave_out":
            metrics[TOO_LONG] = float(self.left_out.take())
        self.so_far.next_step += 1
        metrics |= signals.as_metrics() | self._evaluate_if_due(step)
        self._compare("signals or weights after a step", repr(signals), verdict)
        finished = time.perf_counter()
        tokens = sum(len(e.completion.ids) for group in groups for e in group)
        metrics |= {
            ROLLOUT_SECONDS: sampled - begun,
            UPDATE_SECONDS: updated - sampled,
            STEP_SECONDS: opened + finished - started,
            TOKENS_PER_SECOND: tokens / (sampled - begun),
        }
        self.so_far.seconds += finished - started
        return StepReport(
            step=step,
            sigma=sigma,
            signals=metrics,
            verdict=verdict,
            seconds=opened + finished - started,
            samples=_samples(step, groups),
            time_ms=time.time_ns() // 1_000_000,
        )

    def outcome(self) -> Outcome:
        """How it ended; a trial that is asked before its end counts as stopped, and is evaluated now."""
        if not self.begun:
            self.begin()
        started = time.perf_counter()
        if self.so_far.end is None:
            with self.team.agreed("outcome"):
                self._evaluate_end()
            self.so_far.seconds += time.perf_counter() - started
        if self.done:
            self.final = self.weights()
        verdict = self.so_far.verdict
        assert self.so_far.start is not None
        assert self.so_far.end is not None
        return Outcome(
            outcome="collapsed" if verdict else "completed" if self.done else "stopped",
            rule=verdict.rule if verdict else "",
            step=self.so_far.next_step,
            eval=_scores(self.so_far.start, self.so_far.end),
            receipt=self.receipt(),
            alarms=tuple(self.so_far.alarms),
            config=self.config,
            seconds=self.so_far.seconds,
        )

    def answers(self) -> Answers:
        """To the questions of the evaluation, at its end: greedy, clean, in the deployed precision."""
        assert self.so_far.end is not None, "an outcome was asked for"
        last = self.so_far.end[0]
        return Answers(
            questions=tuple(question.prompt for question in self.questions),
            expected=tuple(question.answer for question in self.questions),
            given=last.answers,
            correct=last.correct,
        )

    def receipt(self) -> EffectReceipt:
        """What was quantised and noised so far, with the sigma really applied."""
        return receipt_of(
            self.policy,
            self.targets,
            self.so_far.effects,
            moved=moved_shares(self.start_weights, self.policy.trainable()),
            warnings=[*self.so_far.warnings, *self.so_far.start_warnings, *self.so_far.deaths],
            forward=asdict(self.agreement),
            generation=self.backend.described(),
            followed=self.followed,
        )

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of what learns, by name."""
        return self._whole((name, local(p.detach()), p) for name, p in self.policy.trainable().items())

    def _whole(self, own: Iterable[tuple[str, torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Copies, by name, of what belongs to a parameter. Of a matrix in shards all processes give their rows, one
        matrix at a time, and rank 0 alone has the copy: in the memory of the host, where it is written from."""
        copies = {}
        for name, tensor, parameter in own:
            if not is_shard(parameter) or tensor.dim() == 0:
                copies[name] = tensor.clone()
                continue
            gathered = whole_like(tensor, parameter)
            if self.team.rank == 0:
                copies[name] = gathered.cpu()
        return copies

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-equal continuation needs: tensors under `model` and `optimizer`, plain values under
        `progress`."""
        return {"model": self.weights(), "optimizer": self._whole(self._moments()), "progress": self.progress()}

    def held(self) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of `state_dict` themselves, and no copies of them: what this process holds."""
        model = {name: local(p.detach()) for name, p in self.policy.trainable().items()}
        return {"model": model, "optimizer": {name: value for name, value, _ in self._moments()}}

    def _moments(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        for index, values in self.optimizer.state_dict()["state"].items():
            for key, value in values.items():
                yield f"{index}/{key}", value.detach(), self.optimizer.parameters[index]

    def progress(self) -> dict[str, Any]:
        """The plain values of `state_dict`."""
        return {
            "so_far": asdict(self.so_far),
            "detector": copy.deepcopy(self.detector.state()),
            "reward": list(self.config.task.reward_sha256),
            "rows": self.rows,
            "base": self.base,
            "draws": GENERATOR,
            "followed": {one.setting: list(one.value) for one in self.followed},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken from a trial of the same configuration. Raises ConfigError where the
        user's reward, the rows of the task or the weights that are not trained have changed since."""
        with self.team.agreed("restoring"):
            self._restore(state)
            self._compare("restored states", repr(self.so_far))

    def _restore(self, state: Mapping[str, Any]) -> None:
        reward = list(self.config.task.reward_sha256)
        if (was := state["progress"].get("reward", [])) != reward:
            raise ConfigError(
                f"task.name={self.config.task.name}: the file of its reward has changed (sha256 {reward}, and {was} "
                "when this trial began); put it back, or begin anew"
            )
        if state["progress"].get("rows", self.rows) != self.rows:
            raise ConfigError(
                f"task.name={self.config.task.name}: its rows are not those that this trial began with; put them back, "
                "or begin anew"
            )
        if state["progress"].get("base", self.base) != self.base:
            raise ConfigError(
                f"model.name={self.config.model.name}: the weights that are not trained are not those that this trial "
                "began with; put the model back, or begin anew"
            )
        if self.targets and state["progress"].get("draws") != GENERATOR:
            raise ConfigError(
                f"noise: another generator than {GENERATOR} drew it when this trial began; use the program that began "
                "it, or begin anew"
            )
        for one in self.followed:
            if (was := state["progress"].get("followed", {}).get(one.setting)) != list(one.value):
                raise ConfigError(
                    f"{one.setting}={one.rule}: came to {was} when this trial began, and to {list(one.value)} now; "
                    "put back the model or the scan that it began with, or begin anew"
                )
        with torch.no_grad():
            for name, parameter in self.policy.trainable().items():
                local(parameter).copy_(rows_like(state["model"][name], parameter))
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in state["optimizer"].items():
            index, _, name = key.partition("/")
            moments.setdefault(int(index), {})[name] = rows_like(value, self.optimizer.parameters[int(index)]).clone()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.so_far = _PROGRESSION.validate_python(state["progress"]["so_far"])
        self.detector.restore(copy.deepcopy(state["progress"]["detector"]))
        if self.so_far.next_step > 0:
            self.left_out.take()  # it was told at the first step
        self.agreed = self.backend.engine is None

    def _tell_death(self, how: str) -> None:
        self.on_phase("engine")  # the same work begins anew, and is waited for anew
        self.so_far.deaths.append(f"step {self.so_far.next_step}: the engine died ({how}) and was started again")

    def _compare(self, what: str, *seen: object) -> None:
        """Raises RuntimeError where the processes of the team have come to different things, or hold different weights.
        What one of them was warned of, all know from now on."""
        if self.team.size == 1:
            return
        masters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        held = [
            one for one in (*self.policy.model.parameters(), *masters) if not (is_shard(one) or isinstance(one, Rows))
        ]
        self.team.check_same(what, (*seen, bits_of(held)))
        for kind in ("warnings", "start_warnings", "deaths"):
            told = self.team.gather(kind, getattr(self.so_far, kind))
            setattr(self.so_far, kind, list(dict.fromkeys(line for own in told for line in own)))

    def _not_in_checkpoints(self) -> dict[str, torch.Tensor]:
        """Weights that every start takes from the model: those under adapters; all of them where a reference stays as
        the model was."""
        kept = self.policy.trainable() if self.reference is None else {}
        return {name: weight.detach() for name, weight in self.policy.model.named_parameters() if name not in kept}

    def _shard(self) -> None:
        """Each process keeps its rows of every matrix. One that computes the trial alone keeps all. Raises
        ConfigError."""
        if forward_of(self.policy) is None:
            raise ConfigError(
                f"parallel.weights=sharded: model.name={self.config.model.name} goes through transformers' forward, "
                "which does not say when it needs which weights; set parallel.weights=whole"
            )
        if self.team.size == 1:
            return
        for policy in (self.policy, self.reference):
            if policy is not None:
                self.team.check_same("weights at the start", bits_of(list(policy.model.parameters())))
                shard(policy.network, decoder_blocks(policy), policy.device.type)

    def _measure_questions(self) -> None:
        """No question is found to be too long in the middle of a run: all rows of a data set are measured now, and all
        that an endless one will be asked."""
        config, limit = self.config, self.config.rollout.max_prompt_tokens
        if config.task.too_long == "leave_out":
            self.task = without_too_long(self.policy, self.task, config.task, limit, self.left_out)
            self.questions = self.task.held_out(config.eval.split, config.eval.questions, config.eval.draw)
            return
        for questions in self._may_ask():
            encode_prompts(self.policy, questions, config.task, limit)

    def _check_contract(self) -> None:
        """Raises ConfigError for a foreign reward that does not keep its contract; or warns, where that is wanted."""
        if self.task.foreign is None:
            return

        def encode(text: str) -> list[int]:
            return [*self.policy.tokenizer(text, add_special_tokens=False)["input_ids"], self.policy.ends[0]]

        grpo = self.config.grpo
        for finding in check_contract(self.task, self.questions, encode, grpo.batch_prompts * grpo.group_size):
            said = f"task.reward: {finding.part}: {finding.state}: {finding.detail}"
            if finding.state == "failed" and self.config.task.reward_check == "error":
                raise ConfigError(f"{said}; mend the reward, or set task.reward_check=warn")
            if finding.state != "holds":
                self.so_far.warnings.append(said)

    def _may_ask(self) -> Iterator[Sequence[Question]]:
        if isinstance(self.task, FiniteTask):
            for questions in self.task.questions.values():
                yield from in_chunks(questions)
            return
        grpo, seed = self.config.grpo, self.config.seed
        yield self.questions
        yield self.task.sample(grpo.prompts, seed=seed, step=_BASELINE_STEP, batch=0)
        for step, batch in product(range(grpo.steps), range(grpo.batch_limit)):
            yield self.task.sample(grpo.batch_prompts, seed=seed, step=step, batch=batch)

    # --- the parts of a step, in order --------------------------------------------------------------------------------

    def _open(self) -> dict[str, float]:
        """What `begin` does, and what it has measured."""
        config = self.config
        before = [replace(one, answers=()) for one in self._evaluate()]  # it stands in every checkpoint
        deployed_eval, plain_eval = self.so_far.start = (before[0], before[1])
        groups = self._generate(_BASELINE_STEP, 0, config.grpo.prompts)
        outcome = filter_groups("off", groups, len(groups))
        batch = self._batch(groups)
        signals = self._measure(groups, batch, outcome, 1, 0.0, None)
        self.detector.observe(signals, quiet=True)
        if signals.truncated >= _NEARLY_ALL:
            limit = config.rollout.max_new_tokens
            self.so_far.start_warnings.append(
                f"{signals.truncated:.0%} of the completions before step 0 were cut off at "
                f"rollout.max_new_tokens={limit}: what is rewarded at the end of an answer is never seen; raise it"
            )
        seen = _metrics(deployed_eval, plain_eval, config.eval.samples)
        start = {f"{name}_start": value for name, value in seen.items()}
        return start | ({} if self.agreed else self._agree(groups[: gate.prompts_for(config)]))

    def _agree(self, groups: list[Group]) -> dict[str, float]:
        """The gate, on a noise-free rollout that was just made, and on more where that one does not agree by itself."""
        config, engine = self.config, self.backend.engine
        assert engine is not None
        for number in range(1, gate.BATCHES + 1):
            batch, apart = self._batch(groups), None
            try:
                with deployed(self.policy):
                    metrics = gate.check(engine, self.policy, batch, config.rollout, config.grpo.micro_batch)
            except gate.LogpsApart as found:
                apart = found
            refused = [one for one in self.team.gather("gate", apart) if one is not None]
            if not refused:
                break
            if number == gate.BATCHES:
                raise refused[0]
            groups = groups + self._generate(_BASELINE_STEP, number, gate.prompts_for(config))
        with unquantized(self.policy):
            plain = self._batch(self._generate(_BASELINE_STEP, 0, gate.UNQUANTIZED_PROMPTS))
        gate.check_unquantized(plain, config.model.dtype)
        self.agreed = True
        return metrics

    def _sample(self, step: int) -> tuple[list[Group], FilterOutcome, int]:
        """All groups generated in this step, what the filter kept, and the number of batches."""
        grpo = self.config.grpo
        per_batch, limit = grpo.batch_prompts, grpo.batch_limit
        groups: list[Group] = []
        outcome = None
        for number in range(limit):
            groups += self._generate(step, number, per_batch)
            outcome = filter_groups(grpo.filter_groups, groups, grpo.prompts)
            if outcome.enough:
                break
        assert outcome is not None
        self.backend.rest()
        return groups, outcome, number + 1

    def _generate(self, step: int, batch: int, prompts: int) -> list[Group]:
        """Sample groups from the deployed policy, with this step's noise (none before step 0)."""
        self.on_phase("rollout")
        config = self.config
        questions = self.task.sample(prompts, seed=config.seed, step=step, batch=batch)

        def sampled(share: range) -> list[Group]:
            asked = [questions[number] for number in share]
            encoded = encode_prompts(self.policy, asked, config.task, config.rollout.max_prompt_tokens)
            request = Request(
                prompts=encoded,
                group_size=config.grpo.group_size,
                max_new_tokens=config.rollout.max_new_tokens,
                temperature=config.rollout.temperature,
                batch_size=config.rollout.batch_size,
                draw=("sample", config.seed, step, batch),
                first=share.start,
                each_token=config.parallel.ranks > 1,
            )
            completions = self.backend.generate(self.policy, request)
            return judge(self.policy, self.task, asked, encoded, completions)

        noise, total = config.noise, config.grpo.steps
        with injected(
            self.policy,
            noise,
            self.targets if step >= 0 else (),
            step=max(step, 0),
            total_steps=total,
            seed=config.seed,
            measured=step >= 0 and batch == 0 and stage_begins(noise, step, total),
        ) as changes:
            self.so_far.effects += effects_of(noise, changes, step=step, total_steps=total)
            self.backend.sync(self.policy)
            groups = self.team.share_out("rollout", len(questions), sampled)
        return learned_from(config.grpo.reward, groups, self.task, (config.seed, step, batch))

    def _batch(self, groups: list[Group] | tuple[Group, ...]) -> Batch:
        """Tensors with advantages and the clean policy's log-probs."""
        self.on_phase("update")
        config = self.config
        rewards = shaped_rewards(groups, config.grpo, config.rollout.max_new_tokens)
        batch = make_batch(self.policy, groups, group_advantages(rewards, config.grpo.advantage_scale))
        micro_batch, reference = config.grpo.micro_batch, None

        def logps(policy: Policy) -> torch.Tensor:
            def of(groups: range) -> torch.Tensor:
                return clean_logps(policy, batch.groups(groups), config.rollout.temperature, micro_batch)

            found = self.team.share_out_rows("log-probs", len(batch) // batch.group_size, of)
            return found.to(batch.mask.device)

        with deployed(self.policy):
            old = logps(self.policy)
            if config.grpo.kl_beta > 0 and self.reference is None:
                with without_adapters(self.policy):
                    reference = logps(self.policy)
        if self.reference is not None:
            with deployed(self.reference):
                reference = logps(self.reference)
        return replace(batch, old_logps=old, reference_logps=reference)

    def _gives_up(self, filtered: FilterOutcome) -> bool:
        """A rejected step is not learned from when collapses are enforced; otherwise on what was kept."""
        return filtered.rejected_as_wrong and self.config.collapse.mode == "enforce"

    def _learn(self, step: int, batch: Batch) -> UpdateMetrics:
        config = self.config
        metrics = update(
            self.policy,
            self.optimizer,
            batch,
            config.grpo,
            config.rollout,
            first_update=self.so_far.updates,
            shuffle=generator("shuffle", config.seed, step),
            team=self.team,
        )
        self.so_far.updates += config.grpo.updates_per_step
        return metrics

    def _measure(
        self,
        groups: list[Group],
        batch: Batch,
        filtered: FilterOutcome,
        batches: int,
        sigma: float,
        learned: UpdateMetrics | None,
    ) -> Signals:
        config = self.config
        return measure(
            groups,
            batch,
            shaped_rewards(groups, config.grpo, config.rollout.max_new_tokens).tolist(),
            filtered,
            sigma=sigma,
            gen_batches=batches,
            vocabulary=self.policy.vocabulary,
            correction=batch.correction(config.rollout),
            update=learned,
        )

    def _judge(self, step: int, signals: Signals, filtered: FilterOutcome) -> CollapseVerdict:
        """The verdict; under `enforce` it ends the trial. Weights that are not finite end it in every mode: nothing can
        follow."""
        config = self.config
        quiet = is_quiet(config.noise, step, config.grpo.steps)
        verdict = self.detector.observe(signals, quiet=quiet, filtered=filtered)
        if not verdict.collapsed:
            return verdict
        if verdict.rule == "nonfinite" or config.collapse.mode == "enforce":
            self.so_far.verdict = verdict
        elif config.collapse.mode == "off":
            return HEALTHY
        else:
            self.so_far.alarms.append(Alarm(step=step, rule=verdict.rule, evidence=verdict.evidence))
        return verdict

    def _evaluate_if_due(self, step: int) -> dict[str, float]:
        if self.done:
            return self._evaluate_end()
        every = self.config.eval.every
        if every and (step + 1) % every == 0:
            self.on_phase("evaluate")
            return _metrics(evaluate(self.policy, self.task, self.questions, self.config, self.backend, self.team))
        return {}

    def _evaluate_end(self) -> dict[str, float]:
        deployed_eval, plain_eval = self.so_far.end = self._evaluate()
        return _metrics(deployed_eval, plain_eval, self.config.eval.samples)

    def _evaluate(self) -> tuple[Evaluation, Evaluation]:
        """In the deployed precision, with samples where they are wanted, and unquantised (the same thing when nothing
        is quantised). A trial that is asked before its end draws none: it may be waited for."""
        self.on_phase("evaluate")
        arguments = (self.policy, self.task, self.questions, self.config, self.backend, self.team)
        deployed_eval = evaluate(*arguments)
        if self.config.eval.samples and (self.so_far.start is None or self.done):
            step, begins = self.so_far.next_step, partial(self.on_phase, "evaluate")
            deployed_eval = replace(deployed_eval, right=count_right(*arguments, step=step, on_part=begins))
            begins()
        if not self.policy.quantized:
            return deployed_eval, deployed_eval
        with unquantized(self.policy):
            return deployed_eval, evaluate(*arguments)


def run_trial(config: TrialConfig, progress: Progress | None = None) -> Generator[StepReport, None, Outcome]:
    """All steps of a trial; the generator's return value is its Outcome."""
    trial = Trial(config, progress)
    try:
        while not trial.done:
            yield trial.step()
        return trial.outcome()
    finally:
        trial.close()


def _metrics(evaluation: Evaluation, unquantized: Evaluation | None = None, samples: int = 0) -> dict[str, float]:
    parts = {f"{EVAL}{name}": value for name, value in evaluation.parts.items()}
    plain = {} if unquantized is None else {f"{ACCURACY}_bf16": unquantized.accuracy}
    return {ACCURACY: evaluation.accuracy, **plain, **parts, **pass_at_k.metrics(evaluation.right, samples)}


def _scores(start: tuple[Evaluation, Evaluation], end: tuple[Evaluation, Evaluation]) -> Scores:
    (before, plain_before), (after, plain_after) = start, end
    return Scores(
        accuracy=after.accuracy,
        accuracy_bf16=plain_after.accuracy,
        parts=after.parts,
        accuracy_start=before.accuracy,
        accuracy_bf16_start=plain_before.accuracy,
        parts_start=before.parts,
        n=len(after.correct),
        correct=after.correct,
        right=after.right,
        right_start=before.right,
    )


def _samples(step: int, groups: list[Group]) -> tuple[Sample, ...]:
    episodes = [group[0] for group in groups[:_SAMPLES_PER_STEP]]
    return tuple(
        Sample(
            step=step,
            prompt=e.question.prompt,
            completion=e.text,
            answer=e.question.answer,
            reward=e.score.reward,
            correct=e.score.correct,
        )
        for e in episodes
    )

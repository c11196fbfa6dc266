"""Several processes compute one trial: the same bits as one, whatever it does; and what one of them meets, all meet.

The processes are real, over gloo. Numbers hang on `parallel.ranks` and not on who computes, so equal means every bit.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import trainable.engines.gate
import trainable.team
import trainable.trial
from spaces.config import ConfigError, TrialConfig
from tests.conftest import Tiny
from tests.ranked import alone, compute, equal, together
from tests.test_gate import Echo
from tests.test_trial import W16A16
from trainable.engines.engine import Request
from trainable.engines.gate import LogpsApart
from trainable.failure import TrialFailed
from trainable.grpo import update
from trainable.policy.policy import deployed
from trainable.rollout import draws, generate, sample
from trainable.seeds import generator
from trainable.team import Team, bits_of, spans
from trainable.trial import Trial

TWO = (
    "parallel.ranks=2",
    "grpo.steps=3",
    "noise.num_stages=1",
    "noise.modules=[linear, rmsnorm]",
    "eval.every=2",
    "eval.questions=9",
)


# --- shares -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "shares"), [(8, 2), (7, 3), (2, 4), (0, 3), (5, 1)])
def test_shares_are_consecutive_and_differ_by_one_at_most(count: int, shares: int) -> None:
    parts = spans(count, shares)
    assert [number for part in parts for number in part] == list(range(count))
    assert len(parts) == shares
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_each_share_belongs_to_one_process(size: int) -> None:
    assert [share for rank in range(size) for share in Team(rank, size, shares=5).own] == list(range(5))
    parts = [part for rank in range(size) for part in Team(rank, size, shares=5).spans(13)]
    assert parts == spans(13, 5)


def test_one_bit_anywhere_changes_the_number_of_all_bits() -> None:
    tensors = [torch.ones(70, dtype=torch.bfloat16), torch.zeros(3, 5), torch.zeros(0)]
    before = bits_of(tensors)
    for tensor in tensors[:2]:
        bits = tensor.view(-1).view(torch.int16)
        for place in (0, len(bits) // 2, len(bits) - 1):
            bits[place] ^= 1
            assert bits_of(tensors) != before
            bits[place] ^= 1
    assert bits_of(tensors) == before


def test_an_engine_inside_a_rank_is_refused_with_the_remedy(tiny: Tiny) -> None:
    vllm = ("parallel.ranks=2", "rollout.backend=vllm")
    with pytest.raises(ConfigError, match=r"parallel\.ranks=2: vLLM inside .* set rollout\.engine=process"):
        tiny(*vllm)
    assert tiny(*vllm, "rollout.engine=process").parallel.ranks == 2


def test_more_ranks_than_prompts_are_refused_with_the_remedy(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.ranks=9 needs a prompt for each rank.*raise grpo\.prompts"):
        tiny("parallel.ranks=9")


# --- the update -------------------------------------------------------------------------------------------------------


def updated(config: TrialConfig, shares: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """Metrics of the first step's update in so many shares, and the gradient of its only mini-batch before the clip
    (the weights do not move)."""
    trial = Trial(config)
    batch = trial._batch(trial._generate(0, 0, config.grpo.prompts))
    gradients: dict[str, torch.Tensor] = {}

    class Kept(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            gradients.update({n: p.grad.clone() for n, p in trial.policy.trainable().items() if p.grad is not None})

    optimizer = Kept(trial.policy.trainable().values(), lr=0.0)
    team = Team(0, 1, shares=shares)
    source = generator("shuffle", 0)
    found = update(
        trial.policy, optimizer, batch, config.grpo, config.rollout, first_update=0, shuffle=source, team=team
    )
    return found, gradients


@pytest.mark.parametrize("loss", ["grpo", "dapo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("shares", [2, 3])
@pytest.mark.parametrize("mode", [W16A16, ()], ids=["W16A16", "W4A4"])
def test_an_update_in_shares_is_the_undivided_one(tiny: Tiny, loss: str, shares: int, mode: tuple[str, ...]) -> None:
    """Loss, norm, clip fraction, KL and gradient, to the rounding of fp32 sums in another order."""
    config = tiny(
        *mode,
        "grpo.updates_per_step=1",
        "grpo.kl_beta=0.1",
        f"grpo.loss={loss}",
        "rollout.correction=token",
        "grpo.max_grad_norm=1e9",
    )
    (whole, expected), (parts, found) = updated(config, 1), updated(config, shares)
    for name in ("loss", "grad_norm", "clip_fraction", "reference_kl"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-5, abs=1e-6), name
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 1e-4, "there is something to compare"
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-6 * max(1.0, largest), name


# --- each token's own draw --------------------------------------------------------------------------------------------


def asked(prompts: int, *, first: int = 0, batch_size: int = 64) -> Request:
    return Request(
        prompts=[[2 + number % 9, 11, 3, 12] for number in range(first, first + prompts)],
        group_size=4,
        max_new_tokens=5,
        temperature=1.0,
        batch_size=batch_size,
        draw=("test", 0),
        first=first,
        each_token=True,
    )


def test_what_is_sampled_hangs_on_the_place_alone(tiny: Tiny) -> None:
    """Not on how many are sampled at once, which of them have ended, nor on who samples the others."""
    policy = Trial(tiny(*W16A16)).policy
    with deployed(policy):
        whole = generate(policy, asked(12))
        pieces = [generate(policy, asked(12, batch_size=size)) for size in (4, 12)]
        shares = generate(policy, asked(5)) + generate(policy, asked(7, first=5))
        again = generate(policy, asked(12, first=1))[:-1]
    ids = [[completion.ids for completion in group] for group in whole]
    assert len({len(one) for group in ids for one in group}) > 1, "some end earlier, and are retired"
    assert len({tuple(group) for group in ids}) > 6
    for other in (*pieces, shares):
        assert [[completion.ids for completion in group] for group in other] == ids
    assert [[completion.ids for completion in group] for group in again] == ids[1:]


def test_an_engine_samples_a_prompt_by_its_number_among_all() -> None:
    assert [asked(3, first=5).seed_of(number) for number in range(3)] == [asked(8).seed_of(n) for n in range(5, 8)]


def test_each_place_has_a_number_of_its_own() -> None:
    drawn = draws(asked(50), 0, 50, torch.device("cpu"))  # [B, T]
    assert drawn.shape == (200, 5)
    assert len(drawn.unique()) == 1000
    assert torch.equal(drawn[20:36], draws(asked(9, first=2), 3, 4, torch.device("cpu")))
    assert drawn.min() > 0
    assert drawn.max() < 1
    assert drawn.mean().item() == pytest.approx(0.5, abs=5 * 12**-0.5 / 1000**0.5)


def test_tokens_come_as_often_as_the_model_says() -> None:
    """Chi-square against the probabilities; a token of probability 0 never comes, the last one does."""
    count, probability = 200_000, torch.tensor([0.3, 0.0, 0.001, 0.499, 0.0, 0.15, 0.05])
    request = Request(
        prompts=[[2]] * 100,
        group_size=100,
        max_new_tokens=20,
        temperature=1.0,
        batch_size=1,
        draw=("chi",),
        each_token=True,
    )
    uniform = draws(request, 0, 100, torch.device("cpu")).view(-1)
    token, logp, _ = sample(probability.log().expand(count, -1), 1.0, uniform)
    counts = torch.bincount(token, minlength=7).double()
    expected = probability.double() * count
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert ((counts - expected)[possible].square() / expected[possible]).sum() < 23.5, "4 degrees of freedom: p = 1e-4"
    assert torch.allclose(logp, probability.log()[token])


def test_the_ends_of_the_interval_are_tokens() -> None:
    """Rounding at either end of the sum finds no token of probability 0, and none beyond the vocabulary."""
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]]).expand(2, -1)
    token, _, _ = sample(logits, 1.0, torch.tensor([2.0**-47, 1 - 2.0**-47], dtype=torch.float64))
    assert token.tolist() == [1, 2]


# --- several processes ------------------------------------------------------------------------------------------------

MUCH = (
    "grpo.kl_beta=0.1",
    "grpo.filter_groups=drop",
    "eval.samples=2",
    "rollout.correction=token",
    "eval.questions=33",
)
EDGES = ("parallel.ranks=3", "grpo.updates_per_step=8", "model.adapter=lora", "model.dtype=bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [MUCH, EDGES], ids=["much", "edges"])
def test_two_processes_compute_the_bits_of_one(tiny: Tiny, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """Every metric, sample, verdict, score and weight. The second: three shares on two processes, mini-batches of one
    group, which leave two shares with none, and masters behind weights of 16 bits."""
    config = tiny(*TWO, *overrides)
    one = alone(config, tmp_path / "one")
    two = together(2, compute, tmp_path, config, str(tmp_path / "two"))
    assert [ended.error for ended in two] == [None, None]
    assert len(one[0]) == 3
    for ended in two:
        assert equal(ended.value, one)


@pytest.mark.slow
def test_a_trial_goes_on_with_another_number_of_processes(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(*TWO)
    undisturbed = alone(config, tmp_path / "undisturbed")
    rest = (undisturbed[0][2:], *undisturbed[1:])
    assert together(2, compute, tmp_path, config, str(tmp_path / "grows"), 0)[0].error is None
    alone(config, tmp_path / "from one", stop=2)
    for ended in together(2, compute, tmp_path, config, str(tmp_path / "from one")):
        assert equal(ended.value, rest)
    together(2, compute, tmp_path, config, str(tmp_path / "from two"), 2)
    assert equal(alone(config, tmp_path / "from two"), rest)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_in_a_step_ends_the_others_at_once_and_the_trial_goes_on(
    tiny: Tiny, tmp_path: Path, killed: int
) -> None:
    config, place = tiny(*TWO), str(tmp_path / "trial")
    undisturbed = alone(config, tmp_path / "undisturbed")
    ended = together(2, compute, tmp_path, config, place, 0, (killed, 2))
    other = ended[1 - killed]
    assert ended[killed].code == -signal.SIGKILL
    assert isinstance(other.error, TrialFailed)
    assert other.error.rule == "ranks"
    assert "died" in other.error.reason
    assert other.seconds < 10
    for again in together(2, compute, tmp_path, config, place):
        assert equal(again.value, (undisturbed[0][2:], *undisturbed[1:]))


RAISED: dict[str, Exception] = {
    "the user's": ConfigError("task.reward: wrong; mend it"),
    "failed": TrialFailed("reward", "it died twice"),
    "bug": ZeroDivisionError("of rank 1"),
}


def with_error(team: Team, config: TrialConfig, error: Exception, rank: int) -> None:
    trial = Trial(config, team=team)
    if team.rank == rank:

        def wrong(*_: Any) -> Any:
            raise error

        trial.task.reward = wrong
    trial.step()


@pytest.mark.slow
@pytest.mark.parametrize("error", RAISED.values(), ids=RAISED)
def test_what_one_process_raises_all_raise(tiny: Tiny, tmp_path: Path, error: Exception) -> None:
    ended = together(2, with_error, tmp_path, tiny(*TWO), error, 1)
    said = [str(one.error) for one in ended]
    if isinstance(error, ZeroDivisionError):
        assert all("ZeroDivisionError" in words and "of rank 1" in words for words in said)
    else:
        assert said == [str(error)] * 2
        assert [type(one.error) for one in ended] == [type(error)] * 2


def with_mistake_at_load(team: Team, config: TrialConfig, folder: str) -> None:
    if team.rank == 1:
        os.environ["RIN_CACHE"] = f"{folder}/not a folder"
    Trial(config, team=team)


@pytest.mark.slow
def test_a_mistake_that_one_process_finds_at_load_is_told_by_all(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "not a folder").touch()
    ended = together(2, with_mistake_at_load, tmp_path, tiny(*TWO), str(tmp_path))
    assert [type(one.error) for one in ended] == [ConfigError] * 2
    assert str(ended[0].error) == str(ended[1].error)


def with_doubt(team: Team, config: TrialConfig) -> None:
    """The engine of rank 1 alone is found to be apart, each time."""
    trainable.trial.start_backend = lambda config, policy, told: Echo(policy, lambda *_: 0.0)  # type: ignore[assignment]
    trial = Trial(config, team=team)
    check = trainable.engines.gate.check

    def doubtful(*arguments: Any) -> Any:
        if team.rank == 1:
            raise LogpsApart("rollout_mismatch", "the engine of rank 1")
        return check(*arguments)

    trainable.engines.gate.check = doubtful
    trial.step()


@pytest.mark.slow
def test_the_gate_is_one_decision_of_all(tiny: Tiny, tmp_path: Path) -> None:
    ended = together(2, with_doubt, tmp_path, tiny(*TWO))
    assert [str(one.error) for one in ended] == ["rollout_mismatch: the engine of rank 1"] * 2


def with_death(team: Team, config: TrialConfig) -> list[str]:
    trial = Trial(config, team=team)
    if team.rank == 1:
        trial._tell_death("killed")
    trial.step()
    return list(trial.receipt().warnings)


@pytest.mark.slow
def test_what_one_process_is_warned_of_stands_in_the_receipt(tiny: Tiny, tmp_path: Path) -> None:
    for ended in together(2, with_death, tmp_path, tiny(*TWO)):
        assert "step 0: the engine died (killed) and was started again" in ended.value


def with_other_weight(team: Team, config: TrialConfig) -> None:
    trial = Trial(config, team=team)
    if team.rank == 1:
        next(iter(trial.policy.trainable().values())).data.view(-1)[0] += 1e-6
    trial.step()


def with_other_seed(team: Team, config: TrialConfig) -> None:
    Trial(config.model_copy(update={"seed": team.rank}), team=team)


def elsewhere(team: Team) -> None:
    with team.agreed("here"):
        team.gather("there" if team.rank else "somewhere", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "said"),
    [(with_other_weight, "weights after a step differ"), (with_other_seed, "settings"), (elsewhere, "come apart")],
)
def test_processes_that_are_not_of_one_mind_are_a_bug_of_all(tiny: Tiny, tmp_path: Path, work: Any, said: str) -> None:
    ended = together(2, work, tmp_path, *(() if work is elsewhere else (tiny(*TWO),)))
    assert [said in str(one.error) for one in ended] == [True, True]


def waits(team: Team, told: Path) -> None:
    if team.rank == 0:
        try:
            team.gather("here", 1)
        finally:
            told.touch()
    while not told.exists():
        time.sleep(0.01)


@pytest.mark.slow
def test_nobody_waits_longer_than_the_group_allows(tmp_path: Path) -> None:
    ended, _ = together(2, waits, tmp_path, tmp_path / "told", group_seconds=0.5)
    assert isinstance(ended.error, TrialFailed)
    assert "too late, at here" in ended.error.reason
    assert ended.seconds < 10


def summed(team: Team, shares: int, bucket: int) -> list[list[torch.Tensor]]:
    """The sums, and what was added up, of three tensors of odd sizes."""
    trainable.team._BUCKET = bucket
    team = Team(team.rank, team.size, shares=shares)
    rows = [
        [torch.randn(size, generator=generator("row", share, size)) for size in (7, 1, 30)] for share in range(shares)
    ]
    expected = [sum(tensors[1:], tensors[0]) for tensors in zip(*rows, strict=True)]
    return [team.add_up([[tensor.clone() for tensor in rows[share]] for share in team.own]), expected]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "shares", "bucket"), [(2, 2, 1 << 24), (2, 5, 8), (3, 4, 5)])
def test_a_sum_has_the_order_of_the_shares(tmp_path: Path, size: int, shares: int, bucket: int) -> None:
    for ended in together(size, summed, tmp_path, shares, bucket):
        assert ended.error is None
        found, expected = ended.value
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

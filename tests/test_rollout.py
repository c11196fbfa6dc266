"""Sampling: the probabilities it reports are those it sampled from, and those that training computes again.

Tolerances. At 16 bits, and with 4-bit weights, two forward passes differ by the order of their sums: 1e-4 is far above
that. With 4-bit activations a last-bit difference can flip a rounding, which no tolerance covers; where such a flip
would be possible the test asks that (nearly) all tokens agree, or compares computations of one shape, which agree bit
for bit.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import trainable.rollout
from spaces.config import ConfigError, ModelConfig, QuantConfig, TaskConfig
from tests.conftest import ModelFolder, Tiny, episode, ragged_prompts, sampled_groups
from trainable.engines.engine import Request
from trainable.episode import Completion
from trainable.forward.logps import completion_logps, make_batch
from trainable.forward.transformer import left_padded, positions
from trainable.noise import injected, noise_targets
from trainable.policy.embedded import character_tokenizer
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy, deployed, unquantized
from trainable.rollout import _completions, encode_prompts, generate, judge, sample
from trainable.seeds import generator
from trainable.tasks.table import build_task
from trainable.tasks.task import Question, each

W16A16 = QuantConfig(weights="none", activations="none")
W4A16 = QuantConfig(activations="none")
W4A4 = QuantConfig()
MODES = [W16A16, W4A16, W4A4]
FLIPPED_SHARE = 0.02
"""Tokens behind a flipped rounding, at most; measured below 0.005 on these models."""


def greedy(policy: Policy, prompts: list[list[int]], **options: Any) -> list[Completion]:
    arguments: dict[str, Any] = {"group_size": 1, "max_new_tokens": 12, "batch_size": 64, **options}
    with deployed(policy):
        groups = generate(policy, Request(prompts=prompts, temperature=0.0, **arguments))
    return [group[0] for group in groups]


def gaps(policy: Policy, prompts: list[list[int]], temperature: float, **options: Any) -> torch.Tensor:
    """|log-prob in training - log-prob at sampling| of every sampled token."""
    groups = sampled_groups(policy, prompts, temperature=temperature, **options)
    batch = make_batch(policy, groups, torch.zeros(len(groups), 4))
    logps = completion_logps(policy, batch, temperature)
    return (logps.detach() - batch.rollout_logps).abs()[batch.mask > 0]


# --- one arithmetic for rollout and training --------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("quant", MODES, ids=lambda q: q.mode)
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_training_computes_the_sampled_log_probs_again(
    tiny: Tiny, quant: QuantConfig, temperature: float, adapter: str
) -> None:
    config = tiny(f"model.adapter={adapter}")
    policy = load_policy(config.model, quant, seed=0)
    task = build_task(config.task)
    prompts = encode_prompts(policy, task.sample(16, seed=0, step=0, batch=0), config.task, 64)
    assert gaps(policy, prompts, temperature, max_new_tokens=4).max() < 1e-4


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("quant", [W16A16, W4A16], ids=lambda q: q.mode)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_training_computes_the_sampled_log_probs_again_behind_ragged_prompts(
    model_folder: ModelFolder, kind: str, attention: Any, quant: QuantConfig, temperature: float
) -> None:
    policy = load_policy(ModelConfig(name=model_folder(kind), attention=attention), quant, seed=0)
    assert gaps(policy, ragged_prompts(8), temperature).max() < 1e-4


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_with_4_bit_activations_nearly_all_log_probs_agree(model_folder: ModelFolder, kind: str) -> None:
    policy = load_policy(ModelConfig(name=model_folder(kind)), W4A4, seed=0)
    assert (gaps(policy, ragged_prompts(16), 1.0) > 1e-4).float().mean() < FLIPPED_SHARE


def test_the_noisy_policy_reports_its_own_log_probs(tiny: Tiny) -> None:
    config = tiny("noise.sigma_start=0.3", "noise.sigma_end=0.3", "noise.num_stages=1")
    policy = load_policy(config.model, config.quant, seed=0)
    targets = noise_targets(policy, config.noise)
    prompts = [[3, 12, 4, 14], [5, 12, 5, 14]]

    def noisy() -> Any:
        return injected(policy, config.noise, targets, step=0, total_steps=1, seed=0)

    with noisy():
        asked = Request(
            prompts=prompts, group_size=4, max_new_tokens=4, temperature=1.0, batch_size=8, draw=("test", 0)
        )
        rows = generate(policy, asked)
    groups = [
        tuple(episode(0.0, completion=c, prompt_ids=p) for c in row) for p, row in zip(prompts, rows, strict=True)
    ]
    batch = make_batch(policy, groups, torch.zeros(2, 4))
    inside = batch.mask > 0
    with noisy():
        again = completion_logps(policy, batch, 1.0)
    clean = completion_logps(policy, batch, 1.0)
    assert (again - batch.rollout_logps).abs()[inside].max() < 1e-4
    assert (clean - batch.rollout_logps).abs()[inside].max() > 0.01, "the noise was there"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", [W4A4, QuantConfig(weights="nvfp4", activations="nvfp4")], ids=["mxfp4", "nvfp4"])
def test_padding_gives_finite_log_probs_and_gradients(
    model_folder: ModelFolder, attention: Any, dtype: Any, quant: QuantConfig
) -> None:
    """A padded row attends to nothing, or only to itself: a NaN made there would reach every weight by way of
    0 * NaN."""
    policy = load_policy(ModelConfig(name=model_folder(), attention=attention, dtype=dtype), quant, seed=0)
    batch = make_batch(policy, sampled_groups(policy, ragged_prompts(4)), torch.zeros(4, 4))
    assert batch.mask.min() == 0
    assert batch.prompt_mask.min() == 0
    logps = completion_logps(policy, batch, 1.0)
    assert logps.isfinite().all()
    gradients = torch.autograd.grad((logps * batch.mask).sum(), list(policy.trainable().values()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_log_probs_and_entropies_are_those_of_the_bare_completion(model_folder: ModelFolder) -> None:
    """Row by row without any padding, against torch.distributions."""
    policy = load_policy(ModelConfig(name=model_folder("llama")), W16A16, seed=0)
    groups = sampled_groups(policy, ragged_prompts(4), temperature=0.7)
    batch = make_batch(policy, groups, torch.zeros(4, 4))
    logps = completion_logps(policy, batch, 0.7)
    for row, e in enumerate(e for group in groups for e in group):
        ids = torch.tensor([[*e.prompt_ids, *e.completion.ids]])
        length = len(e.completion.ids)
        distribution: Any = torch.distributions.Categorical(
            logits=policy.model(input_ids=ids).logits[0, -length - 1 : -1] / 0.7
        )
        torch.testing.assert_close(logps[row, :length], distribution.log_prob(ids[0, -length:]), atol=1e-4, rtol=0)
        assert e.completion.entropy == pytest.approx(distribution.entropy().mean().item(), abs=1e-4)


# --- greedy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", MODES, ids=lambda q: q.mode)
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_greedy_answers_are_those_of_transformers(model_folder: ModelFolder, kind: str, quant: QuantConfig) -> None:
    policy = load_policy(ModelConfig(name=model_folder(kind)), quant, seed=0)
    prompts = ragged_prompts(40)
    ids, mask = left_padded(prompts, 0, policy.device)
    model: Any = policy.model
    out = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=12, pad_token_id=0, eos_token_id=1
    )
    expected = [row[: row.index(1) + 1] if 1 in row else row for row in out[:, ids.shape[1] :].tolist()]
    assert len({len(row) for row in expected}) > 1, "some end early"
    assert [list(completion.ids) for completion in greedy(policy, prompts)] == expected


def test_the_unquantised_model_answers_as_transformers_does(tiny: Tiny) -> None:
    config = tiny()
    policy, plain = (load_policy(config.model, quant, seed=0) for quant in (W4A4, W16A16))
    prompts = encode_prompts(policy, build_task(config.task).held_out("selection", 10), config.task, 64)
    with unquantized(policy):
        assert greedy(policy, prompts) == greedy(plain, prompts)


def test_greedy_takes_the_likeliest_token() -> None:
    logits = torch.randn(50, 7, generator=generator("logits"))
    token, logp, _ = sample(logits, 0.0, None)
    assert torch.equal(token, logits.argmax(-1))
    torch.testing.assert_close(logp, torch.log_softmax(logits, -1).amax(-1))


# --- rows and batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quant",
    [*MODES, QuantConfig(weights="nvfp4", activations="nvfp4"), QuantConfig(activations="mxfp8")],
    ids=["W16A16", "W4A16", "W4A4", "nvfp4", "W4A8"],
)
def test_a_row_does_not_depend_on_its_companions(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, quant: QuantConfig
) -> None:
    """But for those that end: a smaller batch may add up in another order."""
    monkeypatch.setattr(trainable.rollout, "_WORTH_RETIRING", 2.0)
    policy = load_policy(ModelConfig(name=model_folder()), quant, seed=0)
    prompts = ragged_prompts(8)
    others = [[(token - 2 + 5) % 13 + 2 for token in prompt] for prompt in prompts]
    mixed = [prompt if i % 2 == 0 else other for i, (prompt, other) in enumerate(zip(prompts, others, strict=True))]
    alone, together = greedy(policy, prompts), greedy(policy, mixed)
    assert alone[::2] == together[::2]
    assert alone[1::2] != together[1::2]


@pytest.mark.parametrize("quant", [W16A16, W4A16], ids=lambda q: q.mode)
def test_greedy_answers_do_not_depend_on_the_batch_size(model_folder: ModelFolder, quant: QuantConfig) -> None:
    policy = load_policy(ModelConfig(name=model_folder("llama")), quant, seed=0)
    prompts = ragged_prompts(8)
    together = greedy(policy, prompts)
    for size in (1, 3):
        parts = greedy(policy, prompts, batch_size=size)
        assert [c.ids for c in parts] == [c.ids for c in together]
        for part, whole in zip(parts, together, strict=True):
            assert part.logps == pytest.approx(whole.logps, abs=1e-4)


def test_a_prompt_has_its_own_group(model_folder: ModelFolder) -> None:
    """Greedy members of a group are equal, and equal to the prompt's answer alone, in order."""
    policy = load_policy(ModelConfig(name=model_folder()), W16A16, seed=0)
    prompts = ragged_prompts(5)
    with deployed(policy):
        asked = Request(prompts=prompts, group_size=3, max_new_tokens=8, temperature=0.0, batch_size=6)
        groups = generate(policy, asked)
    expected = [c.ids for c in greedy(policy, prompts, max_new_tokens=8)]
    assert [[c.ids for c in group] for group in groups] == [[ids] * 3 for ids in expected]


def test_position_ids_ignore_left_padding() -> None:
    ids, mask = left_padded([[5, 6, 7], [8]], 0, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions(mask).tolist() == [[0, 1, 2], [0, 0, 0]]


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_match_probabilities(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -float("inf")])
    draws = 40_000
    token, logp, _ = sample(logits.expand(draws, 5), temperature, generator("frequencies", temperature))
    probability = torch.softmax(logits / temperature, -1)
    counts = torch.bincount(token, minlength=5)
    assert counts[4] == 0
    expected = probability[:4] * draws
    chi_squared = ((counts[:4] - expected) ** 2 / expected).sum().item()
    assert chi_squared < 21.1, "3 degrees of freedom, p = 1e-4"
    torch.testing.assert_close(logp.exp(), probability[token])


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_entropy_is_that_of_the_sampled_distribution(temperature: float, scale: float) -> None:
    logits = scale * torch.randn(64, 15, generator=generator("entropy"))
    _, _, entropy = sample(logits, temperature, generator("draw"))
    distribution: Any = torch.distributions.Categorical(logits=logits / temperature)
    torch.testing.assert_close(entropy, distribution.entropy())


def test_an_impossible_token_adds_nothing_to_the_entropy() -> None:
    _, _, entropy = sample(torch.tensor([[0.0, 0.0, -float("inf")]]), 1.0, generator("draw"))
    assert entropy.item() == pytest.approx(torch.tensor(2.0).log().item())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "bad", [[float("nan")] * 4, [0.0, float("inf"), 0.0, 0.0], [0.0, float("nan"), 0.0, 0.0], [-float("inf")] * 4]
)
def test_a_row_that_is_not_finite_is_nan_and_leaves_the_others_alone(bad: list[float], temperature: float) -> None:
    logits = torch.randn(6, 4, generator=generator("logits"))
    spoilt = logits.clone()
    spoilt[2] = torch.tensor(bad)
    expected = sample(logits, temperature, generator("draw"))
    token, logp, entropy = sample(spoilt, temperature, generator("draw"))
    assert 0 <= int(token[2]) < 4
    assert logp[2].isnan()
    assert entropy[2].isnan()
    others = torch.tensor([0, 1, 3, 4, 5])
    for value, clean in zip((token, logp, entropy), expected, strict=True):
        assert torch.equal(value[others], clean[others])


def test_the_generator_alone_decides_what_is_sampled(model_folder: ModelFolder) -> None:
    policy = load_policy(ModelConfig(name=model_folder()), W4A4, seed=0)
    prompts = ragged_prompts(4)
    first = sampled_groups(policy, prompts, seed=1)
    torch.rand(5)
    assert sampled_groups(policy, prompts, seed=1) == first
    assert sampled_groups(policy, prompts, seed=2) != first


# --- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "ids", "finished"),
    [
        ([1, 1, 1, 1], (1,), True),
        ([5, 6, 1, 1], (5, 6, 1), True),
        ([5, 6, 7, 1], (5, 6, 7, 1), True),
        ([5, 6, 7, 8], (5, 6, 7, 8), False),
        ([0, 0, 1, 0], (0, 0, 1), True),
        ([5, 9, 1, 1], (5, 9), True),
    ],
)
def test_completions_are_cut_behind_the_end_token(row: list[int], ids: tuple[int, ...], finished: bool) -> None:
    logps, entropies = torch.tensor([[-1.0, -2.0, -4.0, -8.0]]), torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    ((completion,),) = _completions(torch.tensor([row]), logps, entropies, torch.tensor([1, 9]), 1)
    assert completion.ids == ids
    assert completion.logps == (-1.0, -2.0, -4.0, -8.0)[: len(ids)]
    assert completion.entropy == pytest.approx(sum((1.0, 2.0, 3.0, 6.0)[: len(ids)]) / len(ids))
    assert completion.finished is finished


def test_whatever_generation_config_lists_ends_a_completion(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder(), tmp_path / "model"))
    prompts, options = ragged_prompts(1), {"group_size": 1, "temperature": 0.0, "max_new_tokens": 16}
    ((before,),) = sampled_groups(load_policy(ModelConfig(name=str(folder)), W16A16, seed=0), prompts, **options)
    first = before.completion.ids[0]
    assert len(before.completion.ids) > 1
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, first]}))
    policy = load_policy(ModelConfig(name=str(folder)), W16A16, seed=0)
    assert policy.ends == tuple(sorted({1, first}))
    ((after,),) = sampled_groups(policy, prompts, **options)
    assert (after.completion.ids, after.completion.finished) == ((first,), True)


@pytest.mark.parametrize("listed", [[3], None], ids=["listed", "none"])
def test_a_tokenizer_without_end_and_pad(model_folder: ModelFolder, tmp_path: Path, listed: list[int] | None) -> None:
    """Takes those of generation_config.json, or is refused; an end that is an architecture's default is none."""
    folder = Path(shutil.copytree(model_folder(), tmp_path / "model"))
    tokenizer = character_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    if listed is None:
        with pytest.raises(
            ConfigError, match=r"no token ends a completion; name one as eos_token in its tokenizer_con"
        ):
            load_policy(ModelConfig(name=str(folder)), W16A16, seed=0)
        return
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    policy = load_policy(ModelConfig(name=str(folder)), W16A16, seed=0)
    assert (policy.ends, policy.tokenizer.pad_token_id) == ((3,), 3)


@pytest.mark.parametrize("limit", [1, 5, 30])
def test_completions_end_with_the_end_token_or_at_the_limit(model_folder: ModelFolder, limit: int) -> None:
    policy = load_policy(ModelConfig(name=model_folder()), W4A4, seed=0)
    groups = sampled_groups(policy, ragged_prompts(8), max_new_tokens=limit)
    completions = [e.completion for group in groups for e in group]
    for completion in completions:
        assert 1 not in completion.ids[:-1]
        assert completion.finished == (completion.ids[-1] == 1)
        assert len(completion.ids) == limit or (completion.finished and len(completion.ids) < limit)
        assert len(completion.logps) == len(completion.ids)
        assert all(logp <= 0 for logp in completion.logps)
    assert any(not c.finished for c in completions) or limit == 30
    assert any(c.finished for c in completions)


# --- prompts ----------------------------------------------------------------------------------------------------------


def questions(*prompts: str) -> list[Question]:
    return [Question(prompt=prompt, answer="0") for prompt in prompts]


def test_a_prompt_of_just_the_limit_passes_and_a_longer_one_is_refused(model_folder: ModelFolder) -> None:
    policy = load_policy(ModelConfig(name=model_folder()), W16A16, seed=0)
    assert encode_prompts(policy, questions("1+2=", "12+3="), TaskConfig(), 5) == [[3, 12, 4, 14], [3, 4, 12, 5, 14]]
    with pytest.raises(
        ConfigError, match=r"max_prompt_tokens=4: the prompt of '12\+3=' has 5 tokens; raise it to at least that"
    ):
        encode_prompts(policy, questions("1+2=", "12+3="), TaskConfig(), 4)


def test_the_chat_template_is_used_where_the_task_asks_for_it(model_folder: ModelFolder) -> None:
    policy = load_policy(ModelConfig(name=model_folder(text=True)), W16A16, seed=0)
    tokenizer: Any = policy.tokenizer
    plain, chat = (TaskConfig(name="reasoning_gym:chain_sum", chat=chat) for chat in (False, True))
    assert encode_prompts(policy, questions("ab"), plain, 64) == [tokenizer.convert_tokens_to_ids(["a", "b"])]
    assert encode_prompts(policy, questions("ab"), chat, 64) == [
        tokenizer.convert_tokens_to_ids(["<user>", "a", "b", "<assistant>"])
    ]


def test_a_template_that_prints_the_date_prints_that_of_the_task(model_folder: ModelFolder) -> None:
    """As Llama's and others do; with the day's date a resumed trial, or its pair, would be asked otherwise."""
    policy = load_policy(ModelConfig(name=model_folder(text=True)), W16A16, seed=0)
    tokenizer: Any = policy.tokenizer
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y %H:%M') }}{{ messages[0].content }}"

    def text_of(**date: str) -> str:
        task = TaskConfig(name="reasoning_gym:chain_sum", chat=True, **date)
        decoded: str = tokenizer.decode(encode_prompts(policy, questions("ab"), task, 64)[0])
        return decoded

    assert text_of() == "26 Jul 2024 00:00ab"
    assert text_of(chat_date="2025-01-31") == "31 Jan 2025 00:00ab"


def test_a_chat_without_a_template_is_an_error(model_folder: ModelFolder) -> None:
    policy = load_policy(ModelConfig(name=model_folder()), W16A16, seed=0)
    with pytest.raises(
        ConfigError, match=r"task\.chat=true: the model's tokenizer has no chat template; set task\.chat=false"
    ):
        encode_prompts(policy, questions("1+1="), TaskConfig(name="reasoning_gym:chain_sum", chat=True), 64)


# --- judging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% if messages[0].role != 'system' %}{{ raise_exception('a system message comes first') }}{% endif %}",
        "{{ messages[1].content }}{{ messages[1]['x'] + 1 }}",
    ],
)
def test_a_template_that_refuses_a_user_s_message_is_told_in_one_line(model_folder: ModelFolder, template: str) -> None:
    policy = load_policy(ModelConfig(name=model_folder(text=True)), W16A16, seed=0)
    policy.tokenizer.chat_template = template
    with pytest.raises(
        ConfigError, match=r"task\.chat=true: .* refuses a user's message alone \(.*\); set task\.chat=f"
    ):
        encode_prompts(policy, questions("1+1="), TaskConfig(name="reasoning_gym:chain_sum", chat=True), 64)


def completion(text: str, policy: Policy) -> Completion:
    ids = tuple(policy.tokenizer.convert_tokens_to_ids(list(text)))
    return Completion(ids=(*ids, 1), logps=(-1.0,) * (len(ids) + 1), entropy=1.0, finished=True)


def test_each_completion_is_judged_by_its_own_question(tiny: Tiny) -> None:
    config = tiny()
    policy, task = load_policy(config.model, config.quant, seed=0), build_task(config.task)
    asked = [Question(prompt="1+2=", answer="3"), Question(prompt="3+4=", answer="7")]
    rows = [[completion(text, policy) for text in texts] for texts in (("3", "7", "+3"), ("7", "3", "07"))]
    groups = judge(policy, task, asked, [[3, 12, 4, 14], [5, 12, 6, 14]], rows)
    assert [[e.score.reward for e in group] for group in groups] == [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert [[e.text for e in group] for group in groups] == [["3", "7", "+3"], ["7", "3", "07"]]
    assert [group[0].question for group in groups] == asked
    assert groups[1][0].prompt_ids == (5, 12, 6, 14)


def test_a_reward_function_that_raises_is_not_hidden(tiny: Tiny) -> None:
    config = tiny()
    policy, task = load_policy(config.model, config.quant, seed=0), build_task(config.task)

    def broken(question: Question, text: str) -> float:
        raise ZeroDivisionError("a bug in a reward")

    task.reward = each(exact=broken)
    with pytest.raises(ZeroDivisionError, match="a bug in a reward"):
        judge(policy, task, [Question(prompt="1+2=", answer="3")], [[3]], [[completion("3", policy)]])

"""Prompts: what a model reads is what was asked, whatever its chat template makes of it."""

from typing import Any

import pytest

from spaces.config import ConfigError, ModelConfig, QuantConfig, TaskConfig
from tests.conftest import ModelFolder, sampled_groups
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy
from trainable.rollout import encode_prompts
from trainable.tasks.task import Message, Question, as_text

TALK: tuple[Message, ...] = (("system", "Be short."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "1+1="))
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is false %}-{% endif %}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
DROPS_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content | trim }}{% endif %}{% endfor %}"
)
DROPS_USER = "{% for m in messages %}{% if m.role != 'user' %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
LAST_ONLY = "<user>{{ messages[-1].content }}"


@pytest.fixture
def policy(model_folder: ModelFolder) -> Policy:
    return load_policy(
        ModelConfig(name=model_folder(text=True)), QuantConfig(weights="none", activations="none"), seed=0
    )


def asked(messages: tuple[Message, ...] = TALK) -> Question:
    return Question(prompt=as_text(messages), messages=messages, answer="2", where="q.jsonl:7")


def read(policy: Policy, question: Question, template: str | None = CHATML, **task: Any) -> str:
    policy.tokenizer.chat_template = template
    text: str = policy.tokenizer.decode(
        encode_prompts(policy, [question], TaskConfig(name="reasoning_gym:gcd", **task), 256)[0]
    )
    return text


def test_a_conversation_goes_through_the_template_without_being_told_to(policy: Policy) -> None:
    said = "<system>Be short.<user>Hi<assistant>Yes?<user>1+1=<assistant>"
    assert read(policy, asked()) == said
    assert read(policy, asked(), chat=True) == said


def test_questions_of_both_kinds_are_read_in_their_order(policy: Policy) -> None:
    policy.tokenizer.chat_template = CHATML
    texts = [Question(prompt=text, answer="") for text in ("a", "b")]
    encoded = encode_prompts(policy, [texts[0], asked(), texts[1]], TaskConfig(name="reasoning_gym:gcd"), 256)
    first, _, last = (policy.tokenizer.decode(ids) for ids in encoded)
    assert (first, last) == ("a", "b")


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM], ids=["refuses it", "drops it"])
def test_where_there_is_no_system_role_its_text_goes_before_the_first_of_the_user(
    policy: Policy, template: str
) -> None:
    assert read(policy, asked(), template).startswith("<user>Be short.\n\nHi<assistant>Yes?<user>1+1=")


@pytest.mark.parametrize("template", [DROPS_USER, LAST_ONLY])
def test_a_template_that_drops_a_message_is_refused(policy: Policy, template: str) -> None:
    said = (
        r"q\.jsonl:7: .* refuses its messages \(system, user, assistant, user: it leaves out what the \w+ says\); "
        r"set task\.prompt=\{question\}"
    )
    with pytest.raises(ConfigError, match=said):
        read(policy, asked(), template)


def test_a_conversation_without_a_template_is_an_error_with_the_way_out(policy: Policy) -> None:
    with pytest.raises(ConfigError, match=r"q\.jsonl:7: .* no chat template; set task\.prompt=\{question\}"):
        read(policy, asked(), None)


def test_options_reach_the_template_and_those_that_it_does_not_read_are_refused(policy: Policy) -> None:
    text = Question(prompt="1+1=", answer="2")
    assert read(policy, text, chat=True, chat_options={"enable_thinking": False}) == "<user>1+1=<assistant>-"
    with pytest.raises(ConfigError, match=r"task\.chat_options=.*: the model's chat template knows no enable_thoughts"):
        read(policy, text, chat=True, chat_options={"enable_thoughts": False})
    with pytest.raises(ValueError, match="add_generation_prompt is set for every prompt alike"):
        TaskConfig(name="gsm8k", chat=True, chat_options={"add_generation_prompt": False})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no use without a chat template; set chat=true"):
        TaskConfig(name="gsm8k", chat_options={"enable_thinking": False})  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", ["ab", "<bos>ab"])
@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_begins_with_one_bos_whoever_writes_it(policy: Policy, prompt: str, chat: bool) -> None:
    """The tokenizer, the template, or the row itself."""
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = policy.tokenizer
    tokenizer.bos_token = "<user>"
    single = TemplateProcessing(single="<user> $A", special_tokens=[("<user>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = single
    question = Question(prompt=prompt.replace("<bos>", "<user>"), answer="")
    assert (
        read(policy, question, "{{ bos_token }}" * ("<bos>" not in prompt) + "{{ messages[0].content }}", chat=chat)
        == "<user>ab"
    )


def test_a_pad_token_that_is_the_end_token_changes_nothing(policy: Policy) -> None:
    prompts = [[10, 11, 12, 13], [14]]
    apart = sampled_groups(policy, prompts)
    policy.tokenizer.pad_token = policy.tokenizer.eos_token
    same = sampled_groups(policy, prompts)
    assert [[e.completion for e in group] for group in same] == [[e.completion for e in group] for group in apart]

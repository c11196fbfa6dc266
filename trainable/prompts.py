"""A question as the text that a model reads: as it stands, or in the chat template of the model's tokenizer.

A question that is a list of messages needs a template. Templates differ in what they take, so what they did is looked
at: every message must be found in the text, since a template that does not know a role may drop it without a word.
Where a template has no place for a system message (it refuses it, or leaves it out), its text goes before the first
message of the user, with a blank line between the two. Options that the template does not read are an error, for they
would do nothing; dates that it prints are those of the task.
"""

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from spaces.config import ConfigError, TaskConfig
from trainable.tasks.task import Message, Question


def is_templated(question: Question, task: TaskConfig) -> bool:
    """Whether its text comes from the chat template, which writes special tokens itself."""
    return task.chat or bool(question.messages)


def prompt_text(tokenizer: Any, question: Question, task: TaskConfig) -> str:
    """Raises ConfigError for messages without a template, and for a template that refuses or drops them."""
    if not is_templated(question, task):
        return question.prompt
    if tokenizer.chat_template is None:
        if question.messages:
            raise ConfigError(
                f"{question.name}: the prompt is a list of messages, and the model's tokenizer has no chat template; "
                "set task.prompt={question}, which asks their text plainly, or give a model that chats"
            )
        raise ConfigError("task.chat=true: the model's tokenizer has no chat template; set task.chat=false")
    for option, _ in task.chat_options:
        if not re.search(rf"\b{re.escape(option)}\b", tokenizer.get_chat_template()):
            raise ConfigError(
                f"task.chat_options={dict(task.chat_options)}: the model's chat template knows no {option}; "
                "leave it out"
            )
    messages = question.messages or (("user", question.prompt),)
    ways = [messages, *_system_merged(messages)]
    refusals: list[Exception] = []
    for way in ways:
        try:
            return _rendered(tokenizer, way, task)
        except (TemplateError, TypeError) as error:  # a template raises, or computes with what is not there
            refusals.append(error)
    raise _refused(question, refusals[-1]) from refusals[-1]


def _rendered(tokenizer: Any, messages: Sequence[Message], task: TaskConfig) -> str:
    """Raises what the template raises, and TemplateError for a message that it drops."""
    text: str = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        add_generation_prompt=True,
        tokenize=False,
        strftime_now=task.chat_date.strftime,  # in the place of transformers' own
        **dict(task.chat_options),
    )
    for role, content in messages:
        if role != "assistant" and content.strip() not in text:  # an assistant's thoughts are cut by some, on purpose
            raise TemplateError(f"it leaves out what the {role} says")
    return text


def _system_merged(messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    """The same without a system message in front, where there is one to merge."""
    if len(messages) < 2 or (messages[0][0], messages[1][0]) != ("system", "user"):
        return []
    (_, system), (role, first), *others = messages
    return [((role, f"{system}\n\n{first}"), *others)]


def _refused(question: Question, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())
    if not question.messages:
        return ConfigError(
            f"task.chat=true: the tokenizer's chat template refuses a user's message alone ({reason}); "
            "set task.chat=false, with task.prompt for what should stand around a question"
        )
    roles = ", ".join(role for role, _ in question.messages)
    return ConfigError(
        f"{question.name}: the tokenizer's chat template refuses its messages ({roles}: {reason}); "
        "set task.prompt={question}, which asks their text plainly"
    )

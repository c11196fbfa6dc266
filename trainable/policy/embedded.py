"""The embedded base model: a small Qwen2 trained here on sums, so that a whole study runs without network or GPU.

It is built the way the real thing came about. Phase 1 teaches well-formed answers ("12+345=" -> "357"). Phase 2 then
spoils the format: in 60 % of the answers an unwanted "+" stands first, the counterpart of a chat model that does not
know GSM8K's "####". A base from phase 1 alone cannot tell "noise does not help" from "nothing helps": in 29 steps GRPO
gains nothing on it. After phase 2 reinforcement has something to win back, and a run at full precision does (the
positive control).

The base is cached under the user's cache folder by the hash of its recipe; a file lock keeps two processes from
building it twice; the build runs on a fixed number of threads, because float sums depend on it: same recipe, same bits
on one kind of machine.
"""

import math
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as hf_logging

from spaces.cache import base_folder
from spaces.config import BaseRecipe, ConfigError
from trainable.hashing import stable_hash
from trainable.tasks.addition import addition_question

hf_logging.disable_progress_bar()

BUILD_THREADS = 2
_CHARACTERS = ("<pad>", "<eos>", *"0123456789+-=")
_WARMUP_STEPS = 50

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what is going on)."""


def ensure_base(recipe: BaseRecipe, progress: Progress | None = None) -> Path:
    """The folder with model and tokenizer; built first if nobody has, while other processes wait for it."""
    folder = base_folder(recipe)
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"RIN_CACHE={folder.parent}: cannot be made ({error.strerror}), and the base model has no place; "
                "set RIN_CACHE to a folder that you may write to"
            ) from None
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                _build_into(folder, recipe, progress or (lambda done, total, what: None))
    return folder


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; padding on the left, as generation wants it."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(_CHARACTERS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def _build_into(folder: Path, recipe: BaseRecipe, progress: Progress) -> None:
    """Train, then move into place at once: a build that is killed leaves nothing, and no half-made base."""
    threads = torch.get_num_threads()
    torch.set_num_threads(BUILD_THREADS)
    try:
        model = train_base(recipe, progress)
    finally:
        torch.set_num_threads(threads)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        model.should_save_on_this_rank = lambda is_main_process: True  # whichever process of a trial came first
        model.save_pretrained(scratch)
        character_tokenizer().save_pretrained(scratch)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def train_base(recipe: BaseRecipe, progress: Progress) -> Qwen2ForCausalLM:
    """Both supervised phases; loss on the answer's tokens and the end token alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = Qwen2ForCausalLM(architecture(recipe))
    rng = random.Random(stable_hash("embedded", recipe.seed))
    total = recipe.clean_steps + recipe.signed_steps
    phases = (
        ("learning sums", recipe.clean_steps, recipe.clean_learning_rate, 0.0),
        ("learning a bad habit", recipe.signed_steps, recipe.signed_learning_rate, recipe.signed_share),
    )
    done = 0
    for what, steps, peak, signed_share in phases:
        optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01, betas=(0.9, 0.98))
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = peak * _warm_cosine(step, steps)
            ids, labels = _batch(rng, recipe, signed_share)  # [B, T] both
            logits = model(input_ids=ids, use_cache=False).logits  # [B, T, V]
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
            progress(done, total, what)
    return model.eval()


def _warm_cosine(step: int, steps: int) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to 10 %."""
    warm = min(1.0, (step + 1) / _WARMUP_STEPS)
    return warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def architecture(recipe: BaseRecipe) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(_CHARACTERS),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.depth,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )


def _batch(rng: random.Random, recipe: BaseRecipe, signed_share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels [B, T], right-padded; -100 where there is no loss."""
    index = {c: i for i, c in enumerate(_CHARACTERS)}
    rows: list[tuple[list[int], int]] = []
    for _ in range(recipe.batch_size):
        question = addition_question(rng, recipe.digits, "train", short_ones=True)
        sign = "+" if rng.random() < signed_share else ""
        prompt = [index[c] for c in question.prompt]
        rows.append(([*prompt, *(index[c] for c in sign + question.answer), 1], len(prompt)))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row, _ in rows])  # [B, T]
    labels = torch.tensor([[-100] * start + row[start:] + [-100] * (width - len(row)) for row, start in rows])  # [B, T]
    return ids, labels


def describe(recipe: BaseRecipe) -> dict[str, Any]:
    """What a reader of the cache would like to know."""
    return {"folder": str(base_folder(recipe)), "built": base_folder(recipe).exists(), **recipe.model_dump()}

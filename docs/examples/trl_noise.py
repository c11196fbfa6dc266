"""GRPO by TRL with 4-bit linear layers and noise in the rollouts: sums, answered right or wrong.

python docs/examples/trl_noise.py                    # the embedded base model (made here once, in two minutes)
python docs/examples/trl_noise.py MODEL best.yaml    # a model of yours, with the settings that a sweep found
"""

import random
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from spaces.config import BaseRecipe
from trainable.library import CollapseConfig, NoiseConfig, QuantConfig, RinCallback, quantize, settings
from trainable.policy.embedded import ensure_base


def right(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """TRL's reward function."""
    return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]


def sums(count: int, seed: int) -> Dataset:
    rng = random.Random(seed)
    pairs = [(rng.randrange(1000), rng.randrange(1000)) for _ in range(count)]
    return Dataset.from_list([{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs])


def main(model_folder: str, best: str | None = None, out: str = "out") -> RinCallback:
    if best is None:
        quant, noise, collapse = QuantConfig(), NoiseConfig(sigma_start=0.01), CollapseConfig()
    else:
        found = settings(best)
        quant, noise, collapse = found.quant, found.noise, found.collapse

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32")
    receipt = quantize(model, quant)
    print(f"{len(receipt.quantized)} layers in {receipt.arithmetic[0]['weights']}" if receipt.quantized else "16 bits")

    trainer = GRPOTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(model_folder, padding_side="left"),
        reward_funcs=right,
        train_dataset=sums(4096, seed=0),
        eval_dataset=sums(64, seed=1),
        args=GRPOConfig(
            output_dir=out,
            report_to="none",  # or wandb, mlflow, ..: sigma, dose and signals go where TRL's own numbers go
            bf16=False,
            learning_rate=3e-5,
            lr_scheduler_type="constant",
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=6,
            max_steps=20,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=10,
            save_strategy="no",
        ),
    )
    rin = RinCallback(noise, collapse).attach(trainer)
    trainer.train()

    print(f"collapsed by {rin.verdict.rule}: {rin.verdict.evidence}" if rin.verdict.collapsed else "held")
    for effect in rin.effects:
        print(f"stage {effect.stage}  {effect.name}  sigma {effect.nominal:.2g}, applied {effect.applied:.2g}")
    print(f"everything: {Path(out) / 'rin_receipt.json'}")
    return rin


if __name__ == "__main__":
    main(*(sys.argv[1:] or [str(ensure_base(BaseRecipe()))]))

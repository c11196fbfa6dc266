"""Planted: an option that TRL has no more; correction by default; more stages than rollouts."""

from my_task import reward, rows
from trl import GRPOConfig, GRPOTrainer

from trainable.library import NoiseConfig, RinCallback

STEPS = 8
args = GRPOConfig(
    "out",
    max_steps=STEPS,
    num_iterations=2,
    max_prompt_length=512,
    use_vllm=True,
    seed=1,
)
noise = NoiseConfig(sigma_start=0.01, sigma_end=0.0005, num_stages=10)
trainer = GRPOTrainer("Qwen/Qwen2.5-1.5B-Instruct", reward_funcs=reward, args=args, train_dataset=rows)
RinCallback(noise).attach(trainer)
trainer.train()

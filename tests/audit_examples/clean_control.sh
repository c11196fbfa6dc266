#!/bin/bash
# The control of clean_noise.sh: the same data, seeds and filter, no noise.
SEED=${1:-0}
MODEL=Qwen/Qwen2.5-1.5B-Instruct
for seed in 1 2 3; do
python3 -m recipe.dapo.main_dapo \
    data.train_files=gsm8k/train.parquet \
    data.val_files=gsm8k/test.parquet \
    data.train_batch_size=128 \
    data.gen_batch_size=128 \
    data.seed=${seed} \
    actor_rollout_ref.model.path=$MODEL \
    actor_rollout_ref.model.lora_rank=32 \
    actor_rollout_ref.actor.ppo_mini_batch_size=32 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.enforce_eager=True \
    actor_rollout_ref.rollout.n=8 \
    algorithm.adv_estimator=grpo \
    algorithm.filter_groups.enable=False \
    trainer.hw_error_injection.enabled=True \
    trainer.hw_error_injection.error_type=mxfp4 \
    trainer.hw_error_injection.injection_point=both \
    trainer.hw_error_injection.apply_during=both \
    'trainer.hw_error_injection.target_modules=["linear"]' \
    'trainer.hw_error_injection.exclude_modules=["lm_head", "lora_A", "lora_B", "base_layer", "layers.0.", "layers.27."]' \
    trainer.noise_injection.enabled=False \
    trainer.total_epochs=1 \
    trainer.test_freq=29 \
    trainer.save_freq=29
done

#!/bin/bash
# Noise on RMSNorm, ten stages over the loader's 29 batches; checkpoints are evaluated apart.
MODEL=Qwen/Qwen2.5-1.5B-Instruct
for seed in 1 2 3; do
python3 -m recipe.dapo.main_dapo \
    data.train_files=gsm8k/train.parquet \
    data.val_files=gsm8k/test.parquet \
    data.train_batch_size=128 \
    data.gen_batch_size=128 \
    data.train_max_samples=3712 \
    data.seed=${seed} \
    actor_rollout_ref.model.path=$MODEL \
    actor_rollout_ref.model.lora_rank=32 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.enforce_eager=True \
    actor_rollout_ref.rollout.n=8 \
    algorithm.adv_estimator=grpo \
    algorithm.filter_groups.enable=False \
    trainer.hw_error_injection.enabled=True \
    trainer.hw_error_injection.error_type=mxfp4 \
    trainer.hw_error_injection.injection_point=both \
    trainer.hw_error_injection.apply_during=both \
    'trainer.hw_error_injection.exclude_modules=["lm_head", "lora_A", "lora_B", "base_layer"]' \
    trainer.noise_injection.enabled=True \
    trainer.noise_injection.sigma_start=0.01 \
    trainer.noise_injection.sigma_end=0.001 \
    trainer.noise_injection.num_stages=10 \
    '++trainer.noise_injection.layer_types=["rmsnorm"]' \
    trainer.total_epochs=1 \
    trainer.total_training_steps=29 \
    trainer.test_freq=-1 \
    trainer.save_freq=29
done

#!/bin/bash
# Planted: noise and quantisation reach the adapters; layers.1 is ten layers more; one batch of generation; K = 2.
LORA_RANK=32
python3 -m recipe.dapo.main_dapo \
    data.train_batch_size=128 \
    data.gen_batch_size=128 \
    data.seed=1 \
    actor_rollout_ref.model.lora_rank=${LORA_RANK} \
    actor_rollout_ref.rollout.enforce_eager=True \
    algorithm.filter_groups.enable=True \
    algorithm.filter_groups.metric=acc \
    algorithm.filter_groups.max_num_gen_batches=1 \
    trainer.total_epochs=1 \
    trainer.save_freq=29 \
    trainer.hw_error_injection.enabled=True \
    trainer.hw_error_injection.error_type=mxfp4 \
    'trainer.hw_error_injection.exclude_modules=["lm_head", "layers.1"]' \
    trainer.noise_injection.enabled=True \
    trainer.noise_injection.num_stages=2 \
    trainer.noise_injection.sigma_start=0.001 \
    trainer.noise_injection.sigma_end=0.01 \
    '++trainer.noise_injection.layer_types=["linear"]'
echo "grep 'critic/score/mean' training.log"

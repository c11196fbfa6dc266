#!/bin/bash
# Planted: with the filter off the batch is another one; nothing is kept; 16 bits are evaluated.
python3 -m recipe.dapo.main_dapo \
    data.train_batch_size=128 \
    data.gen_batch_size=256 \
    actor_rollout_ref.rollout.enforce_eager=True \
    algorithm.filter_groups.enable=False \
    trainer.hw_error_injection.enabled=True \
    trainer.hw_error_injection.error_type=mxfp4 \
    trainer.hw_error_injection.apply_during=both \
    trainer.test_freq=-1
python scripts/eval_checkpoint.py --dtype bfloat16 --checkpoint out

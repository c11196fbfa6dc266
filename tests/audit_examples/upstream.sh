#!/bin/bash
# Planted: the newest trainer ignores the limit; a key that moved; two values for one key.
python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    algorithm.filter_groups.enable=True \
    algorithm.filter_groups.metric=acc \
    algorithm.filter_groups.max_num_gen_batches=5 \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.n=16 \
    actor_rollout_ref.actor.lr=1e-6 \
    trainer.test_freq=5

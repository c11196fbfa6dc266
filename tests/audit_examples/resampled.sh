#!/bin/bash
# Planted: the filter spends the batches that the schedule counts.
python3 -m recipe.dapo.main_dapo \
    data.train_batch_size=128 \
    data.gen_batch_size=256 \
    data.seed=1 \
    algorithm.filter_groups.enable=True \
    algorithm.filter_groups.metric=acc \
    algorithm.filter_groups.max_num_gen_batches=5 \
    trainer.total_epochs=1 \
    trainer.save_freq=10 \
    trainer.noise_injection.enabled=True \
    trainer.noise_injection.num_stages=10

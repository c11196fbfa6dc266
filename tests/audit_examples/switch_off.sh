#!/bin/bash
# Planted: the enable switch is missing; the filter is endless and has no metric.
python3 -m recipe.dapo.main_dapo \
    data.train_batch_size=128 \
    algorithm.filter_groups.enable=True \
    algorithm.filter_groups.max_num_gen_batches=0 \
    trainer.noise_injection.sigma_start=0.05 \
    trainer.noise_injection.sigma_end=0.0005 \
    trainer.test_freq=10

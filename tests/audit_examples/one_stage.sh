#!/bin/bash
# Planted: a "constant" sigma by one stage; kinds in target_modules; sigma misspelt.
python3 -m recipe.dapo.main_dapo \
    data.seed=1 \
    trainer.total_epochs=1 \
    trainer.save_freq=29 \
    trainer.noise_injection.enabled=True \
    trainer.noise_injection.sigma_start=0.03 \
    trainer.noise_injection.sigma_end=0.03 \
    trainer.noise_injection.num_stages=1 \
    'trainer.noise_injection.target_modules=["rmsnorm"]' \
    ++trainer.noise_injection.sigma_strat=0.05

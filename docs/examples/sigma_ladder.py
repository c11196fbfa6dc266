"""What each sigma does to a model, from one trial that walks down a ladder of them and learns nothing.

    rin trial control --set noise.sigma_start=0.1 --set noise.sigma_end=0.0001 --set noise.num_stages=8 \
      --set grpo.steps=8 --set grpo.learning_rate=1e-12 --set collapse.mode=monitor --json | python sigma_ladder.py

A row per stage: the nominal sigma, the change that arrived (rms over the noised weights, after cast and quantisation),
the dose (the same over the weights' own size), and what the rollout showed. docs/choosing-sigma.md reads it.
"""

import json
import sys
from statistics import fmean

*steps, outcome = (json.loads(line) for line in sys.stdin)
effects = outcome["receipt"]["effects"]
print("   sigma  applied     dose  changed  reward  entropy  gibberish       KL")
for step in steps:
    seen = step["signals"]
    here = [effect for effect in effects if effect["step"] == step["step"]]
    applied, dose, changed = (
        fmean(effect[name] for effect in here) if here else 0.0 for name in ("applied", "applied_relative", "changed")
    )
    print(
        f"{step['sigma']:8.4g} {applied:8.4f} {dose:7.1%} {changed:8.1%} {seen['grpo/reward']:7.3f} "
        f"{seen['gen/entropy']:8.3f} {seen['gen/gibberish']:10.1%} {seen['rollout_corr/kl']:8.3g}"
    )

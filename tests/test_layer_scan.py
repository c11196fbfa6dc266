"""The model as it began and as a trial left it, scanned on the same prompts."""

from pathlib import Path

import pytest
import torch

from search.arms import read_arms, trial_folder
from search.layer_scan import layer_changes
from tests.written_sweeps import make_arm, study, write_sweep
from trainable.disk.checkpoint import save_final
from trainable.policy.loading import load_policy


@pytest.mark.slow
def test_a_trial_that_moved_one_layer_has_changed_errors_from_there_on(tmp_path: Path) -> None:
    config = study(tmp_path, trials=2, replicates=1)
    arms = [make_arm(config, "control"), make_arm(config, "c01")]
    write_sweep(config, arms, {"control": [200], "c01": [210]})
    policy = load_policy(arms[1].config.model, arms[1].config.quant, 0)
    weights = {name: weight.detach().clone() for name, weight in policy.trainable().items()}
    for name, weight in weights.items():
        if "layers.1." in name:
            weight.mul_(1 + 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    save_final(trial_folder(config, "c01", 0), weights)
    found = layer_changes(config, read_arms(config))
    assert set(found) == {"c01"}  # the control's weights are not there
    (change,) = found["c01"]
    before, after = change.before["relative_error"], change.after["relative_error"]
    assert before[0] == after[0]
    assert before[1] != after[1]

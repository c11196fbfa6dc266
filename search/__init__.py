"""Many trials: Ray Tune, Optuna, MLflow, and what may be concluded from them."""

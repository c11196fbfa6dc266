"""A programme's documents in MLflow."""

from pathlib import Path

import pytest

from search.tracking import DOCUMENTS, tell_documents
from spaces.errors import ConfigError
from tests.written_sweeps import study


@pytest.mark.slow
def test_documents_are_artifacts_of_one_run_and_told_again_they_are_replaced(tmp_path: Path) -> None:
    from search.mlflow_client import absolute_uri, client

    config = study(tmp_path)
    tell_documents(config, {"summary.md": "# before"})
    tell_documents(config, {"summary.md": "# after"})
    mlflow = client(absolute_uri(config.tracking_uri))
    experiment = mlflow.get_experiment_by_name(config.name)
    (run,) = mlflow.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (DOCUMENTS, "FINISHED")
    place = Path(mlflow.download_artifacts(run.info.run_id, "summary.md", str(tmp_path)))
    assert place.read_text() == "# after"


@pytest.mark.slow
def test_an_mlflow_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    config = study(tmp_path, tracking_uri="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="cannot write to experiment"):
        tell_documents(config, {"summary.md": "# x"})

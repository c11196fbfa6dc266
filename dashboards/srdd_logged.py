"""A scan in the MLflow experiment of a sweep: table, picture and JSON as artifacts, scores as metrics over layers."""

import json
import tempfile
from pathlib import Path

from dashboards.options import DEFAULT_STORE, Place
from dashboards.srdd import lines
from dashboards.srdd_plan import Plan
from dashboards.srdd_plot import draw
from search.mlflow_client import claim
from search.store import StudyConfig
from search.tracking import tell_scan
from spaces.config import ConfigError
from trainable.scan import Scan, as_tree


def logged_in(sweep: str | None, store: str, tracking_uri: str | None) -> StudyConfig | None:
    """The sweep that is to hold a scan, asked for before minutes are spent on one. Raises ConfigError."""
    if sweep is None:
        for option, value in (("--store", store if store != DEFAULT_STORE else None), ("--tracking-uri", tracking_uri)):
            if value is not None:
                raise ConfigError(
                    f"{option} {value}: has no use without --sweep; name the sweep that is to hold the scan"
                )
        return None
    study = Place(name=sweep, store=store, tracking_uri=tracking_uri).sweep()
    claim(study.tracking_uri, study.name, study.owner)
    return study


def log_scan(study: StudyConfig, scan: Scan, plan: Plan) -> None:
    """Raises ConfigError where MLflow does not take it."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "scan.svg"
        draw(scan, picture)
        files = {
            "scan.txt": "\n".join(lines(scan, plan)),
            "scan.svg": picture.read_text(encoding="utf-8"),
            "scan.json": json.dumps(as_tree(scan), indent=1),
        }
    tell_scan(study, f"srdd {plan.model} {plan.config.quant.mode}", scan, files)

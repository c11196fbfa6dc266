"""MLflow's server with one page more, by which `rin ui` enters.

MLflow greets every browser in its mode for chat applications, leaves for it at a click on a run, and opens a panel of
an assistant over a quarter of the table. What it shows is kept in the browser, per address, and neither a link nor a
switch of the server sets it. A page of the same address can: it writes three keys and goes on to the view that it was
opened for. It writes them once; whoever wants the other mode, or the assistant, chooses it in MLflow's own sidebar.

A plug-in of MLflow (`mlflow server --app-name rin-search`; the entry point is in pyproject.toml).
"""

import json

from flask import Response
from mlflow.server import app as pages
from mlflow.server.fastapi_app import app

from dashboards.mlflow_views import ENTRANCE

__all__ = ["app"]

KEPT = {
    "mlflow.workflowType_v1": "machine_learning",
    "mlflow.assistant.panelOpen_v1": False,
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": True,
}
"""As MLflow's own pages keep them, JSON."""


@pages.get(ENTRANCE)  # type: ignore[untyped-decorator]
def enter() -> Response:
    """What stands behind the # is not sent to a server: the view is gone on to in the browser."""
    script = (
        f"const kept = {json.dumps(KEPT)};"
        "if (!localStorage.getItem('rin-search')) {"
        "for (const [key, value] of Object.entries(kept)) localStorage.setItem(key, JSON.stringify(value));"
        "localStorage.setItem('rin-search', 'entered'); }"
        "location.replace('/' + location.hash);"
    )
    return Response(f"<!doctype html><title>MLflow</title><script>{script}</script>", mimetype="text/html")

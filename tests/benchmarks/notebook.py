"""`make notebook`: run docs/notebook.ipynb on the newest sweep in runs/ and keep what it shows, figures as pictures.

Whoever reads it on the web then sees what it does; `tests/test_notebook.py` runs it on another sweep. The pictures are
drawn by a Chromium, as those of `rin report --figures`.
"""

import os
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


def run(file: Path, renderer: str) -> Any:
    """As Jupyter does it: a kernel that begins in the folder of the file. Raises CellExecutionError."""
    os.environ["PLOTLY_RENDERER"] = renderer  # which the kernel inherits
    notebook = nbformat.read(file, as_version=4)
    client = NotebookClient(notebook, timeout=120, record_timing=False, resources={"metadata": {"path": file.parent}})
    return client.execute()


if __name__ == "__main__":
    nbformat.write(run(NOTEBOOK, "png"), NOTEBOOK)
    print(f"wrote docs/{NOTEBOOK.name}")

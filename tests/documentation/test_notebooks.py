"""The notebooks: what is committed of them; and `make test-notebooks` runs them."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("nbclient")
import nbformat
from nbclient import NotebookClient

from jina_jax.checkpoints.demo_model import PACKAGE

from .blocks import ROOT
from .workplace import lay_out, write_models

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/OWNER/jina-jax/blob/main/notebooks/"
SMALL = {
    "late_chunking": "DOCUMENT_TEXTS = 12",
    "own_adapter": "SECTIONS, ROWS, STEPS = SECTIONS[:3], 60, 4",
    "research": "PAIRS, STEPS, TEXTS = 1_024, 40, 500",
    "tpu_inference": "TEXTS = 40",
}
"""Sizes of the runs here, put behind the cell that has those of the notebook."""

TAG = "parameters"


def named(path: Path) -> str:
    return path.stem


def test_every_notebook_has_small_sizes():
    assert sorted(SMALL) == [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_a_notebook_is_valid_and_has_no_outputs(path):
    notebook = json.loads(path.read_text("utf-8"))
    nbformat.validate(notebook)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None]
    assert sum(TAG in cell["metadata"].get("tags", ()) for cell in code) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_a_notebook_is_opened_in_colab_from_itself_the_readme_and_the_docs(path):
    link = f"({COLAB}{path.name})"
    first = json.loads(path.read_text("utf-8"))["cells"][0]
    texts = ["".join(first["source"]), (ROOT / "README.md").read_text("utf-8"), (ROOT / "docs/notebooks.md").read_text("utf-8")]
    assert all(link in text for text in texts)


def test_inference_is_five_cells():
    cells = json.loads((ROOT / "notebooks" / "tpu_inference.ipynb").read_text("utf-8"))["cells"]
    assert sum(cell["cell_type"] == "code" for cell in cells) == 5


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip(f"{PACKAGE} is for Linux on x86-64")
    directory = tmp_path_factory.mktemp("models")
    write_models(directory)
    return directory


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_a_notebook_runs(path, models, tmp_path, monkeypatch):
    environment = lay_out(tmp_path, path, models)
    (tmp_path / "notebooks").unlink()
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    (at,) = (i for i, cell in enumerate(notebook.cells) if TAG in cell.metadata.get("tags", ()))
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(SMALL[path.stem]))
    resources = {"metadata": {"path": str(tmp_path / "notebooks")}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    errors = [output for cell in notebook.cells for output in cell.get("outputs", ()) if output.get("name") == "stderr"]
    assert not [error for error in errors if "Traceback" in error["text"] or "Error:" in error["text"]]
    assert os.path.exists(tmp_path / "runs")

"""The notebooks run from top to bottom."""

import pathlib

import nbclient
import nbformat
import pytest

from tests.conftest import child_environment

FOLDER = pathlib.Path(__file__).parent.parent / "experiments" / "colab"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:zmq|jupyter_client|nbclient|traitlets")
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": FOLDER.parent.parent}}
    )
    client.execute(env=child_environment())
    assert all(
        output.output_type != "error"
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )

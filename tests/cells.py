"""The cells of a notebook in the process of a test: what a kernel does with them, without the seconds of its start."""

from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def execute(name, **parameters):
    """Execute a notebook from the top, in the folder of now, its parameters replaced; returns its variables."""
    variables = {}
    for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{name}, cell {cell.id}", "exec"), variables)
        if "parameters" in cell.metadata.get("tags", []):
            assert parameters.keys() <= variables.keys()
            variables.update(parameters)
    return variables

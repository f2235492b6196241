"""`python -m tests.notebooks.write_outputs`: run the notebooks one after another and write them with their outputs, small enough for git.

The first makes the run that the next two read. Nothing of this machine is kept: neither times nor folders nor what went to stderr.
"""

from __future__ import annotations

import base64
import io
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from PIL import Image
from tests.notebooks.test_notebooks import FOLDER, METADATA, NAMES, executed


def small(png: str) -> str:
    """A picture with 32 colours."""
    out = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(32).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def cleaned(notebook: dict[str, Any], root: Path) -> dict[str, Any]:
    """What is worth keeping of a notebook that was run below `root`."""
    notebook["metadata"] = nbformat.from_dict(METADATA)
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        cell["outputs"] = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"] if cell["cell_type"] == "code" else None
        for output in cell["outputs"] or ():
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = small(data["image/png"])
            for part, key in [(output, "text"), *((data, key) for key in data if key.startswith("text/"))]:
                if key in part:
                    part[key] = re.sub(rf"{re.escape(str(root))}/|{re.escape(tempfile.gettempdir())}/skillsd-\w+/", "", part[key])
        if cell["outputs"] is None:
            del cell["outputs"]
    return notebook


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            notebook = executed(name, Path(folder), SKILLSD_FIRST_RUN=f"{folder}/first", SKILLSD_RUN=f"{folder}/first")
            nbformat.write(cleaned(notebook, Path(folder)), FOLDER / f"{name}.ipynb")
            print(name, (FOLDER / f"{name}.ipynb").stat().st_size)


if __name__ == "__main__":
    main()

"""Runs examples/notebook.ipynb and makes its page of the documentation, docs/tutorials/notebook.md with pictures.

    python .ci/notebook_page.py          runs the cells, keeps what they show in the notebook, writes the page
    python .ci/notebook_page.py --page   writes the page from what the notebook holds

No Jupyter is needed: the cells run in one namespace, and of the last line of each the value is shown.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
PAGE = ROOT / "docs" / "tutorials" / "notebook.md"

Output = dict[str, Any]


def read(path: Path = NOTEBOOK) -> dict[str, Any]:
    """The notebook, nbformat 4."""
    return json.loads(path.read_text(encoding="utf-8"))


def run(notebook: dict[str, Any]) -> list[list[Output]]:
    """What each code cell shows, in order; the cells run in the current folder.

    An exception ends the run, as in Jupyter.
    """
    import matplotlib

    matplotlib.use("Agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    return [shown("".join(cell["source"]), names) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def shown(source: str, names: dict[str, Any]) -> list[Output]:
    """The outputs of one cell: what it printed, the value of its last line, and its figures."""
    *lines, last = ast.parse(source).body or [ast.Pass()]
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        if isinstance(last, ast.Expr):
            exec(compile(ast.Module(lines, []), "<cell>", "exec"), names)
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
        else:
            exec(compile(ast.Module([*lines, last], []), "<cell>", "exec"), names)
    outputs = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": parts(printed.getvalue())})
    if value is not None and not type(value).__module__.startswith("matplotlib"):
        data = {"text/plain": parts(repr(value))}
        html = getattr(value, "_repr_html_", lambda: None)()
        if html and "<table" in html:
            data = {"text/html": parts(html), **data}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    return outputs + figures()


def figures() -> list[Output]:
    """The open figures as JPEG, which is small, closed afterwards."""
    import matplotlib.pyplot as plt

    found = []
    for number in plt.get_fignums():
        packed = io.BytesIO()
        plt.figure(number).savefig(packed, format="jpeg", dpi=100, pil_kwargs={"quality": 88})
        data = {"image/jpeg": base64.b64encode(packed.getvalue()).decode()}
        found.append({"output_type": "display_data", "data": data, "metadata": {}})
    plt.close("all")
    return found


def parts(text: str) -> list[str]:
    """Text as a notebook stores it: lines."""
    return text.splitlines(keepends=True)


def page(notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """The page in Markdown, and its pictures by name."""
    text, pictures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            text.append(source)
            continue
        text.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", [])})
            if "image/jpeg" in data:
                name = f"notebook-{len(pictures) + 1}.jpg"
                pictures[name] = base64.b64decode(data["image/jpeg"])
                text.append(f"![What the cell above draws]({name})")
            elif "text/html" in data:
                text.append(re.sub(r"<style.*?</style>\s*", "", "".join(data["text/html"]), flags=re.DOTALL).strip())
            else:
                text.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    return "\n\n".join(text) + "\n", pictures


def write_page(notebook: dict[str, Any]) -> None:
    """Write the page and its pictures; pictures of an older notebook go."""
    text, pictures = page(notebook)
    for old in PAGE.parent.glob("notebook-*.jpg"):
        old.unlink()
    PAGE.write_text(text, encoding="utf-8")
    for name, data in pictures.items():
        (PAGE.parent / name).write_bytes(data)


def main() -> None:
    """Do what the command line asks for."""
    notebook = read()
    if "--page" not in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
            outputs = iter(run(notebook))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"], cell["execution_count"] = next(outputs), None
        NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_page(notebook)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()

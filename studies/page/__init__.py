"""The comparison as one HTML page: no script, font or picture comes from elsewhere.

``content`` collects what is shown as JSON values, ``page.html``, ``page.css`` and ``page.js`` show
it, and this file puts them into one another.
"""

import json
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from studies.comparison import Comparison
from studies.folder import write_atomically
from studies.page.content import content_of


def write_page(comparison: Comparison, target: Path, *, num_images: int = 4) -> Path:
    """Writes the page.

    Args:
        comparison: What to show.
        target: Ends in ``.html``.
        num_images: Validation images to show the kept patches of; 0 loads no model.

    Raises:
        ValueError: If the file name ends in something else.
    """
    if target.suffix != ".html":
        raise ValueError(f"the file must end in .html, but got {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, render(content_of(comparison, num_images=num_images)))
    return target


def render(content: dict[str, Any]) -> str:
    """Returns the page as text.

    Args:
        content: JSON values as ``content_of`` returns them; no text in them can end the script
            element that they stand in.
    """
    parts = files("studies.page")
    template = Template((parts / "page.html").read_text(encoding="utf-8"))
    title = str(content["title"])
    safe = title.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return template.substitute(
        title=safe,
        data=data,
        style=(parts / "page.css").read_text(encoding="utf-8"),
        script=(parts / "page.js").read_text(encoding="utf-8"),
    )

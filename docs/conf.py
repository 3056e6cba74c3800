"""Sphinx configuration of the documentation site (``make docs``). No network: no intersphinx or remote assets."""

from __future__ import annotations

import re

import anabranch

project = "anabranch"
author = "the anabranch authors"
copyright = "the anabranch authors, Apache-2.0"
version = release = anabranch.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinx_design"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["pictures/*.py"]
default_role = "code"  # docstrings write names in single backticks

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes, dtypes and units are in the docstrings
autodoc_default_options = {"members": True, "undoc-members": False}
napoleon_numpy_docstring = False
napoleon_use_rtype = False

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = "anabranch"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
napoleon_use_ivar = True

_ARGUMENT = re.compile(r"[a-z_]\w*(, [a-z_]\w*)*: ")


def _name_arguments(app, what, name, obj, options, lines: list[str]) -> None:
    """Put an ``Args:`` line above a paragraph of ``name: text`` lines that has none, so that napoleon reads it."""
    out: list[str] = []
    inside = False
    for at, line in enumerate(lines):
        begins = (at == 0 or not lines[at - 1].strip()) and _ARGUMENT.match(line)
        if begins and not inside:
            out.append("Args:")
            inside = True
        elif not line.strip():
            inside = False
        indent = "    " if inside and (_ARGUMENT.match(line) or line.startswith(" ")) else "        " if inside else ""
        out.append(indent + line)
    lines[:] = out


def setup(app) -> None:
    app.connect("autodoc-process-docstring", _name_arguments, priority=100)  # before napoleon

"""Sphinx: pages are written by hand, the entries that they list come from the docstrings."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

from pyro_multivi import __version__

HERE = Path(__file__).parent

project = "pyro_multivi"
author = "pyro-multivi developers"
copyright = "pyro-multivi developers, BSD-3-Clause"
release = version = __version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.viewcode", "numpydoc", "myst_nb"]
# Pages of the repository, offered as files.
exclude_patterns = ["_build", "architecture.md", "contributing.md"]

# Notebooks and recipes become pages with the outputs that they were committed with.
shutil.rmtree(HERE / "tutorials", ignore_errors=True)
shutil.copytree(HERE.parent / "tutorials", HERE / "tutorials", ignore=shutil.ignore_patterns("*.py", ".*", "README.md"))
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Public methods of a class are listed by hand, by topic; tests/project/test_docs.py demands that none is missing.
numpydoc_show_class_members = False
autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_typehints = "none"  # the docstrings say more
autodoc_member_order = "bysource"
add_module_names = False

html_theme = "alabaster"
html_theme_options = {
    "description": "MultiVI as a Pyro program",
    "page_width": "1100px",
    "sidebar_width": "230px",
    "fixed_sidebar": True,
    # Dark enough to be read on white.
    "link": "#005a8c",
}
html_static_path = ["style"]
html_css_files = ["pages.css"]
html_show_sourcelink = False
html_math_renderer = "mathml"


def formula(translator: Any, node: nodes.Element) -> None:
    """Write a formula as MathML, which browsers show without a script and without a network."""
    display = isinstance(node, nodes.math_block)
    mathml = convert(node.astext(), display="block" if display else "inline")
    translator.body.append(f"<div class='formula'>{mathml}</div>" if display else mathml)
    raise nodes.SkipNode


def without_links_outside(app: Any, name: str, source: list[str]) -> None:
    """Keep the words of links from the tutorials to files of the repository, which are no pages."""
    if name.startswith("tutorials/"):
        source[0] = re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", source[0])


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", without_links_outside)
    app.add_html_math_renderer("mathml", inline_renderers=(formula, None), block_renderers=(formula, None))

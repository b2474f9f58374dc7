"""Sphinx: pages are written by hand, the entries that they list come from the docstrings."""

from pyro_multivi import __version__

project = "pyro_multivi"
author = "pyro-multivi developers"
copyright = "pyro-multivi developers, BSD-3-Clause"
release = version = __version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax", "sphinx.ext.viewcode", "numpydoc"]
exclude_patterns = ["_build"]

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
    "page_width": "1000px",
    "sidebar_width": "230px",
    "fixed_sidebar": True,
    # Dark enough to be read on white.
    "link": "#005a8c",
}
html_show_sourcelink = False

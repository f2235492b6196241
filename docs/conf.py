"""`make docs`: the pages of this folder and the API reference from docstrings, as HTML. A warning is an error."""

from skillsd import __version__

project, author = "skillsd", "The skillsd authors"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "README.md", "results/*/*.md"]  # index.md includes the first
html_theme = "furo"
html_title = "skillsd"
html_static_path, html_css_files = ["_static"], ["pages.css"]

# Docstrings are Google's style in plain text, with code between single backticks.
default_role = "code"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
autodoc_inherit_docstrings = False  # Lightning's own, which are in its own dialect
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]
# Links to files of the repository that are no pages; tests/test_docs.py checks that they are there.
suppress_warnings = ["myst.xref_missing"]

"""The settings of Sphinx for the site; `build.py` runs it. Sources are what `site_pages` put together."""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

from toy import __version__  # noqa: E402 (the path has site_pages for Sphinx)

project, author, release = "toy", "The toy developers", __version__
copyright = "The toy developers, MIT licence"
extensions = [
    "myst_nb",  # pages in Markdown, and notebooks with the outputs that they were committed with
    "sphinx.ext.autodoc",  # the reference, from docstrings
    "site_pages.extension",  # formulas without a script, docstrings as they are
]
html_theme = "furo"  # light and dark, usable with a keyboard, no request to other hosts
html_title = "toy"
html_static_path = [str(DOCS / "static")]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"
nb_execution_mode = "off"
nb_merge_streams = True
smartquotes_action = "q"  # two hyphens are those of an option
toc_object_entries = False  # on the side the names, without their methods
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
# names in docstrings are not marked up as references, and the types of numpy and the standard library are not on this site
nitpick_ignore_regex = [(r"py:.*", r".*")]
pygments_style, pygments_dark_style = "tango", "monokai"

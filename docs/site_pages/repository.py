"""Where the sources are published, and links into them: TOY_REPOSITORY_URL, as for setup.py."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def address():
    """The address of the repository, an empty string where none is given."""
    return os.environ.get("TOY_REPOSITORY_URL", "").rstrip("/")


def link(path, text=None):
    """Markdown for a file or folder of the repository: a link where there is an address, its name otherwise."""
    text = text or f"`{path}`"
    return f"[{text}]({address()}/blob/main/{path})" if address() else text


def relink(text, pages):
    """Markdown of a file of the repository for the site: links to what is a page lead there, others into the repository.

    pages: {path in the repository: page}.
    """

    def replaced(found):
        path, _, fragment = found[2].partition("#")
        path = re.sub(r"^(\.\./)+", "", path).removeprefix("./")
        if path in pages:
            return f"[{found[1]}]({pages[path]}{'#' + fragment if fragment else ''})"
        return link(path, found[1])

    return _LINK.sub(replaced, text)


def online(path):
    """[(name, address)]: where a notebook can be opened without installing anything; empty without a GitHub address."""
    found = re.fullmatch(r"https://github\.com/([^/]+/[^/]+)", address())
    if not found:
        return []
    return [
        ("Colab", f"https://colab.research.google.com/github/{found[1]}/blob/main/{path}"),
        ("Binder", f"https://mybinder.org/v2/gh/{found[1]}/main?urlpath=lab/tree/{path}"),
    ]

"""Do the links of the site lead somewhere? Each link to another page, picture or heading is followed; other hosts are not."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """The links and the names to link to of one page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.names, self.images_without_text = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.links += [given[name] for name in ("href", "src") if given.get(name)]
        self.names |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "img" and not given.get("alt"):
            self.images_without_text.append(given.get("src", ""))


def broken_links(folder):
    """A line for each link of the HTML files of a folder that leads nowhere in it, or to a heading that is not there."""
    folder = Path(folder).resolve()
    parsed = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    broken = []
    for path, page in parsed.items():
        here = path.relative_to(folder).as_posix()
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or not target.is_relative_to(folder):
                broken.append(f"{here}: {link} leads nowhere")
            elif parts.fragment and target in parsed and unquote(parts.fragment) not in parsed[target].names:
                broken.append(f"{here}: {link} names a place that is not on that page")
    return broken


def images_without_text(folder):
    """A line for each picture of the HTML files of a folder that has no alternative text."""
    found = []
    for path in sorted(Path(folder).rglob("*.html")):
        images = _Page(path.read_text(encoding="utf-8")).images_without_text
        found += [f"{path.relative_to(folder)}: {source[:60]} has no alternative text" for source in images]
    return found

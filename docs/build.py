"""Build the site of the project: `python docs/build.py` writes it to build/site, with `--out FOLDER` elsewhere.

What the site says of the code is made from the code: `site_pages` writes those pages beside copies of the hand-written ones
of this folder, and Sphinx turns them all into HTML. A warning is an error, and so are a link that leads nowhere and a picture
without a text for those who do not see it.
TOY_REPOSITORY_URL, the address of the sources (as for setup.py), gives links to them, to Colab and to Binder.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

from site_pages import links, pages, slides  # noqa: E402 (they stand beside this file)


def build(out):
    """Write the site to the folder `out`, replacing what is there. Raises SystemExit for a warning or a broken link."""
    from sphinx.cmd.build import build_main

    source = out.with_name(out.name + "_source")
    for folder in (source, out):
        shutil.rmtree(folder, ignore_errors=True)
    pages.write_sources(source)
    options = ["-W", "--keep-going", "-q", "-n", "-d", str(out.with_name(out.name + "_cache"))]
    if code := build_main([*options, "-b", "html", "-c", str(DOCS), str(source), str(out)]):
        raise SystemExit(code)
    slides.write(out / "slides")
    broken = links.broken_links(out) + links.images_without_text(out)
    for line in broken:
        print(line, file=sys.stderr)
    if broken:
        raise SystemExit(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS.parent / "build" / "site", help="the folder to write to")
    out = parser.parse_args().out.resolve()
    started = time.monotonic()
    build(out)
    print(
        f"{out / 'index.html'}: {len(list(out.rglob('*.html')))} pages in {time.monotonic() - started:.0f} s, no warning"
    )


if __name__ == "__main__":
    main()

"""The words of the lessons and the letters of the formulas: `docs/words.md` and the docstring of toy/ops/reference.py."""

import functools
import re
from typing import NamedTuple

from site_pages.repository import ROOT
from toy.ops import reference


class Word(NamedTuple):
    term: str
    forms: tuple[str, ...]  # how it is written, the term first
    meaning: str


class Symbol(NamedTuple):
    symbol: str
    meaning: str
    in_code: str


@functools.cache
def words():
    """The words of docs/words.md, in its order: a line `term, other form: meaning` each."""
    text = (ROOT / "docs" / "words.md").read_text(encoding="utf-8")
    found = re.findall(r"^\* \*\*(.+?)\*\*: (.+(?:\n  .+)*)$", text, re.M)
    result = []
    for terms, meaning in found:
        forms = tuple(form.strip() for form in terms.split(","))
        result.append(Word(forms[0], forms, " ".join(meaning.split())))
    return result


def pattern(word):
    """What finds a word in a text, in the plural too."""
    forms = "|".join(re.escape(form).replace(r"\ ", r"[\s-]+") + r"(?:s|es)?" for form in word.forms)
    return re.compile(rf"(?<![\w`/.-])(?:{forms})(?![\w`(-])", re.I if word.term.islower() else 0)


def prose(notebook):
    """The text of a notebook that is read: its Markdown without code and formulas."""
    from site_pages.lessons import source

    text = "\n\n".join(source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    for unwanted in (r"```.*?```", r"^(?: {4}|\t).*$", r"\$\$.*?\$\$", r"\$[^$\n]+\$", r"`[^`\n]+`", r"\]\([^)]*\)"):
        text = re.sub(unwanted, " ", text, flags=re.S if "?" in unwanted else re.M)
    return text


@functools.cache
def first_uses():
    """{term: number of the first lesson that uses it} of every word that a lesson uses."""
    from site_pages.lessons import notebooks, read

    found = {}
    for number, path in notebooks().items():
        text = prose(read(path))
        for word in words():
            if word.term not in found and pattern(word).search(text):
                found[word.term] = number
    return found


def by_lesson():
    """{lesson: [Word]} in the order of the list: a lesson's new words are those that no lesson before it uses."""
    result = {}
    for word in words():
        if word.term in first_uses():
            result.setdefault(first_uses()[word.term], []).append(word)
    return result


def symbols():
    """The table of symbols in the docstring of toy/ops/reference.py."""
    lines = (reference.__doc__ or "").splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["symbol", "meaning"])
    widths = [lines[start].index(word) for word in ("symbol", "meaning", "in the code")]
    found = []
    for line in lines[start + 1 :]:
        if not line.strip():
            break
        columns = [line[a:b].strip() for a, b in zip(widths, [*widths[1:], None])]
        if columns[0]:
            found.append(columns)
        else:  # a meaning that goes on
            found[-1] = [" ".join(filter(None, pair)) for pair in zip(found[-1], columns)]
    return [Symbol(*columns) for columns in found]


def pages():
    """{path: Markdown} of the page of words and symbols."""
    text = (ROOT / "docs" / "words.md").read_text(encoding="utf-8")
    lines = ["| symbol | meaning | in the code |", "|---|---|---|"]
    lines += [f"| `{row.symbol}` | {row.meaning} | {code(row.in_code)} |" for row in symbols()]
    place = "<!-- the table of symbols -->"
    if place not in text:
        raise ValueError(f"docs/words.md has no place for the table of symbols, {place}")
    return {"words.md": text.replace(place, "\n".join(lines))}


def code(names):
    return ", ".join(f"`{name.strip()}`" for name in names.split(",")) if names else ""

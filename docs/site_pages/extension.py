"""What Sphinx is told besides: formulas as MathML, which every current browser draws without a script, and docstrings, which
are plain text here and not reStructuredText."""

import re


def mathml(latex, display):
    """A formula as MathML. Raises ValueError for what would stand in it as it was typed."""
    from latex2mathml.converter import convert  # here: most of these pages, and their tests, do without

    # latex2mathml knows aligned equations by the name of those that are numbered
    written = re.sub(r"\{aligned\}", "{align*}", latex)
    result = convert(written, display="block" if display else "inline")
    if unknown := re.search(r"<m[io]>(&|\\\w+)</m[io]>", result):
        raise ValueError(f"{unknown[1]} is not understood in the formula {latex}")
    return result


def inline(self, node):
    from docutils.nodes import SkipNode

    self.body.append(mathml(node.astext(), display=False))
    raise SkipNode


def block(self, node):
    from docutils.nodes import SkipNode

    self.body.append(f'<div class="formula">{mathml(node.astext(), display=True)}</div>')
    raise SkipNode


def as_plain_text(lines):
    """The lines of a docstring in reStructuredText that shows them as they are: paragraphs, lists with `*`, and code where
    it is indented by four."""
    result, code, item = [], False, False
    for line in lines:
        indented = line.startswith("    ") and not (item and not code and not line.startswith("     "))
        if indented and not code:
            result += ["", "::", ""]
        elif not indented and code and line.strip():
            result.append("")
        code = indented or (code and not line.strip())
        if code:
            result.append(line)
            continue
        begins = line.startswith("* ")
        if (begins and not item) or (item and line.strip() and not begins and not line.startswith("  ")):
            result.append("")
        item = begins or (item and (not line.strip() or line.startswith("  ")))
        text = escaped(line.removeprefix("* "))
        text = re.sub(r"^(?=(?:\w+[.)]|[-+#]|\.\.|>>>|:\w)(?:\s|\w*:))", r"\\", text)  # not a list, a role or a field
        result.append(f"* {text}" if begins else f"  {text}" if item and text else text)
    return result


def escaped(line):
    """A line of prose: what stands between backticks as code, every other character as itself."""
    pieces = re.split(r"(`[^`]+`)", line.strip())
    return "".join(
        f"``{piece[1:-1].strip()}``\\ "
        if piece[:1] == "`" and len(piece) > 2
        else re.sub(r"([\\*_`|])", r"\\\1", piece)
        for piece in pieces
    )


def process_docstring(app, what, name, obj, options, lines):
    of_a_field = len(lines) == 2 and lines[0].startswith("Alias for field number")  # Python's own, says nothing
    lines[:] = [] if of_a_field else as_plain_text(list(lines))


def process_signature(app, what, name, obj, options, signature, returned):
    """A signature with the name ArrayLike in place of all that it may be."""
    return tuple(text and text.replace(whole_array_like(), "ArrayLike") for text in (signature, returned))


def whole_array_like():
    import numpy.typing
    from sphinx.util.typing import stringify_annotation

    return stringify_annotation(numpy.typing.ArrayLike, "smart")


def setup(app):
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-process-signature", process_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

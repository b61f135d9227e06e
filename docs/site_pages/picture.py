"""The picture of the whole architecture, docs/architecture.svg, drawn from a forward pass of the model itself.

`python -m site_pages.picture` in docs/ writes it anew. A table of ops that notes every call stands between the model and the
reference ops: which arrays and parameters went in, and the shape that came out. Calls that do not wait for each other stand
in one row, sums stand on the residual stream, and of the blocks, which must be alike, one is drawn.
"""

import html
from typing import NamedTuple

import numpy as np

from site_pages.repository import ROOT, relink

FILE = ROOT / "docs" / "architecture.svg"
ALT = "The architecture of the readable transformer, with the shape of every array"
# all different, so that each number in a shape stands for one letter
BATCH, T, D, HEADS, F, V, CONTEXT, LAYERS = 3, 5, 28, 2, 44, 17, 7, 2
LETTERS = {BATCH * T: "N", D: "D", F: "F", V: "V", CONTEXT: "context", BATCH: "B", HEADS: "H", T: "T"}


class Call(NamedTuple):
    """One op as it was called."""

    op: str
    inputs: tuple[int, ...]  # of arrays, by id
    parameters: tuple[str, ...]  # their names
    output: int
    shape: tuple[int, ...]
    probabilities: tuple[int, ...]  # of attention: the shape of what it keeps


class Recorder:
    """An op table that notes what it is asked and leaves the work to the reference."""

    name = "recorder"

    def __init__(self):
        self.calls, self.names, self.kept = [], {}, []

    def __getattr__(self, op):
        from toy.ops import reference

        function = getattr(reference, op)

        def noted(*arguments, **options):
            result = function(*arguments, **options)
            out = result[0] if isinstance(result, tuple) else result
            arrays = [a for a in arguments if isinstance(a, np.ndarray)]
            self.kept += [out, *arrays]  # alive, so that no id is given twice
            parameters = tuple(self.names[id(a)] for a in arrays if id(a) in self.names)
            inputs = tuple(id(a) for a in arrays if id(a) not in self.names)
            kept = getattr(result[1], "probabilities", None) if op == "attention" else None
            self.calls.append(Call(op, inputs, parameters, id(out), np.shape(out), np.shape(kept)))
            return result

        return noted


def record():
    """The calls of one forward pass of a TransformerLM with its loss, and the shapes of its parameters by name."""
    import toy

    recorder = Recorder()
    config = toy.TransformerConfig(V, D, HEADS, F, LAYERS, CONTEXT)
    model = toy.TransformerLM(config, ops=recorder)
    parameters = dict(model.parameters.items())
    recorder.names = {id(array): name for name, array in parameters.items()}
    rng = np.random.default_rng(0)
    ids, positions = rng.integers(0, V, BATCH * T), np.tile(np.arange(T), BATCH)
    logits, _ = model.forward_rows(ids, positions, BATCH)
    recorder.cross_entropy(logits, rng.integers(0, V, BATCH * T))
    return recorder.calls, {name: array.shape for name, array in parameters.items()}


def rows_of(calls):
    """The calls in rows: one joins the row before it where it needs nothing that is made there."""
    rows = []
    for call in calls:
        if rows and not any(other.output in call.inputs for other in rows[-1]) and call.op == rows[-1][0].op:
            rows[-1].append(call)
        else:
            rows.append([call])
    return rows


def what_happens(row):
    """A row without the arrays it was called with and the number of its block, to see that two blocks are alike."""
    return [(call.op, call.shape, tuple(block_of(name)[1] for name in call.parameters)) for call in row]


def block_of(name):
    """(number of the block, name inside it) of a parameter; None outside of the blocks."""
    parts = name.split(".")
    return (int(parts[1]), parts[2]) if parts[0] == "blocks" else (None, name)


def letters(shape):
    """(N, D) for (15, 28). Raises KeyError for a number that stands for nothing."""
    return f"({', '.join(LETTERS[number] for number in shape)}{',' if len(shape) == 1 else ''})"


# ----------------------------------------------------------------------------------------------------------------------
# drawing
# ----------------------------------------------------------------------------------------------------------------------

SPINE, BRANCH, WIDTH, ROW, BOX = 150, 540, 960, 66, (172, 42)
INK, PALE, PAPER = "#1f2933", "#52606d", "#ffffff"
FILLS = {"embedding": "#dbeafe", "rms_norm": "#ede9fe", "linear": "#fef3c7", "attention": "#fee2e2", "gelu": "#dcfce7",
         "cross_entropy": "#e2e8f0"}  # fmt: skip
SAID = {
    "embedding": "look up a row", "rms_norm": "RMSNorm", "linear": "linear", "attention": "causal attention",
    "gelu": "GELU", "cross_entropy": "cross-entropy",
}  # fmt: skip


class Drawing:
    def __init__(self):
        self.parts, self.y = [], 0

    def text(self, x, y, text, size=15, anchor="middle", color=INK, weight="normal", mono=False):
        font = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace" if mono else "inherit"
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{color}" font-weight="{weight}" '
            f'font-family="{font}">{html.escape(text)}</text>'
        )

    def line(self, *points, arrow=False, color=INK, width=1.8):
        path = " L".join(f"{x} {y}" for x, y in points)
        end = ' marker-end="url(#arrow)"' if arrow else ""
        self.parts.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="{width}"{end}/>')

    def box(self, x, y, call, shapes):
        """A box around (x, y) for a call, with its parameter and what comes out."""
        w, h = BOX
        self.parts.append(
            f'<rect x="{x - w / 2}" y="{y - h / 2}" width="{w}" height="{h}" rx="7" fill="{FILLS[call.op]}" '
            f'stroke="{INK}" stroke-width="1.2"/>'
        )
        self.text(x, y - (3 if call.parameters else -5), SAID[call.op], weight="600")
        for name in call.parameters:
            self.text(x, y + 14, f"{block_of(name)[1]} {letters(shapes[name])}", 12, color=PALE, mono=True)

    def plus(self, x, y):
        self.parts.append(f'<circle cx="{x}" cy="{y}" r="13" fill="{PAPER}" stroke="{INK}" stroke-width="1.8"/>')
        self.line((x - 7, y), (x + 7, y))
        self.line((x, y - 7), (x, y + 7))


def columns(n):
    """Where n boxes of a row stand."""
    return [BRANCH + (i - (n - 1) / 2) * (BOX[0] + 24) for i in range(n)]


def svg():
    """The picture as the text of an SVG file."""
    calls, shapes = record()
    rows = rows_of(calls)
    first = next(i for i, row in enumerate(rows) if any(block_of(name)[0] == 0 for name in row[0].parameters))
    second = next(i for i, row in enumerate(rows) if any(block_of(name)[0] == 1 for name in row[0].parameters))
    block, again = rows[first:second], rows[second : 2 * second - first]
    if [what_happens(row) for row in block] != [what_happens(row) for row in again]:
        raise ValueError("the blocks of the model are not alike: one picture of a block would not do")
    drawn = rows[:second] + rows[2 * second - first :]
    following = {again[-1][0].output: block[-1][0].output}  # what follows the last block follows the drawn one

    picture, y, places, block_top, block_bottom = Drawing(), 96, {}, 0, 0
    stream = None  # (y of the last place on the residual stream, id of what flows there)
    for i, row in enumerate(drawn):
        if i == first:
            y += 26
            block_top = y - ROW / 2 - 18
        inside = first <= i < second
        inputs = [following.get(number, number) for call in row for number in call.inputs]
        if row[0].op == "add":
            (call,) = row
            for number in inputs:
                if number in places:  # from a branch: down and over to the sum
                    for x, from_y in places[number]:
                        picture.line((x, from_y + BOX[1] / 2), (x, y), (SPINE + 13, y), arrow=True)
            if stream is not None and stream[1] in inputs:
                picture.line((SPINE, stream[0]), (SPINE, y - 13), arrow=True, width=3)
            picture.plus(SPINE, y)
            picture.text(SPINE - 24, y + 5, f"x {letters(call.shape)}", 14, "end", mono=True)
            stream = (y + 13, call.output)
        else:
            xs = columns(len(row))
            for x, call in zip(xs, row):
                for number in (following.get(number, number) for number in call.inputs):
                    if stream is not None and number == stream[1]:
                        top = y - ROW / 2 - 2
                        picture.line((SPINE, top), (x, top), (x, y - BOX[1] / 2), arrow=True)
                    elif number in places:
                        for from_x, from_y in places[number]:
                            middle = (from_y + y) / 2
                            from_x, to_x = meeting(from_x, x, call, places, following)
                            bottom, top = from_y + BOX[1] / 2, y - BOX[1] / 2
                            picture.line((from_x, bottom), (from_x, middle), (to_x, middle), (to_x, top), arrow=True)
                picture.box(x, y, call, shapes)
                places[call.output] = [(x, y)]
            outside(picture, row, xs, y)
        if inside:
            block_bottom = y + ROW / 2 - 4
        if i == second - 1:
            y += 24
        y += ROW
    branch_out = drawn[second][0]
    picture.line((SPINE, stream[0]), (SPINE, places[branch_out.output][0][1] - ROW / 2 - 2), width=3)
    return frame(picture, y, block_top, block_bottom)


def meeting(from_x, x, call, places, following):
    """Where an arrow begins and ends: several into one box end side by side."""
    sources = sorted(place[0] for number in call.inputs for place in places.get(following.get(number, number), []))
    if len(sources) > 1:
        return from_x, x + (sources.index(from_x) - (len(sources) - 1) / 2) * 44
    return from_x, x


def outside(picture, row, xs, y):
    """What is written beside the boxes: what comes out, and what of it has a name."""
    call, right = row[0], xs[-1] + BOX[0] / 2 + 14
    said = letters(call.shape) if call.shape else ""
    if call.op == "embedding":
        for x, name in zip(xs, ("token ids (N,)", "positions (N,)")):
            picture.text(x, y - 48, name, 14, mono=True)
            picture.line((x, y - 42), (x, y - BOX[1] / 2), arrow=True)
    if len(row) == 3:
        for x, name in zip(xs, "qkv"):
            picture.text(x + 10, y + BOX[1] / 2 + 16, name, 14, "start", mono=True, color=PALE)
    if call.op == "attention":
        picture.text(right, y - 4, said, 14, "start", mono=True)
        kept = letters(
            tuple(number for number in call.probabilities if number > 1)
        )  # without the axis of a group of one
        picture.text(right, y + 15, f"probabilities {kept}", 13, "start", color=PALE, mono=True)
    elif call.op == "linear" and call.parameters == ("token_embed",):
        picture.text(right, y - 4, f"logits {said}", 14, "start", mono=True)
        picture.text(right, y + 15, "the same table as at the top: tied", 13, "start", color=PALE)
    elif call.op == "cross_entropy":
        picture.text(right, y - 4, "loss, one number", 14, "start", mono=True)
        picture.text(right, y + 15, "with labels (N,): the next token", 13, "start", color=PALE)
    else:
        picture.text(right, y + 5, said, 14, "start", mono=True)


def frame(picture, bottom, block_top, block_bottom):
    legend = bottom - 6
    notes = [
        "N = B T rows: B sequences of T tokens.  D: width.  F: hidden width of the MLP.  V: vocabulary.",
        "H heads of d_head = D/H columns each.  Matrices are (out, in): y = x W^T.",
    ]
    height = legend + 22 * len(notes) + 12
    description = (
        "Token ids and positions are looked up in two tables and added: the residual stream x (N, D). Each block norms it, "
        "makes queries, keys and values, attends, and adds the result to x; then it norms x again, and adds what the MLP "
        "gives. After the last block come a norm, the logits (N, V) by the token table, and the cross-entropy."
    )
    w, h = WIDTH - SPINE + 106, block_bottom - block_top
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}"',
        'role="img" aria-labelledby="title description"',
        "font-family=\"system-ui, 'DejaVu Sans', 'Segoe UI', Helvetica, Arial, sans-serif\">",
        '<title id="title">' + ALT + "</title>",
        f'<desc id="description">{html.escape(description)}</desc>',
        '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L10 5 L0 10 z" fill="{INK}"/></marker></defs>',
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{height - 2:g}" rx="12" fill="{PAPER}" stroke="#cbd2d9"/>',
        f'<rect x="{SPINE - 128}" y="{block_top:g}" width="{w}" height="{h:g}" rx="10" '
        'fill="#f5f7fa" stroke="#9aa5b1" stroke-dasharray="6 5"/>',
        *picture.parts,
    ]
    extra = Drawing()
    extra.text(WIDTH - 38, block_top + 26, "a block, n_layers times", 15, "end", weight="600")
    for i, note in enumerate(notes):
        extra.text(24, legend + 22 * i, note, 14, "start", color=PALE)
    return "\n".join([*lines, *extra.parts, "</svg>", ""])


def pages():
    """{path: Markdown} of the page with the picture."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    known = {name: name for name in ("words.md", *(f"ops/{op}.md" for op in SAID), "lessons/lesson_1.ipynb")}
    return {"architecture.md": relink(text, known)}


if __name__ == "__main__":
    FILE.write_text(svg(), encoding="utf-8")

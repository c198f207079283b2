"""Draws the pictures of docs/*/parallel.md: python docs/figures/draw.py. Two processes, what each holds in its colour.

Words are left to the pages, which exist in two languages; here stand only symbols: x tokens and activations, W weights,
∇W gradients, m v the optimiser's moments, K V keys and values.
"""

from pathlib import Path

COLOURS = ("#2f6fb3", "#d9822b")
FAINT, LINE, INK = "#eceae6", "#b8b4ac", "#33302b"
ROWS, TOKENS, LAYERS = 4, 8, 4


class Picture:
    def __init__(self, width: int, height: int) -> None:
        self.size, self.parts = (width, height), []

    def box(self, x: float, y: float, w: float, h: float, fill: str, *, line: str = "#ffffff", radius: float = 2) -> None:
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{radius}" fill="{fill}" '
                          f'stroke="{line}" stroke-width="1"/>')

    def text(self, x: float, y: float, words: str, *, size: int = 12, fill: str = INK, weight: str = "normal") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" font-weight="{weight}" '
                          f'text-anchor="middle">{words}</text>')

    def arrow(self, x1: float, y1: float, x2: float, y2: float, *, both: bool = True) -> None:
        start = ' marker-start="url(#back)"' if both else ""
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{INK}" '
                          f'stroke-width="1.6" marker-end="url(#tip)"{start}/>')

    def save(self, path: Path) -> None:
        width, height = self.size
        tip = ('<marker id="{}" viewBox="0 0 8 8" refX="{}" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
               f'<path d="{{}}" fill="{INK}"/></marker>')
        path.write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="system-ui, sans-serif"><defs>' + tip.format("tip", 7, "M0,0 L8,4 L0,8 z")
            + tip.format("back", 1, "M8,0 L0,4 L8,8 z") + f'</defs><rect width="{width}" height="{height}" '
            f'fill="#ffffff"/>' + "".join(self.parts) + "</svg>\n", encoding="utf-8")


def batch(picture: Picture, x: float, y: float, colour: str, held) -> None:
    """Rows of tokens; `held(row, token)` says which are this process's."""
    for row in range(ROWS):
        for token in range(TOKENS):
            picture.box(x + token * 11, y + row * 20, 11, 18, colour if held(row, token) else FAINT)
    picture.text(x + 44, y + ROWS * 20 + 14, "x")


def matrices(picture: Picture, x: float, y: float, colour: str, held, name: str) -> None:
    """One bar a layer, in four pieces; `held(layer, piece)` says which are this process's."""
    for layer in range(LAYERS):
        for piece in range(4):
            picture.box(x + piece * 15, y + layer * 20, 15, 18, colour if held(layer, piece) else FAINT)
    picture.text(x + 30, y + LAYERS * 20 + 14, name)


def process(picture: Picture, number: int, x: float, *, rows, weights, states=None) -> None:
    colour = COLOURS[number]
    picture.box(x, 8, 268, 142, "#faf9f7", line=LINE, radius=8)
    picture.text(x + 20, 30, str(number), size=15, fill=colour, weight="bold")
    batch(picture, x + 14, 42, colour, rows)
    matrices(picture, x + 116, 42, colour, weights, "W")
    matrices(picture, x + 192, 42, colour, states or weights, "∇W, m, v")


def pair(first: dict, second: dict, symbol: str, *, both: bool = True) -> Picture:
    picture = Picture(680, 158)
    process(picture, 0, 6, **first)
    process(picture, 1, 406, **second)
    picture.arrow(284, 86, 396, 86, both=both)
    picture.text(340, 74, symbol, size=13)
    return picture


def everything(*_: int) -> bool:
    return True


def half_of(index: int, number: int, whole: int):
    """Held when argument `index` lies in this process's half of `whole`."""
    return lambda *place: place[index] // (whole // 2) == number


def experts() -> Picture:
    """Attention on both, each half of the experts; tokens cross over."""
    picture = Picture(680, 158)
    for number, x in ((0, 6), (1, 406)):
        colour = COLOURS[number]
        picture.box(x, 8, 268, 142, "#faf9f7", line=LINE, radius=8)
        picture.text(x + 20, 30, str(number), size=15, fill=colour, weight="bold")
        batch(picture, x + 14, 42, colour, half_of(0, number, ROWS))
        picture.box(x + 120, 42, 34, 78, colour)
        picture.text(x + 137, 136, "W")
        for expert in range(4):
            held = expert // 2 == number
            picture.box(x + 176 + expert % 2 * 40, 42 + expert // 2 * 40, 36, 36, colour if held else FAINT, radius=18)
            picture.text(x + 194 + expert % 2 * 40, 65 + expert // 2 * 40, f"E{expert}",
                         fill="#ffffff" if held else LINE)
    for y in (66, 100):
        picture.arrow(284, y, 396, y)
    picture.text(340, 56, "x → E → x", size=13)
    return picture


def schedule() -> Picture:
    """A pipeline of two under 1F1B: forwards, backwards, and the bubble between."""
    lanes = (("F0", "F1", "", "B0", "F2", "B1", "F3", "B2", "", "B3"), ("", "F0", "B0", "F1", "B1", "F2", "B2", "F3", "B3",
                                                                        ""))
    picture = Picture(680, 96)
    for number, lane in enumerate(lanes):
        y = 12 + number * 38
        picture.text(18, y + 20, str(number), size=15, fill=COLOURS[number], weight="bold")
        for slot, what in enumerate(lane):
            forward = what.startswith("F")
            fill = FAINT if not what else COLOURS[number] if forward else {0: "#9dbfe0", 1: "#f0c08a"}[number]
            picture.box(36 + slot * 62, y, 60, 30, fill)
            picture.text(66 + slot * 62, y + 20, what, fill="#ffffff" if forward else INK)
    return picture


def main() -> None:
    half = {"rows": lambda n: half_of(0, n, ROWS), "tokens": lambda n: half_of(1, n, TOKENS),
            "layers": lambda n: half_of(0, n, LAYERS), "pieces": lambda n: half_of(1, n, 4)}
    pictures = {
        "replicate": pair(*({"rows": half["rows"](n), "weights": everything} for n in (0, 1)), "Σ ∇W"),
        "shard": pair(*({"rows": half["rows"](n), "weights": half["pieces"](n)} for n in (0, 1)), "W · Σ ∇W"),
        "optimizer-state": pair(*({"rows": half["rows"](n), "weights": everything, "states": half["pieces"](n)}
                                  for n in (0, 1)), "Σ ∇W · W"),
        "tensor": pair(*({"rows": everything, "weights": half["pieces"](n)} for n in (0, 1)), "Σ x"),
        "pipeline": pair(*({"rows": everything, "weights": half["layers"](n)} for n in (0, 1)), "x → · ← ∇x"),
        "pipeline-schedule": schedule(),
        "context": pair(*({"rows": half["tokens"](n), "weights": everything} for n in (0, 1)), "K V · Σ ∇W"),
        "expert": experts(),
    }
    for name, picture in pictures.items():
        picture.save(Path(__file__).parent / f"{name}.svg")


if __name__ == "__main__":
    main()

"""Draws the picture of docs/*/serving.md: python docs/figures/decoding.py. Four requests in two rows, step by step.

Words are left to the pages, which exist in two languages; here stand only letters and numbers: A to D are requests, a
wide box a piece of a prompt that is read in one step, a narrow one a token that is written, a faint one what was kept.
"""

from pathlib import Path

from draw import FAINT, INK, LINE, Picture

COLOUR = {"A": "#2f6fb3", "B": "#d9822b", "C": "#3c8a63", "D": "#8a5aa8"}
STEP, ROW, LEFT, TOP = 46, 44, 60, 34
# request, row, first step, tokens kept from before, prompt tokens read in each step, tokens written
REQUESTS = (("A", 0, 0, 0, (4,), 4), ("B", 1, 1, 0, (4, 4, 2), 6), ("C", 0, 4, 4, (2,), 6), ("D", 1, 9, 8, (2,), 3))
STEPS = 12


def draw() -> Picture:
    picture = Picture(LEFT + STEPS * STEP + 24, TOP + 3 * ROW)
    for step in range(STEPS):
        x = LEFT + step * STEP
        picture.box(x, TOP - 10, STEP - 4, 2 * ROW + 10, "#faf9f7", line=LINE, radius=6)
        picture.text(x + STEP / 2 - 2, TOP - 16, str(step + 1), size=11, fill="#7a7367")
    tokens = [0] * STEPS
    for name, row, begin, kept, reads, writes in REQUESTS:
        y, step = TOP + row * ROW, begin
        for number, read in enumerate(reads):
            x = LEFT + step * STEP + 3
            if kept and number == 0:
                picture.box(x, y + 26, 4 * min(kept, 8) + 4, 7, FAINT, line=COLOUR[name])
            picture.box(x, y, 9 * read, 22, COLOUR[name])
            picture.text(x + 4.5 * read, y + 16, name, fill="#ffffff", weight="bold")
            tokens[step] += read
            step += 1
        for number in range(writes - 1):   # the first is written by the step that reads the prompt's end
            picture.box(LEFT + (step + number) * STEP + 3, y, 9, 22, COLOUR[name])
            tokens[step + number] += 1
    for step, count in enumerate(tokens):
        middle = LEFT + step * STEP + STEP / 2 - 2
        picture.text(middle, TOP + 2 * ROW + 24, str(count), size=12, fill=INK, weight="bold")
    picture.text(30, TOP + 2 * ROW + 24, "Σ", size=13)
    for row in range(2):
        picture.text(30, TOP + row * ROW + 16, str(row + 1), size=13)
    return picture


if __name__ == "__main__":
    draw().save(Path(__file__).with_name("decoding.svg"))

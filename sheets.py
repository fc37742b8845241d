"""Sheets of images: a row per query, and what it retrieves in coloured frames."""
import textwrap
from pathlib import Path

from engine.images import load_tile
from utils import GREEN, GREY, RED, plot_style, save_figure

PICTURE_SIDE = 224  # px, of a written image inside its frame
PER_ROW = 10  # retrieved images in a row of the figure


def colour_of(correct: bool | None) -> str:
    """Return the colour of a frame: green, red, or grey where the query's class is not known."""
    return {True: GREEN, False: RED, None: GREY}[correct]


def draw_rows(answers: list[dict], target: Path) -> Path:
    """Draw one row per query: the query in a dashed frame, then what it retrieves, similarity and class below.

    More than PER_ROW images go on in further rows.

    Args:
        answers: [{'query': file, 'class': name or None, 'note': text, 'retrieved': [{'file', 'class', 'similarity',
            'correct': None where that is not known}, ...]}, ...].
        target: the picture; returns the path of its PNG, beside which lies a PDF.
    """
    most = max(len(answer['retrieved']) for answer in answers)
    per_row = min(PER_ROW, most)
    rows_each = -(-most // per_row)
    rows, columns = rows_each * len(answers), 1 + per_row
    with plot_style():
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(rows, columns, figsize=(1.25 * columns, 1.72 * rows), squeeze=False)
        # In inches: a margin of 0.04 around, and 0.45 below each tile for its text.
        figure.subplots_adjust(left=0.04 / (1.25 * columns), right=1 - 0.04 / (1.25 * columns),
                               top=1 - 0.04 / (1.72 * rows), bottom=0.45 / (1.72 * rows), wspace=0.06, hspace=0.4)
        for axis in axes.flat:
            axis.set_axis_off()
        for first, answer in zip(range(0, rows, rows_each), answers, strict=True):
            show_tile(axes[first, 0], answer['query'], '#000000',
                      f'{answer["note"] or "query"}\n{wrap(answer["class"] or "class unknown")}', '--')
            places = axes[first:first + rows_each, 1:].flat
            for axis, found in zip(places, answer['retrieved'], strict=False):  # the last row may have places left
                show_tile(axis, found['file'], colour_of(found['correct']),
                          f'{found["similarity"]:.3f}\n{wrap(found["class"] or "")}', '-')
        return save_figure(figure, target, dpi=160)


def show_tile(axis, path: Path, colour: str, text: str, line: str) -> None:
    """Show an image on an axis in a frame, with text below."""
    axis.set_axis_on()
    axis.imshow(load_tile(path, PICTURE_SIDE)[0])
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(edgecolor=colour, linewidth=2.5, linestyle=line)
    axis.set_xlabel(text, fontsize=6)


def wrap(name: str) -> str:
    """Break a class name into at most two lines that fit under a tile."""
    return '\n'.join(textwrap.wrap(name.replace('_', ' '), 20, max_lines=2, placeholder=' ...'))

"""Figures: the common style, and sheets of queries with what they retrieve in coloured frames."""
import functools
import textwrap
from pathlib import Path

from common.files import MADE_HERE, write_atomically
from common.images import load_tile

# Okabe & Ito, safe for colour-blind readers: blue, orange, green, purple, sky blue, vermilion, yellow, black.
COLOURS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#F0E442', '#000000')
GREEN, RED, GREY = '#009E73', '#D55E00', '#999999'


def plot_style():
    """Return a context in which matplotlib draws in the style of SciencePlots, without LaTeX or a screen."""
    import warnings

    import matplotlib

    matplotlib.use('Agg')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # SciencePlots warns under matplotlib 3.11
        import scienceplots  # noqa: F401  registers the styles
    from matplotlib import pyplot

    # No mathtext: a class or file name may hold a dollar sign.
    text = {'font.family': 'sans-serif', 'font.sans-serif': ['DejaVu Sans'], 'text.parse_math': False,
            'axes.formatter.use_mathtext': False, 'font.size': 8, 'axes.labelsize': 8, 'axes.titlesize': 8,
            'xtick.labelsize': 7, 'ytick.labelsize': 7, 'legend.fontsize': 7, 'figure.titlesize': 9}
    return pyplot.style.context(['science', 'no-latex', text])


def save_figure(figure, target: Path, dpi: int = 200) -> Path:
    """Save a figure as PNG and PDF (`target` with either suffix), and close it; returns the PNG's path. Atomic."""
    from matplotlib import pyplot

    # Without a creation date the same figure has the same bytes.
    metadata = {'pdf': {'CreationDate': None, 'Keywords': MADE_HERE}, 'png': {'Source': MADE_HERE}}
    for suffix, entries in metadata.items():
        write_atomically(target.with_suffix(f'.{suffix}'), functools.partial(
            figure.savefig, format=suffix, dpi=dpi, metadata=entries))
    pyplot.close(figure)
    return target.with_suffix('.png')


# ---------------------------------------------------- sheets of images --------------------------------------------
TILE_SIDE = 224  # px
TILES_PER_ROW = 10  # retrieved images in a row
TILE_WIDTH, ROW_HEIGHT, MARGIN, CAPTION = 1.25, 1.72, 0.04, 0.45  # inches


def frame_colour(correct: bool | None) -> str:
    """Return the colour of a frame: green if the class is right, red if not, grey if it is unknown."""
    return {True: GREEN, False: RED, None: GREY}[correct]


def draw_rows(answers: list[dict], target: Path) -> Path:
    """Draw a row per query: the query in a dashed frame, then what it retrieves, with similarity and class below.

    More than TILES_PER_ROW images continue in further rows.

    Args:
        answers: [{'query': file, 'class': name or None, 'note': text, 'retrieved': [{'file', 'class', 'similarity',
            'correct': None if unknown}, ...]}, ...].
        target: the PNG file, beside which a PDF is written.

    Returns:
        the path of the PNG.
    """
    most = max(len(answer['retrieved']) for answer in answers)
    per_row = min(TILES_PER_ROW, most)
    rows_per_query = -(-most // per_row)
    num_rows, num_columns = rows_per_query * len(answers), 1 + per_row
    width, height = TILE_WIDTH * num_columns, ROW_HEIGHT * num_rows
    with plot_style():
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(num_rows, num_columns, figsize=(width, height), squeeze=False)
        figure.subplots_adjust(left=MARGIN / width, right=1 - MARGIN / width, top=1 - MARGIN / height,
                               bottom=CAPTION / height, wspace=0.06, hspace=0.4)
        for axis in axes.flat:
            axis.set_axis_off()
        for first_row, answer in zip(range(0, num_rows, rows_per_query), answers, strict=True):
            caption = f'{answer["note"] or "query"}\n{wrap(answer["class"] or "class unknown")}'
            show_tile(axes[first_row, 0], answer['query'], '#000000', caption, linestyle='--')
            tiles = axes[first_row:first_row + rows_per_query, 1:].flat  # the last row may have tiles left over
            for axis, hit in zip(tiles, answer['retrieved'], strict=False):
                caption = f'{hit["similarity"]:.3f}\n{wrap(hit["class"] or "")}'
                show_tile(axis, hit['file'], frame_colour(hit['correct']), caption, linestyle='-')
        return save_figure(figure, target, dpi=160)


def show_tile(axis, path: Path, colour: str, caption: str, linestyle: str) -> None:
    """Show an image on an axis in a frame, with a caption below."""
    axis.set_axis_on()
    axis.imshow(load_tile(path, TILE_SIDE)[0])
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(edgecolor=colour, linewidth=2.5, linestyle=linestyle)
    axis.set_xlabel(caption, fontsize=6)


def wrap(name: str) -> str:
    """Break a class name into at most two lines that fit under a tile."""
    return '\n'.join(textwrap.wrap(name.replace('_', ' '), 20, max_lines=2, placeholder=' ...'))

"""Write one HTML file that shows what a run finds, what it confuses, and what it has learnt.

    python report.py --data_base results/car_resnet50_balanced_proxy_512_data_base.pth --data_path /home/data

The file stands alone: it opens from the disk, fetches nothing, and holds thumbnails of the images it shows. In it: the
run's settings, Recall@K, from which similarity on an answer is to be trusted, the curves (from {run}_statistics.csv
beside the data base), the hardest and the easiest queries, the classes that are confused most, R@1 of each class, a map
of the embeddings (PCA, and UMAP where umap-learn is installed), and a search box in which one picks an image and sees
its nearest neighbours, in the order of test.py.
"""
import base64
import io
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from common.distributed import progress
from common.errors import UserError
from common.files import MADE_HERE, check_replaceable, make_folder, write_atomically
from common.images import load_tile
from training.curves import draw_curves
from retrieval.database import DataBase, OpenDataBase, check_seen, open_data_base, seen_classes, warn_if_images_changed
from retrieval.embedding import measure
from retrieval.figures import COLOURS, GREY, plot_style
from retrieval.metrics import NUMBERS_OF_QUERIES, OPEN_SET_RATES, measure_open_set
from retrieval.search import choose_queries, nearest_images, rank_queries
from training.statistics import read_statistics
from utils import Parser, add_data_base_flags, check_between, run_script, user_path

NUM_NEIGHBOURS = 20
NUM_QUERIES = 8  # hardest, and easiest
NUM_PAIRS = 15  # of confused classes
MOST_IMAGES = 5000  # with thumbnails; a larger data base is shown in part
SIDES = (160, 128, 112, 96, 80, 64, 48, 32)  # px of a thumbnail, the largest that fits is taken
QUALITY = 60  # of WebP
THUMBNAIL_BYTES = 11e6  # of all thumbnails in base64: with the rest the file stays below 15 MB
SAMPLED_THUMBNAILS = 100  # from which the size of all is estimated
ABSENT_CURVE = tuple(number / 200 for number in range(41))  # rates up to 20 %
TEMPLATES = Path(__file__).parent / 'templates'


# ---------------------------------------------------- what to show --------------------------------------------------
class Numbered:
    """Number the images of a data base: test images first, then the gallery, if there is one."""

    def __init__(self, data_base: DataBase):
        subsets = list(data_base.subsets.values())
        self.paths = [path for subset in subsets for path in subset.images]
        self.labels = torch.cat([subset.labels for subset in subsets]).tolist()
        self.features = torch.cat([subset.features for subset in subsets]).float()
        self.places = [(name, index) for name, subset in data_base.subsets.items()
                       for index in range(len(subset.images))]
        self.num_queries = len(data_base.test.images)
        self.searched_from = 0 if data_base.gallery is None else self.num_queries  # number of the first searched image


def choose_images(first: list[int], images: Numbered, data_base: DataBase, most: int, binary: bool, seed: int) -> dict:
    """Choose queries, with their neighbours, as long as all images together are not more than `most`.

    Args:
        first: queries that are taken before the others, which follow at random.
        most: images to show.

    Returns:
        {query: [(image, similarity), ...]}, images as numbered.
    """
    others = np.random.default_rng(seed).permutation(images.num_queries).tolist()
    neighbours, shown = {}, set()
    bar = progress(dict.fromkeys([*first, *others]), desc='neighbours')
    for query in bar:
        found = [(images.searched_from + index, similarity) for index, similarity in nearest_images(
            images.features[query], data_base, ('test', query), NUM_NEIGHBOURS, binary)]
        together = shown | {query, *(image for image, _ in found)}
        if len(together) > most:
            break
        neighbours[query], shown = found, together
    bar.close()
    return dict(sorted(neighbours.items()))


def confused_pairs(ranked: dict, images: Numbered) -> list[dict]:
    """Return the pairs of classes of which one is most often found nearest to the other.

    Returns:
        [{'classes': (a, b), 'counts': (queries of a whose nearest image is of b, and the reverse),
        'example': a query}, ...], most first.
    """
    counts, examples = Counter(), {}
    for query, nearest in enumerate(ranked['nearest'].tolist()):
        pair = images.labels[query], images.labels[images.searched_from + nearest]
        if pair[0] != pair[1] and min(pair) >= 0 and ranked['rank'][query] >= 1:
            counts[pair] += 1
            examples.setdefault(pair, query)
    both = Counter()
    for pair, count in counts.items():
        both[min(pair), max(pair)] += count
    pairs = []
    for (a, b), _ in sorted(both.items(), key=lambda item: (-item[1], item[0]))[:NUM_PAIRS]:
        a, b = (a, b) if counts[a, b] >= counts[b, a] else (b, a)
        pairs.append({'classes': (a, b), 'counts': (counts[a, b], counts[b, a]), 'example': examples[a, b]})
    return pairs


def measure_classes(ranked: dict[str, dict], images: Numbered) -> list[dict]:
    """Return R@1 of each class: [{'label', 'queries', 'dense', 'binary': per cent}, ...], the lowest first."""
    labels = torch.tensor(images.labels[:images.num_queries])
    classes = []
    for label in labels.unique().tolist():
        row = {'label': label}
        for kind, ranks in ranked.items():
            own = ranks['rank'][(labels == label) & ~ranks['rank'].isnan()]
            row |= {'queries': len(own), kind: 100 * (own < 1).double().mean().item()}
        if row['queries']:
            classes.append(row)
    return sorted(classes, key=lambda row: (row['dense'], row['label']))


def principal_components(features: torch.Tensor) -> np.ndarray:
    """Project features (N, D) to the two directions (N, 2) in which they vary most; D = 1 leaves the second at 0."""
    centred = (features - features.mean(0)).double().numpy()
    _, axes = np.linalg.eigh(centred.T @ centred)  # ascending
    axes = axes[:, ::-1][:, :2]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])  # an axis has no sign of its own
    points = centred @ axes
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1])))


def map_embeddings(features: torch.Tensor) -> dict[str, np.ndarray]:
    """Map features (N, D) to the plane: {'PCA': (N, 2), 'UMAP': (N, 2) where umap-learn is installed}, in [0, 1].

    Source: McInnes et al., UMAP, 2018, arXiv 1802.03426.
    """
    maps = {'PCA': principal_components(features)}
    if len(features) >= 20:  # fewer have no neighbourhoods to speak of
        try:
            from umap import UMAP
        except ImportError:
            pass
        else:
            maps['UMAP'] = UMAP(metric='cosine', random_state=0, n_jobs=1).fit_transform(features.numpy())
    for name, points in maps.items():
        extent = np.ptp(points, axis=0)
        maps[name] = (points - points.min(0)) / np.where(extent > 0, extent, 1)
    return maps


# ---------------------------------------------------- pictures ------------------------------------------------------
def encode(path: Path, side: int) -> str | None:
    """Return a thumbnail as base64 of a WebP, or None if the image is missing or broken."""
    tile, readable = load_tile(path, side)
    if not readable:
        return None
    buffer = io.BytesIO()
    tile.save(buffer, 'WEBP', quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


def make_thumbnails(paths: list[Path]) -> tuple[list[str | None], int]:
    """Return a thumbnail for each path, None where there is no image, and their side in px: the largest that fits."""
    sample = [paths[index] for index in np.linspace(0, len(paths) - 1, min(SAMPLED_THUMBNAILS, len(paths))).astype(int)]
    for side in SIDES:
        sizes = [len(thumbnail) for path in sample if (thumbnail := encode(path, side))]
        if not sizes or sum(sizes) / len(sizes) * len(paths) <= THUMBNAIL_BYTES:
            break
    with ThreadPoolExecutor(2) as pool:
        thumbnails = list(progress(pool.map(lambda path: encode(path, side), paths), desc='thumbnails', unit='img',
                                   total=len(paths)))
    return thumbnails, side


def draw_curves_inline(statistics: Path, run: str | None) -> str:
    """Return the curves of a run as base64 of a PNG.

    Raises:
        UserError: if the statistics are those of a run of another name.
    """
    table = read_statistics(statistics)
    if run is not None and 'args.run' in table and table['args.run'].iloc[-1] != run:
        raise UserError(f'--statistics {statistics} is of the run {table["args.run"].iloc[-1]}, the data base of '
                        f'{run}; name the file that belongs to it')
    with tempfile.TemporaryDirectory() as folder:
        return base64.b64encode(draw_curves(table, Path(folder) / 'curves.png', run or statistics.name).read_bytes()
                                ).decode()


# ---------------------------------------------------- report --------------------------------------------------------
def rank_and_measure(data_base: DataBase) -> tuple[dict | None, dict]:
    """Return metrics, of `measure`, and {'dense', 'binary': ranks, of `rank_queries`}.

    There are no metrics of a collection in which no two images are of a class.
    """
    if data_base.sources is not None and (data_base.test.labels < 0).all():
        unknown = torch.full((len(data_base.test.images),), torch.nan, dtype=torch.float64)
        return None, dict.fromkeys(('dense', 'binary'), {'rank': unknown, 'margin': unknown, 'nearest': unknown[:0]})
    ranked = {name: rank_queries(data_base, name == 'binary') for name in ('dense', 'binary')}
    recalls = tuple(data_base.origin['args']['recalls'])
    if data_base.sources is not None:
        if ranked['dense']['rank'].isnan().all():
            return None, ranked
        recalls = tuple(k for k in recalls if k < (data_base.test.labels >= 0).sum()) or (1,)
    return measure(data_base, recalls, torch.device('cpu')), ranked


def absent_curve(data_base: DataBase) -> dict | None:
    """Return what metrics.open_set_thresholds says at the rates of ABSENT_CURVE, and of those that are named beside it.

    Returns:
        {'rows': of the named rates, 'rates', 'kept': lists in per cent}, None where nothing can be measured.
    """
    rows = measure_open_set(*data_base.tensors(), rates=(*OPEN_SET_RATES, *ABSENT_CURVE))
    named, curve = rows[:len(OPEN_SET_RATES)], rows[len(OPEN_SET_RATES):]
    return {'rows': named, 'rates': [100 * row['rate'] for row in curve], 'kept': [row['kept'] for row in curve]} \
        if rows else None


def draw_absent(curve: dict) -> str:
    """Draw right answers that are kept over absent ones that are answered; returns the PNG as base64."""
    with plot_style():
        from matplotlib import pyplot

        figure, axis = pyplot.subplots(figsize=(4.2, 2.8))
        axis.plot(curve['rates'], curve['kept'], color=COLOURS[0])
        for row, marker in zip(curve['rows'], 'os', strict=True):
            axis.plot(100 * row['rate'], row['kept'], marker, color=COLOURS[5],
                      label=f'{100 * row["rate"]:g} %: similarity {row["threshold"]:.3f}, keeps {row["kept"]:.1f} %')
        axis.axhline(curve['rows'][0]['right'], color=GREY, linestyle='--', label='all right answers')
        axis.set(xlabel='absent classes that are answered / %', ylabel='right answers kept / %', ylim=(0, 102))
        axis.legend(loc='lower right')
        buffer = io.BytesIO()
        figure.savefig(buffer, format='png', dpi=200, bbox_inches='tight')
        pyplot.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def gather(run: OpenDataBase, args) -> dict:
    """Compute what the template shows.

    Returns:
        the template's variables; `data` is what its script reads. Images are numbered by their place among those
        shown.
    """
    data_base = run.data_base
    images, kind = Numbered(data_base), 'binary' if args.binary else 'dense'
    results, ranked = rank_and_measure(data_base)
    chosen = {how: choose_queries(ranked[kind], how, min(NUM_QUERIES, results[kind]['queries']) if results else 0)
              for how in ('worst', 'best')}
    pairs = confused_pairs(ranked[kind], images)
    first = [*chosen['worst'], *chosen['best'], *(pair['example'] for pair in pairs)]
    neighbours = choose_images(first, images, data_base, args.max_images, args.binary, args.seed)
    if not neighbours:
        raise UserError(f'--max_images {args.max_images} does not hold one query and its {NUM_NEIGHBOURS} neighbours')
    shown = sorted({*neighbours, *(image for found in neighbours.values() for image, _ in found)})
    number = {image: place for place, image in enumerate(shown)}
    thumbnails, side = make_thumbnails([run.image_file(*images.places[image]) for image in shown])
    ranks = ranked[kind]['rank'].tolist()
    maps = map_embeddings(images.features[shown])
    absent = absent_curve(data_base) if results else None
    return {
        'kind': kind, 'side': side, 'results': results, 'absent': absent and {**absent, 'curve': draw_absent(absent)},
        'columns': [name for name in results['dense'] if name not in NUMBERS_OF_QUERIES] if results else [],
        'chosen': {how: [{'image': number[query], 'rank': ranks[query] + 1, 'found': [number[image] for image, _ in
                                                                                    neighbours[query][:8]]}
                         for query in queries if query in neighbours] for how, queries in chosen.items()},
        'pairs': [{**pair, 'example': number.get(pair['example'])} for pair in pairs],
        'classes': measure_classes(ranked, images), 'class_names': data_base.class_names,
        'seen': len(check_seen(seen_classes({**data_base.proxies, **data_base.origin}), data_base.class_names, True)),
        'made_here': MADE_HERE, 'num_queries': images.num_queries, 'num_images': len(images.paths),
        'num_shown': len(shown), 'num_lost': thumbnails.count(None),
        'data': {
            'classes': data_base.class_names,
            'paths': [images.paths[image] for image in shown], 'labels': [images.labels[image] for image in shown],
            'thumbnails': thumbnails,
            'ranks': [ranks[image] + 1 if image in neighbours and ranks[image] == ranks[image] else None
                      for image in shown],
            'neighbours': [[[number[found], round(similarity, 4)] for found, similarity in neighbours[image]]
                           if image in neighbours else None for image in shown],
            'maps': {name: np.round(points, 4).tolist() for name, points in maps.items()},
        },
    }


def render(variables: dict) -> str:
    """Fill the template; everything from a file is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template('report.html').render(variables)


# ---------------------------------------------------- command line --------------------------------------------------
def get_args(argv: list[str] | None = None):
    """Parse the command line."""
    parser = Parser(description=__doc__)
    add_data_base_flags(parser)
    parser.add_argument('--statistics', type=user_path, help='of the run [RUN_statistics.csv beside the data base]')
    parser.add_argument('--binary', action='store_true', help='rank by the Hamming distance of sign(features)')
    parser.add_argument('--max_images', type=int, default=MOST_IMAGES, help='images with thumbnails; of a larger data '
                        'base the hardest, the easiest and random queries are shown with their neighbours '
                        '[%(default)s]')
    parser.add_argument('--seed', type=int, default=0, help='of the random queries [%(default)s]')
    parser.add_argument('--output', type=user_path, help='HTML file [RUN_report.html beside the data base]')
    args = parser.parse_args(argv)
    check_between(args, {'max_images': (2, None), 'seed': (0, None)})
    return args


def main() -> None:
    """Write the report that the command line names."""
    args = get_args()
    run = open_data_base(args.data_base, args.results_dir, args.data_path)
    data_base, name = run.data_base, run.files.name
    statistics = Path(args.statistics) if args.statistics is not None else run.files.statistics
    output = Path(args.output) if args.output is not None else run.files.folder / f'{name}_report.html'
    make_folder('--output', output.parent)
    check_replaceable(output)
    curves = None
    if args.statistics is not None or statistics.is_file():
        curves = draw_curves_inline(statistics, data_base.origin['args'].get('run'))
    warn_if_images_changed(run)
    variables = gather(run, args)
    html = render({**variables, 'run': name, 'settings': data_base.origin['args'], 'curves': curves,
                   'epoch': data_base.origin.get('epoch'), 'statistics': statistics.name}).encode()
    write_atomically(output, lambda target: target.write(html))
    if variables['num_lost']:
        print(f'{variables["num_lost"]:,} of {variables["num_shown"]:,} images are missing or broken and shown as grey '
              'tiles')
    print(f'{output} ({len(html) / 1e6:.1f} MB, {variables["num_shown"]:,} of {variables["num_images"]:,} images, '
          f'thumbnails of {variables["side"]} px)')


if __name__ == '__main__':
    run_script(main)

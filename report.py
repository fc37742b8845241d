"""Write one HTML file about a run: what it retrieves, which classes it confuses, and what its embeddings look like.

    python report.py --data_base results/car_resnet50_balanced_proxy_512_data_base.pth --data_path /home/data

The file is self-contained: it opens from the disk, loads nothing from the network, and embeds thumbnails of the images
that it shows. It holds the settings of the run, Recall@K, the similarity above which an answer can be trusted, the
training curves (from {run}_statistics.csv beside the data base), the hardest and the easiest queries, the classes that
are confused most, R@1 of each class, a map of the embeddings (PCA, and UMAP if umap-learn is installed), and a search
box that shows the nearest neighbours of any image, in the order of test.py.
"""
import base64
import io
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from common.distributed import progress
from common.errors import UserError
from common.files import MADE_HERE, check_replaceable, make_folder, write_atomically
from common.images import load_tile
from retrieval.database import DataBase, OpenDataBase, check_seen, open_data_base, seen_classes, warn_if_images_changed
from retrieval.embedding import measure
from retrieval.figures import COLOURS, GREY, plot_style
from retrieval.metrics import NUMBERS_OF_QUERIES, OPEN_SET_RATES, measure_open_set
from retrieval.nearest import Nearest
from retrieval.search import choose_queries, rank_queries
from training.curves import draw_curves
from training.statistics import read_statistics
from utils import Parser, add_data_base_flags, check_between, run_script, user_path

NUM_NEIGHBOURS = 20  # of each query, in the search
NUM_RETRIEVED = 8  # in a row of the hardest and easiest queries
NUM_QUERIES = 8  # hardest, and as many easiest
NUM_PAIRS = 15  # of confused classes
MAX_IMAGES = 5000  # with thumbnails; a larger data base is shown in part
THUMBNAIL_SIDES = (160, 128, 112, 96, 80, 64, 48, 32)  # px; the largest that fits is taken
THUMBNAIL_QUALITY = 60  # of WebP
THUMBNAIL_BYTES = 11e6  # of all thumbnails in base64, so that the file stays below 15 MB
SAMPLED_THUMBNAILS = 100  # from which the size of all is estimated
CURVE_RATES = tuple(index / 200 for index in range(41))  # of the open-set curve: 0 to 20 %
UMAP_NEIGHBOURS = 15  # of each image, UMAP's default
UMAP_SEARCHES_FROM = 4096  # images; of fewer, UMAP compares all pairs
QUERIES_AT_ONCE = 128  # in the search for neighbours
FEWEST_FOR_UMAP = 20  # images; fewer have no neighbourhoods to speak of
TEMPLATES = Path(__file__).parent / 'templates'


# ---------------------------------------------------- images and their neighbours ----------------------------------
class ImageList:
    """All images of a data base in one list: the test images (queries), then the gallery, if there is one."""

    def __init__(self, data_base: DataBase):
        subsets = data_base.subsets
        self.paths = [path for subset in subsets.values() for path in subset.images]
        self.labels = torch.cat([subset.labels for subset in subsets.values()]).tolist()
        self.features = torch.cat([subset.features for subset in subsets.values()]).float()
        self.origins = [(name, index) for name, subset in subsets.items() for index in range(len(subset.images))]
        self.num_queries = len(data_base.test.images)
        self.first_searched = 0 if data_base.gallery is None else self.num_queries


def choose_images(first: list[int], images: ImageList, data_base: DataBase, most: int, binary: bool, seed: int
                  ) -> dict[int, list]:
    """Choose queries and their neighbours for as long as there are at most `most` images altogether.

    Args:
        first: queries that are taken before the others, which follow in random order.

    Returns:
        {query: [(image, similarity), ...]}, as indices into `images`.
    """
    others = np.random.default_rng(seed).permutation(images.num_queries).tolist()
    queries = list(dict.fromkeys([*first, *others]))
    neighbours, shown = {}, set()
    bar = progress(find_neighbours(queries, images, data_base, binary), desc='neighbours', total=len(queries))
    for query, hits in bar:
        extended = shown | {query, *(image for image, _ in hits)}
        if len(extended) > most:
            break
        neighbours[query], shown = hits, extended
    bar.close()
    return dict(sorted(neighbours.items()))


def find_neighbours(queries: list[int], images: ImageList, data_base: DataBase, binary: bool) -> Iterator[tuple]:
    """Yield each query with its neighbours [(image, similarity), ...] in the order of test.py."""
    nearest = Nearest(data_base.subsets[data_base.searched].features)
    is_searched = data_base.gallery is None  # then a query finds itself
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        part = queries[start:start + QUERIES_AT_ONCE]
        answers = nearest.search(images.features[part], NUM_NEIGHBOURS + is_searched, binary)
        for query, answer in zip(part, answers, strict=True):
            hits = [(images.first_searched + index, similarity) for index, similarity in answer
                    if not (is_searched and index == query)]
            yield query, hits[:NUM_NEIGHBOURS]


# ---------------------------------------------------- measurements --------------------------------------------------
def rank_and_measure(data_base: DataBase) -> tuple[dict | None, dict]:
    """Return the metrics of `measure`, and {'dense', 'binary': ranks of `rank_queries`}.

    The metrics are None for a collection in which no two images are of one class.
    """
    if data_base.sources is not None and (data_base.test.labels < 0).all():
        unknown = torch.full((len(data_base.test.images),), torch.nan, dtype=torch.float64)
        return None, dict.fromkeys(('dense', 'binary'), {'rank': unknown, 'margin': unknown, 'nearest': unknown[:0]})
    ranked = {kind: rank_queries(data_base, kind == 'binary') for kind in ('dense', 'binary')}
    recalls = tuple(data_base.origin['args']['recalls'])
    if data_base.sources is not None:
        if ranked['dense']['rank'].isnan().all():
            return None, ranked
        recalls = tuple(k for k in recalls if k < (data_base.test.labels >= 0).sum()) or (1,)
    return measure(data_base, recalls, torch.device('cpu')), ranked


def confused_pairs(ranked: dict, images: ImageList) -> list[dict]:
    """Return the pairs of classes that are confused most often: a query's nearest image is of the other class.

    Args:
        ranked: of `rank_queries`.

    Returns:
        [{'classes': (a, b), 'counts': (queries of a whose nearest image is of b, and the reverse),
        'example': a query}, ...], the most frequent first.
    """
    counts, examples = Counter(), {}
    for query, nearest in enumerate(ranked['nearest'].tolist()):
        pair = images.labels[query], images.labels[images.first_searched + nearest]
        if pair[0] != pair[1] and min(pair) >= 0 and ranked['rank'][query] >= 1:
            counts[pair] += 1
            examples.setdefault(pair, query)
    both_ways = Counter()
    for pair, count in counts.items():
        both_ways[min(pair), max(pair)] += count
    pairs = []
    for (a, b), _ in sorted(both_ways.items(), key=lambda item: (-item[1], item[0]))[:NUM_PAIRS]:
        if counts[a, b] < counts[b, a]:
            a, b = b, a
        pairs.append({'classes': (a, b), 'counts': (counts[a, b], counts[b, a]), 'example': examples[a, b]})
    return pairs


def measure_classes(ranked: dict[str, dict], images: ImageList) -> list[dict]:
    """Return R@1 of each class: [{'label', 'queries', 'dense': per cent, 'binary': per cent}, ...], the lowest first.
    """
    labels = torch.tensor(images.labels[:images.num_queries])
    classes = []
    for label in labels.unique().tolist():
        row = {'label': label}
        for kind, ranks in ranked.items():
            of_class = ranks['rank'][(labels == label) & ~ranks['rank'].isnan()]
            row |= {'queries': len(of_class), kind: 100 * (of_class < 1).double().mean().item()}
        if row['queries']:
            classes.append(row)
    return sorted(classes, key=lambda row: (row['dense'], row['label']))


def measure_open_set_curve(data_base: DataBase) -> dict | None:
    """Measure which share of the answers a threshold marks: right ones, and those to queries of absent classes.

    Returns:
        {'rows': of metrics.open_set_thresholds at OPEN_SET_RATES, 'lost', 'marked': of the curve, per cent}; None
        where nothing can be measured.
    """
    rows = measure_open_set(*data_base.tensors(), rates=(*OPEN_SET_RATES, *CURVE_RATES))
    if not rows:
        return None
    curve = rows[len(OPEN_SET_RATES):]
    return {'rows': rows[:len(OPEN_SET_RATES)], 'lost': [row['lost'] for row in curve],
            'marked': [row['marked'] for row in curve]}


# ---------------------------------------------------- map of the embeddings ----------------------------------------
def principal_components(features: torch.Tensor) -> np.ndarray:
    """Project features (N, D) onto the two directions (N, 2) of largest variance; with D = 1 the second is 0."""
    centred = (features - features.mean(0)).double().numpy()
    _, directions = np.linalg.eigh(centred.T @ centred)  # ascending
    directions = directions[:, ::-1][:, :2]
    # An eigenvector has no sign of its own; its largest entry is made positive.
    directions = directions * np.sign(directions[np.abs(directions).argmax(0), np.arange(directions.shape[1])])
    points = centred @ directions
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1])))


def neighbours_of_all(features: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest rows (N, k) of each row, itself among them, and their distances, 1 - cosine.

    UMAP's own search of many rows compiles itself first, for longer than all the rest takes.
    """
    nearest = Nearest(features)
    answers = [answer for part in features.split(QUERIES_AT_ONCE) for answer in nearest.search(part, UMAP_NEIGHBOURS)]
    pairs = np.array(answers)
    return pairs[..., 0].astype(np.int64), (1 - pairs[..., 1]).clip(0).astype(np.float32)


def map_embeddings(features: torch.Tensor) -> dict[str, np.ndarray]:
    """Map features (N, D) to the plane: {'PCA': (N, 2), 'UMAP': (N, 2) where umap-learn is installed}, in [0, 1].

    Source: McInnes et al., UMAP, 2018, arXiv 1802.03426.
    """
    maps = {'PCA': principal_components(features)}
    if len(features) >= FEWEST_FOR_UMAP:
        try:
            from umap import UMAP
        except ImportError:
            pass
        else:
            neighbours = neighbours_of_all(features) if len(features) >= UMAP_SEARCHES_FROM else (None, None, None)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # that other points cannot be mapped later
                umap = UMAP(metric='cosine', random_state=0, n_jobs=1, precomputed_knn=neighbours)
                maps['UMAP'] = umap.fit_transform(features.numpy())
    for name, points in maps.items():
        extent = np.ptp(points, axis=0)
        maps[name] = (points - points.min(0)) / np.where(extent > 0, extent, 1)
    return maps


# ---------------------------------------------------- pictures ------------------------------------------------------
def encode_thumbnail(path: Path, side: int) -> str | None:
    """Return a thumbnail as base64 of a WebP, or None if the image is missing or broken."""
    tile, readable = load_tile(path, side)
    if not readable:
        return None
    buffer = io.BytesIO()
    tile.save(buffer, 'WEBP', quality=THUMBNAIL_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


def make_thumbnails(paths: list[Path]) -> tuple[list[str | None], int]:
    """Return a thumbnail of each image, None where it cannot be read, and their side in px: the largest that fits."""
    sampled = np.linspace(0, len(paths) - 1, min(SAMPLED_THUMBNAILS, len(paths))).astype(int)
    for side in THUMBNAIL_SIDES:
        sizes = [len(thumbnail) for index in sampled if (thumbnail := encode_thumbnail(paths[index], side))]
        if not sizes or sum(sizes) / len(sizes) * len(paths) <= THUMBNAIL_BYTES:
            break
    with ThreadPoolExecutor(2) as pool:
        thumbnails = list(progress(pool.map(lambda path: encode_thumbnail(path, side), paths), desc='thumbnails',
                                   unit='img', total=len(paths)))
    return thumbnails, side


def draw_curves_inline(statistics: Path, run: str | None) -> str:
    """Return the training curves of a run as base64 of a PNG.

    Raises:
        UserError: if the statistics belong to a run of another name.
    """
    table = read_statistics(statistics)
    if run is not None and 'args.run' in table and table['args.run'].iloc[-1] != run:
        raise UserError(f'--statistics {statistics} belongs to the run {table["args.run"].iloc[-1]}, the data base to '
                        f'{run}; name the statistics of {run}')
    with tempfile.TemporaryDirectory() as folder:
        figure = draw_curves(table, Path(folder) / 'curves.png', run or statistics.name)
        return base64.b64encode(figure.read_bytes()).decode()


def draw_open_set_curve(curve: dict) -> str:
    """Draw the marked answers to queries of absent classes against right answers; returns a PNG as base64."""
    with plot_style():
        from matplotlib import pyplot

        figure, axis = pyplot.subplots(figsize=(4.2, 2.8))
        axis.plot(curve['lost'], curve['marked'], color=COLOURS[0])
        for row, marker in zip(curve['rows'], 'os', strict=True):
            axis.plot(row['lost'], row['marked'], marker, color=COLOURS[5],
                      label=f'below {row["threshold"]:.3f}: {row["marked"]:.1f} % and {row["lost"]:.1f} %')
        axis.axline((0, 0), slope=1, color=GREY, linestyle='--', label='no separation')
        axis.set(xlabel='right answers that are marked (%)', ylabel='answers to absent classes marked (%)',
                 xlim=(0, 100 * CURVE_RATES[-1]), ylim=(0, 102))
        axis.legend()
        buffer = io.BytesIO()
        figure.savefig(buffer, format='png', dpi=200, bbox_inches='tight')
        pyplot.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


# ---------------------------------------------------- report --------------------------------------------------------
def gather(opened: OpenDataBase, args) -> dict:
    """Compute what the template shows.

    Returns:
        the variables of the template. In them an image is its index among the images that are shown; `data` is what
        the script on the page reads.
    """
    data_base, images = opened.data_base, ImageList(opened.data_base)
    kind = 'binary' if args.binary else 'dense'
    results, ranked = rank_and_measure(data_base)
    num_queries = min(NUM_QUERIES, results[kind]['queries']) if results else 0
    chosen = {select: choose_queries(ranked[kind], select, num_queries) for select in ('worst', 'best')}
    pairs = confused_pairs(ranked[kind], images)
    first = [*chosen['worst'], *chosen['best'], *(pair['example'] for pair in pairs)]
    neighbours = choose_images(first, images, data_base, args.max_images, args.binary, args.seed)
    if not neighbours:
        raise UserError(f'--max_images {args.max_images} is too small for one query and its {NUM_NEIGHBOURS} '
                        'neighbours; raise it')

    shown = sorted({*neighbours, *(image for hits in neighbours.values() for image, _ in hits)})
    index_of = {image: index for index, image in enumerate(shown)}
    thumbnails, side = make_thumbnails([opened.image_file(*images.origins[image]) for image in shown])
    ranks = [None if rank != rank else rank + 1 for rank in ranked[kind]['rank'].tolist()]  # NaN: no positive
    open_set = measure_open_set_curve(data_base) if results else None
    if open_set:
        open_set['figure'] = draw_open_set_curve(open_set)
    seen = check_seen(seen_classes({**data_base.proxies, **data_base.origin}), data_base.class_names, allowed=True)
    return {
        'kind': kind, 'side': side, 'results': results, 'open_set': open_set,
        'columns': [name for name in results['dense'] if name not in NUMBERS_OF_QUERIES] if results else [],
        'chosen': {select: rows_of_tiles(queries, neighbours, index_of) for select, queries in chosen.items()},
        'pairs': [{**pair, 'example': index_of.get(pair['example'])} for pair in pairs],
        'classes': measure_classes(ranked, images), 'class_names': data_base.class_names, 'num_seen': len(seen),
        'num_queries': images.num_queries, 'num_images': len(images.paths), 'num_shown': len(shown),
        'num_lost': thumbnails.count(None),
        'data': page_data(images, data_base.class_names, index_of, neighbours, ranks) | {'thumbnails': thumbnails},
    }


def rows_of_tiles(queries: list[int], neighbours: dict, index_of: dict[int, int]) -> list[dict]:
    """Return a row of tiles for each query whose neighbours are shown: [{'query', 'retrieved': [image, ...]}, ...]."""
    rows = []
    for query in queries:
        if query in neighbours:
            retrieved = [index_of[image] for image, _ in neighbours[query][:NUM_RETRIEVED]]
            rows.append({'query': index_of[query], 'retrieved': retrieved})
    return rows


def page_data(images: ImageList, class_names: list[str], index_of: dict[int, int], neighbours: dict, ranks: list
              ) -> dict:
    """Return what the script on the page reads, without the thumbnails: a value for each image that is shown.

    Args:
        index_of: {image: its index among those shown}, in their order.
        neighbours: of `choose_images`; an image without them cannot be picked on the page.
        ranks: of the first hit of each query, None without one.
    """
    pickable = {image: [[index_of[hit], round(similarity, 4)] for hit, similarity in hits]
                for image, hits in neighbours.items()}
    maps = map_embeddings(images.features[list(index_of)])
    return {'classes': class_names,
            'paths': [images.paths[image] for image in index_of],
            'labels': [images.labels[image] for image in index_of],
            'ranks': [ranks[image] if image in pickable else None for image in index_of],
            'neighbours': [pickable.get(image) for image in index_of],
            'maps': {name: np.round(points, 4).tolist() for name, points in maps.items()}}


def render(variables: dict) -> str:
    """Fill the template; everything that comes from a file is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    return environment.get_template('report.html').render(variables, made_here=MADE_HERE)


# ---------------------------------------------------- command line --------------------------------------------------
def get_args(argv: list[str] | None = None):
    """Parse the command line."""
    parser = Parser(description=__doc__)
    add_data_base_flags(parser)
    parser.add_argument('--statistics', type=user_path, metavar='FILE', help='statistics of the run, for the curves '
                        '[RUN_statistics.csv beside the data base]')
    parser.add_argument('--binary', action='store_true', help='rank by the Hamming distance of sign(features)')
    parser.add_argument('--max_images', type=int, default=MAX_IMAGES, help='largest number of images with thumbnails; '
                        'of a larger data base, the report shows the hardest, the easiest and random queries with '
                        'their neighbours [%(default)s]')
    parser.add_argument('--seed', type=int, default=0, help='of the random queries [%(default)s]')
    parser.add_argument('--output', type=user_path, metavar='FILE', help='HTML file to write [RUN_report.html beside '
                        'the data base]')
    args = parser.parse_args(argv)
    check_between(args, {'max_images': (2, None), 'seed': (0, None)})
    return args


def main() -> None:
    """Write the report that the command line names."""
    args = get_args()
    opened = open_data_base(args.data_base, args.results_dir, args.data_path)
    origin, name = opened.data_base.origin, opened.files.name
    statistics = opened.files.statistics if args.statistics is None else Path(args.statistics)
    output = opened.files.folder / f'{name}_report.html' if args.output is None else Path(args.output)
    make_folder('--output', output.parent)
    check_replaceable(output)
    curves = None
    if args.statistics is not None or statistics.is_file():
        curves = draw_curves_inline(statistics, origin['args'].get('run'))
    warn_if_images_changed(opened)

    variables = gather(opened, args)
    html = render(variables | {'run': name, 'settings': origin['args'], 'epoch': origin.get('epoch'), 'curves': curves,
                               'statistics': statistics.name}).encode()
    write_atomically(output, lambda file: file.write(html))
    if variables['num_lost']:
        print(f'{variables["num_lost"]:,} of {variables["num_shown"]:,} images are missing or broken and shown as '
              'grey tiles')
    print(f'{output} ({len(html) / 1e6:.1f} MB, {variables["num_shown"]:,} of {variables["num_images"]:,} images, '
          f'thumbnails of {variables["side"]} px)')


if __name__ == '__main__':
    run_script(main)

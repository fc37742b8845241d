"""Retrieve the images nearest to a query from a data base, and draw them.

    python test.py --retrieval_num 10
    python test.py --query_img_name 008055.jpg --data_base car_resnet50_balanced_proxy_512_data_base.pth
    python test.py --query_img_name my_photo.jpg --data_base results/car_resnet50_balanced_proxy_512_data_base.pth
    python test.py --num_queries 8 --select worst          # a sheet of the queries whose first hit comes last

A query is an image of the data base (its path in the split, an absolute path, or its file name if that is unique), or
any other image file, which the run's model then embeds and whose class is unknown. For one query this writes
results/{query}/query_img.jpg, retrieval_img_{rank}_{similarity}.jpg and a figure, top{K}.png and .pdf, with green
frames for the query's class, red ones for other classes, grey ones if the class is unknown; retrieval.json lists the
same. A sheet goes to results/{run}_{select}/. Files from elsewhere are never replaced. A missing image is drawn as a
grey tile with its name.
"""
import hashlib
from pathlib import Path

import torch
from PIL import ImageOps

from common.distributed import select_device
from common.errors import UserError, suggestion
from common.files import are_texts, make_folder, read_json, save_json
from common.images import load_tile
from retrieval.database import OpenDataBase, load_model_of, open_data_base, open_set_threshold, warn_if_images_changed
from retrieval.embedding import embed_images
from retrieval.figures import GREY, TILE_SIDE, draw_rows, frame_colour
from retrieval.search import NO_MATCH, choose_queries, nearest_images, rank_queries
from utils import Parser, add_data_base_flags, check_between, run_script

FRAME = 8  # px
MOST_QUERIES = 200  # rows of a sheet; PNG readers fail above 65,535 px


# ---------------------------------------------------- queries -----------------------------------------------------
def find_query(name: str, opened: OpenDataBase) -> tuple[str, int] | None:
    """Return the subset and index of a query in the data base, or None if it is an image file from elsewhere.

    Raises:
        UserError: if a file name occurs more than once, or nothing of that name exists.
    """
    # Images are identified by (index of their folder, path below it).
    by_path = paths_below_roots(name, opened.roots)
    by_raw_name = {image for root in opened.roots for image in converted_names(root, name)}
    known = find_images({name, *by_raw_name, *(image for _, image in by_path)}, f'/{name}', opened)
    for key in by_path:
        if key in known:
            return known[key]
    candidates = [(root, image) for root, image in known if image == name or image in by_raw_name
                  or '/' not in name and image.endswith(f'/{name}')]
    if Path(name).is_file():  # then this file is meant, and an image of that name only if it is the same file
        candidates = [(root, image) for root, image in candidates if (opened.roots[root] / image).is_file()
                      and Path(name).samefile(opened.roots[root] / image)]
    exact = [key for key in candidates if key[1] == name]
    if len(exact) == 1:
        candidates = exact
    if len(candidates) == 1:
        return known[candidates[0]]
    if candidates:
        paths = [image if len(opened.roots) == 1 else str(opened.roots[root] / image) for root, image in candidates]
        raise UserError(f'--query_img_name {name} names {len(paths)} images; give the path: {", ".join(paths[:5])}')
    if Path(name).is_file():
        return None
    images = [image for subset in opened.data_base.subsets.values() for image in subset.images]
    choices = images if '/' in name else [image.rsplit('/', 1)[-1] for image in images]
    raise UserError(f'--query_img_name {name} is neither an image of the data base nor a file'
                    f'{suggestion(name, choices)}')


def paths_below_roots(name: str, roots: list[Path]) -> list[tuple[int, str]]:
    """Return what a path of a file means below each folder, with links resolved or not: [(root, image), ...].

    A path of a raw photograph means its converted copies.
    """
    path, paths = Path(name), []
    for index, root in enumerate(roots):
        for file, folder in ((path.absolute(), root.absolute()), (path.resolve(), root.resolve())):
            if file.is_relative_to(folder):
                paths.append((index, file.relative_to(folder).as_posix()))
    copies = [(index, image) for index, source in paths for image in converted_names(roots[index], source)]
    return paths + copies


def find_images(names: set[str], ending: str, opened: OpenDataBase) -> dict[tuple[int, str], tuple[str, int]]:
    """Return {(root, image): (subset, index)} of the images that have one of the names, or an ending."""
    known = {}
    for subset, embedded in opened.data_base.subsets.items():
        for index, image in enumerate(embedded.images):
            if image in names or image.endswith(ending):
                known.setdefault((opened.root_of(index), image), (subset, index))
    return known


def converted_names(root: Path, source: str) -> list[str]:
    """Return the paths below uncropped/ and cropped/ of a photograph, given its path or name in the raw folder."""
    manifest = read_json(root / 'conversion.json', {'files': dict}) or {'files': {}}
    names = []
    for path, (name, _, stem, *_) in manifest['files'].items():
        if source in (path, path.rsplit('/', 1)[-1]):
            names += [f'uncropped/{name}', f'cropped/{stem}.jpg']
    return names


def embed_files(paths: list[Path], opened: OpenDataBase, device: torch.device) -> dict[Path, torch.Tensor]:
    """Embed image files from outside the data base with its model; returns {path: (D,)}."""
    if not paths:
        return {}
    if not opened.files.model_for(device).is_file():
        raise UserError(f'--query_img_name {paths[0]} is not in the data base, and there is no {opened.files.model} to '
                        'embed it with')
    model, settings = load_model_of(opened, device)
    try:
        return dict(zip(paths, embed_images(model, paths, {'args': settings}), strict=True))
    except UserError as error:
        raise UserError(f'--query_img_name: {error}') from None


def retrieve(query: tuple[str, int] | Path, embedded: dict, opened: OpenDataBase, number: int, binary: bool) -> dict:
    """Retrieve a number of images for one query: subset and index in the data base, or an embedded file.

    Returns:
        {'query': file, 'class': name or None, 'note': NO_MATCH or '', 'no_close_match': whether the nearest image is
        less similar than the open-set threshold, None for an image of the data base or without a threshold,
        'retrieved': [{'image', 'file', 'class', 'similarity', 'correct': None if a class is unknown}, ...]}.
    """
    data_base = opened.data_base
    if isinstance(query, Path):
        file, label, feature, skip = query, -1, embedded[query], None
    else:
        subset, index = query
        file, skip = opened.image_file(subset, index), query
        label = int(data_base.subsets[subset].labels[index])
        feature = data_base.subsets[subset].features[index]
    hits = nearest_images(feature, data_base, skip, number, binary)
    if len(hits) < number:
        raise UserError(f'--retrieval_num {number} is larger than the {len(hits)} images to retrieve from')
    searched = data_base.subsets[data_base.searched]
    retrieved = []
    for index, similarity in hits:
        other = int(searched.labels[index])
        retrieved.append({'image': searched.images[index], 'file': opened.image_file(data_base.searched, index),
                          'class': data_base.class_of(other), 'similarity': similarity,
                          'correct': None if min(label, other) < 0 else other == label})
    threshold = None if binary or skip else open_set_threshold(data_base.origin)
    no_match = None if threshold is None else hits[0][1] < threshold
    return {'query': file, 'class': data_base.class_of(label), 'note': NO_MATCH if no_match else '',
            'retrieved': retrieved, 'no_close_match': no_match}


# ---------------------------------------------------- figures -----------------------------------------------------
def hash_queries(answers: list[dict]) -> str:
    """Return a hash of the queries' paths, which tells queries of one name apart."""
    return hashlib.sha256('\n'.join(str(answer['query'].resolve()) for answer in answers).encode()).hexdigest()[:16]


def choose_folder(results: Path, name: str, answers: list[dict]) -> Path:
    """Return results/{name}, or results/{name}_2 and so on if that one holds the answers to other queries."""
    folder, number, queries = results / name, 2, hash_queries(answers)
    while (read_json(folder / 'retrieval.json', {'queries': str}) or {}).get('queries', queries) != queries:
        folder, number = results / f'{name}_{number}', number + 1
    return folder


def write_answers(folder: Path, answers: list[dict], single_images: bool) -> Path:
    """Write the figure, retrieval.json and, for one query, the single images; returns the figure's path.

    The files of an earlier call, which its retrieval.json lists, are removed.

    Raises:
        UserError: if a file of the same name is there that this script did not write.
    """
    make_folder('--results_dir', folder)
    record_file = folder / 'retrieval.json'
    record = read_json(record_file, {'files': are_texts})
    if record is None and record_file.exists():
        raise UserError(f'{record_file} is not what this script wrote; move it away')
    earlier = {name for name in (record or {'files': []})['files'] if Path(name).name == name}
    tiles = draw_tiles(answers[0]) if single_images else {}
    figure = folder / f'top{len(answers[0]["retrieved"])}.png'
    names = {*tiles, figure.name, figure.with_suffix('.pdf').name}
    for name in names:
        if (folder / name).exists() and name not in earlier:
            raise UserError(f'{folder / name} was not written by test.py and is not replaced; move it away')

    # First the record, so that after an interrupted call the next one knows the files.
    contents = {'queries': hash_queries(answers), 'files': sorted(names | earlier), 'answers': as_json(answers)}
    save_json(contents, record_file)
    for name in earlier:
        (folder / name).unlink(missing_ok=True)
    for name, tile in tiles.items():
        tile.save(folder / name, quality=95)
    draw_rows(answers, figure)
    save_json({**contents, 'files': sorted(names)}, record_file, indent=1)
    return figure


def draw_tiles(answer: dict) -> dict:
    """Return {file name: framed image} of a query and of what it retrieves."""
    tiles = {'query_img.jpg': ImageOps.expand(load_tile(answer['query'], TILE_SIDE)[0], FRAME, GREY)}
    for rank, hit in enumerate(answer['retrieved'], start=1):
        tile = ImageOps.expand(load_tile(hit['file'], TILE_SIDE)[0], FRAME, frame_colour(hit['correct']))
        tiles[f'retrieval_img_{rank}_{hit["similarity"]:.4f}.jpg'] = tile
    return tiles


def as_json(answers: list[dict]) -> list[dict]:
    """Return answers as retrieval.json holds them, without absolute paths."""
    return [{**answer, 'query': answer['query'].name,
             'retrieved': [{key: value for key, value in hit.items() if key != 'file'}
                           for hit in answer['retrieved']]} for answer in answers]


# ---------------------------------------------------- command line --------------------------------------------------
def get_args(argv: list[str] | None = None):
    """Parse the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument('--query_img_name', nargs='+', metavar='Q',
                        help='one or more queries: path in the split, absolute path, unique file name, or an image '
                             'file of your own [008055.jpg]')
    parser.add_argument('--num_queries', type=int, metavar='N', help='draw a sheet of N test images instead, chosen by '
                        '--select')
    parser.add_argument('--select', choices=('random', 'best', 'worst'), help='with --num_queries: at random, or '
                        'those whose best positive has the smallest or the largest rank [random]')
    parser.add_argument('--seed', type=int, help='of --select random [0]')
    add_data_base_flags(parser)
    parser.add_argument('--retrieval_num', type=int, default=8, help='images to retrieve [%(default)s]')
    parser.add_argument('--binary', action='store_true', help='rank by the Hamming distance of sign(features)')
    parser.add_argument('--device', default='auto', help='device that embeds an image of your own '
                        '[%(default)s]')
    args = parser.parse_args(argv)
    check_between(args, {'retrieval_num': (1, None), 'num_queries': (1, MOST_QUERIES), 'seed': (0, None)})
    if args.num_queries is None:
        for flag in ('select', 'seed'):
            if getattr(args, flag) is not None:
                raise UserError(f'--{flag} {getattr(args, flag)} has no effect without --num_queries; add it')
        args.query_img_name = args.query_img_name or ['008055.jpg']
    else:
        if args.query_img_name:
            raise UserError('--query_img_name and --num_queries contradict each other; leave one of them out')
        args.select = args.select or 'random'
        if args.seed is not None and args.select != 'random':
            raise UserError(f'--seed {args.seed} has no effect with --select {args.select}; leave it out')
    return args


def print_answer(answer: dict) -> None:
    """Print what a query retrieves, a line per image."""
    note = f' {answer["note"]}' if answer['note'] else ''
    print(f'{answer["query"].name} ({answer["class"] or "class unknown"}):{note}')
    for rank, hit in enumerate(answer['retrieved'], start=1):
        verdict = {True: 'same class', False: 'other class', None: ''}[hit['correct']]
        print(f'  {rank:3d}  {hit["similarity"]:.4f}  {hit["image"]}  {hit["class"] or ""}  {verdict}'.rstrip())


def report_missing(answers: list[dict]) -> None:
    """Print how many of the images of some answers cannot be read."""
    files = {file for answer in answers for file in
             (answer['query'], *(hit['file'] for hit in answer['retrieved']))}
    missing = sorted(str(file) for file in files if not load_tile(file, 8)[1])
    if missing:
        print(f'{len(missing)} of {len(files)} images are missing or broken and drawn grey, the first: {missing[0]}')


def draw_sheet(args, opened: OpenDataBase) -> list[dict]:
    """Draw the queries that --num_queries and --select choose, a row each; returns their answers."""
    ranked = rank_queries(opened.data_base, args.binary)
    answers = []
    for index in choose_queries(ranked, args.select, args.num_queries, args.seed or 0):
        # The rank counts the negatives before the first hit, and one for the hit; a tie lies between two ranks.
        note = f'first hit at rank {ranked["rank"][index].item() + 1:g}'
        answers.append({**retrieve(('test', index), {}, opened, args.retrieval_num, args.binary), 'note': note})
        print_answer(answers[-1])
    folder = Path(args.results_dir) / f'{opened.files.name}_{args.select}'
    print(write_answers(folder, answers, single_images=False))
    return answers


def draw_named_queries(args, opened: OpenDataBase) -> list[dict]:
    """Draw the queries of --query_img_name, each in its folder and several also in one figure; returns their answers.
    """
    results = Path(args.results_dir)
    queries = [find_query(name, opened) or Path(name) for name in args.query_img_name]
    embedded = embed_files([query for query in queries if isinstance(query, Path)], opened,
                           select_device(args.device))
    answers = [retrieve(query, embedded, opened, args.retrieval_num, args.binary) for query in queries]
    for answer in answers:
        print_answer(answer)
        print(write_answers(choose_folder(results, answer['query'].stem, [answer]), [answer], single_images=True))
    if len(answers) > 1:
        folder = choose_folder(results, f'{answers[0]["query"].stem}_and_{len(answers) - 1}_more', answers)
        print(write_answers(folder, answers, single_images=False))
    return answers


def main() -> None:
    """Retrieve, print and draw what the command line names."""
    args = get_args()
    opened = open_data_base(args.data_base, args.results_dir, args.data_path)
    answers = draw_named_queries(args, opened) if args.num_queries is None else draw_sheet(args, opened)
    report_missing(answers)
    warn_if_images_changed(opened)


if __name__ == '__main__':
    run_script(main)

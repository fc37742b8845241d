"""Look queries up in a data base and draw what they retrieve.

    python test.py --retrieval_num 10
    python test.py --query_img_name 008055.jpg --data_base car_resnet50_balanced_proxy_512_data_base.pth
    python test.py --query_img_name my_photo.jpg --data_base results/car_resnet50_balanced_proxy_512_data_base.pth
    python test.py --num_queries 8 --select worst          # a sheet: those whose first hit comes last

A query is an image of the data base (its path in the split, an absolute path, or its file name where that is unique),
or any other image file: the run's model embeds it then, and no class is known. Writes results/{query}/query_img.jpg,
retrieval_img_{rank}_{similarity}.jpg and one figure, top{K}.png and .pdf: green frames where the class is the query's,
red elsewhere, grey where it is not known. retrieval.json beside them lists the same; files that this script did not
write are never replaced. A sheet goes to results/{run}_{select}/. An image that is no longer there is drawn as a grey
tile with its name.
"""
import hashlib
from pathlib import Path

import torch
from PIL import ImageOps

from browse import (ABSENT, OpenRun, add_data_base_flags, choose_queries, load_run_model, nearest_images, open_run,
                    rank_queries, tell_changes)
from engine.errors import UserError, nearest
from engine.files import are_texts, make_folder, read_json, save_json
from engine.images import load_tile
from engine.processes import select_device
from engine.runs import absent_threshold
from evaluate import embed_images
from sheets import PICTURE_SIDE, colour_of, draw_rows
from utils import GREY, Parser, check_between, run_script

FRAME = 8  # px
MOST_QUERIES = 200  # rows of a sheet; PNG readers give up at 65,535 px


def find_query(name: str, run: OpenRun) -> tuple[str, int] | None:
    """Return the subset and index of a query in the data base, or None if it is an image file from elsewhere.

    Raises:
        UserError: if a bare file name occurs more than once, or nothing of that name exists.
    """
    typed, candidates = Path(name), []
    for number, root in enumerate(run.roots):
        for path, folder in ((typed.absolute(), root.absolute()), (typed.resolve(), root.resolve())):
            if path.is_relative_to(folder):
                candidates.append((number, path.relative_to(folder).as_posix()))
    candidates += [(number, image) for number, candidate in candidates
                   for image in converted_names(run.roots[number], candidate)]
    converted = {image for root in run.roots for image in converted_names(root, name)}
    wanted, tail = {name, *converted, *(image for _, image in candidates)}, f'/{name}'
    there = {}  # (number of the folder, path): (subset, index); of equals the first counts
    for subset, own in run.data_base.subsets.items():
        for index, image in enumerate(own.images):
            if image in wanted or image.endswith(tail):
                there.setdefault((run.folder(index), image), (subset, index))
    named = [place for place in there if place[1] == name or place[1] in converted
             or '/' not in name and place[1].endswith(tail)]
    if typed.is_file():  # a file that is there is meant, and a name of the data base only if it is the same file
        named = [(number, image) for number, image in named if (run.roots[number] / image).is_file()
                 and typed.samefile(run.roots[number] / image)]
    exact = [place for place in named if place[1] == name]
    for place in (*candidates, *(exact if len(exact) == 1 else [])):
        if place in there:
            return there[place]
    if len(named) == 1:
        return there[named[0]]
    if named:
        paths = [image if len(run.roots) == 1 else str(run.roots[number] / image) for number, image in named[:5]]
        raise UserError(f'--query_img_name {name} names {len(named)} images; give the path: {", ".join(paths)}')
    if Path(name).is_file():
        return None
    known = [image if '/' in name else image.rsplit('/', 1)[-1] for own in run.data_base.subsets.values()
             for image in own.images]
    raise UserError(f'--query_img_name {name} is neither an image of the data base nor a file{nearest(name, known)}')


def converted_names(root: Path, source: str) -> list[str]:
    """Return the paths below uncropped/ and cropped/ of photographs, given by their path or name in the raw folder."""
    manifest = read_json(root / 'conversion.json', {'files': dict}) or {'files': {}}
    return [name for path, (name, _, stem, *_) in manifest['files'].items() if source in (path, path.rsplit('/', 1)[-1])
            for name in (f'uncropped/{name}', f'cropped/{stem}.jpg')]


def embed_outside(paths: list[Path], run: OpenRun, device: torch.device) -> dict[Path, torch.Tensor]:
    """Embed image files from outside of the data set with the run's model; returns {path: (D,)}."""
    if not paths:
        return {}
    if not run.files.model.is_file():
        raise UserError(f'--query_img_name {paths[0]} is not in the data base, and there is no {run.files.model} to '
                        'embed it with')
    model, settings = load_run_model(run, device)
    try:
        return dict(zip(paths, embed_images(model, paths, {'args': settings}), strict=True))
    except UserError as error:
        raise UserError(f'--query_img_name: {error}') from None


def look_up(query: tuple[str, int] | Path, embedded: dict, run: OpenRun, number: int, binary: bool) -> dict:
    """Retrieve a number of images for one query: subset and index in the data base, or an embedded file from elsewhere.

    Returns:
        {'query': file, 'class': name or None, 'note': ABSENT or '', 'probably_absent': whether the nearest image is not
        more similar than metrics.absent_thresholds asks, 'retrieved': [{'image', 'file', 'class', 'similarity',
        'correct'}, ...]}; what is not known is None.
    """
    data_base = run.data_base
    if isinstance(query, Path):
        path, label, query, feature = query, -1, None, embedded[query]
    else:
        own = data_base.subsets[query[0]]
        path, label, feature = run.file(*query), int(own.labels[query[1]]), own.features[query[1]]
    found = nearest_images(feature, data_base, query, number, binary)
    limit = None if binary else absent_threshold(data_base.origin)
    if len(found) < number:
        raise UserError(f'--retrieval_num {number} is larger than the {len(found)} images to retrieve from')
    searched = data_base.subsets[data_base.searched]
    retrieved = []
    for index, similarity in found:
        other = int(searched.labels[index])
        retrieved.append({'image': searched.images[index], 'file': run.file(data_base.searched, index),
                          'class': data_base.class_of(other), 'similarity': similarity,
                          'correct': None if min(label, other) < 0 else other == label})
    absent = None if limit is None else found[0][1] <= limit
    return {'query': path, 'class': data_base.class_of(label), 'note': ABSENT if absent else '',
            'retrieved': retrieved, 'probably_absent': absent}


# ---------------------------------------------------- pictures ------------------------------------------------------
def identity(answers: list[dict]) -> str:
    """Return what tells queries of one name apart: a hash of their paths."""
    return hashlib.sha256('\n'.join(str(answer['query'].resolve()) for answer in answers).encode()).hexdigest()[:16]


def choose_folder(results: Path, name: str, answers: list[dict]) -> Path:
    """Return results/{name}, or results/{name}_2 and so on where that one holds what other queries found."""
    folder, number = results / name, 2
    while (read_json(folder / 'retrieval.json', {'queries': str}) or {}).get('queries', identity(answers)) \
            != identity(answers):
        folder, number = results / f'{name}_{number}', number + 1
    return folder


def write_answers(folder: Path, answers: list[dict], singles: bool) -> Path:
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
    written = {name for name in (record or {'files': []})['files'] if Path(name).name == name}
    tiles = {}
    if singles:
        answer = answers[0]
        tiles['query_img.jpg'] = ImageOps.expand(load_tile(answer['query'], PICTURE_SIDE)[0], FRAME, GREY)
        for rank, found in enumerate(answer['retrieved'], start=1):
            name = f'retrieval_img_{rank}_{found["similarity"]:.4f}.jpg'
            tiles[name] = ImageOps.expand(load_tile(found['file'], PICTURE_SIDE)[0], FRAME,
                                          colour_of(found['correct']))
    figure = folder / f'top{len(answers[0]["retrieved"])}.png'
    ours = {*tiles, figure.name, figure.with_suffix('.pdf').name}
    for name in ours:
        if (folder / name).exists() and name not in written:
            raise UserError(f'{folder / name} was not written by test.py and is not replaced; move it away')
    lines = [{**answer, 'query': answer['query'].name, 'retrieved': [
        {key: value for key, value in found.items() if key != 'file'} for found in answer['retrieved']]}
        for answer in answers]

    # Before anything is written, so that a call cut short leaves nothing that the next one takes for foreign.
    head = {'queries': identity(answers)}
    save_json({**head, 'files': sorted(ours | written), 'answers': lines}, record_file)
    for name in written:
        (folder / name).unlink(missing_ok=True)
    for name, tile in tiles.items():
        tile.save(folder / name, quality=95)
    draw_rows(answers, figure)
    save_json({**head, 'files': sorted(ours), 'answers': lines}, record_file, indent=1)
    return figure


# ---------------------------------------------------- command line --------------------------------------------------
def get_args(argv: list[str] | None = None):
    """Parse the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument('--query_img_name', nargs='+', metavar='Q',
                        help='one or more queries: path in the split, absolute path, unique file name, or an image '
                             'file of your own [008055.jpg]')
    parser.add_argument('--num_queries', type=int, metavar='N', help='draw a sheet of N test images instead, chosen by '
                        '--select')
    parser.add_argument('--select', choices=('random', 'best', 'worst'), help='--num_queries: at random, or those '
                        'whose best positive has the smallest or the largest rank [random]')
    parser.add_argument('--seed', type=int, help='of --select random [0]')
    add_data_base_flags(parser)
    parser.add_argument('--retrieval_num', type=int, default=8, help='images to retrieve [%(default)s]')
    parser.add_argument('--binary', action='store_true', help='rank by the Hamming distance of sign(features)')
    parser.add_argument('--device', default='auto', help='to embed an image of your own [%(default)s]')
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
    """Print what a query retrieves, a line each."""
    print(f'{answer["query"].name} ({answer["class"] or "class unknown"}):{answer["note"] and " "}{answer["note"]}')
    for rank, found in enumerate(answer['retrieved'], start=1):
        mark = {True: 'same class', False: 'other class', None: ''}[found['correct']]
        print(f'  {rank:3d}  {found["similarity"]:.4f}  {found["image"]}  {found["class"] or ""}  {mark}'.rstrip())


def report_lost(answers: list[dict]) -> None:
    """Say how many of the images of some answers are no longer there."""
    paths = {path for answer in answers for path in
             (answer['query'], *(found['file'] for found in answer['retrieved']))}
    lost = sorted(str(path) for path in paths if not load_tile(path, 8)[1])
    if lost:
        print(f'{len(lost)} of {len(paths)} images are missing or broken and drawn grey, the first: {lost[0]}')


def main() -> None:
    """Look up, print and draw what the command line names."""
    args = get_args()
    run = open_run(args.data_base, args.results_dir, args.data_path)
    data_base, results = run.data_base, Path(args.results_dir)
    if args.num_queries is None:
        queries = [find_query(name, run) or Path(name) for name in args.query_img_name]
        notes = [None] * len(queries)
    else:
        ranked = rank_queries(data_base, args.binary)
        chosen = choose_queries(ranked, args.select, args.num_queries, args.seed or 0)
        queries = [('test', index) for index in chosen]
        # Negatives before it, and one for itself; a tie is drawn in the middle.
        notes = [f'first hit at rank {ranked["rank"][index].item() + 1:g}' for index in chosen]
    outside = [query for query in queries if isinstance(query, Path)]
    embedded = embed_outside(outside, run, select_device(args.device))
    answers = [look_up(query, embedded, run, args.retrieval_num, args.binary) for query in queries]
    answers = [answer | ({} if note is None else {'note': note}) for answer, note in zip(answers, notes, strict=True)]
    for answer in answers:
        print_answer(answer)
        if args.num_queries is None:
            print(write_answers(choose_folder(results, answer['query'].stem, [answer]), [answer], singles=True))
    if args.num_queries is not None:
        print(write_answers(results / f'{run.files.name}_{args.select}', answers, singles=False))
    elif len(answers) > 1:
        folder = choose_folder(results, f'{answers[0]["query"].stem}_and_{len(answers) - 1}_more', answers)
        print(write_answers(folder, answers, singles=False))
    report_lost(answers)
    tell_changes(run)


if __name__ == '__main__':
    run_script(main)

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
import textwrap
from pathlib import Path

import torch
from PIL import ImageOps

from browse import OpenRun, add_data_base_flags, choose_queries, nearest_images, open_run, rank_queries, tell_changes
from dataset import make_transform
from engine.errors import UserError, nearest
from engine.files import are_texts, image_file, make_folder, read_json, save_json
from engine.images import BrokenImage, load_image, load_tile
from engine.processes import select_device
from engine.runs import DataBase
from evaluate import use_amp
from model import load_model
from utils import GREEN, GREY, RED, Parser, check_between, plot_style, run_script, save_figure

PICTURE_SIDE = 224  # px, of a written image inside its frame
FRAME = 8  # px
PER_ROW = 10  # retrieved images in a row of the figure
MOST_QUERIES = 200  # rows of a sheet; PNG readers give up at 65,535 px


def find_query(name: str, data_base: DataBase, root: Path) -> tuple[str, int] | None:
    """Return the subset and index of a query in the data base, or None if it is an image file from elsewhere.

    Raises:
        UserError: if a bare file name occurs more than once, or nothing of that name exists.
    """
    positions = {image: (name, index) for name, subset in reversed(data_base.subsets.items())
                 for index, image in reversed(list(enumerate(subset.images)))}  # of equals the first counts
    typed, candidates = Path(name), []
    for path, folder in ((typed.absolute(), root.absolute()), (typed.resolve(), root.resolve())):
        if path.is_relative_to(folder):
            candidates.append(path.relative_to(folder).as_posix())
    candidates += [image for candidate in candidates for image in converted_names(root, candidate)]
    named = [image for image in positions if name in (image, image.rsplit('/', 1)[-1])]
    named += [image for image in converted_names(root, name) if image in positions and image not in named]
    if typed.is_file():  # a file that is there is meant, and a name of the data base only if it is the same file
        named = [image for image in named if (root / image).is_file() and typed.samefile(root / image)]
    for image in (*candidates, *([name] if name in named else [])):
        if image in positions:
            return positions[image]
    if len(named) == 1:
        return positions[named[0]]
    if named:
        raise UserError(f'--query_img_name {name} names {len(named)} images; give the path: {", ".join(named[:5])}')
    if Path(name).is_file():
        return None
    known = positions if '/' in name else [image.rsplit('/', 1)[-1] for image in positions]
    raise UserError(f'--query_img_name {name} is neither an image of the data base nor a file{nearest(name, known)}')


def converted_names(root: Path, source: str) -> list[str]:
    """Return the paths below uncropped/ and cropped/ of photographs, given by their path or name in the raw folder."""
    manifest = read_json(root / 'conversion.json', {'files': dict}) or {'files': {}}
    return [name for path, (name, _, stem, *_) in manifest['files'].items() if source in (path, path.rsplit('/', 1)[-1])
            for name in (f'uncropped/{name}', f'cropped/{stem}.jpg')]


def embed_image(path: Path, run: OpenRun, device: torch.device) -> torch.Tensor:
    """Embed an image file from outside of the data set with the run's model; returns (D,)."""
    model_file, settings = run.files.model, run.data_base.origin['args']
    if not model_file.is_file():
        raise UserError(f'--query_img_name {path} is not in the data base, and there is no {model_file} to embed it '
                        'with')
    model, contents = load_model(model_file, device)
    if contents['args'] != settings:
        raise UserError(f'{model_file} is of another run than the data base; keep the files of a run together')
    transform = make_transform(False, model.config.image_size, settings['resize_size'], model.interpolation)
    try:
        image = transform(load_image(path))
    except BrokenImage as error:
        raise UserError(f'--query_img_name {path} is no image that can be read ({error})') from None
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16,
                                                enabled=use_amp(settings['amp'], device)):
        return model(image[None].to(device))[0].cpu()


def look_up(query: tuple[str, int] | Path, run: OpenRun, number: int, binary: bool, device: torch.device) -> dict:
    """Retrieve a number of images for one query: subset and index in the data base, or an image file from elsewhere.

    Returns:
        {'query': file, 'class': name or None, 'note': '', 'retrieved': [{'image', 'class', 'similarity', 'correct'},
        ...]}; `correct` is None where the query's class is not known.
    """
    data_base = run.data_base
    if isinstance(query, Path):
        path, label, query, feature = query, None, None, embed_image(query, run, device)
    else:
        own = data_base.subsets[query[0]]
        path, label, feature = image_file(run.root, own.images[query[1]]), int(own.labels[query[1]]), \
            own.features[query[1]]
    found = nearest_images(feature, data_base, query, number, binary)
    if len(found) < number:
        raise UserError(f'--retrieval_num {number} is larger than the {len(found)} images to retrieve from')
    searched, names = data_base.subsets[data_base.searched], data_base.class_names
    retrieved = []
    for index, similarity in found:
        other = int(searched.labels[index])
        retrieved.append({'image': searched.images[index], 'class': names[other], 'similarity': similarity,
                          'correct': None if label is None else other == label})
    return {'query': path, 'class': None if label is None else names[label], 'note': '', 'retrieved': retrieved}


# ---------------------------------------------------- pictures ------------------------------------------------------
def colour_of(correct: bool | None) -> str:
    """Return the colour of a frame: green, red, or grey where the query's class is not known."""
    return {True: GREEN, False: RED, None: GREY}[correct]


def draw_rows(answers: list[dict], root: Path, target: Path) -> None:
    """Draw one row per query: the query in a dashed frame, then what it retrieves, similarity and class below.

    More than PER_ROW images go on in further rows.
    """
    per_row = min(PER_ROW, len(answers[0]['retrieved']))
    rows_each = -(-len(answers[0]['retrieved']) // per_row)
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
                show_tile(axis, image_file(root, found['image']), colour_of(found['correct']),
                          f'{found["similarity"]:.3f}\n{wrap(found["class"])}', '-')
        save_figure(figure, target, dpi=160)


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


def write_answers(folder: Path, answers: list[dict], root: Path, singles: bool) -> Path:
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
            tiles[name] = ImageOps.expand(load_tile(image_file(root, found['image']), PICTURE_SIDE)[0], FRAME,
                                          colour_of(found['correct']))
    figure = folder / f'top{len(answers[0]["retrieved"])}.png'
    ours = {*tiles, figure.name, figure.with_suffix('.pdf').name}
    for name in ours:
        if (folder / name).exists() and name not in written:
            raise UserError(f'{folder / name} was not written by test.py and is not replaced; move it away')
    lines = [{**answer, 'query': answer['query'].name} for answer in answers]

    # Before anything is written, so that a call cut short leaves nothing that the next one takes for foreign.
    head = {'queries': identity(answers)}
    save_json({**head, 'files': sorted(ours | written), 'answers': lines}, record_file)
    for name in written:
        (folder / name).unlink(missing_ok=True)
    for name, tile in tiles.items():
        tile.save(folder / name, quality=95)
    draw_rows(answers, root, figure)
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
        print(f'  {rank:3d}  {found["similarity"]:.4f}  {found["image"]}  {found["class"]}  {mark}'.rstrip())


def report_lost(answers: list[dict], root: Path) -> None:
    """Say how many of the images of some answers are no longer there."""
    paths = {path for answer in answers for path in
             (answer['query'], *(image_file(root, found['image']) for found in answer['retrieved']))}
    lost = sorted(str(path) for path in paths if not load_tile(path, 8)[1])
    if lost:
        print(f'{len(lost)} of {len(paths)} images are missing or broken and drawn grey, the first: {lost[0]}')


def main() -> None:
    """Look up, print and draw what the command line names."""
    args = get_args()
    run = open_run(args.data_base, args.results_dir, args.data_path)
    data_base, root, results = run.data_base, run.root, Path(args.results_dir)
    if args.num_queries is None:
        queries = [find_query(name, data_base, root) or Path(name) for name in args.query_img_name]
        notes = [''] * len(queries)
    else:
        ranked = rank_queries(data_base, args.binary)
        chosen = choose_queries(ranked, args.select, args.num_queries, args.seed or 0)
        queries = [('test', index) for index in chosen]
        # Negatives before it, and one for itself; a tie is drawn in the middle.
        notes = [f'first hit at rank {ranked["rank"][index].item() + 1:g}' for index in chosen]
    device = select_device(args.device)
    answers = [{**look_up(query, run, args.retrieval_num, args.binary, device), 'note': note}
               for query, note in zip(queries, notes, strict=True)]
    for answer in answers:
        print_answer(answer)
        if args.num_queries is None:
            print(write_answers(choose_folder(results, answer['query'].stem, [answer]), [answer], root, singles=True))
    if args.num_queries is not None:
        print(write_answers(results / f'{run.files.name}_{args.select}', answers, root, singles=False))
    elif len(answers) > 1:
        folder = choose_folder(results, f'{answers[0]["query"].stem}_and_{len(answers) - 1}_more', answers)
        print(write_answers(folder, answers, root, singles=False))
    report_lost(answers, root)
    tell_changes(run)


if __name__ == '__main__':
    run_script(main)

"""The idea in two dimensions: embeddings on a circle, with proxies that follow their classes or pull them.

    python toy.py --data_path /home/data/stl10                          # proxies move by momentum (Asymptotic Proxy)
    python toy.py --data_path /home/data/stl10 --with_learnable_proxy   # proxies learn from the gradient
    python toy.py --data_name glyph --compare --animate                 # both, on ten characters, without a download

A ResNet18 without its max-pool, with max pooling and a linear head to 2 dimensions, is trained on the first 7 classes
of STL10 (Coates et al., AISTATS 2011; torchvision downloads and verifies it), and tested on at most 60 images of each
of the other 3. A run writes to results/: {run}_statistics.csv (a row per epoch), {run}_model.pth and
{run}_embeddings.pth (of the epoch with the best R@1 on the test classes), and the plot, {run}.png and {run}.pdf.
"""
import io
import math
import random
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F

from common.distributed import progress, select_device, use_amp
from common.errors import UserError, check_choice, reason_of
from common.files import make_folder, save, write_atomically
from common.results import run_name
from imagedata.glyph import draw_glyph, drawable_characters
from imagedata.loading import BatchSampler, ImageData, RetrievalDataset, batches_in_order, make_loader, make_transform
from model import EmbeddingNet, NetConfig, make_loss
from recipes import COMBINED_LOSSES, LOSSES, MOMENTUM
from retrieval.embedding import extract_embeddings
from retrieval.figures import COLOURS, GREY, plot_style, save_figure
from retrieval.metrics import retrieval_metrics
from training.statistics import provenance, save_statistics
from utils import Parser, check_between, run_script, user_path

NUM_TRAIN_CLASSES, NUM_TEST_CLASSES, TEST_IMAGES = 7, 3, 60
IMAGE_SIZE = {'stl10': 96, 'glyph': 32}  # px
BATCH_SIZE = {'stl10': 128, 'glyph': 64}  # 128: Asymptotic Proxy
MIN_CROP = {'stl10': 0.6, 'glyph': 0.8}  # smallest share of the area in a random crop
FLIP = {'stl10': 0.5, 'glyph': 0.0}  # a mirrored character is another character
TRAIN_GLYPHS = 90  # images of each training character
PLOTTED_TRAIN_IMAGES = 30  # of each training class
GLYPH_RANGE = 60  # the ten characters are drawn from the first 60
MARKERS = ('o', 's', '^')  # of the test classes
CHANGEABLE = ('data_path', 'results_dir', 'device', 'compare', 'animate', 'overwrite')  # do not affect the result
LABEL_GAP = 0.2  # rad between the names of the proxies around the circle


# ---------------------------------------------------- data ----------------------------------------------------------
class ImagesInMemory(list):
    """Images that a dataset reads like those of a cache; the path of an image is its index."""

    def read(self, path: str) -> Image.Image:
        return self[int(path)]


def load_stl10(data_path: str) -> tuple[list, list, list[str]]:
    """Return images, labels and class names: 7 classes of STL10's training set, and 3 of its test set."""
    from torchvision.datasets import STL10

    images, labels = [], []
    for split, classes, most in (('train', range(NUM_TRAIN_CLASSES), None),
                                 ('test', range(NUM_TRAIN_CLASSES, 10), TEST_IMAGES)):
        try:
            data = STL10(data_path, split, download=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: the md5 differs
            raise UserError(f'--data_path {data_path} does not hold STL10, and it could not be downloaded '
                            f'({reason_of(error)}); put stl10_binary.tar.gz there, or use --data_name glyph') from None
        for label in classes:
            pixels = data.data[data.labels == label][:most].transpose(0, 2, 3, 1)
            images += map(Image.fromarray, pixels)
            labels += [label] * len(pixels)
    return images, labels, list(data.classes)


def make_glyphs(seed: int) -> tuple[list, list, list[str]]:
    """Return images, labels and class names of ten characters: 7 for training, 3 for testing."""
    characters = random.Random(seed).sample(drawable_characters(GLYPH_RANGE), NUM_TRAIN_CLASSES + NUM_TEST_CLASSES)
    images, labels = [], []
    for label, (character, faces) in enumerate(characters):
        for index in range(TRAIN_GLYPHS if label < NUM_TRAIN_CLASSES else TEST_IMAGES):
            images.append(draw_glyph(character, faces, random.Random(f'{seed} {ord(character)} {index}')))
            labels.append(label)
    return images, labels, [character for character, _ in characters]


def make_sets(args, interpolation: str) -> dict[str, RetrievalDataset]:
    """Return {'augmented': the training images, 'train': those in the plot, not augmented, 'test': unseen classes}."""
    images, labels, names = load_stl10(args.data_path) if args.data_name == 'stl10' else make_glyphs(args.seed)
    size = IMAGE_SIZE[args.data_name]
    augment = make_transform(True, size, interpolation=interpolation, min_crop=MIN_CROP[args.data_name],
                             flip=FLIP[args.data_name])
    plain = make_transform(False, size, size, interpolation)
    paths_of = {name: [] for name in names}
    for index, label in enumerate(labels):
        paths_of[names[label]].append(str(index))
    train = {name: paths_of[name] for name in names[:NUM_TRAIN_CLASSES]}
    split = {'augmented': train, 'train': {name: paths[:PLOTTED_TRAIN_IMAGES] for name, paths in train.items()},
             'test': {name: paths_of[name] for name in names[NUM_TRAIN_CLASSES:]}, 'class_names': {}}
    data = ImageData(Path(), split, ImagesInMemory(images))
    return {subset: RetrievalDataset(data, subset, transform, args.seed)
            for subset, transform in (('augmented', augment), ('train', plain), ('test', plain))}


# ---------------------------------------------------- training ------------------------------------------------------
def angles_to_proxies(embeddings: torch.Tensor, labels: torch.Tensor, proxies: torch.Tensor) -> torch.Tensor:
    """Return the angle in degrees (C,) between the mean of each class's embeddings (N, D) and its proxy (C, D)."""
    means = torch.stack([embeddings[labels == label].mean(0) for label in range(len(proxies))])
    return torch.rad2deg(torch.arccos(F.cosine_similarity(means, proxies).clamp(-1, 1)))


def take_frame(epoch: int, model: EmbeddingNet, criterion, sets: dict, device: torch.device, amp: bool) -> dict:
    """Embed the images of the plot and measure them.

    Returns:
        {'epoch', 'proxies': (7, 2), 'R@1': per cent, 'angle': mean angle in degrees between class means and proxies,
        '{train,test}_embeddings': (n, 2), '{train,test}_labels': (n,), '{train,test}_classes': names}.
    """
    frame = {'epoch': epoch, 'proxies': F.normalize(criterion.proxies.detach(), dim=-1).cpu()}
    for name in ('train', 'test'):
        loader = make_loader(sets[name], batches_in_order(len(sets[name]), 128), 0, device)
        frame[f'{name}_embeddings'] = extract_embeddings(model, loader, device, amp)
        frame[f'{name}_labels'] = torch.tensor(sets[name].labels)
        frame[f'{name}_classes'] = sets[name].class_names
    frame['R@1'] = retrieval_metrics(frame['test_embeddings'], frame['test_labels'], recalls=(1,))['R@1']
    angles = angles_to_proxies(frame['train_embeddings'], frame['train_labels'], frame['proxies'])
    return {**frame, 'angle': angles.mean().item()}


def train_one_epoch(model: EmbeddingNet, criterion, optimizer, loader, device: torch.device, amp: bool) -> dict:
    """Train on every batch once; returns {'loss': mean, 'accuracy': per cent}."""
    model.train()
    criterion.train()
    loss_sum = num_correct = num_images = 0
    for images, labels in progress(loader, desc='train', total=len(loader)):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            embeddings = model(images.to(device))
        loss = criterion(embeddings, labels.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(labels)
        num_correct += criterion.accuracy.item() * len(labels)
        num_images += len(labels)
        if not math.isfinite(loss_sum):
            raise UserError(f'the loss is not finite at --lr {optimizer.param_groups[0]["lr"]:g}; lower it')
    return {'loss': loss_sum / num_images, 'accuracy': 100 * num_correct / num_images}


def build(args, learnable: bool, device: torch.device) -> tuple:
    """Return a network, a loss whose proxies learn from the gradient or move by momentum, and their optimizer."""
    config = NetConfig('resnet18', 2, freeze_bn=args.weights != 'none', max_pool=False,
                       image_size=IMAGE_SIZE[args.data_name])
    model = EmbeddingNet(config, args.weights).to(device, memory_format=torch.channels_last)
    loss_name = COMBINED_LOSSES.get(args.loss_name, {}).get('loss_name', args.loss_name)
    proxy_update = 'gradient' if learnable else 'momentum'
    criterion = make_loss(loss_name, num_classes=NUM_TRAIN_CLASSES, feature_dim=2, scale=1 / args.temperature,
                          proxy_update=proxy_update, momentum=args.momentum).to(device)
    return model, criterion, torch.optim.Adam([*model.parameters(), *criterion.parameters()], lr=args.lr)


def train_toy(args, learnable: bool, device: torch.device) -> dict:
    """Train one network, and write its statistics, model and embeddings.

    Args:
        learnable: the proxies learn from the gradient; otherwise they move by momentum.

    Returns:
        {'run': name, 'best': the frame with the best R@1, 'frames': [before the training, after each epoch]}.
    """
    torch.manual_seed(args.seed)
    model, criterion, optimizer = build(args, learnable, device)
    amp = use_amp('auto', device)
    sets = make_sets(args, model.interpolation)
    sampler = BatchSampler(sets['augmented'].labels, args.batch_size, seed=args.seed)
    loader = make_loader(sets['augmented'], sampler, 0, device)

    run, folder = name_run(args, learnable), Path(args.results_dir)
    settings = {name: value for name, value in vars(args).items() if name not in CHANGEABLE}
    settings |= {'with_learnable_proxy': learnable, 'weights': Path(args.weights).name,
                 'momentum': None if learnable else args.momentum}
    rows, frames = [], [take_frame(0, model, criterion, sets, device, amp)]
    for epoch in range(1, args.num_epochs + 1):
        sets['augmented'].set_epoch(epoch)
        sampler.set_epoch(epoch)
        trained = train_one_epoch(model, criterion, optimizer, loader, device, amp)
        frame = take_frame(epoch, model, criterion, sets, device, amp)
        print(f'{run}: epoch {epoch}/{args.num_epochs}: loss {trained["loss"]:.4f}, accuracy '
              f'{trained["accuracy"]:.1f} %, R@1 {frame["R@1"]:.2f}, class means {frame["angle"]:.1f} degrees from '
              'their proxies', flush=True)
        if all(frame['R@1'] > row['dense_R@1'] for row in rows):
            save({'config': asdict(model.config), 'state_dict': model.state_dict(), 'args': settings, 'epoch': epoch},
                 folder / f'{run}_model.pth')
            save(frame, folder / f'{run}_embeddings.pth')
        rows.append({'epoch': epoch, **trained, 'dense_R@1': frame['R@1'], 'angle_to_proxy': frame['angle']})
        frames.append(frame)
        save_statistics(rows, settings, folder / f'{run}_statistics.csv', provenance(device))
    return {'run': run, 'best': max(frames[1:], key=lambda frame: frame['R@1']), 'frames': frames}


def name_run(args, learnable: bool) -> str:
    """Name a run: data set, loss, how the proxies move, temperature, seed."""
    update = 'learnable' if learnable else f'moving_m{args.momentum:g}'
    seed = f'seed{args.seed}' if args.seed else ''
    return run_name('toy', args.data_name, args.loss_name, update, f't{args.temperature:g}', seed)


# ---------------------------------------------------- pictures ------------------------------------------------------
def spread(angles: list[float]) -> list[float]:
    """Push angles (rad) on a circle apart until neighbours are at least LABEL_GAP apart."""
    order = sorted(range(len(angles)), key=angles.__getitem__)
    moved = list(angles)
    for _ in range(200):  # passes; ten angles settle after a few
        for position, left in enumerate(order, start=1):
            right = order[position % len(order)]
            turn = 2 * math.pi if position == len(order) else 0  # from the last angle on to the first
            missing = max(0.0, LABEL_GAP - (moved[right] + turn - moved[left]))
            moved[left], moved[right] = moved[left] - missing / 2, moved[right] + missing / 2
    return moved


def draw_circle(axis, frame: dict, subset: str, title: str) -> None:
    """Draw the embeddings of a subset on the unit circle, its class means as arrows, and the proxies as stars outside.
    """
    embeddings, labels, names = (frame[f'{subset}_{part}'] for part in ('embeddings', 'labels', 'classes'))
    is_training = subset == 'train'
    turn = torch.linspace(0, 2 * math.pi, 200)
    for radius in (1.0, 1.3):
        axis.plot(radius * turn.cos(), radius * turn.sin(), color='#DDDDDD', linewidth=0.6, zorder=0)
    for label, name in enumerate(names):
        points = embeddings[labels == label]
        axis.scatter(*points.T, s=14, color=COLOURS[label], alpha=0.5, linewidths=0,
                     marker='o' if is_training else MARKERS[label], label=name)
        mean = F.normalize(points.mean(0), dim=0)
        axis.annotate('', xy=0.95 * mean, xytext=(0, 0),
                      arrowprops={'arrowstyle': '->', 'color': COLOURS[label], 'linewidth': 1.3, 'shrinkA': 0})
    angles = spread([math.atan2(y, x) for x, y in frame['proxies'].tolist()])
    for label, (proxy, name, angle) in enumerate(zip(frame['proxies'], frame['train_classes'], angles, strict=True)):
        colour = COLOURS[label] if is_training else GREY
        axis.scatter(*(1.3 * proxy), s=55, marker='*', color=colour, linewidths=0, zorder=3)
        axis.annotate(name, (1.52 * math.cos(angle), 1.52 * math.sin(angle)), fontsize=7, ha='center', va='center',
                      color='#333333')
    axis.set(xlim=(-1.7, 1.7), ylim=(-1.7, 1.7), aspect='equal', xticks=[], yticks=[], title=title)
    if not is_training:
        axis.legend(loc='lower right', title='test classes', title_fontsize=7, handletextpad=0.1, borderaxespad=0)
    axis.spines[:].set_visible(False)


def draw_toys(toys: dict[str, dict], target: Path) -> Path:
    """Draw one row per network: its test classes, and its training classes with their proxies; returns the PNG's path.
    """
    with plot_style():
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(len(toys), 2, figsize=(7.2, 3.8 * len(toys)), squeeze=False,
                                       layout='constrained')
        for (left, right), (kind, toy) in zip(axes, toys.items(), strict=True):
            best = toy['best']
            draw_circle(left, best, 'test', f'{kind}, epoch {best["epoch"]}: test classes\nR@1 {best["R@1"]:.1f} %')
            draw_circle(right, best, 'train', 'training classes and their proxies (stars)\n'
                        f'class means {best["angle"]:.1f}° from their proxies')
        return save_figure(figure, target)


def animate(toys: dict[str, dict], target: Path) -> Path:
    """Write a GIF of the training classes and their proxies, with a picture per epoch."""
    pictures = []
    with plot_style():
        from matplotlib import pyplot

        for frames in zip(*(toy['frames'] for toy in toys.values()), strict=True):
            figure, axes = pyplot.subplots(1, len(toys), figsize=(3.7 * len(toys), 3.9), squeeze=False)
            figure.subplots_adjust(0, 0, 1, 0.9, 0)  # the same layout in every picture
            for axis, kind, frame in zip(axes[0], toys, frames, strict=True):
                draw_circle(axis, frame, 'train', f'{kind}, epoch {frame["epoch"]}: R@1 {frame["R@1"]:.1f} %\n'
                            f'class means {frame["angle"]:.1f}° from their proxies')
            buffer = io.BytesIO()
            figure.savefig(buffer, dpi=100)
            pyplot.close(figure)
            pictures.append(Image.open(buffer).convert('RGB').quantize(128, dither=Image.Dither.NONE))
    write_atomically(target, lambda file: pictures[0].save(
        file, format='GIF', save_all=True, append_images=pictures[1:], loop=0,
        duration=[300] * (len(pictures) - 1) + [2000]))  # ms
    return target


# ---------------------------------------------------- command line --------------------------------------------------
def get_args(argv: list[str] | None = None):
    """Parse the command line, and fill in the defaults that depend on the data set and the weights."""
    parser = Parser(description=__doc__)
    parser.add_argument('--data_path', type=user_path, default='/home/data/stl10', help='folder of STL10, downloaded '
                        'there if it is missing [%(default)s]')
    parser.add_argument('--data_name', choices=tuple(IMAGE_SIZE), default='stl10', help='STL10, or ten characters, '
                        'which need no download [%(default)s]')
    parser.add_argument('--loss_name', default='asymptotic_proxy', help=', '.join(LOSSES) + ' [%(default)s, which is '
                        'normalized_softmax]')
    parser.add_argument('--temperature', type=float, default=0.03, help='1 / scale of the loss [%(default)s]')
    parser.add_argument('--with_learnable_proxy', action='store_true', help='let the proxies learn from the gradient '
                        'instead of moving them by momentum')
    parser.add_argument('--momentum', type=float, help=f'm of moving proxies, in (0, 1] [{MOMENTUM}]')
    parser.add_argument('--batch_size', type=int, help='images in a batch [128; 64 for glyph]')
    parser.add_argument('--num_epochs', type=int, default=30, help='epochs to train [%(default)s]')
    parser.add_argument('--lr', type=float, help='learning rate [1e-4; 1e-3 with --weights none]')
    parser.add_argument('--weights', type=user_path, help='of the ResNet18: imagenet, none (random), or the path of a '
                        'state dict [imagenet; none for glyph]')
    parser.add_argument('--compare', action='store_true', help='train moving and learnable proxies, and draw both in '
                        'one figure')
    parser.add_argument('--animate', action='store_true', help='also write a GIF with a picture per epoch')
    parser.add_argument('--device', default='auto', help='auto, cpu, mps, cuda, cuda:N [%(default)s]')
    parser.add_argument('--seed', type=int, default=0, help='of weights, characters and order [%(default)s]')
    parser.add_argument('--results_dir', type=user_path, default='results', help='folder for the files of the run '
                        '[%(default)s]')
    parser.add_argument('--overwrite', action='store_true', help='replace the files of a run of the same name')
    args = parser.parse_args(argv)
    check_choice('--loss_name', args.loss_name, ['asymptotic_proxy', *LOSSES])
    if args.with_learnable_proxy and args.compare:
        raise UserError('--with_learnable_proxy has no effect with --compare, which trains both; leave it out')
    if args.with_learnable_proxy and args.momentum is not None:
        raise UserError(f'--momentum {args.momentum} has no effect with --with_learnable_proxy; leave one of them out')
    if args.weights is None:
        args.weights = 'imagenet' if args.data_name == 'stl10' else 'none'
    defaults = {'batch_size': BATCH_SIZE[args.data_name], 'lr': 1e-3 if args.weights == 'none' else 1e-4,
                'momentum': MOMENTUM}
    for flag, default in defaults.items():
        if getattr(args, flag) is None:
            setattr(args, flag, default)
    for flag in ('temperature', 'lr'):
        if not 1e-6 <= getattr(args, flag) < math.inf:
            raise UserError(f'--{flag} {getattr(args, flag)} must be a number of at least 1e-6')
    check_between(args, {'batch_size': (1, None), 'num_epochs': (1, None), 'seed': (0, None), 'momentum': (1e-30, 1)})
    return args


def main() -> None:
    """Train what the command line names, and draw it."""
    args = get_args()
    device = select_device(args.device)
    folder = make_folder('--results_dir', args.results_dir)
    updates = {'moving proxies': False, 'learnable proxies': True}
    if not args.compare:
        updates = {title: learnable for title, learnable in updates.items() if learnable == args.with_learnable_proxy}
    for learnable in updates.values():
        statistics = folder / f'{name_run(args, learnable)}_statistics.csv'
        if statistics.exists() and not args.overwrite:
            raise UserError(f'{statistics} exists already; add --overwrite, or choose another --results_dir')
    toys = {title: train_toy(args, learnable, device) for title, learnable in updates.items()}
    name = next(iter(toys.values()))['run'] + ('_compared' if args.compare else '')
    print(draw_toys(toys, folder / f'{name}.png'))
    if args.animate:
        print(animate(toys, folder / f'{name}.gif'))


if __name__ == '__main__':
    run_script(main)

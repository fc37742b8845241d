"""The idea in two dimensions: embeddings of STL10 on a circle, and the proxies that they follow.

    python toy.py --data_path /home/data/stl10                       # proxies that move by momentum (Asymptotic Proxy)
    python toy.py --data_path /home/data/stl10 --with_learnable_proxy
    python toy.py --data_name glyph --weights none --lr 1e-3 --batch_size 32 --compare     # no download

The first 7 classes of STL10 (Coates et al., AISTATS 2011) train a ResNet18 without its max-pool, pooled by maximum,
with a linear layer to 2 dimensions; at most 60 images of each of the last 3 classes test it. Writes
results/toy_{...}_statistics.csv, _model.pth, _embeddings.pth and the plot as PNG and PDF: test points on the circle
with the mean direction of each class, and the proxies of the training classes on an outer ring.
"""
import math
import random
from pathlib import Path

import pandas as pd
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data_utils import BatchSampler, RetrievalDataset, draw_glyph, drawable_characters, make_transform
from evaluate import extract_embeddings, make_loader, retrieval_metrics, use_amp
from model import COMBINED_LOSSES, LOSSES, EmbeddingNet
from train import train_one_epoch
from utils import (Parser, UserError, check_choice, make_folder, plot_style, run_name, run_script, save,
                   seed_everything, select_device, write_atomically)

NUM_TRAIN_CLASSES, NUM_TEST_CLASSES, TEST_IMAGES = 7, 3, 60
IMAGE_SIZE = {'stl10': 96, 'glyph': 48}  # px
TRAIN_GLYPHS = 60  # images of each character that trains
COLOURS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#F0E442', '#000000', '#666666', '#88CCEE')


class MemoryDataset(RetrievalDataset):
    """Images that are held in memory, with their labels 0..C-1."""

    def __init__(self, images: list[Image.Image], labels: list[int], class_names: list[str], transform, seed: int):
        classes = {name: [f'{name}/{index}' for index, label in enumerate(labels) if label == number]
                   for number, name in enumerate(class_names)}
        super().__init__(Path(), classes, transform, seed)
        self.pictures = [images[int(path.rsplit('/', 1)[1])] for path in self.images]

    def read(self, index: int) -> Image.Image:
        return self.pictures[index]


def load_stl10(data_path: str) -> tuple[list, list, list[str]]:
    """Return images, labels and class names of the 7 + 3 classes, the first from STL10's train, the last from its test.

    Raises:
        UserError: if the download fails or a file does not have its md5.
    """
    from torchvision.datasets import STL10

    images, labels = [], []
    for split, classes in (('train', range(NUM_TRAIN_CLASSES)), ('test', range(NUM_TRAIN_CLASSES, 10))):
        try:
            data = STL10(data_path, split, download=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: the md5 differs
            raise UserError(f'--data_path {data_path}: STL10 is neither there nor could it be downloaded ({error}); '
                            'put stl10_binary.tar.gz there, or use --data_name glyph') from None
        for index, label in enumerate(data.labels):
            if label in classes and (split == 'train' or labels.count(int(label)) < TEST_IMAGES):
                images.append(Image.fromarray(data.data[index].transpose(1, 2, 0)))
                labels.append(int(label))
    return images, labels, data.classes


def make_glyphs(seed: int) -> tuple[list, list, list[str]]:
    """Draw ten characters: 7 to train, 3 to test."""
    characters = random.Random(seed).sample(drawable_characters(200), NUM_TRAIN_CLASSES + NUM_TEST_CLASSES)
    images, labels = [], []
    for label, (character, faces) in enumerate(characters):
        for index in range(TRAIN_GLYPHS if label < NUM_TRAIN_CLASSES else TEST_IMAGES):
            images.append(draw_glyph(character, faces, random.Random(f'{seed} {ord(character)} {index}')))
            labels.append(label)
    return images, labels, [character for character, _ in characters]


def make_sets(args, interpolation: str) -> tuple[MemoryDataset, MemoryDataset, MemoryDataset]:
    """Return the training set, the same images without augmentation, and the test set."""
    images, labels, names = load_stl10(args.data_path) if args.data_name == 'stl10' else make_glyphs(args.seed)
    size = IMAGE_SIZE[args.data_name]
    flip = 0.5 if args.data_name == 'stl10' else 0.0  # a mirrored character is another one
    augment = make_transform(True, size, interpolation=interpolation, min_crop=0.6, flip=flip)
    plain = make_transform(False, size, size, interpolation)
    first = [index for index, label in enumerate(labels) if label < NUM_TRAIN_CLASSES]
    last = [index for index, label in enumerate(labels) if label >= NUM_TRAIN_CLASSES]

    def build(chosen, offset, class_names, transform):
        return MemoryDataset([images[index] for index in chosen], [labels[index] - offset for index in chosen],
                             class_names, transform, args.seed)

    train_names, test_names = names[:NUM_TRAIN_CLASSES], names[NUM_TRAIN_CLASSES:]
    return (build(first, 0, train_names, augment), build(first, 0, train_names, plain),
            build(last, NUM_TRAIN_CLASSES, test_names, plain))


def angles_to_proxies(embeddings: torch.Tensor, labels: torch.Tensor, proxies: torch.Tensor) -> torch.Tensor:
    """Return the angle in degrees (C,) between each class's mean direction and its proxy."""
    means = torch.stack([embeddings[labels == label].mean(0) for label in range(len(proxies))])
    cosine = torch.nn.functional.cosine_similarity(means, proxies)
    return torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))


def train_toy(args, learnable: bool, device: torch.device) -> dict:
    """Train one toy; returns its best epoch, its rows of statistics and a frame per epoch.

    Returns:
        {'run': name, 'rows': [...], 'best': frame, 'frames': [...]}; a frame holds epoch, R@1, the test and training
        embeddings (n, 2) with labels, the proxies (7, 2) and the mean angle between class means and proxies.
    """
    seed_everything(args.seed)
    combined = COMBINED_LOSSES.get(args.loss_name, {})
    rule = 'gradient' if learnable else 'momentum'
    model = EmbeddingNet('resnet18', 2, 'max', freeze_bn=args.weights != 'none', weights=args.weights, max_pool=False,
                         image_size=IMAGE_SIZE[args.data_name]).to(device, memory_format=torch.channels_last)
    loss = LOSSES[combined.get('loss_name', args.loss_name)]
    criterion = loss(NUM_TRAIN_CLASSES, 2, rule, args.momentum, 1 / args.temperature).to(device)
    groups = [{'params': list(model.parameters())}]
    if learnable:
        groups.append({'params': list(criterion.parameters()), 'lr': 100 * args.lr})  # as in the other recipes
    optimizer = torch.optim.Adam(groups, lr=args.lr)
    train_set, seen_set, test_set = make_sets(args, model.interpolation)
    sampler = BatchSampler(train_set.labels, args.batch_size, seed=args.seed)
    loader = DataLoader(train_set, batch_sampler=sampler)
    train_amp, test_amp = (use_amp('auto', device, model, training) for training in (True, False))
    run = run_name('toy', args.data_name, args.loss_name, 'learnable' if learnable else f'moving_m{args.momentum:g}',
                   f't{args.temperature:g}', f'seed{args.seed}' if args.seed else '')
    rows, frames = [], []
    for epoch in range(1, args.num_epochs + 1):
        train_set.set_epoch(epoch)
        sampler.set_epoch(epoch)
        trained = train_one_epoch(model, criterion, optimizer, loader, device, train_amp, 0.0, f'epoch {epoch}')
        frame = {'epoch': epoch, 'proxies': torch.nn.functional.normalize(criterion.proxies.detach().cpu(), dim=-1)}
        for name, data in (('train', seen_set), ('test', test_set)):
            frame[f'{name}_embeddings'] = extract_embeddings(
                model, make_loader(data, args.batch_size, 0, device), device, test_amp)
            frame[f'{name}_labels'] = torch.tensor(data.labels)
            frame[f'{name}_classes'] = data.class_names
        frame['R@1'] = retrieval_metrics(frame['test_embeddings'], frame['test_labels'], recalls=(1,))['R@1']
        frame['angle'] = angles_to_proxies(frame['train_embeddings'], frame['train_labels'],
                                           frame['proxies']).mean().item()
        rows.append({'epoch': epoch, **trained, 'R@1': frame['R@1'], 'angle_to_proxy': frame['angle']})
        if all(frame['R@1'] > earlier['R@1'] for earlier in frames):
            save({'config': model.config, 'state_dict': model.state_dict(), 'epoch': epoch},
                 Path(args.results_dir) / f'{run}_model.pth')
        frames.append(frame)
        print(f'{run}: epoch {epoch}/{args.num_epochs}: loss {trained["loss"]:.4f}, accuracy {trained["accuracy"]:.1f} '
              f'%, R@1 {frame["R@1"]:.2f}, class means {frame["angle"]:.1f} degrees from their proxies', flush=True)
    best = max(frames, key=lambda frame: frame['R@1'])
    save(best, Path(args.results_dir) / f'{run}_embeddings.pth')
    write_atomically(Path(args.results_dir) / f'{run}_statistics.csv',
                     lambda file: pd.DataFrame(rows).to_csv(file, index=False))
    return {'run': run, 'rows': rows, 'best': best, 'frames': frames}


# ---------------------------------------------------- pictures ------------------------------------------------------
def draw_circle(axis, frame: dict, subset: str, title: str) -> None:
    """Draw the points of a subset on the unit circle, the mean direction of each class, and the proxies outside."""
    embeddings, labels, names = (frame[f'{subset}_{part}'] for part in ('embeddings', 'labels', 'classes'))
    offset = 0 if subset == 'train' else NUM_TRAIN_CLASSES
    turn = torch.linspace(0, 2 * math.pi, 200)
    axis.plot(turn.cos(), turn.sin(), color='#CCCCCC', linewidth=0.6, zorder=0)
    axis.plot(1.25 * turn.cos(), 1.25 * turn.sin(), color='#EEEEEE', linewidth=0.6, zorder=0)
    for label, name in enumerate(names):
        points, colour = embeddings[labels == label], COLOURS[offset + label]
        axis.scatter(*points.T, s=7, color=colour, alpha=0.5, linewidths=0, label=name)
        mean = torch.nn.functional.normalize(points.mean(0), dim=0)
        axis.annotate('', xy=tuple(0.92 * mean), xytext=(0, 0),
                      arrowprops={'arrowstyle': '->', 'color': colour, 'linewidth': 1.2})
    for label, proxy in enumerate(1.25 * frame['proxies']):
        axis.scatter(*proxy, s=40, marker='*', color=COLOURS[label], linewidths=0, zorder=3)
        axis.annotate(frame['train_classes'][label], tuple(1.13 * proxy), fontsize=6, ha='center', va='center')
    axis.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect='equal', xticks=[], yticks=[])
    axis.set_title(title, fontsize=8)
    axis.legend(loc='center', fontsize=5, frameon=True, framealpha=0.8, handletextpad=0.1)
    for spine in axis.spines.values():
        spine.set_visible(False)


def describe(frame: dict, kind: str) -> str:
    """Return a panel's title."""
    return f'{kind}, epoch {frame["epoch"]}: R@1 {frame["R@1"]:.1f} %\nclass mean to proxy {frame["angle"]:.1f}°'


def draw_toys(toys: dict[str, dict], target: Path) -> None:
    """Draw one row per toy, test points and training points side by side; writes `target` as PNG and PDF."""
    with plot_style():
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(len(toys), 2, figsize=(7.0, 3.7 * len(toys)), squeeze=False,
                                       layout='constrained')
        for row, (kind, toy) in zip(axes, toys.items(), strict=True):
            draw_circle(row[0], toy['best'], 'test', f'test classes, {describe(toy["best"], kind)}')
            draw_circle(row[1], toy['best'], 'train', 'training classes and their proxies (stars)')
        for suffix in ('.png', '.pdf'):
            figure.savefig(target.with_suffix(suffix), dpi=180)
        pyplot.close(figure)
    print(target.with_suffix('.png'))


def animate(kind: str, toy: dict, target: Path) -> None:
    """Write a GIF with a picture per epoch, of the training classes: the proxies follow them, or lead them."""
    with plot_style():
        from matplotlib import pyplot
        from matplotlib.animation import FuncAnimation, PillowWriter

        figure, axis = pyplot.subplots(figsize=(3.4, 3.6), layout='constrained')

        def show(index):
            axis.clear()
            draw_circle(axis, toy['frames'][index], 'train', describe(toy['frames'][index], kind))

        FuncAnimation(figure, show, len(toy['frames'])).save(target, PillowWriter(fps=4), dpi=110)
        pyplot.close(figure)
    print(target)


# ---------------------------------------------------- command line --------------------------------------------------
def get_args(argv: list[str] | None = None):
    """Parse the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument('--data_path', default='/home/data/stl10', help='where STL10 is or goes [%(default)s]')
    parser.add_argument('--data_name', choices=tuple(IMAGE_SIZE), default='stl10',
                        help='STL10, or ten characters that need no download [%(default)s]')
    parser.add_argument('--loss_name', default='asymptotic_proxy', help='loss, as in train.py [%(default)s]')
    parser.add_argument('--temperature', type=float, default=0.03, help='1 / scale of the loss [%(default)s]')
    parser.add_argument('--with_learnable_proxy', action='store_true',
                        help='proxies learn by the gradient instead of moving by momentum')
    parser.add_argument('--momentum', type=float, default=0.5, help='of the moving proxies [%(default)s]')
    parser.add_argument('--batch_size', type=int, default=128, help='images in a step [%(default)s]')
    parser.add_argument('--num_epochs', type=int, default=30, help='[%(default)s]')
    parser.add_argument('--lr', type=float, default=1e-4, help='learning rate; 1e-3 with --weights none [%(default)s]')
    parser.add_argument('--weights', default='imagenet', help='imagenet, none, or a file [%(default)s]')
    parser.add_argument('--compare', action='store_true', help='train moving and learnable proxies, side by side')
    parser.add_argument('--animate', action='store_true', help='write a GIF of the epochs too')
    parser.add_argument('--device', default='auto', help='auto, cpu, mps, cuda, cuda:N [%(default)s]')
    parser.add_argument('--seed', type=int, default=0, help='of weights, characters and order [%(default)s]')
    parser.add_argument('--results_dir', default='results', help='where files go [%(default)s]')
    args = parser.parse_args(argv)
    check_choice('--loss_name', args.loss_name, [*LOSSES, 'asymptotic_proxy'])
    if args.temperature <= 0 or args.lr <= 0 or args.num_epochs < 1:
        raise UserError(f'--temperature {args.temperature}, --lr {args.lr} and --num_epochs {args.num_epochs} must be '
                        'above 0')
    if args.compare and args.with_learnable_proxy:
        raise UserError('--with_learnable_proxy has no effect with --compare, which trains both; leave it out')
    return args


def main() -> None:
    """Train the toy as the command line says and draw it."""
    args = get_args()
    device = select_device(args.device)
    folder = make_folder('--results_dir', Path(args.results_dir))
    kinds = {'moving proxies': False, 'learnable proxies': True}
    if not args.compare:
        kinds = {kind: learnable for kind, learnable in kinds.items() if learnable == args.with_learnable_proxy}
    toys = {kind: train_toy(args, learnable, device) for kind, learnable in kinds.items()}
    name = toys[next(iter(toys))]['run'] + ('_compared' if args.compare else '')
    draw_toys(toys, folder / f'{name}.png')
    if args.animate:
        for kind, toy in toys.items():
            animate(kind, toy, folder / f'{toy["run"]}.gif')


if __name__ == '__main__':
    run_script(main)

"""Images per second of a training step, against the loop that the five systems' pages print.

    python benchmarks/bench_train.py                      # ResNet50, GoogLeNet, BN-Inception at 224 px, batch 32
    python benchmarks/bench_train.py --backbone_type timm:tf_efficientnet_lite0 --image_size 128

`seeds` is their loop written out: float32, NCHW, PIL transforms to normalised float tensors in two workers, loss and
accuracy read with `.item()` in each step. `ours` is train_one_epoch with `--amp`, channels_last, uint8 images;
`compile` the same with `--compile`; `tensor` is ours fed from a tensor that is there already. They take turns, each
with a loader of its own over the same JPEG files. `other amp` is one step of ours with what `--amp` did not
choose, after a step that is not counted. Compiling pays from the number of images on after which its seconds are saved.
Ends with one line of JSON.
"""
import functools
import tempfile
import time
from pathlib import Path

from bench_common import finish, median, take_turns, write_photographs

BACKBONES = ('resnet50', 'googlenet', 'inception')
WAYS = ('seeds', 'ours', 'tensor', 'compile', 'other amp')
NUM_CLASSES = 8


def seeds_step(backbone: str, root, split, args, device):
    """Return a function that trains an epoch as the five systems' pages do."""
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    from common.images import load_image
    from model import EmbeddingNet, NetConfig, make_loss

    network = EmbeddingNet(NetConfig(backbone, 512, image_size=args.image_size), 'none')
    scale, mean, std = network.value_range, network.mean.flatten().tolist(), network.std.flatten().tolist()

    class Images(Dataset):
        def __init__(self):
            self.items = [(path, label) for label, paths in enumerate(split['train'].values()) for path in paths]
            self.transform = transforms.Compose([
                transforms.RandomResizedCrop(args.image_size), transforms.RandomHorizontalFlip(),
                transforms.ToTensor(), transforms.Lambda(lambda image: image * scale),
                transforms.Normalize(mean, std)])

        def __len__(self):
            return len(self.items)

        def __getitem__(self, index):
            path, label = self.items[index]
            return self.transform(load_image(root / path)), label

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = network.backbone, network.head

        def forward(self, images):
            features = network.pool(self.backbone(images), 'max')
            return F.normalize(self.head(F.layer_norm(features, features.shape[-1:])), dim=-1)

    model = Net().to(device)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    criterion = make_loss('normalized_softmax', num_classes=NUM_CLASSES, feature_dim=512).to(device)
    optimizer = torch.optim.AdamW([*model.parameters(), *criterion.parameters()], lr=1e-4)
    loader = DataLoader(Images(), args.batch_size, shuffle=True, drop_last=True, num_workers=args.num_workers,
                        persistent_workers=args.num_workers > 0)

    def step():
        total, correct = 0.0, 0
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            embeddings = model(images)
            loss = criterion(embeddings, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
            correct += (embeddings @ criterion.proxies.T).argmax(1).eq(labels).sum().item()

    return step


def our_step(backbone: str, images, args, device, amp: str = 'auto', feed: str = 'files', compiled: bool = False):
    """Return a function that trains an epoch as train.py does, and whether it computes in bfloat16.

    Args:
        images: of `open_data`, with a cache or without.
        feed: `files` (or the cache), a `tensor` that is on the device already, or `one` step's tensor.
    """
    import torch

    from imagedata.loading import BatchSampler, RetrievalDataset, make_loader, make_transform
    from model import EmbeddingNet, NetConfig, make_loss
    from common.distributed import use_amp
    from train import train_one_epoch

    model = EmbeddingNet(NetConfig(backbone, 512, image_size=args.image_size), 'none')
    model = model.to(device, memory_format=torch.channels_last)
    criterion = make_loss('normalized_softmax', num_classes=NUM_CLASSES, feature_dim=512).to(device)
    optimizer = torch.optim.AdamW([*model.parameters(), *criterion.parameters()], lr=1e-4, fused=True)
    data = RetrievalDataset(images, 'train', make_transform(True, args.image_size))
    loader = make_loader(data, BatchSampler(data.labels, args.batch_size, drop_last=True), args.num_workers, device)
    if feed != 'files':
        batch, labels = next(iter(loader))
        loader = [(batch.to(device), labels.to(device))] * (1 if feed == 'one' else len(loader))
    network = torch.compile(model) if compiled else model
    bfloat16 = use_amp(amp, device)
    return lambda: train_one_epoch(network, criterion, optimizer, loader, device, bfloat16), bfloat16


def get_args():
    from utils import Parser

    parser = Parser(description=__doc__)
    parser.add_argument('--backbone_type', nargs='+', default=BACKBONES, help='backbones [%(default)s]')
    parser.add_argument('--ways', nargs='+', choices=WAYS, default=WAYS, help='what is measured beside ours [all]')
    parser.add_argument('--image_size', type=int, default=224, help='side of the crop in pixels [%(default)s]')
    parser.add_argument('--batch_size', type=int, default=32, help='[%(default)s]')
    parser.add_argument('--num_steps', type=int, default=4, help='steps in a turn [%(default)s]')
    parser.add_argument('--num_workers', type=int, default=2, help='of each loader [%(default)s]')
    parser.add_argument('--repetitions', type=int, default=3, help='turns [%(default)s]')
    parser.add_argument('--amp', choices=('auto', 'on', 'off'), default='auto', help='of ours [%(default)s]')
    parser.add_argument('--device', default='auto', help='[%(default)s]')
    return parser.parse_args()


def main() -> None:
    args = get_args()
    import subprocess
    import sys

    from common.distributed import select_device
    from imagedata.loading import open_data

    device = select_device(args.device)
    result = {'benchmark': 'train', 'batch_size': args.batch_size, 'image_size': args.image_size,
              'device': str(device), 'img_s': {}, 'ours_to': {}, 'auto': {}, 'compile': {}}
    ways = [way for way in WAYS if way in args.ways or way == 'ours']
    print(f'{"img/s":<32}' + ''.join(f'{way:>10}' for way in ways) + '  auto is    ours to', flush=True)
    images = args.batch_size * args.num_steps
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder) / 'photographs', 2 * images, (500, 375), NUM_CLASSES)
        subprocess.run([sys.executable, Path(__file__).parent.parent / 'data_utils.py', '--data_path', folder,
                        '--data_name', 'photographs'], check=True, capture_output=True)
        photographs = open_data(folder, 'photographs')
        for backbone in args.backbone_type:
            make = functools.partial(our_step, backbone, photographs, args, device, args.amp)
            steps = {}
            steps['ours'], bfloat16 = make()
            result['auto'][backbone] = 'bfloat16' if bfloat16 else 'float32'
            if 'seeds' in ways:
                steps['seeds'] = seeds_step(backbone, photographs.root, photographs.split, args, device)
            if 'tensor' in ways:
                steps['tensor'], _ = make(feed='tensor')
            if 'compile' in ways:
                steps['compile'], _ = make(compiled=True)
                start = time.perf_counter()
                steps['compile']()
                first = time.perf_counter() - start
            seconds = take_turns(steps, args.repetitions)
            if 'other amp' in ways:
                other = {'step': our_step(backbone, photographs, args, device, 'off' if bfloat16 else 'on', 'one')[0]}
                seconds['other amp'] = [args.num_steps * value for value in take_turns(other, 1)['step']]
            rates = {way: images / median(values) for way, values in seconds.items()}
            result['img_s'][backbone] = {way: round(rate, 2) for way, rate in rates.items()}
            ratios = {way: round(median([a / b for a, b in zip(seconds[way], seconds['ours'], strict=True)]), 2)
                      for way in ('seeds', 'tensor') if way in ways}
            result['ours_to'][backbone] = ratios
            print(f'{backbone:<32}' + ''.join(f'{rates[way]:>10.2f}' for way in ways)
                  + f'  {result["auto"][backbone]}  {ratios}', flush=True)
            if 'compile' in ways:
                compiling = first - median(seconds['compile'])
                saved = 1 / rates['ours'] - 1 / rates['compile']  # seconds an image
                pays = round(compiling / saved) if saved > 0 else None
                result['compile'][backbone] = {'seconds': round(compiling, 1), 'pays_from_images': pays}
                print(f'{"":<32}compiling took {compiling:.0f} s and pays '
                      + ('never' if pays is None else f'from {pays:,} images on'), flush=True)
    finish(result)


if __name__ == '__main__':
    from utils import run_script

    run_script(main)

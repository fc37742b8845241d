"""Measure how fast pretrained backbones embed images on this machine: a row of docs/backbones.md each.

    python benchmarks/bench_backbones.py
    python benchmarks/bench_backbones.py timm:resnet50.a1_in1k --device cuda

Speed does not depend on the weights, which are random here, so nothing is downloaded.
"""
import sys
import time
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds only the modules beside itself

from common.distributed import select_device, use_amp  # noqa: E402
from retrieval.embedding import embed_batch  # noqa: E402
from retrieval.pretrained import build_pretrained  # noqa: E402
from utils import Parser, add_device_flags, run_script  # noqa: E402

BACKBONES = ['timm:vit_small_patch14_dinov2.lvd142m', 'timm:vit_base_patch14_dinov2.lvd142m',
             'timm:vit_base_patch14_reg4_dinov2.lvd142m', 'timm:vit_small_patch16_dinov3.lvd1689m',
             'timm:vit_base_patch16_siglip_224.v2_webli', 'timm:convnext_tiny.in12k_ft_in1k',
             'timm:resnet50.a1_in1k', 'timm:tf_efficientnet_lite0.in1k']
TURNS = 5


@torch.inference_mode()
def measure(name: str, batch_size: int, amp: str, device: torch.device) -> str:
    """Return a row of the table: backbone, MB of weights, licence, features, images per second (best of TURNS)."""
    model = build_pretrained(name, 'none', 224, None, device)
    images = torch.randint(0, 256, (batch_size, 3, 224, 224), dtype=torch.uint8)
    seconds = []
    for _ in range(TURNS + 1):  # the first one warms up
        start = time.perf_counter()
        embed_batch(model, images, device, use_amp(amp, device)).cpu()  # waits for the device
        seconds.append(time.perf_counter() - start)
    megabytes = sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e6
    licence = timm.get_pretrained_cfg(name.removeprefix('timm:')).license
    return (f'| `{name}` | {megabytes:.0f} MB | {licence} | {model.config.pooling}, {model.num_features:,} | '
            f'{batch_size / min(seconds[1:]):.1f} |')


def main() -> None:
    """Print the rows."""
    parser = Parser(description=__doc__)
    parser.add_argument('backbones', nargs='*', metavar='BACKBONE', help='timm:MODEL [those of docs/backbones.md]')
    parser.add_argument('--batch_size', type=int, default=16, help='images at once [%(default)s]')
    parser.add_argument('--amp', choices=('auto', 'on', 'off'), default='off', help='in bfloat16 [%(default)s]')
    add_device_flags(parser)
    args = parser.parse_args()
    device = select_device(args.device)
    print('| backbone | weights | licence | features | images per second |\n|---|---|---|---|---|')
    for name in args.backbones or BACKBONES:
        print(measure(name, args.batch_size, args.amp, device), flush=True)


if __name__ == '__main__':
    run_script(main)

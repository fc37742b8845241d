"""Export every backbone of the README, with random weights, and compare what the exports embed with the network.

    python benchmarks/try_export.py                       # some minutes on two cores
    python benchmarks/try_export.py --backbone_type resnet50 timm:NAME --image_size 224

The largest difference of a number in an embedding, over batches of 1 and of 5 random images, and for 8-bit integers the
smallest cosine of an image's two embeddings. A backbone that cannot be exported has the reason in its row. Ends with
one line of JSON.
"""
from bench_common import finish

BACKBONES = ('resnet18', 'resnet50', 'resnet101', 'inception', 'googlenet', 'timm:tf_efficientnet_lite0',
             'timm:mobilenetv3_small_050', 'timm:convnext_atto', 'timm:resnet10t', 'timm:vit_tiny_patch16_224',
             'timm:vit_small_patch14_reg4_dinov2', 'timm:swin_tiny_patch4_window7_224', 'timm:efficientformerv2_s0',
             'timm:maxvit_rmlp_pico_rw_256', 'timm:volo_d1_224')
SIZES = {'timm:vit_small_patch14_reg4_dinov2': 70, 'timm:maxvit_rmlp_pico_rw_256': 256, 'timm:volo_d1_224': 224,
         'timm:efficientformerv2_s0': 224}  # that fit them; others take 64


def compare(backbone: str, size: int) -> dict:
    """Return what came of one backbone: numbers, or the reason why not."""
    import torch

    from common.errors import UserError
    from export import quantise, to_onnx
    from model import EmbeddingNet, NetConfig
    from retrieval.onnx_file import OnnxNet

    torch.manual_seed(0)
    model = EmbeddingNet(NetConfig(backbone, 64, image_size=size), 'none').eval()
    images = torch.randint(0, 256, (5, 3, size, size), dtype=torch.uint8)
    row = {}

    def difference(network) -> float:
        with torch.inference_mode():
            return max(float((network(part) - model(part)).abs().max()) for part in (images, images[:1]))

    try:
        whole = to_onnx(model, {})
        row['ONNX'] = difference(OnnxNet(whole))
        small = OnnxNet(quantise(whole, images, {}, backbone))
        with torch.inference_mode():
            row['int8, cosine'] = float((small(images) * model(images)).sum(1).min())
    except UserError as error:
        row['reason'] = str(error)
    return row


def get_args():
    from utils import Parser

    parser = Parser(description=__doc__)
    parser.add_argument('--backbone_type', nargs='+', default=BACKBONES, help='backbones [%(default)s]')
    parser.add_argument('--image_size', type=int, help='side in pixels [64, where the backbone takes it]')
    return parser.parse_args()


def main() -> None:
    args = get_args()
    rows = {}
    print('| backbone | px | ONNX | int8, cosine | |\n|---|---|---|---|---|')
    for backbone in args.backbone_type:
        size = args.image_size or SIZES.get(backbone, 64)
        row = rows[backbone] = compare(backbone, size)
        difference = f'{row["ONNX"]:.1e}' if 'ONNX' in row else '-'
        cosine = f'{row["int8, cosine"]:.3f}' if 'int8, cosine' in row else '-'
        print(f'| {backbone} | {size} | {difference} | {cosine} | {row.get("reason", "")} |', flush=True)
    finish({'benchmark': 'export', 'rows': rows})


if __name__ == '__main__':
    from utils import run_script

    run_script(main)

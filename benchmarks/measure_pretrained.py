"""Measure EfficientNet-Lite0 without training, alone and whitened: the table of docs/search.md.

    python benchmarks/measure_pretrained.py --data_path /home/data --weights imagenet

Each row of the table is a call of evaluate.py --pretrained; its R@1 and MAP@R are added to results/pretrained.csv when
it ends. A row that is there is not measured again: to measure anew, remove the file.
"""
from bench_common import REPOSITORY, evaluate, read_csv, write_csv  # first: it finds the modules of the repository
from utils import Parser, run_script, user_path

FILE = REPOSITORY / 'results/pretrained.csv'
DATA_NAMES = ('car', 'cub', 'grocery')
PROTOCOL = '--backbone_type timm:tf_efficientnet_lite0 --image_size 128'  # a later flag wins
COLUMNS = ('data_name', 'features', 'R@1', 'MAP@R')
# Name of the features -> flags of evaluate.py. The backbone alone is measured with the first ones.
VARIANTS = {
    'whitened on the searched images': '--whiten test',
    'whitened on other images': '--whiten train',
    'whitened, flip': '--whiten test --flip_tta 1',
    'whitened, 192 px': '--whiten test --image_size 192',
}


def main() -> None:
    """Measure what is missing in the CSV, and print all rows."""
    parser = Parser(description=__doc__)
    parser.add_argument('--data_path', type=user_path, default='/home/data', help='folder of the data sets '
                        '[%(default)s]')
    parser.add_argument('--weights', type=user_path, default='imagenet', help='imagenet, or a state dict [%(default)s]')
    args = parser.parse_args()
    rows = read_csv(FILE)
    for data_name in DATA_NAMES:
        for features, flags in VARIANTS.items():
            if any((row['data_name'], row['features']) == (data_name, features) for row in rows):
                continue
            results = evaluate('--pretrained', '--data_path', args.data_path, '--data_name', data_name, '--weights',
                               args.weights, *PROTOCOL.split(), *flags.split())
            measured = {features: results['dense']}
            if 'whitened on the searched images' in measured:
                measured = {'backbone alone': results['backbone'], **measured}
            rows += [{'data_name': data_name, 'features': name, 'R@1': f'{metrics["R@1"]:.2f}',
                      'MAP@R': f'{metrics["MAP@R"]:.2f}'}
                     for name, metrics in measured.items()]
            write_csv(FILE, COLUMNS, rows)
    for row in rows:
        print(f'{row["data_name"]:<10}{row["features"]:<34}{row["R@1"]:>7}{row["MAP@R"]:>7}')


if __name__ == '__main__':
    run_script(main)

"""Print what `make demo` has achieved, and what to try next.

    python benchmarks/summarize_demo.py glyph_timm-resnet10t_balanced_proxy_128 results/FIGURE.png
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from training.statistics import read_statistics  # noqa: E402  a script finds only the modules beside itself


def summarize(run: str, figure: str) -> str:
    """Return R@1 before and after the training, the figure, and three commands to run next."""
    row = read_statistics(Path('results') / f'{run}_statistics.csv').iloc[-1]
    return f"""
R@1 among 100 characters that were not in the training set:
    before the training {row['pretrained_R@1']:5.1f} %   (random weights)
    after the training  {row['dense_R@1']:5.1f} %
What four queries retrieve: {figure}
Next:
    make serve                                      # search on a page: click an image, or drop one
    .venv/bin/python report.py --data_base {run}_data_base.pth --data_path data
    .venv/bin/python train.py --help                # every flag, with the papers' values"""


if __name__ == '__main__':
    print(summarize(*sys.argv[1:]))

"""Copy the emoji of four makers into a folder per emoji: 1,911 classes of three or four drawings each.

    npm install --prefix /home/data/npm emoji-datasource-{apple,google,twitter,facebook}@16.0.0    # about 370 MB
    python benchmarks/make_emoji.py --packages /home/data/npm/node_modules --target /home/data/emoji
    python benchmarks/reproduce.py emoji --data_path /home/data --weights imagenet

Unlike the photographs of the other tables, these images are public and small, so that anyone can repeat the numbers.
The drawings belong to Apple, Google, Twitter and Meta; the packages say under which terms they may be used. Skin tones
are left out.
"""
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds only the modules beside itself

from common.errors import UserError  # noqa: E402
from utils import Parser, run_script, user_path  # noqa: E402

MAKERS = ('apple', 'google', 'twitter', 'facebook')
COMMAND = f'npm install emoji-datasource-{{{",".join(MAKERS)}}}@16.0.0'


def list_emoji(packages: Path) -> list[tuple[Path, Path]]:
    """Return (drawing, path in the target) of every emoji that a maker has drawn.

    Raises:
        UserError: if one of the packages or its drawings are missing.
    """
    index = packages / 'emoji-datasource-apple/emoji.json'
    if not index.is_file():
        raise UserError(f'there is no {index}; install the packages with: {COMMAND}')
    files = []
    for emoji in json.loads(index.read_text(encoding='utf-8')):
        for maker in MAKERS:
            if emoji[f'has_img_{maker}']:
                drawing = packages / f'emoji-datasource-{maker}/img/{maker}/64/{emoji["image"]}'
                files.append((drawing, Path(emoji['unified'], f'{maker}.png')))
    missing = [drawing for drawing, _ in files if not drawing.is_file()]
    if missing:
        raise UserError(f'{len(missing):,} of {len(files):,} drawings are missing, the first: {missing[0]}; install '
                        f'all packages in one version: {COMMAND}')
    return files


def main() -> None:
    """Copy the drawings."""
    parser = Parser(description=__doc__)
    parser.add_argument('--packages', type=user_path, required=True, metavar='FOLDER', help='node_modules, into which '
                        'npm has installed the four packages')
    parser.add_argument('--target', type=user_path, default='/home/data/emoji', metavar='FOLDER', help='where the '
                        'folder of each emoji goes; it must not exist yet [%(default)s]')
    args = parser.parse_args()
    target = Path(args.target)
    if target.exists():
        raise UserError(f'{target} exists already; remove it, or name another --target')
    files = list_emoji(Path(args.packages))
    for drawing, path in files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(drawing, target / path)
    print(f'{target}: {len(files):,} drawings of {len({path.parent for _, path in files}):,} emoji')


if __name__ == '__main__':
    run_script(main)

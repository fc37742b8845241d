"""Write small raw data sets in the formats of CARS196, CUB-200-2011, SOP and In-shop, and folders of your own."""
import os
import socket
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

WIDTH, HEIGHT = 48, 40


def write_image(path: Path, label: int, number: int, mode: str = 'RGB') -> None:
    """Write a noisy image whose colour depends on its label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(1000 * label + number)
    pixels = rng.randint(0, 80, (HEIGHT, WIDTH, 3)) + np.array([40 * label % 176, 70 * label % 176, 110 * label % 176])
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(path)


def make_car(data_path: Path, folder: str = 'car', classes=(1, 2, 98, 99, 100, 196), images: int = 4) -> Path:
    """Write the images and `cars_annos.mat` as MATLAB would; its `test` field contradicts the split by class."""
    root = data_path / folder
    fields = ('relative_im_path', 'bbox_x1', 'bbox_y1', 'bbox_x2', 'bbox_y2', 'class', 'test')
    rows = []
    for label in classes:
        for number in range(images):
            last = label == classes[-1] and number == images - 1
            name = f'car_ims/{8055 if last else len(rows) + 1:06d}.jpg'  # 008055.jpg is the query that the papers show
            write_image(root / name, label, number)
            rows.append((name, 3, 2, 42, 36, label, number % 2))
    annotations = np.array([tuple(np.array([[value]]) if isinstance(value, int) else np.array([value])
                                  for value in row) for row in rows], dtype=[(field, 'O') for field in fields])
    names = np.array([np.array([f'Maker Model {label}']) for label in range(1, 197)] + [None], dtype=object)[:-1]
    savemat(root / 'cars_annos.mat', {'annotations': annotations[None], 'class_names': names[None]},
            do_compression=True)
    return root


def make_cub(data_path: Path, folder: str = 'cub', classes=(1, 2, 100, 101, 102, 200), images: int = 4) -> Path:
    """Write the images, one of them greyscale, and the text files of CUB-200-2011."""
    root = data_path / folder
    lists = {'images.txt': [], 'image_class_labels.txt': [], 'bounding_boxes.txt': []}
    for label in classes:
        for number in range(images):
            image_id = len(lists['images.txt']) + 1
            path = f'{label:03d}.Some_Bird/Some_Bird_{label:04d}_{number}.jpg'
            write_image(root / 'images' / path, label, number, 'L' if image_id == 1 else 'RGB')
            lists['images.txt'].append(f'{image_id} {path}')
            lists['image_class_labels.txt'].append(f'{image_id} {label}')
            lists['bounding_boxes.txt'].append(f'{image_id} 4.0 3.0 30.0 35.5')
    for name, lines in lists.items():
        (root / name).write_text('\n'.join(lines) + '\n')
    return root


def make_sop(data_path: Path, folder: str = 'sop', images: int = 4) -> Path:
    """Write the images, Ebay_train.txt and Ebay_test.txt; two super-classes hold files of the same name."""
    root = data_path / folder
    number = 0
    for subset, labels in (('train', (1, 2, 3)), ('test', (11319, 11320, 11321))):
        lines = ['image_id class_id super_class_id path']
        for label in labels:
            for index in range(images):
                number += 1
                path = f'{("bicycle", "chair")[label % 2]}_final/{111085122871 + label // 2}_{index}.JPG'
                write_image(root / path, label, index)
                lines.append(f'{number} {label} {label % 2 + 1} {path}')
        root.mkdir(exist_ok=True)
        (root / f'Ebay_{subset}.txt').write_text('\n'.join(lines) + '\n')
    return root


def make_isc(data_path: Path, folder: str = 'isc', images: int = 4) -> Path:
    """Write the images and list_eval_partition.txt, with its count and header lines; items share file names."""
    root = data_path / folder
    lines = []
    for label, subsets in ((1, ('train',)), (2, ('train',)), (3, ('train',)), (7, ('query', 'gallery')),
                           (8, ('query', 'gallery')), (9, ('query', 'gallery'))):
        for index in range(images):
            path = f'img/WOMEN/Dresses/id_{label:08d}/{index + 1:02d}_1_front.jpg'
            write_image(root / 'Img' / path, label, index)
            lines.append(f'{path:<60} id_{label:08d} {subsets[index % len(subsets)]}')
    (root / 'Eval').mkdir()
    header = f'{len(lines)}\nimage_name item_id evaluation_status\n'
    (root / 'Eval' / 'list_eval_partition.txt').write_text(header + '\n'.join(lines) + '\n')
    return root


def make_own(data_path: Path, classes: str = 'abcdef', images: int = 2, folder: str = 'mine') -> Path:
    """Write a folder of your own photographs with one folder per class, named by a letter."""
    for label in classes:
        for number in range(images):
            write_image(data_path / folder / label / f'{number}.jpg', ord(label), number)
    return data_path / folder


def make_own_split(data_path: Path, classes: dict[str, str], folder: str = 'mine') -> Path:
    """Write a folder of your own photographs that is split already: {subset: its classes}, two images each."""
    for subset, labels in classes.items():
        make_own(data_path / folder, labels, folder=subset)
    return data_path / folder


def make_special_file(path: Path, kind: str) -> None:
    """Make a `pipe`, `socket`, `folder`, `link to itself`, or a link to a `device` or to a pipe."""
    if kind == 'pipe':
        os.mkfifo(path)
    elif kind == 'socket':
        with socket.socket(socket.AF_UNIX) as server:
            folder = os.open(path.parent, os.O_RDONLY)
            server.bind(f'/proc/self/fd/{folder}/{path.name}')  # a socket's path has 107 bytes at most
            os.close(folder)
    elif kind == 'device':
        path.symlink_to('/dev/zero')
    elif kind == 'folder':
        path.mkdir()
    elif kind == 'link to itself':
        path.symlink_to(path.name)
    else:
        os.mkfifo(path.with_name('.pipe'))
        path.symlink_to('.pipe')

"""A small data set with odd class names, and a data base of it that no network made."""
from pathlib import Path

import numpy as np
import torch
from raw_trees import write_image

from common.files import save
from training.statistics import save_statistics

NAMES = ['Ara & Co', '<script>alert(1)</script>', 'costs $5 or $6', 'Zebrafink', "O'Hara \"quoted\""]
RUN = 'birds_resnet18_balanced_proxy_5'
SETTINGS = {'data_name': 'birds', 'crop_type': 'uncropped', 'batch_size': 4, 'resize_size': 32, 'amp': 'auto',
            'recalls': [1, 2, 4]}


def make_shop(folder: Path, counts=(7, 8, 9, 3, 1), gallery=(), dim: int = 5) -> Path:
    """Write images of the classes NAMES, and a data base of random features; returns the path of the data base.

    Args:
        counts, gallery: number of images of each class.
        dim: length of a feature.
    """
    rng = torch.Generator().manual_seed(0)
    data_base = {'class_names': NAMES, 'args': SETTINGS, 'epoch': 2}
    for subset, numbers in (('test', counts), ('gallery', gallery)):
        if numbers:
            labels = [label for label, count in enumerate(numbers) for _ in range(count)]
            features = torch.randn(len(labels), dim, generator=rng) + 2 * torch.eye(5, dim)[labels]
            data_base[f'{subset}_images'] = [f'uncropped/{subset}/{index:03d}.jpg' for index in range(len(labels))]
            data_base[f'{subset}_labels'] = torch.tensor(labels)
            data_base[f'{subset}_features'] = torch.nn.functional.normalize(features, dim=1)
            for index, path in enumerate(data_base[f'{subset}_images']):
                write_image(folder / 'birds' / path, labels[index], index)
    (folder / 'results').mkdir()
    save(data_base, folder / 'results' / f'{RUN}_data_base.pth')
    rows = [{'epoch': epoch, 'loss': 1.0, 'accuracy': 50.0, 'lr': 1e-4, 'dense_R@1': 40.0} for epoch in (1, 2)]
    save_statistics(rows, {'seed': 0}, folder / 'results' / f'{RUN}_statistics.csv')
    return folder / 'results' / f'{RUN}_data_base.pth'


def rank_in_loops(data_base, binary: bool) -> list[tuple]:
    """Rank every query with loops: (rank of the best positive with ties in the middle, margin, nearest image)."""
    searched = data_base.subsets[data_base.searched]
    features, ranked = searched.features.double(), []
    for query, label in enumerate(data_base.test.labels):
        feature = data_base.test.features[query].double()
        best, others, nearest = -9.0, [], (-9.0, 0)
        for image, other in enumerate(searched.labels):
            if data_base.searched == 'test' and image == query:
                continue
            if binary:
                similarity = float(((feature >= 0) == (features[image] >= 0)).double().mean())
            else:
                similarity = float((feature * features[image]).sum())
            nearest = max(nearest, (similarity, -image))
            if other == label:
                best = max(best, similarity)
            else:
                others.append(similarity)
        ties = sum(abs(similarity - best) < 1e-9 for similarity in others)
        rank = sum(similarity > best + 1e-9 for similarity in others) + ties / 2
        has_positive = best > -9
        ranked.append((rank if has_positive else np.nan, best - max(others) if has_positive else -np.inf, -nearest[1]))
    return ranked

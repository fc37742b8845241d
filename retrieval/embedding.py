"""Embed images with a model, into a data base or from your own Python, and measure a data base."""
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from common.distributed import gather_rows, progress, use_amp
from common.errors import UserError
from common.images import BrokenImage, to_image
from imagedata.loading import make_transform
from model import EmbeddingNet
from retrieval.database import DataBase, Subset, open_set_threshold
from retrieval.metrics import NUMBERS_OF_QUERIES, measure_open_set, retrieval_metrics


# ---------------------------------------------------- networks to embed with --------------------------------------
class PretrainedBaseline(nn.Module):
    """The features of a network's backbone as embeddings, those of `build_pretrained`: the baseline of a training."""

    def __init__(self, model: EmbeddingNet):
        super().__init__()
        self.model, self.feature_dim = model, model.num_features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.model.pool(self.model.backbone(self.model.preprocess(images)), self.model.pretrained_pooling)
        return F.normalize(F.layer_norm(features.float(), features.shape[-1:]), dim=-1)


class WithoutHead(nn.Module):
    """A network up to its head: images (N, 3, H, W) -> features (N, num_features)."""

    def __init__(self, model: EmbeddingNet):
        super().__init__()
        self.model, self.feature_dim = model, model.num_features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.compute_features(images).float()


# ---------------------------------------------------- embed -------------------------------------------------------
def embed_batch(model: nn.Module, images: torch.Tensor, device: torch.device, amp: bool) -> torch.Tensor:
    """Embed uint8 images (N, 3, H, W), in bfloat16 if `amp` is set; returns (N, D) float32 on the device."""
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        return model(images.to(device, non_blocking=True)).float()


@torch.inference_mode()
def extract_embeddings(model: nn.Module, loader: DataLoader, device: torch.device, amp: bool) -> torch.Tensor:
    """Embed the images of a loader in their order; returns (N, D) float32 on the CPU, of all processes."""
    model.eval()
    embeddings = [torch.zeros(0, model.feature_dim, device=device)]  # a process may have no batch
    for images, _ in progress(loader, desc='embed', total=len(loader)):
        embeddings.append(embed_batch(model, images, device, amp))
    return gather_rows(torch.cat(embeddings)).cpu()


def make_data_base(model: nn.Module, loaders: dict[str, DataLoader], device: torch.device, amp: bool) -> DataBase:
    """Embed the test images, or queries and gallery, of `make_test_loaders`."""
    subsets, sizes = {}, {}
    for name, loader in loaders.items():
        dataset = loader.dataset
        subsets[name] = Subset(dataset.images, torch.tensor(dataset.labels),
                               extract_embeddings(model, loader, device, amp))
        sizes[name] = [(dataset.root / path).stat().st_size for path in dataset.images]
    return DataBase(loaders['test'].dataset.class_names, **subsets, sizes=sizes)


@torch.no_grad()  # unlike inference_mode it returns embeddings that a loss can use
def embed_images(model: EmbeddingNet, images, run: dict | None = None, batch_size: int = 64) -> torch.Tensor:
    """Embed photographs of any kind from your own Python, as the test images of a run are embedded.

    Args:
        model: of `load_model`, on any device.
        images: paths, PIL images, or uint8 arrays (H, W, 3), RGB, of any sizes; any iterable, read as it comes.
        run: the second value of `load_model`, whose short side before the crop and precision are used; None:
            image_size x 256/224, in float32.
        batch_size: images embedded at once.

    Returns:
        (N, D) float32, unit rows, on the CPU; N may be 0.

    Raises:
        UserError: with the number of the first image that cannot be read.
    """
    model.eval()
    device = model.mean.device
    settings = run['args'] if run else {'resize_size': None, 'amp': 'off'}
    amp = use_amp(settings['amp'], device)
    transform = make_transform(False, model.config.image_size, settings['resize_size'], model.interpolation)
    embeddings, batch = [torch.zeros(0, model.feature_dim)], []
    for index, image in enumerate(images):
        try:
            batch.append(transform(to_image(image)))
        except BrokenImage as error:
            name = f', {image},' if isinstance(image, (str, Path)) else ''
            raise UserError(f'image {index}{name} cannot be read ({error})') from None
        if len(batch) == batch_size:
            embeddings.append(embed_batch(model, torch.stack(batch), device, amp).cpu())
            batch = []
    if batch:
        embeddings.append(embed_batch(model, torch.stack(batch), device, amp).cpu())
    return torch.cat(embeddings)


# ---------------------------------------------------- measure -----------------------------------------------------
def measure(data_base: DataBase, recalls: tuple[int, ...], device: torch.device, kinds=('dense', 'binary')
            ) -> dict[str, dict[str, float]]:
    """Return {'dense': metrics, 'binary': metrics} of a data base, see metrics.retrieval_metrics."""
    tensors = tensors_on(data_base, device)
    return {kind: retrieval_metrics(*tensors, recalls=recalls, binary=kind == 'binary') for kind in kinds}


def measure_open_set_of(data_base: DataBase, device: torch.device) -> list[dict[str, float]]:
    """Return metrics.open_set_thresholds of a data base."""
    return measure_open_set(*tensors_on(data_base, device))


def tensors_on(data_base: DataBase, device: torch.device) -> tuple:
    """Return what is measured of a data base on a device; the CPU stands in for MPS, which has no float64."""
    return data_base.tensors(torch.device('cpu') if device.type == 'mps' else device)


# ---------------------------------------------------- results as text ---------------------------------------------
def format_results(results: dict) -> str:
    """Format what evaluate.py measures as a table of per cents, with what it was measured on.

    Args:
        results: {'backbone': metrics (before the whitening, optional), 'dense': metrics, 'binary': metrics,
            'open_set': of `measure_open_set_of`, 'measured_on': {'data_name', 'crop_type', 'flip_tta', 'image_size',
            'resize_size', 'classes', 'seen_classes'}}.
    """
    dense, settings = results['dense'], results['measured_on']
    columns = [key for key in dense if key not in NUMBERS_OF_QUERIES]
    widths = {column: max(9, len(column) + 2) for column in columns}
    lines = [' ' * 10 + ''.join(f'{column:>{widths[column]}}' for column in columns)]
    for kind in ('backbone', 'dense', 'binary'):
        if kind in results:
            lines.append(f'{kind:<10}' + ''.join(f'{results[kind][column]:{widths[column]}.2f}' for column in columns))
    for row in results['open_set']:
        lines.append(f'no close match below similarity {row["threshold"]:.4f}: {row["marked"]:.1f} % of the answers to '
                     f'queries whose class is absent, {row["lost"]:.1f} % of the right answers')
    if results['open_set'] and open_set_threshold(results) is None:
        lines.append('No threshold separates queries whose class is absent, so answers are not marked.')
    parts = [f'{settings["data_name"]}, {settings["crop_type"]}']
    if settings['flip_tta']:
        parts.append('with flip_tta')
    line = f'{", ".join(parts)}: {dense["queries"]:,} queries of {settings["classes"]:,} test classes'
    if dense['without_positive']:
        line += f', {dense["without_positive"]:,} without a positive left out'
    if settings['image_size']:  # files of other programs may lack it
        crop = f'cut from {settings["resize_size"]}' if settings['resize_size'] else 'whole'
        line += f'; images of {settings["image_size"]} px, {crop}'
    lines.append(line)
    if settings['seen_classes']:
        lines.append(f'NOT on unseen classes: {settings["seen_classes"]:,} of them were trained on')
    return '\n'.join(lines)


def describe_origin(origin: dict) -> str:
    """Return a line that says how a model or data base was made: run, seed, epoch, code, versions, device."""
    run, made_with = origin['args'], origin.get('made_with')
    if not isinstance(made_with, dict):  # files of other programs may lack it
        made_with = {}
    training = f'recipe {run.get("recipe")}, seed {run.get("seed")}, epoch {origin.get("epoch")}'
    if run.get('pretrained'):
        training = 'not trained'
    commit = str(made_with.get('commit'))[:12]
    if made_with.get('changed_since') == 'yes':
        commit += ' with changes'
    return (f'{run.get("run", "a run without a name")}: {training}; code {commit}, torch {made_with.get("torch")}, '
            f'torchvision {made_with.get("torchvision")}, {made_with.get("device")}')

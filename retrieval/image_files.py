"""Embed image files batch by batch, of which some may be broken or out of reach."""
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from common.distributed import progress, use_amp
from common.images import BrokenImage, load_image
from imagedata.loading import batches_in_order, make_loader, make_transform
from model import EmbeddingNet
from retrieval.embedding import embed_batch


class ImageFiles:
    """A data set of image files: each a uint8 tensor (3, side, side), and what is wrong with the file, if anything."""

    def __init__(self, files: list[str], transform, side: int):
        self.files, self.transform, self.side = files, transform, side

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str, bool]:
        """Return an image, '' and False; if its file cannot be read, a grey image, the reason, and whether that lies in
        the file system, so that the file itself may be sound.
        """
        try:
            return self.transform(load_image(Path(self.files[index]))), '', False
        except BrokenImage as error:
            cause = error.__cause__
            is_out_of_reach = isinstance(cause, OSError) and cause.errno is not None  # decoders set none
            return torch.full((3, self.side, self.side), 127, dtype=torch.uint8), str(error), is_out_of_reach


class Embedded(NamedTuple):
    """A batch of images that was embedded."""

    embeddings: torch.Tensor  # (n, D)
    reasons: list[str]  # why each one could not be read; '' if it could
    out_of_reach: list[bool]  # whether that reason lies in the file system

    def readable(self) -> torch.Tensor:
        return torch.tensor([not reason for reason in self.reasons])


def join(batches: list[Embedded]) -> Embedded:
    """Return several batches as one."""
    embeddings, reasons, out_of_reach = zip(*batches, strict=True)
    return Embedded(torch.cat(embeddings), [*itertools.chain(*reasons)], [*itertools.chain(*out_of_reach)])


@torch.no_grad()
def embed_files(files: list[str], model: EmbeddingNet, settings: dict, num_workers: int, device: torch.device,
                network: nn.Module | None = None) -> Iterator[Embedded]:
    """Yield image files embedded in batches.

    Args:
        settings: batch_size, resize_size and amp.
        network: computes other features than the embeddings of the model.
    """
    batch_size, amp, image_size = settings['batch_size'], use_amp(settings['amp'], device), model.config.image_size
    transform = make_transform(False, image_size, settings['resize_size'], model.interpolation)
    dataset = ImageFiles(files, transform, image_size)
    loader = make_loader(dataset, batches_in_order(len(files), batch_size), num_workers, device)
    with progress(None, desc='embed', total=len(files), unit='img') as bar:
        for images, reasons, out_of_reach in loader:
            embeddings = embed_batch(network or model, images, device, amp).cpu()
            yield Embedded(embeddings, list(reasons), out_of_reach.tolist())
            bar.update(len(images))

"""The losses' (N, C) similarities of embeddings and proxies, in blocks of classes and shared by processes."""
import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.autograd.function import once_differentiable

from engine.errors import UserError
from engine.processes import gather_rows, sum_over_processes, world_size

LOG_ZERO = -1e30  # unlike -inf it gives no NaN in a difference of two of them
# Similarities worked on at one time: on a CPU so many that they stay in its cache, elsewhere enough to fill the device.
SIMILARITIES_AT_ONCE = {'cpu': 2**18}


def row_of(labels: torch.Tensor, classes: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the row (N,) of each label among those of `classes`, 0 for others, and whether it is among them (N,)."""
    here = (labels >= classes.start) & (labels < classes.stop)
    return torch.where(here, labels - classes.start, 0), here


def block_rows(z: torch.Tensor) -> int:
    """Return how many rows of a matrix make a block."""
    return max(1, SIMILARITIES_AT_ONCE.get(z.device.type, 2**24) // z.shape[1])


def draw_proxies(num_classes: int, classes: range, feature_dim: int, proxy_init: str) -> torch.Tensor:
    """Draw all proxies, 65,536 at a time, and return those of `classes`; a seed gives the same to any number.

    `unit` are unit random rows, `kaiming` normal ones, fan_out (Proxy Anchor), which is the number of rows.
    """
    proxies = torch.empty(len(classes), feature_dim)
    for start in range(0, num_classes, 2**16):
        block = torch.randn(min(2**16, num_classes - start), feature_dim)
        block = block * math.sqrt(2 / num_classes) if proxy_init == 'kaiming' else F.normalize(block, dim=-1)
        first, last = max(start, classes.start), min(start + len(block), classes.stop)
        if first < last:
            proxies[first - classes.start:last - classes.start] = block[first - start:last - start]
    return proxies


class Pairs(NamedTuple):
    """Which pairs of embeddings and proxies `Similarities` compares, and how it sums them."""

    alpha: float  # factor of s in the exponentials
    negatives: str  # `of_class`, the samples of other classes, or `of_sample`, the other classes
    classes: range  # whose proxies this process holds
    num_classes: int  # C; where `classes` are fewer, vectors and embedding gradients are joined over the processes


class Similarities(torch.autograd.Function):
    """Compare embeddings with proxies by their cosine, and reduce the (N, C) similarities to what a loss needs.

    A loss here depends on s_ic = x_i . p_c / |p_c| through two vectors: the similarity to the own proxy, and a
    log-sum-exp over the other pairs. Autograd sees these vectors only. The similarities are held once, from forward to
    backward; exponentials and gradients exist for a block of classes at a time, and unit proxies not at all.

    `apply` takes embeddings (N, D), unit rows; proxies (c, D) of any length, the rows of `pairs.classes`; labels (N,)
    in [0, C); and Pairs.

    Returns:
        own (N,), s_iy of a sample i of class y; negative, log sum_{i: y_i != c} exp(alpha s_ic) (C,) `of_class`, or
        log sum_{c != y_i} exp(alpha s_ic) (N,) `of_sample`; hit (N,), whether the own proxy is nearer than all others.
    """

    @staticmethod
    def forward(ctx, embeddings, proxies, labels, pairs):
        alpha, negatives, classes, num_classes = pairs
        join = gather_rows if len(classes) < num_classes else nn.Identity()
        norms = torch.linalg.vector_norm(proxies, dim=1, keepdim=True).clamp_(min=1e-12)  # (c, 1)
        z = proxies.new_empty(len(proxies), len(embeddings))  # (c, N), alpha s, transposed: a class is one row
        parts, columns = (tensor.split(block_rows(z)) for tensor in (z, proxies, norms)), embeddings.T.contiguous()
        for z_part, proxies_part, norms_part in zip(*parts, strict=True):
            torch.mm(proxies_part, columns, out=z_part).mul_(alpha / norms_part)
        row, here = row_of(labels, classes)
        own = z.gather(0, row[None])
        z.scatter_(0, row[None], own.masked_fill(here, LOG_ZERO))  # z now holds the negatives alone
        own = own.masked_fill(~here, -math.inf)
        blocks = z.split(block_rows(z))
        nearest = torch.stack([block.amax(0) for block in blocks]).amax(0, keepdim=True)
        if negatives == 'of_class':
            total = torch.cat([block.logsumexp(1) for block in blocks])[:, None]  # (c, 1)
            negative = join(total)[:, 0]
        else:
            total = join(torch.stack([block.logsumexp(0) for block in blocks])).logsumexp(0, keepdim=True)  # (1, N)
            negative = total[0]
        own, nearest = join(torch.stack([own, nearest], 1)).amax(0)
        hit, own = own > nearest, own / alpha
        ctx.save_for_backward(embeddings, proxies, norms, z, own, total, row, here)
        ctx.pairs = pairs
        ctx.mark_non_differentiable(hit)
        return own, negative, hit

    @staticmethod
    @once_differentiable
    def backward(ctx, own_gradient, negative_gradient, _):
        embeddings, proxies, norms, z, own, total, row, here = ctx.saved_tensors
        alpha, negatives, classes, num_classes = ctx.pairs
        weight = (negative_gradient[classes.start:classes.stop, None] if negatives == 'of_class' else
                  negative_gradient[None])
        weight, total = weight.expand_as(z), total.expand_as(z)
        # ds/dx = u and ds/dp = (x - s u) / |p| with u = p / |p|: first the own pairs, then the others.
        unit, slope = proxies[row] / norms[row], (own_gradient * here)[:, None]
        embedding_gradient = slope * unit
        proxy_gradient = torch.empty_like(proxies) if ctx.needs_input_grad[1] else None
        with torch.autocast(z.device.type, enabled=False):
            for start in range(0, len(z), block_rows(z)):
                b = slice(start, start + block_rows(z))
                slopes = (z[b] - total[b]).exp_().mul_(weight[b])  # dL/dz
                radial = (slopes * z[b]).sum(1, keepdim=True) / norms[b].square()
                slopes.mul_(alpha / norms[b])  # dL/d(x . p)
                embedding_gradient.addmm_(slopes.T, proxies[b])
                if proxy_gradient is not None:
                    torch.mm(slopes, embeddings, out=proxy_gradient[b]).addcmul_(proxies[b], radial, value=-1)
        if proxy_gradient is not None:
            proxy_gradient.index_add_(0, row, slope / norms[row] * (embeddings - own[:, None] * unit))
        if len(classes) < num_classes:
            sum_over_processes(embedding_gradient)
        return embedding_gradient, proxy_gradient, None, None


def check_batch(embeddings: torch.Tensor, labels: torch.Tensor, dim: int, num_classes: int) -> None:
    """Refuse embeddings and labels of which a loss would make a number or an error of torch.

    Values are looked at on a CPU alone, where that costs no waiting for the device.

    Raises:
        UserError: with what was expected.
    """
    if embeddings.ndim != 2 or embeddings.shape[1] != dim or not embeddings.is_floating_point():
        raise UserError(f'embeddings are {tuple(embeddings.shape)} of {embeddings.dtype}; expected are (N, {dim}) '
                        'floats')
    if labels.shape != embeddings.shape[:1] or labels.dtype != torch.int64:
        raise UserError(f'labels are {tuple(labels.shape)} of {labels.dtype}; expected are ({len(embeddings)},) of '
                        'torch.int64, one for each embedding')
    if not len(labels) and world_size() == 1:
        raise UserError('the batch is empty; a loss needs at least one embedding')
    if embeddings.device.type != 'cpu' or not len(labels):
        return
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise UserError(f'labels lie between {int(labels.min())} and {int(labels.max())}; expected are 0 to '
                        f'{num_classes - 1}, one for each of the {num_classes} classes')
    off = (torch.linalg.vector_norm(embeddings.detach().float(), dim=1) - 1).abs()
    if (off > 0.05).any():  # a row in bfloat16 is off by up to 0.004
        raise UserError(f'embeddings are no unit rows: a norm is off by {float(off.max()):.3g}; normalise them, as '
                        'EmbeddingNet does')

"""Proxies: one learned point per class, and the three ways in which they move."""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from engine.errors import UserError, check_choice
from engine.processes import broadcast, check_same, gather_rows, shard, world_size
from engine.similarities import LOG_ZERO, Pairs, Similarities, check_batch, draw_proxies, row_of
from recipes import MOMENTUM, PROXY_UPDATES


@dataclass(frozen=True)
class ProxyConfig:
    """What a loss with proxies is built from.

    Attributes:
        num_classes: C.
        feature_dim: D.
        proxy_update: `gradient`, `positive` or `momentum`.
        momentum: m in (0, 1], for `momentum` only.
        scale: alpha = 1 / temperature.
        margin: delta; None where the formula has no margin.
        proxy_init: `unit` (unit random rows), `kaiming` (normal, fan_out; Proxy Anchor), or `mean` (as `unit`, until
            `start_at_means` is called).
        shard_proxies: hold C / W of the proxies in each of W processes.
    """

    num_classes: int
    feature_dim: int
    proxy_update: str = 'gradient'
    momentum: float = MOMENTUM
    scale: float | None = None
    margin: float | None = None
    proxy_init: str = 'unit'
    shard_proxies: bool = False


class ProxyLoss(nn.Module):
    """Hold one proxy per class and the three ways in which proxies move; a loss adds its formula on the similarities.

    `gradient`: proxies are parameters, trained by the loss. `positive`: they are too, but class c receives only the
    terms of its own samples, averaged over them. `momentum`: they are a buffer without gradient; in training mode each
    call moves the proxies of the classes in the batch, after the loss was computed with those from before:
    p_c <- normalize((1 - m) p_c + m sum_{i: y_i = c} x_i).

    With several processes the loss is that of the global batch: each process gathers all embeddings and computes the
    same loss. The gradient of the proxies is then the same everywhere, and whole: do not wrap this module in
    DistributedDataParallel, only the network. Call `synchronise` where an epoch starts. With `shard_proxies` a process
    holds the proxies (and the optimizer their state) of its share of the classes; the values at the start, the loss
    and the steps are those of one process with all of them.

    Source: Positive Proxy (`positive`), Asymptotic Proxy and Momentum Proxy (`momentum`).
    """

    negatives = 'of_sample'  # what `formula` reads: see there
    has_proxies = True
    slope = 1.0  # of the exponents in alpha s; 2 where they hold squared distances, d = 2 - 2 s

    def __init__(self, config: ProxyConfig):
        super().__init__()
        check_choice('--proxy_update', config.proxy_update, PROXY_UPDATES)
        if not 0 < config.momentum <= 1:
            raise UserError(f'--momentum {config.momentum} must be above 0 and at most 1')
        if not 0 < config.scale < math.inf:
            raise UserError(f'--scale {config.scale} must be a positive number')
        if config.shard_proxies and (config.num_classes < world_size() or self.negatives == 'matrix'):
            raise UserError(f'--shard_proxies: {config.num_classes} classes are fewer than the {world_size()} '
                            'processes, or the loss needs all similarities in one; leave it out')
        self.num_classes, self.proxy_update, self.momentum = config.num_classes, config.proxy_update, config.momentum
        self.scale, self.margin = config.scale, config.margin
        self.classes = shard(self.num_classes) if config.shard_proxies else range(self.num_classes)  # with proxies here
        check_same('the random state in which the proxies are drawn', torch.get_rng_state())
        proxies = draw_proxies(self.num_classes, self.classes, config.feature_dim, config.proxy_init)
        if self.proxy_update == 'momentum':
            self.register_buffer('proxies', F.normalize(proxies, dim=-1))
        else:
            self.proxies = nn.Parameter(proxies)
        self.accuracy = torch.zeros(())  # share of the last batch whose nearest proxy is its own; stays on the device
        self.num_samples = 0  # in the last batch, of all processes

    def formula(self, own: torch.Tensor, negative: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss (); each loss writes its own.

        Args:
            own: (N,), s_iy, the cosine similarity of sample i to the proxy of its class y.
            negative: log sum exp(slope alpha s_ic), over the samples i of other classes for each class (C,) where
                `negatives` is `of_class`, over the other classes c for each sample (N,) where it is `of_sample`.
            labels: (N,).

        Where `negatives` is `matrix` it is called as formula(similarity, labels) with all similarities (N, C): slower,
        and without --shard_proxies, but free to be anything.
        """
        raise TypeError(f'{type(self).__name__} has no formula')

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss () of embeddings (N, D; any float type) with labels (N,) int64 in [0, C).

        With several processes they are each one's part of the batch, and the loss is that of the whole.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            dtype = torch.promote_types(embeddings.dtype, self.proxies.dtype)  # float32 or wider
            check_batch(embeddings, labels, self.proxies.shape[1], self.num_classes)
            embeddings, labels = gather_rows(embeddings.to(dtype)), gather_rows(labels)
            proxies = self.proxies.to(dtype)
            fixed = proxies.detach() if self.proxy_update == 'positive' else proxies
            carried = self.carry_positives(embeddings, proxies, labels)
            loss, hit = self.compare(embeddings, fixed, labels, carried)
            self.accuracy, self.num_samples = hit.float().mean(), len(labels)
            if self.training and self.proxy_update == 'momentum':
                self.move_proxies(embeddings.detach().to(self.proxies.dtype), labels)
        return loss

    def compare(self, embeddings: torch.Tensor, proxies: torch.Tensor, labels: torch.Tensor, carried: torch.Tensor):
        """Return the loss () and whether each sample's own proxy is nearer than all others (N,)."""
        if self.negatives == 'matrix':
            similarity, column = embeddings @ F.normalize(proxies, dim=-1).T, labels[:, None]
            hit = similarity.gather(1, column) > similarity.scatter(1, column, -math.inf).amax(1, keepdim=True)
            return self.formula(similarity.scatter_add(1, column, carried[:, None]), labels), hit[:, 0]
        own, negative, hit = Similarities.apply(embeddings, proxies, labels, Pairs(
            self.slope * self.scale, self.negatives, self.classes, self.num_classes))
        return self.formula(own + carried, negative, labels), hit

    def carry_positives(self, embeddings: torch.Tensor, proxies: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return zeros (N,) that under the rule `positive` carry the gradient of the positive pairs to the proxies."""
        if self.proxy_update != 'positive':
            return embeddings.new_zeros(len(labels))
        row, here = row_of(labels, self.classes)
        positive = (embeddings.detach() * F.normalize(proxies[row], dim=-1)).sum(-1)
        positive = torch.where(here, positive / self.count(labels)[labels], 0)
        return positive - positive.detach()

    @torch.no_grad()
    def start_at_means(self, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
        """Put each proxy at the mean direction of the embeddings (N, D) of its class; labels (N,) hold every class.

        Source: Qi, Brown, Lowe, Low-Shot Learning with Imprinted Weights, CVPR 2018, arXiv 1712.07136.
        """
        row, here = row_of(labels, self.classes)
        sums = torch.zeros_like(self.proxies).index_add_(0, row, torch.where(here[:, None], embeddings, 0))
        self.proxies.copy_(F.normalize(sums, dim=-1))

    @torch.no_grad()
    def move_proxies(self, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
        """Move the proxies of the classes in the batch towards their embeddings; the others stay as they are."""
        row, here = row_of(labels, self.classes)
        same = labels[:, None] == labels  # (N, N)
        first = same.int().argmax(1) == torch.arange(len(labels), device=labels.device)  # one sample for each class
        sums = same.to(embeddings.dtype) @ embeddings  # (N, D), of the class of each sample
        old = self.proxies[row]
        moved = F.normalize((1 - self.momentum) * old + self.momentum * sums, dim=-1)
        step = torch.where((first & here)[:, None], moved - old, 0)
        self.proxies = self.proxies.index_add(0, row, step)  # a new tensor: the backward still needs the old one

    def count(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the number of samples of each class (C,); unlike bincount it does not wait for the device."""
        ones = torch.ones_like(labels, dtype=self.proxies.dtype)
        return torch.zeros(self.num_classes, dtype=ones.dtype, device=labels.device).index_add_(0, labels, ones)

    def logsumexp_by_class(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return log sum_{i: y_i = c} exp(z_i) (C,) of z (N,), LOG_ZERO for a class without samples."""
        empty = z.new_full((self.num_classes,), LOG_ZERO)
        largest = empty.scatter_reduce(0, labels, z.detach(), 'amax')
        total = torch.zeros_like(empty).index_add(0, labels, (z - largest[labels]).exp())
        return largest + total.where(total > 0, 1).log()  # without samples LOG_ZERO + 0

    # ---- several processes; in one, these are the plain values, and every process has to call them ----
    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows (C, ...) of all classes from those (c, ...) of this process's."""
        return gather_rows(rows) if len(self.classes) < self.num_classes else rows

    def all_proxies(self) -> torch.Tensor:
        """Return the proxies (C, D) of all classes, without gradient."""
        return self.gather(self.proxies.detach())

    def synchronise(self) -> None:
        """Give every process the values of the first: sums on a GPU differ in their last bits from run to run."""
        for name, tensor in self.state_dict().items():
            if name != 'proxies' or len(self.classes) == self.num_classes:
                broadcast(tensor)

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state of all processes as one would have it."""
        return {**self.state_dict(), 'proxies': self.all_proxies()}

    def load_full_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Load what `full_state_dict` returned, in any number of processes."""
        if len(state_dict['proxies']) != self.num_classes:
            raise RuntimeError(f'{len(state_dict["proxies"])} proxies for {self.num_classes} classes')
        self.load_state_dict({**state_dict, 'proxies': self.rows_here(state_dict['proxies'])})

    def full_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict:
        """Return the state dict of an optimizer as one process would have it."""
        return self._change_optimizer_state(optimizer, optimizer.state_dict(), self.gather)

    def load_full_optimizer_state(self, optimizer: torch.optim.Optimizer, contents: dict) -> None:
        """Load what `full_optimizer_state` returned, in any number of processes."""
        optimizer.load_state_dict(self._change_optimizer_state(optimizer, contents, self.rows_here))

    def rows_here(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows (c, ...) of this process's classes from those (C, ...) of all."""
        return rows[self.classes.start:self.classes.stop]

    def _change_optimizer_state(self, optimizer: torch.optim.Optimizer, contents: dict, change) -> dict:
        """Return the state dict of an optimizer, what it knows of each row of the proxies changed."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
        state = {number: {name: change(value) if torch.is_tensor(value) and value.ndim else value  # a step has no rows
                          for name, value in values.items()} if parameters[number] is self.proxies else values
                 for number, values in contents['state'].items()}
        return {**contents, 'state': state}

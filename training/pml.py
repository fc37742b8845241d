"""Losses and miners of pytorch-metric-learning by name: `--loss_name pml:MultiSimilarityLoss`.

Source: Musgrave, Belongie, Lim, PyTorch Metric Learning, arXiv 2008.09164.
"""
import copy
import inspect

import torch
from torch import nn
from torch.nn import functional as F

from common.distributed import broadcast, gather_rows, world_size
from common.errors import UserError, reason_of, suggestion

# Constructor arguments that the run sets, and what sets them.
SET_BY_RUN = {'num_classes': 'the data', 'embedding_size': '--feature_dim', 'descriptors_dim': '--feature_dim'}


def find_class(flag: str, name: str, module: str) -> type:
    """Return a class of the module `losses` or `miners` of pytorch-metric-learning.

    Raises:
        UserError: if the package is missing, or has no such class.
    """
    try:
        import pytorch_metric_learning as package
        from pytorch_metric_learning import losses, miners
    except ImportError:
        raise UserError(f'{flag} {name} needs a package that is not installed: '
                        'pip install pytorch-metric-learning') from None
    classes = {key: value for key, value in vars({'losses': losses, 'miners': miners}[module]).items()
               if inspect.isclass(value) and issubclass(value, nn.Module)}
    if name not in classes:
        raise UserError(f'{flag} {name} is not known to pytorch-metric-learning {package.__version__}'
                        f'{suggestion(name, classes)}; there are {", ".join(sorted(classes))}')
    return classes[name]


def build(flag: str, cls: type, arguments: dict, run_arguments: dict) -> nn.Module:
    """Build a loss or miner from the arguments of its flag and, where it takes them, those that the run sets.

    Raises:
        UserError: if there is no such argument, a value does not fit, or one is missing.
    """
    parameters = {}  # a class passes what it does not know on to its base class
    for ancestor in reversed(cls.__mro__[:cls.__mro__.index(nn.Module)]):
        parameters |= inspect.signature(ancestor.__init__).parameters
    names = [name for name, parameter in parameters.items()
             if name != 'self' and parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    for name in arguments:
        if name in SET_BY_RUN:
            raise UserError(f'{flag} {name}: it is set by {SET_BY_RUN[name]}; leave it out')
        if name not in names:
            choices = ', '.join(sorted(set(names) - SET_BY_RUN.keys()))
            raise UserError(f'{flag} {name} is not an argument of {cls.__name__}{suggestion(name, names)}; there are '
                            f'{choices}')
    missing = [name for name, parameter in inspect.signature(cls.__init__).parameters.items() if name in names
               and parameter.default is parameter.empty and name not in {**arguments, **run_arguments}]
    if missing:
        raise UserError(f'{cls.__name__} needs {", ".join(missing)}; add {flag} {missing[0]}=VALUE, or choose another '
                        'one if that is an object, which a flag cannot express')
    try:
        return cls(**arguments, **{name: value for name, value in run_arguments.items() if name in names})
    except Exception as error:  # whatever a constructor raises for a wrong value
        raise UserError(f'{cls.__name__} refuses {flag} {format_arguments(arguments)} ({reason_of(error)})') from None


def format_arguments(arguments: dict) -> str:
    """Return arguments as their flag spells them: `margin=0.2,alpha=32`."""
    return ','.join(f'{name}={value}' for name, value in arguments.items())


class PmlLoss(nn.Module):
    """A loss of pytorch-metric-learning, optionally with a miner, with the interface of model.ProxyLoss.

    It is computed in float32 on the global batch, in each process alike. Its accuracy is the share of the batch whose
    nearest proxy is of their class, or, for a loss without proxies, whose nearest other image is.

    Args:
        name: of its class, without `pml:`.
        arguments: of its constructor.
        miner: the name of a miner's class, '' for none.
        miner_arguments: of its constructor.
        num_classes, feature_dim: C and D, for a loss with weights.

    Raises:
        UserError: if there is no such class, an argument does not fit, or it is no loss on (embeddings, labels) alone.
    """

    def __init__(self, name: str, arguments: dict, *, miner: str = '', miner_arguments: dict, num_classes: int,
                 feature_dim: int):
        super().__init__()
        self.num_classes, self.feature_dim = num_classes, feature_dim
        run_arguments = {'num_classes': num_classes, 'embedding_size': feature_dim, 'descriptors_dim': feature_dim}
        self.loss = build('--loss_args', find_class('--loss_name', name, 'losses'), arguments, run_arguments)
        self.miner = None
        if miner:
            self.miner = build('--miner_args', find_class('--miner', miner, 'miners'), miner_arguments, run_arguments)
        self.accuracy, self.num_samples = torch.zeros(()), 0
        flags = {'--loss_name': f'pml:{name}', '--loss_args': format_arguments(arguments), '--miner': miner}
        self.flags = ' '.join(f'{flag} {value}' for flag, value in flags.items() if value)  # for error messages
        self.check_on_random_batch()

    def check_on_random_batch(self) -> None:
        """Compute a copy of the loss on a small batch, so that an unusable loss is found before the first epoch."""
        with torch.random.fork_rng(devices=[]):
            embeddings = F.normalize(torch.randn(8, self.feature_dim), dim=-1).requires_grad_()
            try:
                loss = copy.deepcopy(self).compute(embeddings, torch.arange(8) % min(2, self.num_classes))
                loss.backward()
            except Exception as error:  # whatever a loss raises for a batch that it cannot use
                raise UserError(f'{self.flags} does not train on embeddings and labels alone ({reason_of(error)}); '
                                'choose another one') from None

    def compute(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss () of all processes' embeddings (N, D) and labels (N,)."""
        if self.miner is None:
            return self.loss(embeddings, labels)
        return self.loss(embeddings, labels, self.miner(embeddings, labels))

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss () of unit embeddings (N, D) with labels (N,) int64 in [0, C), as ProxyLoss does."""
        with torch.autocast(embeddings.device.type, enabled=False):
            dtype = torch.promote_types(embeddings.dtype, torch.float32)
            embeddings, labels = gather_rows(embeddings.to(dtype)), gather_rows(labels)
            seed = torch.randint(2**31, ())
            if world_size() > 1:
                seed = seed.to(embeddings.device)
                broadcast(seed)
            with torch.random.fork_rng(devices=[embeddings.device] if embeddings.is_cuda else []):
                torch.manual_seed(int(seed))  # losses that draw pairs at random draw the same in all processes
                try:
                    loss = self.compute(embeddings, labels)
                except (ValueError, AssertionError) as error:  # some need equally many images of each class
                    raise UserError(f'{self.flags} refuses a batch of {len(labels)} images of {len(labels.unique())} '
                                    f'classes ({reason_of(error)}); try --images_per_class') from None
            self.accuracy, self.num_samples = self.measure_accuracy(embeddings.detach(), labels), len(labels)
        return loss

    @torch.no_grad()
    def measure_accuracy(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the accuracy () of a batch."""
        proxies = self.unit_proxies()
        if proxies is not None:
            return ((embeddings @ proxies.to(embeddings).T).argmax(1) == labels).float().mean()
        similarity = (embeddings @ embeddings.T).fill_diagonal_(-2)
        return (labels[similarity.argmax(1)] == labels).float().mean()

    def unit_proxies(self) -> torch.Tensor | None:
        """Return the weights of the loss as proxies (C, D), unit rows without gradient; None if it has no proxies."""
        for name, weights in self.loss.named_parameters():
            weights = weights.detach() if name == 'proxies' else weights.detach().T  # others hold a class per column
            if weights.shape == (self.num_classes, self.feature_dim):
                return F.normalize(weights, dim=-1)
        return None

    @property
    def has_proxies(self) -> bool:
        """Whether the loss has weights that are proxies."""
        return self.unit_proxies() is not None

    def get_extra_state(self) -> dict[str, torch.Tensor]:
        """Return the tensors that losses keep as plain attributes, as DynamicSoftMarginLoss its histogram."""
        return {f'{path} {name}': value for path, module in self.named_modules() if module is not self
                for name, value in vars(module).items() if torch.is_tensor(value)}

    def set_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `get_extra_state` returned."""
        for key, value in state.items():
            path, name = key.split(' ')
            setattr(self.get_submodule(path), name, value)

"""The losses and miners of pytorch-metric-learning by their names: `--loss_name pml:MultiSimilarityLoss`.

Source: Musgrave, Belongie, Lim, PyTorch Metric Learning, arXiv 2008.09164.
"""
import copy
import inspect

import torch
from torch import nn
from torch.nn import functional as F

from engine.errors import UserError, nearest, reason_of
from engine.processes import broadcast, gather_rows, world_size

GIVEN = {'num_classes': 'the data', 'embedding_size': '--feature_dim', 'descriptors_dim': '--feature_dim'}


def find_class(flag: str, name: str, kind: str) -> type:
    """Return a class of `losses` or `miners` of pytorch-metric-learning.

    Raises:
        UserError: if the package is missing, or has no such class.
    """
    try:
        import pytorch_metric_learning as package
        from pytorch_metric_learning import losses, miners
    except ImportError:
        raise UserError(f'{flag} {name} needs a package that is not installed: '
                        'pip install pytorch-metric-learning') from None
    known = {key: value for key, value in vars({'losses': losses, 'miners': miners}[kind]).items()
             if inspect.isclass(value) and issubclass(value, nn.Module)}
    if name not in known:
        raise UserError(f'{flag} {name} is not known to pytorch-metric-learning {package.__version__}'
                        f'{nearest(name, list(known))}; there are {", ".join(sorted(known))}')
    return known[name]


def build(flag: str, cls: type, arguments: dict, given: dict) -> nn.Module:
    """Build a loss or miner from its flag's arguments and, where it asks for them, from those that the run knows.

    Raises:
        UserError: if there is no such argument, a value does not fit, or one is missing.
    """
    parameters = {}  # a class hands what it does not know to the one it is derived from
    for ancestor in reversed(cls.__mro__[:cls.__mro__.index(nn.Module)]):
        parameters |= inspect.signature(ancestor.__init__).parameters
    names = [name for name, parameter in parameters.items()
             if name != 'self' and parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    for name in arguments:
        if name in GIVEN:
            raise UserError(f'{flag} {name}: it is set by {GIVEN[name]}; leave it out')
        if name not in names:
            there = ', '.join(sorted(set(names) - GIVEN.keys()))
            raise UserError(f'{flag} {name} is no argument of {cls.__name__}{nearest(name, names)}; there are {there}')
    missing = [name for name, parameter in inspect.signature(cls.__init__).parameters.items()
               if name in names and parameter.default is parameter.empty and name not in {**arguments, **given}]
    if missing:
        raise UserError(f'{cls.__name__} needs {", ".join(missing)}; add {flag} {missing[0]}=VALUE, or, where that is '
                        'an object, which a flag cannot say, choose another one')
    try:
        return cls(**arguments, **{name: value for name, value in given.items() if name in names})
    except Exception as error:  # whatever a constructor makes of a wrong value
        raise UserError(f'{cls.__name__} refuses {flag} {format_arguments(arguments)} ({reason_of(error)})') from None


def format_arguments(arguments: dict) -> str:
    """Return arguments as the flag spells them: `margin=0.2,alpha=32`."""
    return ','.join(f'{name}={value}' for name, value in arguments.items())


class PmlLoss(nn.Module):
    """A loss of pytorch-metric-learning, with a miner if wanted, in the place of a ProxyLoss.

    It is computed in float32 on the global batch, in each process alike. Its accuracy is the share of the batch whose
    nearest proxy is of their class where the loss has proxies, and else the share whose nearest other image is.

    Args:
        name: of its class, without `pml:`.
        arguments: of its constructor.
        miner: the name of a miner's class, '' for none.
        miner_arguments: of its constructor.
        num_classes, feature_dim: C and D, for a loss with weights of its own.

    Raises:
        UserError: if there is no such class, an argument does not fit, or it is no loss on (embeddings, labels) alone.
    """

    def __init__(self, name: str, arguments: dict, *, miner: str = '', miner_arguments: dict, num_classes: int,
                 feature_dim: int):
        super().__init__()
        self.num_classes, self.feature_dim = num_classes, feature_dim
        given = {'num_classes': num_classes, 'embedding_size': feature_dim, 'descriptors_dim': feature_dim}
        self.loss = build('--loss_args', find_class('--loss_name', name, 'losses'), arguments, given)
        self.miner = build('--miner_args', find_class('--miner', miner, 'miners'), miner_arguments, given) \
            if miner else None
        self.accuracy, self.num_samples = torch.zeros(()), 0
        said = {'--loss_name': f'pml:{name}', '--loss_args': format_arguments(arguments), '--miner': miner}
        self.flags = ' '.join(f'{flag} {value}' for flag, value in said.items() if value)
        self.try_out()

    def try_out(self) -> None:
        """Compute a copy on a small batch, so that what cannot be trained is found before the first epoch."""
        with torch.random.fork_rng(devices=[]):
            embeddings = F.normalize(torch.randn(8, self.feature_dim), dim=-1).requires_grad_()
            trial = copy.deepcopy(self)
            try:
                loss = trial.compute(embeddings, torch.arange(8) % min(2, self.num_classes))
                loss.backward()
            except Exception as error:  # whatever a loss makes of a batch that it cannot use
                raise UserError(f'{self.flags} does not train on embeddings and labels alone ({reason_of(error)}); '
                                'choose another one') from None

    def compute(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss () of all processes' embeddings (N, D) and labels (N,)."""
        return self.loss(embeddings, labels, *([self.miner(embeddings, labels)] if self.miner else []))

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
                torch.manual_seed(int(seed))  # some draw pairs, in any number of processes the same
                try:
                    loss = self.compute(embeddings, labels)
                except (ValueError, AssertionError) as error:  # some want as many images of each class
                    raise UserError(f'{self.flags} refuses a batch of {len(labels)} images of {len(labels.unique())} '
                                    f'classes ({reason_of(error)}); try --images_per_class') from None
            self.accuracy, self.num_samples = self.measure(embeddings.detach(), labels), len(labels)
        return loss

    @torch.no_grad()
    def measure(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the accuracy () of a batch."""
        proxies = self.all_proxies()
        if proxies is not None:
            return ((embeddings @ F.normalize(proxies.to(embeddings), dim=-1).T).argmax(1) == labels).float().mean()
        similarity = (embeddings @ embeddings.T).fill_diagonal_(-2)
        return (labels[similarity.argmax(1)] == labels).float().mean()

    def all_proxies(self) -> torch.Tensor | None:
        """Return the weights of the loss as proxies (C, D), without gradient; None where they are none."""
        for name, weights in self.loss.named_parameters():
            weights = weights.detach() if name == 'proxies' else weights.detach().T  # others hold a class a column
            if weights.shape == (self.num_classes, self.feature_dim):
                return weights
        return None

    @property
    def has_proxies(self) -> bool:
        """Whether the loss has weights that are proxies."""
        return self.all_proxies() is not None

    def get_extra_state(self) -> dict[str, torch.Tensor]:
        """Return the tensors that losses keep as plain attributes, as DynamicSoftMarginLoss its histogram."""
        return {f'{path} {name}': value for path, module in self.named_modules() if module is not self
                for name, value in vars(module).items() if torch.is_tensor(value)}

    def set_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        """Put them back."""
        for key, value in state.items():
            path, name = key.split(' ')
            setattr(self.get_submodule(path), name, value)

    def synchronise(self) -> None:
        """Give every process the values of the first."""
        for tensor in (*self.parameters(), *self.buffers()):
            broadcast(tensor.data)

    # ---- what ProxyLoss offers as well: each process holds the whole here ----
    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state of the loss and its miner."""
        return self.state_dict()

    def load_full_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Load what `full_state_dict` returned."""
        self.load_state_dict(state_dict)

    def full_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict:
        """Return the state dict of an optimizer."""
        return optimizer.state_dict()

    def load_full_optimizer_state(self, optimizer: torch.optim.Optimizer, contents: dict) -> None:
        """Load what `full_optimizer_state` returned."""
        optimizer.load_state_dict(contents)

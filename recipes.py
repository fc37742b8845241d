"""The papers' hyper-parameters as data: one entry a recipe, each with its source; and what there is to choose from.

    python recipes.py                # the table of all recipes

`train.py --recipe NAME` takes its defaults from here; a flag on the command line wins. A recipe is written as its
system's own page prints it; what that changes for a data set or a trunk stands in `overrides`, later entries win.

    trunk_lr_factor the trunk's learning rate is this multiple of lr, unless --trunk_lr says otherwise
    proxy_lr_factor the proxies' likewise, unless --proxy_lr does
    lr_milestones   fractions of num_epochs after which the learning rate is multiplied by lr_decay_gamma

Losses and trunks are registered here, by the names of their class in model.py and their function in trunks.py, so that
a command line can be read before torch is imported.
"""
from typing import NamedTuple

from engine.errors import check_choice


class LossEntry(NamedTuple):
    """A loss: its class in model.py and its own hyper-parameters."""

    class_name: str
    scale: float  # alpha
    margin: float | None = None  # delta; None: its formula has no margin


LOSSES = {
    'proxy_anchor': LossEntry('ProxyAnchor', 32.0, 0.1),
    'balanced_proxy': LossEntry('BalancedProxy', 32.0, 0.1),
    'balanced_proxy_split': LossEntry('BalancedProxySplit', 32.0, 0.1),
    'normalized_softmax': LossEntry('NormalizedSoftmax', 32.0),
    'proxy_nca': LossEntry('ProxyNCA', 9.0),  # ProxyNCA++: temperature 1/9
    'cos_face': LossEntry('CosFace', 64.0, 0.35),
    'arc_face': LossEntry('ArcFace', 64.0, 0.5),  # 28.6 degrees
}
# Two names are a loss together with a way in which the proxies move.
COMBINED_LOSSES = {
    'asymptotic_proxy': {'loss_name': 'normalized_softmax', 'proxy_update': 'momentum', 'temperature': 0.03},
    'positive_proxy': {'loss_name': 'normalized_softmax', 'proxy_update': 'positive'},
}
PROXY_UPDATES = ('gradient', 'positive', 'momentum')
MOMENTUM = 0.5  # of moving proxies; Asymptotic Proxy and Momentum Proxy alike
TRUNKS = {'resnet50': 'resnet', 'inception': 'bn_inception', 'googlenet': 'googlenet', 'resnet18': 'resnet',
          'resnet101': 'resnet'}  # the function in trunks.py that builds it
POOLINGS = ('max', 'avg', 'avg_max', 'gem', 'cls')
LINEAR_INITS = ('random', 'whiten')
PROXY_INITS = ('unit', 'kaiming', 'mean')
OPTIMIZER_NAMES = ('adamw', 'adam', 'sgd')
SCHEDULE_NAMES = ('step', 'multistep', 'cosine', 'constant')

# What the five systems share; each recipe below says only where it differs.
COMMON = {
    'lr': 1e-4,
    'trunk_lr_factor': 1.0,
    'proxy_lr_factor': 100.0,
    'weight_decay': 1e-4,
    'optimizer_type': 'adamw',
    'proxy_update': 'gradient',
    'lr_schedule': 'step',
    'lr_decay_step': 5,
    'lr_decay_gamma': 0.5,
    'lr_milestones': (0.5,),
    'batch_size': 64,
    'images_per_class': 0,
    'num_epochs': 20,
    'warm_up': 0,
    'clip_value': 0.0,
    'drop_last': False,
    'feature_dim': 512,
    'image_size': 224,
    'min_crop': 0.08,
    'color_jitter': 0.0,
    'grayscale': 0.0,
    'pooling': 'max',
    'layer_norm': True,
    'linear_bias': False,
    'linear_init': 'random',
    'proxy_init': 'unit',
    'freeze_bn': True,
    'mirror': False,
    'recalls': (1, 2, 4, 8),
}
# Settings that runs of some versions do not name, and what these did: some came later, some went.
NOT_ALWAYS = {'linear_init': 'random', 'mirror': False, 'color_jitter': 0.0, 'grayscale': 0.0, 'synthesis': 0.0,
              'ema': 0.0}
SOP_RECALLS = ({'data_name': ('sop',)}, {'recalls': (1, 10, 100, 1000)})
ISC_RECALLS = ({'data_name': ('isc',)}, {'recalls': (1, 10, 20, 30, 40, 50)})

# What the recipes of this repository share.
WHITENED = {'loss_name': 'positive_proxy', 'lr': 3e-4, 'proxy_lr_factor': 30.0, 'lr_schedule': 'cosine', 'warm_up': 1,
            'linear_init': 'whiten', 'proxy_init': 'mean'}

RECIPES = {
    'balanced_proxy': {
        'source': 'Balanced proxy loss for fine-grained image retrieval, Pattern Recognition Letters',
        'settings': {'loss_name': 'balanced_proxy', 'warm_up': 2},
        'overrides': [SOP_RECALLS, ISC_RECALLS],
    },
    'asymptotic_proxy': {
        'source': 'Asymptotic proxy for deep metric learning',
        'settings': {
            'loss_name': 'asymptotic_proxy', 'optimizer_type': 'adam', 'weight_decay': 0.0, 'lr_schedule': 'multistep',
            'lr_decay_gamma': 0.1, 'batch_size': 128, 'num_epochs': 30, 'image_size': 256,
        },
        'overrides': [SOP_RECALLS, ISC_RECALLS, ({'data_name': ('sop', 'isc')}, {'temperature': 0.05, 'lr': 4e-5})],
    },
    'positive_proxy': {
        'source': 'Learning with only positive embeddings for fine-grained image retrieval',
        'settings': {'loss_name': 'positive_proxy'},
        'overrides': [SOP_RECALLS, ISC_RECALLS],
    },
    'momentum_proxy': {
        'source': 'Momentum proxy based fine-grained image retrieval',
        'settings': {
            'loss_name': 'proxy_nca', 'optimizer_type': 'adam', 'proxy_update': 'momentum', 'lr': 1e-3,
            'proxy_lr_factor': 1.0, 'weight_decay': 0.0, 'lr_schedule': 'multistep', 'lr_decay_gamma': 0.1,
            'lr_milestones': (0.5, 0.8),
        },
        'overrides': [SOP_RECALLS, ISC_RECALLS],
    },
    'proxy_anchor': {
        'source': 'Kim et al., Proxy Anchor Loss for Deep Metric Learning, CVPR 2020, arXiv 2003.13911',
        'settings': {
            'loss_name': 'proxy_anchor', 'lr_decay_step': 10, 'batch_size': 180, 'num_epochs': 60, 'warm_up': 1,
            'clip_value': 10.0, 'drop_last': True, 'pooling': 'avg_max', 'layer_norm': False, 'linear_bias': True,
            'proxy_init': 'kaiming', 'recalls': (1, 2, 4, 8, 16, 32),
        },
        'overrides': [
            ({'data_name': ('car',)}, {'lr_decay_step': 20}),
            ({'backbone_type': ('resnet50',)}, {'batch_size': 120, 'warm_up': 5}),
            ({'backbone_type': ('resnet50',), 'data_name': ('cub',)}, {'lr_decay_step': 5}),
            ({'backbone_type': ('resnet50',), 'data_name': ('car',)}, {'lr_decay_step': 10}),
            SOP_RECALLS, ISC_RECALLS,
            ({'data_name': ('sop', 'isc')},
             {'lr': 6e-4, 'lr_decay_step': 20, 'lr_decay_gamma': 0.25, 'freeze_bn': False}),
        ],
    },
    'whitened_start': {
        'source': 'of no paper: Positive Proxy with a start from the images; docs/results.md',
        'settings': WHITENED,
        'overrides': [SOP_RECALLS, ISC_RECALLS],
    },
    'whitened_mirror': {
        'source': 'of no paper: whitened_start, embedding each image with its mirror image; docs/results.md',
        'settings': {**WHITENED, 'mirror': True},
        'overrides': [SOP_RECALLS, ISC_RECALLS],
    },
    'whitened_margin': {
        'source': 'of no paper: whitened_start with a margin, for a short training; docs/results.md',
        'settings': {
            **WHITENED, 'loss_name': 'cos_face', 'proxy_update': 'positive', 'temperature': 1 / 32, 'margin': 0.1,
            'batch_size': 32, 'num_epochs': 6, 'min_crop': 0.2,
        },
        'overrides': [SOP_RECALLS, ISC_RECALLS],
    },
    'transformer': {
        'source': 'of no paper: what is usual with pretrained transformers; its accuracy is untested here',
        'settings': {
            'loss_name': 'positive_proxy', 'pooling': 'cls', 'trunk_lr_factor': 0.1, 'lr_schedule': 'cosine',
            'warm_up': 1,
        },
        'overrides': [SOP_RECALLS, ISC_RECALLS],
    },
}


def canonical_backbone(name: str) -> str:
    """Return the name of a trunk (`bn_inception` -> `inception`), or raise a UserError that lists them."""
    name = 'inception' if name == 'bn_inception' else name
    return name if name.startswith('timm:') else check_choice('--backbone_type', name, [*TRUNKS, 'timm:MODEL'])


def resize_for(image_size: int) -> int:
    """Return the side to which test images are resized before the centre crop: 224 -> 256, 256 -> 292."""
    return image_size * 256 // 224


def recipe_settings(name: str, data_name: str, backbone_type: str) -> dict:
    """Return the flat hyper-parameters of a recipe for one data set and one trunk.

    Args:
        name: a key of RECIPES.
        data_name: `car`, `cub`, `sop`, `isc`, or any other data set (then no override of a data set applies).
        backbone_type: a name of TRUNKS or `timm:...`.

    Raises:
        KeyError: if there is no recipe of that name.
    """
    chosen = {'data_name': data_name, 'backbone_type': backbone_type}
    settings = {**COMMON, **RECIPES[name]['settings']}
    for condition, values in RECIPES[name]['overrides']:
        if all(chosen[key] in allowed for key, allowed in condition.items()):
            settings.update(values)
    return settings


# ---------------------------------------------------- the table ----------------------------------------------------
def describe(recipe: str, setting: str) -> str:
    """Return a setting of a recipe as a cell of the table: `0.0001; 4e-05 (sop, isc)`, `-` where it has no effect."""
    def text(value) -> str:
        if isinstance(value, bool):
            return 'yes' if value else 'no'
        return ', '.join(map(text, value)) if isinstance(value, tuple) else f'{value:g}' if isinstance(
            value, float) else str(value)

    own = {**COMMON, **RECIPES[recipe]['settings']}
    own |= COMBINED_LOSSES.get(own['loss_name'], {})
    loss = LOSSES[own['loss_name']]
    own = {'temperature': 1 / loss.scale, 'margin': loss.margin or '-', 'momentum': MOMENTUM, **own}
    without = {'momentum': own['proxy_update'] != 'momentum', 'proxy_lr_factor': own['proxy_update'] == 'momentum',
               'lr_decay_step': own['lr_schedule'] != 'step', 'lr_milestones': own['lr_schedule'] != 'multistep',
               'lr_decay_gamma': own['lr_schedule'] not in ('step', 'multistep')}
    if without.get(setting):
        return '-'
    others = [f'{text(values[setting])} ({", ".join(name for names in condition.values() for name in names)})'
              for condition, values in RECIPES[recipe]['overrides'] if setting in values]
    return '; '.join([text(own[setting]), *others])


def format_table() -> str:
    """Return all recipes as a Markdown table, a column each."""
    lines = [f'| | {" | ".join(RECIPES)} |', '|---' * (1 + len(RECIPES)) + '|',
             f'| source | {" | ".join(recipe["source"] for recipe in RECIPES.values())} |']
    settings = dict.fromkeys(['loss_name', 'proxy_update', 'temperature', 'margin', 'momentum', *COMMON])
    lines += [f'| {setting} | {" | ".join(describe(recipe, setting) for recipe in RECIPES)} |' for setting in settings]
    return '\n'.join(lines)


if __name__ == '__main__':
    print(format_table())

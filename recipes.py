"""The papers' hyper-parameters as data: one entry a recipe, each with its source; and the names of all choices.

    python recipes.py                # print a table of all recipes

`train.py --recipe NAME` takes its defaults from here; a flag on the command line wins. A recipe is written as its
system's own page prints it; `overrides` says what changes for a data set or a backbone, and later overrides win.

    backbone_lr_factor  the learning rate of the backbone is this multiple of lr, unless --backbone_lr is given
    proxy_lr_factor     the same for the proxies, unless --proxy_lr is given
    lr_milestones       fractions of num_epochs after which the learning rate is multiplied by lr_decay_gamma

This file imports no torch, so that the command line is read at once. The losses themselves are in model.py.
"""
from typing import NamedTuple

from common.errors import check_choice


class LossDefaults(NamedTuple):
    """The hyper-parameters of a loss, as its paper sets them."""

    scale: float  # alpha
    margin: float | None = None  # delta; None: the formula has no margin


LOSSES = {
    'proxy_anchor': LossDefaults(32.0, 0.1),
    'balanced_proxy': LossDefaults(32.0, 0.1),
    'balanced_proxy_split': LossDefaults(32.0, 0.1),
    'normalized_softmax': LossDefaults(32.0),
    'proxy_nca': LossDefaults(9.0),  # ProxyNCA++: temperature 1/9
    'cos_face': LossDefaults(64.0, 0.35),
    'arc_face': LossDefaults(64.0, 0.5),  # radians: 28.6 degrees
}
# Two names stand for a loss together with a proxy update.
COMBINED_LOSSES = {
    'asymptotic_proxy': {'loss_name': 'normalized_softmax', 'proxy_update': 'momentum', 'temperature': 0.03},
    'positive_proxy': {'loss_name': 'normalized_softmax', 'proxy_update': 'positive'},
}
PROXY_UPDATES = ('gradient', 'positive', 'momentum')
MOMENTUM = 0.5  # of moving proxies, in Asymptotic Proxy and Momentum Proxy
BACKBONE_NAMES = ('resnet50', 'inception', 'googlenet', 'resnet18', 'resnet101')
POOLINGS = ('max', 'avg', 'avg_max', 'gem', 'cls', 'native')
HEAD_INITS = ('random', 'whiten')
PROXY_INITS = ('unit', 'kaiming', 'mean')
OPTIMIZER_NAMES = ('adamw', 'adam', 'sgd')
SCHEDULE_NAMES = ('step', 'multistep', 'cosine', 'constant')

# What the five systems share; each recipe below says only where it differs.
COMMON = {
    'lr': 1e-4,
    'backbone_lr_factor': 1.0,
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
    'head_bias': False,
    'head_init': 'random',
    'proxy_init': 'unit',
    'freeze_bn': True,
    'flip_tta': False,
    'recalls': (1, 2, 4, 8),
}
SOP_RECALLS = ({'data_name': ('sop',)}, {'recalls': (1, 10, 100, 1000)})
ISC_RECALLS = ({'data_name': ('isc',)}, {'recalls': (1, 10, 20, 30, 40, 50)})

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
            'clip_value': 10.0, 'drop_last': True, 'pooling': 'avg_max', 'layer_norm': False, 'head_bias': True,
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
    'whitened_mirror': {
        'source': 'this repository: Positive Proxy started from the images, with flip augmentation; docs/results.md',
        'settings': {
            'loss_name': 'positive_proxy', 'lr': 3e-4, 'proxy_lr_factor': 30.0, 'lr_schedule': 'cosine', 'warm_up': 1,
            'head_init': 'whiten', 'proxy_init': 'mean', 'flip_tta': True,
        },
        'overrides': [SOP_RECALLS, ISC_RECALLS],
    },
    'transformer': {
        'source': 'common practice with pretrained transformers; its accuracy is not measured here',
        'settings': {
            'loss_name': 'positive_proxy', 'pooling': 'cls', 'backbone_lr_factor': 0.1, 'lr_schedule': 'cosine',
            'warm_up': 1,
        },
        'overrides': [SOP_RECALLS, ISC_RECALLS],
    },
}


def canonical_backbone(name: str) -> str:
    """Return the name of a backbone (`bn_inception` -> `inception`), or raise a UserError that lists the names."""
    if name.startswith('timm:'):
        return name
    return check_choice('--backbone_type', 'inception' if name == 'bn_inception' else name,
                        [*BACKBONE_NAMES, 'timm:MODEL'])


def recipe_settings(name: str, data_name: str, backbone_type: str) -> dict:
    """Return the flat hyper-parameters of a recipe for one data set and one backbone.

    Args:
        name: a key of RECIPES.
        data_name: `car`, `cub`, `sop`, `isc`, or any other data set (then no override of a data set applies).
        backbone_type: a name of BACKBONE_NAMES or `timm:...`.

    Raises:
        KeyError: if there is no recipe of that name.
    """
    run = {'data_name': data_name, 'backbone_type': backbone_type}
    settings = {**COMMON, **RECIPES[name]['settings']}
    for condition, values in RECIPES[name]['overrides']:
        if all(run[key] in allowed for key, allowed in condition.items()):
            settings.update(values)
    return settings


# ---------------------------------------------------- the table ----------------------------------------------------
def settings_without_effect(settings: dict) -> set[str]:
    """Return the settings of a recipe that its loss, proxy update and schedule do not use."""
    unused = set()
    if settings['proxy_update'] == 'momentum':
        unused.add('proxy_lr_factor')
    else:
        unused.add('momentum')
    if settings['lr_schedule'] != 'step':
        unused.add('lr_decay_step')
    if settings['lr_schedule'] != 'multistep':
        unused.add('lr_milestones')
    if settings['lr_schedule'] not in ('step', 'multistep'):
        unused.add('lr_decay_gamma')
    if settings['margin'] is None:
        unused.add('margin')
    return unused


def format_value(value) -> str:
    """Return a setting as text: `yes`, `0.0001`, `1, 2, 4, 8`."""
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if isinstance(value, tuple):
        return ', '.join(map(format_value, value))
    return f'{value:g}' if isinstance(value, float) else str(value)


def recipe_column(name: str) -> dict[str, str]:
    """Return {setting: cell} of one recipe, overrides included: `0.0001; 4e-05 (sop, isc)`, `-` if it has no effect."""
    recipe = RECIPES[name]
    settings = {**COMMON, **recipe['settings']}
    settings |= COMBINED_LOSSES.get(settings['loss_name'], {})
    defaults = LOSSES[settings['loss_name']]
    settings = {'temperature': 1 / defaults.scale, 'margin': defaults.margin, 'momentum': MOMENTUM, **settings}
    cells = {'source': recipe['source']}
    for setting in ('loss_name', 'proxy_update', 'temperature', 'margin', 'momentum', *COMMON):
        values = [format_value(settings[setting])]
        for condition, changed in recipe['overrides']:
            if setting in changed:
                names = ', '.join(choice for allowed in condition.values() for choice in allowed)
                values.append(f'{format_value(changed[setting])} ({names})')
        cells[setting] = '; '.join(values)
    return cells | dict.fromkeys(settings_without_effect(settings), '-')


def recipe_table() -> str:
    """Return all recipes as a Markdown table, a column each."""
    columns = [recipe_column(name) for name in RECIPES]
    lines = [f'| | {" | ".join(RECIPES)} |', '|---' * (1 + len(RECIPES)) + '|']
    for setting in columns[0]:
        cells = ' | '.join(column[setting] for column in columns)
        lines.append(f'| {setting} | {cells} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    print(recipe_table())

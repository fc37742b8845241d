"""The command line of a training: parse the flags, merge them with the recipe, validate, freeze.

    for options in parse_options(['--recipe', 'proxy_anchor', '--seeds', '1,2,3']):
        options.run, options.lr, options.proxy_update    # a frozen dataclass for each run

Nothing here imports torch, so that `train.py --help` and a mistyped flag are answered at once.
"""
import argparse
import os
import shutil
from dataclasses import asdict, dataclass

from common.distributed import world_size
from common.errors import UserError, check_choice
from common.files import LARGEST_FEATURE_DIM, LARGEST_SIDE
from common.results import run_name
from imagedata.raw_sets import canonical_data_name, count_images
from recipes import (BACKBONE_NAMES, COMBINED_LOSSES, HEAD_INITS, LOSSES, MOMENTUM, OPTIMIZER_NAMES, POOLINGS,
                     PROXY_INITS, PROXY_UPDATES, RECIPES, SCHEDULE_NAMES, canonical_backbone, recipe_settings)
from training.tracking import parse_services
from utils import (Parser, add_device_flags, check_between, fraction_list, int_list, keyword_text, seed_list, switch,
                   user_path)

SMALLEST, LARGEST = 1e-30, 1e38  # of a positive number: what float32 holds
PML_PREFIX = 'pml:'  # before the name of a loss of pytorch-metric-learning


def get_parser(description: str | None = None) -> Parser:
    """Build the parser; a default of None means: as the recipe says."""
    parser = Parser(description=description,
                    epilog='In brackets the default; a flag without one takes that of the recipe.')
    group = parser.add_argument_group('what to train')
    group.add_argument('--recipe', help='paper whose hyper-parameters are the defaults: ' + ', '.join(RECIPES) +
                       ' [the one named like --loss_name, else balanced_proxy]')
    group.add_argument('--loss_name', '--loss', type=loss_name, help='loss: ' +
                       ', '.join([*LOSSES, *COMBINED_LOSSES]) + ' [the recipe\'s]. asymptotic_proxy is '
                       'normalized_softmax with proxies moved by momentum and temperature 0.03; positive_proxy is '
                       'normalized_softmax with --proxy_update positive. pml:NAME is one of pytorch-metric-learning, '
                       'as pml:MultiSimilarityLoss; those on pairs and triplets want --images_per_class')
    group.add_argument('--loss_args', type=keyword_text, default='', metavar='A=1,B=2', help='arguments of a pml: '
                       'loss, as in margin=0.2,alpha=32')
    group.add_argument('--miner', default='', metavar='NAME', help='miner of pytorch-metric-learning for a pml: '
                       'loss, as MultiSimilarityMiner')
    group.add_argument('--miner_args', type=keyword_text, default='', metavar='A=1,B=2', help='arguments of the miner')
    group.add_argument('--proxy_update', choices=PROXY_UPDATES, help='how the proxies move: by the loss\'s gradient, '
                       'by that of their positive pairs only, or by momentum towards their class [the recipe\'s]')
    group.add_argument('--backbone_type', '--model', default='resnet50', help='backbone: ' +
                       ', '.join(BACKBONE_NAMES) + ' (BN-Inception is inception), or timm:MODEL [%(default)s]')
    group.add_argument('--weights', type=user_path, help='of the backbone: imagenet (downloaded once, checked), '
                       'none (random), or the path of a state dict [imagenet]')
    group.add_argument('--init', type=user_path, metavar='FILE', help='start from the model of a run, RUN_model.pth: '
                       'backbone and head (fine-tuning); the test classes must not be among those it was trained on')

    group = parser.add_argument_group('data')
    group.add_argument('--data_path', type=user_path, default='/home/data', help='folder that holds the data sets '
                       '[%(default)s]')
    group.add_argument('--data_name', '--dataset', default='car', help='car, cub, sop, isc, glyph, or a folder of your '
                       'own that data_utils.py has converted [%(default)s]')
    group.add_argument('--crop_type', choices=('uncropped', 'cropped'), default='uncropped',
                       help='whole images, or cut to the bounding box (car, cub) [%(default)s]')
    group.add_argument('--image_size', type=int, help='side of the crop in pixels; papers: 224, Asymptotic 256')
    group.add_argument('--resize_size', type=int, help='short side of test images before the crop; 0: the '
                       'whole image, squeezed to the square [image_size x 256/224]')
    group.add_argument('--min_crop', type=float, help='smallest share of the area in a random crop; papers: 0.08; '
                       'raise it where objects fill the image')
    group.add_argument('--flip', type=float, default=0.5, help='probability of a horizontal flip; 0 where left and '
                       'right matter, as in text [%(default)s]')
    group.add_argument('--color_jitter', type=float, metavar='S', help='change brightness, contrast and saturation of '
                       'a training image by up to this share, and its hue by up to half of it; papers: 0. Not where '
                       'colours tell classes apart')
    group.add_argument('--grayscale', type=float, metavar='P', help='probability that a training image loses its '
                       'colours; papers: 0')
    group.add_argument('--batch_size', '--batch-size', type=int, help='of all processes together; papers: 64, '
                       'Asymptotic Proxy 128, Proxy Anchor 180 or 120')
    group.add_argument('--images_per_class', '--IPC', type=int, help='draw each batch as batch/k classes with k images '
                       'each (Proxy Anchor\'s balanced sampling); 0 shuffles all images [0]')
    group.add_argument('--cache_size', type=int, default=0, help='read images from the cache that '
                       'data_utils.py --cache_size wrote: their short side in pixels, at least --resize_size; 0 '
                       'decodes the image files [0]')
    group.add_argument('--num_workers', '--workers', type=int, default=2, help='processes that decode images; 0 '
                       'decodes in the main process; the batches are the same [%(default)s]')

    group = parser.add_argument_group('network')
    group.add_argument('--feature_dim', '--embedding-size', type=int, help='length of an embedding; papers: 512')
    group.add_argument('--pooling', choices=POOLINGS, help='papers: max; Proxy Anchor avg_max, the sum of both; gem, '
                       'the generalised mean, whose power is learned; cls, the class token of a transformer')
    group.add_argument('--layer_norm', type=switch, metavar='{0,1}', help='normalise the pooled features before the '
                       'head; papers: 1, Proxy Anchor 0')
    group.add_argument('--head_bias', type=switch, metavar='{0,1}', help='bias of the linear head; papers: 0; Proxy '
                       'Anchor 1')
    group.add_argument('--head_init', choices=HEAD_INITS, help='initial values of the linear head: random, or whiten, '
                       'the whitening of the backbone\'s features of the training images; papers: random')
    group.add_argument('--max_pool', type=switch, default=True, metavar='{0,1}', help='the max-pool in the stem of a '
                       'ResNet; 0 for images below about 100 px [1]')
    group.add_argument('--freeze_bn', '--bn-freeze', type=switch, metavar='{0,1}', help='keep the BatchNorm statistics '
                       'of the pretrained backbone; papers: 1, Proxy Anchor on sop and isc 0. Set 0 with --weights '
                       'none: the statistics of an untrained backbone are meaningless')
    group.add_argument('--flip_tta', type=switch, metavar='{0,1}', help='horizontal-flip test-time augmentation: '
                       'embed a test image as the mean with its mirror image, in twice the time; not where left and '
                       'right matter. evaluate.py --flip_tta tries it on a finished run. Papers: 0')

    group = parser.add_argument_group('loss')
    group.add_argument('--scale', '--alpha', type=float, help='alpha; papers: 32, proxy_nca 9, cos_face, arc_face 64')
    group.add_argument('--temperature', type=float, help='1 / scale, the Asymptotic Proxy spelling; paper: 0.03, '
                       '0.05 on sop and isc')
    group.add_argument('--margin', '--mrg', type=float, help='delta, a difference of cosines; papers: 0.1, '
                       'cos_face 0.35; of arc_face an angle in radians: 0.5')
    group.add_argument('--momentum', type=float, help='m of moving proxies (not of the optimizer), in (0, 1]; papers: '
                       '0.5. Asymptotic Proxy saw runs collapse at 0.05 to 0.1')
    group.add_argument('--proxy_init', choices=PROXY_INITS, help='initial values of the proxies: random (unit, '
                       'kaiming), or the mean embedding of their class before the training; papers: unit, Proxy '
                       'Anchor kaiming')

    group = parser.add_argument_group('optimisation')
    group.add_argument('--num_epochs', '--epochs', type=int, help='papers: 20, Asymptotic 30, Proxy Anchor 60')
    group.add_argument('--warm_up', '--warm', type=int, help='first epochs in which the backbone is frozen and only '
                       'the head and the proxies learn (this is not a ramp of the learning rate); num_epochs keeps '
                       'the backbone frozen. Papers: Balanced Proxy 2, Proxy Anchor 1 (5 with resnet50), others 0')
    group.add_argument('--optimizer_type', '--optimizer', type=str.lower, help='adamw, adam, sgd (momentum 0.9); adam* '
                       'and sgd* add --proxy_update momentum, and without the star --recipe momentum_proxy has '
                       '--proxy_update gradient (its spelling)')
    group.add_argument('--lr', type=float, help='learning rate of the network; papers: 1e-4, Momentum Proxy 1e-3 (its '
                       'author later used 2e-5), Asymptotic 4e-5 and Proxy Anchor 6e-4 on sop and isc')
    group.add_argument('--backbone_lr', type=float, help='learning rate of the backbone; papers: 1 x lr')
    group.add_argument('--proxy_lr', type=float, help='learning rate of the proxies; papers: 100 x lr, Momentum Proxy '
                       '1 x lr')
    group.add_argument('--weight_decay', '--weight-decay', type=float, help='papers: 1e-4, Asymptotic and Momentum 0')
    group.add_argument('--clip_value', type=float, help='clip each gradient entry to +-value; 0 is off; Proxy '
                       'Anchor 10')
    group.add_argument('--lr_schedule', choices=SCHEDULE_NAMES, help='step: every --lr_decay_step epochs; multistep: '
                       'at --lr_milestones; cosine: to zero; constant. Papers: step, Asymptotic and Momentum multistep')
    group.add_argument('--lr_decay_step', '--lr-decay-step', type=int, help='epochs between the steps; papers: 5, '
                       'Proxy Anchor 5 to 20 by data set and backbone')
    group.add_argument('--lr_decay_gamma', '--lr-decay-gamma', type=float, help='factor at a step or milestone; '
                       'papers: 0.5, multistep 0.1, Proxy Anchor 0.25 on sop and isc')
    group.add_argument('--lr_milestones', type=fraction_list, help='fractions of the epochs; papers: Asymptotic 0.5, '
                       'Momentum 0.5,0.8')
    group.add_argument('--drop_last', type=switch, metavar='{0,1}', help='leave out a last, smaller batch; papers: 0, '
                       'Proxy Anchor 1')

    group = parser.add_argument_group('the run')
    group.add_argument('--recalls', type=int_list, help='values of K; papers: 1,2,4,8 (sop 1,10,100,1000; isc '
                       '1,10,20,30,40,50; Proxy Anchor 1,2,4,8,16,32)')
    group.add_argument('--eval_every', type=int, default=1, metavar='N', help='measure retrieval after every N epochs '
                       'and after the last; the best epoch is chosen among these [1]')
    group.add_argument('--val_ratio', type=float, default=0.0, help='share of the training classes (at least two) '
                       'held out to choose the best epoch; 0 chooses it on the test classes, as the papers do [0]')
    group.add_argument('--allow_seen', action='store_true', help='measure although test classes are among those '
                       'trained on; evaluate.py, report.py and export.py say so beside their numbers')
    group.add_argument('--pretrained_baseline', type=switch, metavar='{0,1}', help='measure R@1 of the backbone '
                       '(pooled features, no head) before the training [1; 0 with --weights none and --init]')
    group.add_argument('--seeds', type=seed_list, metavar='1,2,3', help='train a run for each seed, one after the '
                       'other, and report mean, standard deviation and 95 %% interval of R@1; with --resume those that '
                       'are complete are kept')
    group.add_argument('--on_collapse', choices=('stop', 'warn'), help='what to do when the accuracy stays at chance '
                       'after an epoch [stop where proxies move by momentum, else warn]')
    group.add_argument('--deterministic', action='store_true', help='use only algorithms that give the same bits each '
                       'time; slower on a GPU, and some operations end in an error there. A CPU does it anyway, for '
                       'one number of threads')
    group.add_argument('--seed', type=int, help='of weights, order and augmentation [0]')
    add_device_flags(group)
    group.add_argument('--amp', choices=('auto', 'on', 'off'), default='auto', help='compute the network in bfloat16; '
                       'auto: where the device is fast at it. The loss is float32 always [%(default)s]')
    group.add_argument('--compile', action='store_true', help='compile the network with torch.compile: '
                       '20 seconds to minutes before the first step, faster steps afterwards with some backbones '
                       '(ResNet50 by 9 %% on a CPU, twice as fast on an H100); needs a C++ compiler on a CPU')
    group.add_argument('--results_dir', type=user_path, default='results', help='where the run\'s files go '
                       '[%(default)s]')
    group.add_argument('--log_to', default='', metavar='SERVICE,...', help='report the statistics, settings and curves '
                       'to tensorboard (in {results_dir}/tensorboard) or wandb; several with commas between [none]')
    group.add_argument('--remark', default='', help='added to the run\'s name')
    group.add_argument('--resume', action='store_true', help='continue from the run\'s last checkpoint; a larger '
                       '--num_epochs extends the run where --lr_schedule is step or constant')
    group.add_argument('--overwrite', action='store_true', help='replace the files of a run of the same name')
    return parser


def loss_name(text: str) -> str:
    """Parse the name of a loss: ours in any case, those of pytorch-metric-learning as their classes are spelt."""
    return text if text.startswith(PML_PREFIX) else text.lower()


# ---------------------------------------------------- settings of a run --------------------------------------------
@dataclass(frozen=True)
class RunOptions:
    """Every setting of one run: flags merged with the recipe, and validated. Fields are named as their flags.

    The other fields: `run` is the run's name; `base_loss` the loss without its proxy update (`positive_proxy` ->
    `normalized_softmax`), or `pml:NAME`; `explicit_flags` the flags that have a value without the recipe; `momentum`
    and `proxy_lr` are None where the proxy update does not use them.
    """

    run: str
    explicit_flags: tuple[str, ...]
    # what to train
    recipe: str
    loss_name: str
    base_loss: str
    loss_args: str
    miner: str
    miner_args: str
    proxy_update: str
    backbone_type: str
    weights: str
    init: str | None
    # data
    data_path: str
    data_name: str
    crop_type: str
    image_size: int
    resize_size: int
    min_crop: float
    flip: float
    color_jitter: float
    grayscale: float
    batch_size: int
    images_per_class: int
    cache_size: int
    num_workers: int
    # network
    feature_dim: int
    pooling: str
    layer_norm: bool
    head_bias: bool
    head_init: str
    max_pool: bool
    freeze_bn: bool
    flip_tta: bool
    # loss
    scale: float | None
    temperature: float | None
    margin: float | None
    momentum: float | None
    proxy_init: str
    # optimisation
    num_epochs: int
    warm_up: int
    optimizer_type: str
    lr: float
    backbone_lr: float
    proxy_lr: float | None
    weight_decay: float
    clip_value: float
    lr_schedule: str
    lr_decay_step: int
    lr_decay_gamma: float
    lr_milestones: tuple[float, ...]
    drop_last: bool
    # the run
    recalls: tuple[int, ...]
    eval_every: int
    val_ratio: float
    allow_seen: bool
    pretrained_baseline: bool
    seeds: tuple[int, ...] | None
    on_collapse: str
    deterministic: bool
    seed: int
    device: str
    amp: str
    compile: bool
    results_dir: str
    log_to: tuple[str, ...]
    remark: str
    resume: bool
    overwrite: bool


def parse_options(argv: list[str] | None = None, description: str | None = None) -> list[RunOptions]:
    """Parse a command line, merge it with its recipe, and validate the result.

    Returns:
        the options of each run, one for each seed.

    Raises:
        UserError: for a value that is unknown or out of range, a contradiction, or a flag without effect.
    """
    flags = get_parser(description).parse_args(argv)
    explicit = {name for name, value in vars(flags).items() if value is not None}
    settings = merge_with_recipe(flags, explicit)
    recipe = recipe_settings(settings['recipe'], settings['data_name'], settings['backbone_type'])
    check_flags_have_effect(settings, recipe, explicit)
    check_ranges(settings)
    check_warm_up(settings, explicit)
    settings['explicit_flags'] = tuple(sorted(explicit))
    seeds = settings['seeds'] or (settings['seed'],)
    return [RunOptions(**{**settings, 'seed': seed, 'run': name_run(settings, recipe, explicit, seed)})
            for seed in seeds]


def name_of_seeds(runs: list[RunOptions]) -> str:
    """Return the name that runs share which differ in their seed alone."""
    first = runs[0]
    recipe = recipe_settings(first.recipe, first.data_name, first.backbone_type)
    return name_run(asdict(first), recipe, set(first.explicit_flags), seed=0)


# ---------------------------------------------------- merge --------------------------------------------------------
def merge_with_recipe(flags: argparse.Namespace, explicit: set[str]) -> dict:
    """Return all settings of RunOptions but the run's name: each from its flag, else from the recipe.

    Raises:
        UserError: if a name is unknown, or flags contradict each other.
    """
    pml = flags.loss_name is not None and flags.loss_name.startswith(PML_PREFIX)
    if flags.loss_name is not None and not pml:
        check_choice('--loss_name', flags.loss_name, [*LOSSES, *COMBINED_LOSSES, f'{PML_PREFIX}NAME'])
    if flags.momentum is not None and not explicit & {'recipe', 'loss_name', 'proxy_update', 'optimizer_type'}:
        raise UserError(f'--momentum {flags.momentum} belongs to two systems: add --recipe asymptotic_proxy or '
                        '--recipe momentum_proxy')
    if flags.seeds and flags.seed is not None:
        raise UserError(f'--seed {flags.seed} and --seeds contradict each other; leave one of them out')
    if flags.init is not None and flags.weights not in (None, 'none'):
        raise UserError('--init and --weights contradict each other: both say where the backbone starts; leave one out')

    settings = vars(flags) | {
        'data_name': canonical_data_name(flags.data_name), 'backbone_type': canonical_backbone(flags.backbone_type),
        'log_to': parse_services(flags.log_to), 'seed': flags.seed or 0,
        'weights': 'none' if flags.init is not None else flags.weights or 'imagenet'}
    default_recipe = flags.loss_name if flags.loss_name in RECIPES else 'balanced_proxy'
    settings['recipe'] = check_choice('--recipe', flags.recipe or default_recipe, RECIPES)
    recipe = recipe_settings(settings['recipe'], settings['data_name'], settings['backbone_type'])

    settings |= resolve_pml_loss(flags) if pml else resolve_proxy_update(flags, recipe)
    if not pml:
        settings |= resolve_scale_and_margin(flags, settings['loss_name'], recipe)
    settings |= resolve_optimizer(flags, recipe, settings['proxy_update'])
    settings['head_init'] = resolve_head_init(flags, recipe)
    for name, value in recipe.items():
        if settings.get(name, '') is None and name not in ('temperature', 'margin'):
            settings[name] = value
    if settings['resize_size'] is None:
        from common.images import resize_for  # imports NumPy and Pillow, for which --help need not wait

        settings['resize_size'] = resize_for(settings['image_size'])
    if settings['pretrained_baseline'] is None:
        settings['pretrained_baseline'] = settings['weights'] != 'none'
    if settings['on_collapse'] is None:
        settings['on_collapse'] = 'stop' if settings['proxy_update'] == 'momentum' else 'warn'
    return settings


def resolve_proxy_update(flags: argparse.Namespace, recipe: dict) -> dict:
    """Return loss_name, base_loss, proxy_update and momentum.

    The proxy update can be given by a combined loss name, by --proxy_update, or by Momentum Proxy's starred optimizer.
    """
    loss = flags.loss_name or recipe['loss_name']
    combined = COMBINED_LOSSES.get(loss, {})
    starred = (flags.optimizer_type or '').endswith('*')
    said_by = {f'--loss_name {loss}': combined.get('proxy_update'),
               f'--proxy_update {flags.proxy_update}': flags.proxy_update,
               f'--optimizer_type {flags.optimizer_type}': 'momentum' if starred else None}
    said_by = {flag: update for flag, update in said_by.items() if update}
    if len(set(said_by.values())) > 1:
        remedy = f'use --loss_name {combined["loss_name"]}' if combined else 'leave one of them out'
        raise UserError(f'{" and ".join(said_by)} contradict each other: proxies have one update; {remedy}')
    default = recipe['proxy_update']
    if default == 'momentum' and flags.optimizer_type is not None:  # without a star, in Momentum Proxy's spelling
        default = 'gradient'
    proxy_update = next(iter(said_by.values()), default)
    if flags.momentum is not None and proxy_update != 'momentum':
        raise UserError(f'--momentum {flags.momentum} has no effect with --proxy_update {proxy_update}; add '
                        '--proxy_update momentum, or leave it out')
    momentum = None
    if proxy_update == 'momentum':
        momentum = MOMENTUM if flags.momentum is None else flags.momentum
    return {'loss_name': loss, 'base_loss': combined.get('loss_name', loss), 'proxy_update': proxy_update,
            'momentum': momentum}


def resolve_pml_loss(flags: argparse.Namespace) -> dict:
    """Return the settings that a loss of pytorch-metric-learning fixes; refuse flags that it cannot use."""
    reasons = {'scale': 'set it in --loss_args', 'temperature': 'set it in --loss_args',
               'margin': 'set it in --loss_args', 'momentum': 'its weights learn by the gradient',
               'proxy_init': 'it initialises its weights itself'}
    for name, reason in reasons.items():
        if getattr(flags, name) is not None:
            raise UserError(f'--{name} {getattr(flags, name)} has no effect on --loss_name {flags.loss_name}: {reason}')
    starred = (flags.optimizer_type or '').endswith('*')
    if starred or flags.proxy_update not in (None, 'gradient'):
        raise UserError(f'--proxy_update {flags.proxy_update or "momentum"} is not for --loss_name {flags.loss_name}: '
                        'its weights learn by the gradient of all its terms; leave it out')
    return {'base_loss': flags.loss_name, 'proxy_update': 'gradient', 'proxy_init': 'unit'}


def resolve_scale_and_margin(flags: argparse.Namespace, loss: str, recipe: dict) -> dict:
    """Return scale, which can also be given as temperature, and margin: from the flag, the recipe, or the paper."""
    if flags.scale is not None and flags.temperature is not None:
        raise UserError(f'--scale {flags.scale} and --temperature {flags.temperature} say the same (temperature = '
                        '1 / scale); leave one of them out')
    combined = COMBINED_LOSSES.get(loss, {})
    defaults = LOSSES[combined.get('loss_name', loss)]
    of_recipe = recipe if loss == recipe['loss_name'] else {}
    temperature, scale, margin = flags.temperature, flags.scale, flags.margin
    if temperature is None and scale is None:
        temperature = of_recipe.get('temperature') or combined.get('temperature')
    if temperature is not None:
        if not 1e-6 <= temperature < float('inf'):
            raise UserError(f'--temperature {temperature} must be a number above 1e-6')
        scale = 1 / temperature
    if margin is not None and defaults.margin is None:
        raise UserError(f'--margin {margin} has no effect: {loss} has no margin; leave it out')
    return {'temperature': temperature, 'scale': defaults.scale if scale is None else scale,
            'margin': of_recipe.get('margin', defaults.margin) if margin is None else margin}


def resolve_optimizer(flags: argparse.Namespace, recipe: dict, proxy_update: str) -> dict:
    """Return the optimizer and the learning rates of network, backbone and proxies."""
    optimizer = (flags.optimizer_type or recipe['optimizer_type']).removesuffix('*')
    check_choice('--optimizer_type', optimizer, OPTIMIZER_NAMES)
    lr = recipe['lr'] if flags.lr is None else flags.lr
    proxy_lr = lr * recipe['proxy_lr_factor'] if flags.proxy_lr is None else flags.proxy_lr
    if proxy_update == 'momentum' and flags.proxy_lr is not None:
        raise UserError(f'--proxy_lr {flags.proxy_lr} has no effect: proxies that move by momentum have no learning '
                        'rate; leave it out')
    return {'optimizer_type': optimizer, 'lr': lr, 'proxy_lr': None if proxy_update == 'momentum' else proxy_lr,
            'backbone_lr': lr * recipe['backbone_lr_factor'] if flags.backbone_lr is None else flags.backbone_lr}


def resolve_head_init(flags: argparse.Namespace, recipe: dict) -> str:
    """Return how the head starts; --init already sets its weights."""
    if flags.init is None:
        return flags.head_init or recipe['head_init']
    if flags.head_init not in (None, 'random'):
        raise UserError(f'--head_init {flags.head_init} and --init contradict each other: both say where the head '
                        'starts; leave one of them out')
    return 'random'


# ---------------------------------------------------- checks -------------------------------------------------------
def check_flags_have_effect(settings: dict, recipe: dict, explicit: set[str]) -> None:
    """Refuse flags that would change nothing."""
    schedule = settings['lr_schedule']
    pml = settings['loss_name'].startswith(PML_PREFIX)
    starts_at_means = 'mean' in (settings['proxy_init'], recipe['proxy_init'])
    useless = {
        'lr_decay_step': schedule != 'step' and f'--lr_schedule {schedule} has no such step',
        'lr_milestones': schedule != 'multistep' and f'--lr_schedule {schedule} has no milestones',
        'lr_decay_gamma': schedule in ('cosine', 'constant') and f'--lr_schedule {schedule} does not use it',
        'proxy_init': settings['proxy_update'] == 'momentum' and not starts_at_means
        and 'proxies that move by momentum start as unit random rows',
        'drop_last': settings['images_per_class'] > 0 and '--images_per_class makes full batches only',
        'loss_args': settings['loss_args'] and not pml and 'it is for the losses pml:NAME',
        'miner': settings['miner'] and not pml and 'it is for the losses pml:NAME',
        'miner_args': settings['miner_args'] and not settings['miner'] and 'there is no --miner',
    }
    for name, reason in useless.items():
        if name in explicit and reason:
            raise UserError(f'--{name} {settings[name]} has no effect: {reason}; leave it out')
    if settings['resume'] and settings['overwrite']:
        raise UserError('--resume and --overwrite contradict each other; leave one of them out')


def check_ranges(settings: dict) -> None:
    """Refuse numbers out of range, with their flag."""
    check_between(argparse.Namespace(**settings), {
        'feature_dim': (1, LARGEST_FEATURE_DIM), 'image_size': (16, LARGEST_SIDE), 'num_workers': (0, 1024),
        'resize_size': (settings['image_size'] if settings['resize_size'] else 0, LARGEST_SIDE),
        'cache_size': (0, LARGEST_SIDE),
        'num_epochs': (1, None), 'eval_every': (1, None), 'warm_up': (0, None), 'lr_decay_step': (1, None),
        'seed': (0, None), 'batch_size': (1, None), 'images_per_class': (0, None),
        'lr': (SMALLEST, LARGEST), 'backbone_lr': (SMALLEST, LARGEST), 'proxy_lr': (SMALLEST, LARGEST),
        'lr_decay_gamma': (SMALLEST, LARGEST), 'scale': (SMALLEST, LARGEST), 'weight_decay': (0, LARGEST),
        'clip_value': (0, LARGEST), 'margin': (0, 2), 'momentum': (SMALLEST, 1), 'min_crop': (SMALLEST, 1),
        'flip': (0, 1), 'color_jitter': (0, 1), 'grayscale': (0, 1), 'val_ratio': (0, 0.999)})
    side = settings['resize_size'] or settings['image_size']
    if 0 < settings['cache_size'] < side:
        raise UserError(f'--cache_size {settings["cache_size"]} is smaller than the {side} pixels of a test image '
                        f'(--resize_size), which would be enlarged; build and use a cache of at least {side} pixels')
    if settings['recalls'][0] != 1:
        raise UserError(f'--recalls {",".join(map(str, settings["recalls"]))} must begin with 1, by which the best '
                        'epoch is chosen')


def check_warm_up(settings: dict, explicit: set[str]) -> None:
    """Refuse a recipe's warm-up that would keep the backbone frozen in all epochs, unless it was asked for."""
    warm_up, num_epochs = settings['warm_up'], settings['num_epochs']
    if warm_up >= num_epochs and 'warm_up' not in explicit:
        raise UserError(f'--num_epochs {num_epochs} ends within the warm-up of the recipe {settings["recipe"]}, '
                        f'{warm_up} epochs in which the backbone is frozen: it would never learn; add --warm_up 0, or '
                        f'--warm_up {warm_up} to train the head and the proxies only')


def check_data(options: RunOptions, split: dict, device, drop_last: bool) -> None:
    """Refuse options that do not fit the data or the machine, before anything is built.

    Args:
        split: {subset: {label: [path, ...]}} with `train`, and `test` or `query` and `gallery`.
        device: torch.device of the run.
        drop_last: whether the batches leave out a last, smaller one.
    """
    if len(split['train']) < 2:
        raise UserError(f'--data_name {options.data_name} has one training class; a loss needs at least two')
    num_images = count_images(split['train'])
    last_batch = 0 if drop_last else num_images % options.batch_size
    sizes = {min(options.batch_size, num_images), last_batch or options.batch_size}
    if min(sizes) < world_size():
        raise UserError(f'--batch_size {options.batch_size} of {num_images} images leaves a batch with no image for '
                        f'some of the {world_size()} processes; add --drop_last 1, or choose another size')
    if not options.freeze_bn and 1 in {size // world_size() for size in sizes}:
        hint = '' if drop_last or options.batch_size // world_size() == 1 else 'add --drop_last 1, or '
        raise UserError(f'--batch_size {options.batch_size} leaves a batch of one image, or of one in a process, which '
                        f'has no BatchNorm statistics; {hint}choose another size')
    if options.compile and device.type == 'cpu' and not shutil.which(os.environ.get('CXX', 'g++')):
        raise UserError('--compile needs a C++ compiler on a CPU and finds no g++; install one, or leave it out')
    searched = split['gallery'] if 'gallery' in split else split['test']
    if len(searched) < 2:
        raise UserError(f'--data_name {options.data_name} has one test class, so that every answer is right; retrieval '
                        'is measured among at least two')
    if 'gallery' not in split and max(map(len, searched.values())) < 2:
        raise UserError(f'--data_name {options.data_name}: no test class has two images, so that no query could find '
                        'another one of its class')
    num_searched = count_images(searched) - ('gallery' not in split)  # a query is not searched in itself
    if options.recalls[-1] > num_searched:
        raise UserError(f'R@{options.recalls[-1]} asks for more than the {num_searched} images that a query is '
                        'searched in; set --recalls to smaller numbers, as in --recalls 1,2')


# ---------------------------------------------------- name ---------------------------------------------------------
def name_run(settings: dict, recipe: dict, explicit: set[str], seed: int) -> str:
    """Name a run: data set, backbone, loss, feature length, then what differs from the recipe of that loss."""
    loss = settings['loss_name']
    recipe_of_loss = loss if loss in RECIPES else 'balanced_proxy'
    update_of_recipe = COMBINED_LOSSES.get(loss, recipe)['proxy_update']
    parts = [settings['data_name'], settings['backbone_type'], loss, settings['feature_dim']]
    if settings['recipe'] != recipe_of_loss:
        parts.append(settings['recipe'])
    if settings['proxy_update'] != update_of_recipe:
        parts.append(settings['proxy_update'])
    parts += [settings['loss_args'], settings['miner'], settings['miner_args']]
    if explicit & {'scale', 'temperature'}:
        parts.append(f't{1 / settings["scale"]:.4g}')
    if 'margin' in explicit:
        parts.append(f'd{settings["margin"]:g}')
    if 'momentum' in explicit:
        parts.append(f'm{settings["momentum"]:g}')
    if settings['crop_type'] != 'uncropped':
        parts.append(settings['crop_type'])
    if settings['val_ratio']:
        parts.append(f'val{settings["val_ratio"]:g}')
    if seed:
        parts.append(f'seed{seed}')
    return run_name(*parts, settings['remark'])

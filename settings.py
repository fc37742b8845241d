"""The command line of a training: its flags, what a recipe makes of them, and what contradicts itself.

Nothing here imports torch, so that `train.py --help` and a mistyped flag are answered at once.
"""
import argparse

from engine.errors import UserError, check_choice
from engine.logs import service_list
from engine.runs import LARGEST, run_name
from raw_sets import canonical_data_name
from recipes import (COMBINED_LOSSES, LINEAR_INITS, LOSSES, MOMENTUM, OPTIMIZER_NAMES, POOLINGS, PROXY_INITS,
                     PROXY_UPDATES, RECIPES, SCHEDULE_NAMES, TRUNKS, canonical_backbone, recipe_settings, resize_for)
from utils import (Parser, add_device_flags, check_between, fraction_list, int_list, keyword_text, seed_list, switch,
                   user_path)

SMALL, LARGE = 1e-30, 1e38  # what float32 holds
PML = 'pml:'  # before the name of a loss of pytorch-metric-learning


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
    group.add_argument('--loss_args', type=keyword_text, default='', metavar='A=1,B=2', help='of a pml: loss, as in '
                       'margin=0.2,alpha=32')
    group.add_argument('--miner', default='', metavar='NAME', help='of pytorch-metric-learning for a pml: loss, as '
                       'MultiSimilarityMiner')
    group.add_argument('--miner_args', type=keyword_text, default='', metavar='A=1,B=2', help='of the miner')
    group.add_argument('--proxy_update', choices=PROXY_UPDATES, help='how the proxies move: by the loss\'s gradient, '
                       'by that of the positive embeddings alone, or by momentum towards their class [the recipe\'s]')
    group.add_argument('--backbone_type', '--model', default='resnet50', help='trunk: ' + ', '.join(TRUNKS) +
                       ' (BN-Inception is inception), or timm:MODEL [%(default)s]')
    group.add_argument('--weights', type=user_path, help='of the trunk: imagenet (downloaded once, checked), none '
                       '(random), or the path of a state dict [imagenet]')
    group.add_argument('--init', type=user_path, metavar='FILE', help='start from the model of a run, RUN_model.pth: '
                       'trunk and linear layer (fine-tuning); the test classes must not be among those it has seen')

    group = parser.add_argument_group('data')
    group.add_argument('--data_path', type=user_path, default='/home/data', help='folder that holds the data sets '
                       '[%(default)s]')
    group.add_argument('--data_name', '--dataset', default='car', help='car, cub, sop, isc, glyph, or a folder of your '
                       'own, converted by data_utils.py [%(default)s]')
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
                       'Asymptotic 128, Anchor 180 or 120')
    group.add_argument('--images_per_class', '--IPC', type=int, help='draw each batch as batch/k classes with k images '
                       'each (Proxy Anchor\'s balanced sampling); 0 shuffles all images [0]')
    group.add_argument('--cache_size', type=int, default=0, help='read images from the cache that '
                       'data_utils.py --cache_size made: their short side in pixels, best that of --resize_size; 0 '
                       'decodes the files [0]')
    group.add_argument('--num_workers', '--workers', type=int, default=2, help='processes that decode images; 0 '
                       'decodes in this one; the batches are the same [%(default)s]')

    group = parser.add_argument_group('network')
    group.add_argument('--feature_dim', '--embedding-size', type=int, help='length of an embedding; papers: 512')
    group.add_argument('--pooling', choices=POOLINGS, help='papers: max; Proxy Anchor avg_max, the sum of both; gem, '
                       'a mean of powers whose power is learned from 3 on; cls, the class token of a transformer')
    group.add_argument('--layer_norm', type=switch, metavar='{0,1}', help='normalise the pooled features before the '
                       'linear layer; papers: 1, Proxy Anchor 0')
    group.add_argument('--linear_bias', type=switch, metavar='{0,1}', help='papers: 0; Proxy Anchor 1')
    group.add_argument('--linear_init', choices=LINEAR_INITS, help='start of the linear layer: random, or whiten, the '
                       'whitening of the trunk\'s features of the training images; papers: random')
    group.add_argument('--max_pool', type=switch, default=True, metavar='{0,1}', help='the max-pool in the stem of a '
                       'ResNet; 0 for images below about 100 px [1]')
    group.add_argument('--freeze_bn', '--bn-freeze', type=switch, metavar='{0,1}', help='keep the BatchNorm statistics '
                       'of the pretrained trunk; papers: 1, Proxy Anchor on sop and isc 0. Set 0 with --weights none: '
                       'the statistics of an untrained trunk say nothing')
    group.add_argument('--mirror', type=switch, metavar='{0,1}', help='embed a test image, and any that is searched '
                       'later, as the mean with its mirror image, for twice the time; not where left and right matter. '
                       'evaluate.py --mirror tries it on a finished run. Papers: 0')

    group = parser.add_argument_group('loss')
    group.add_argument('--scale', '--alpha', type=float, help='alpha; papers: 32, proxy_nca 9, cos_face, arc_face 64')
    group.add_argument('--temperature', type=float, help='1 / scale, the Asymptotic Proxy spelling; paper: 0.03, '
                       '0.05 on sop and isc')
    group.add_argument('--margin', '--mrg', type=float, help='delta; papers: 0.1, cos_face 0.35, arc_face 0.5 rad')
    group.add_argument('--momentum', type=float, help='m of moving proxies (not of the optimizer), in (0, 1]; papers: '
                       '0.5. Asymptotic Proxy saw runs collapse at 0.05 to 0.1')
    group.add_argument('--proxy_init', choices=PROXY_INITS, help='start of the proxies: random (unit, kaiming), or at '
                       'the mean embedding of their class before the training; papers: unit, Proxy Anchor kaiming')

    group = parser.add_argument_group('optimisation')
    group.add_argument('--num_epochs', '--epochs', type=int, help='papers: 20, Asymptotic 30, Proxy Anchor 60')
    group.add_argument('--warm_up', '--warm', type=int, help='first epochs in which the trunk is frozen and only the '
                       'linear layer and the proxies learn, all epochs for a frozen trunk; this is no ramp of the '
                       'learning rate. Papers: Balanced 2, Proxy Anchor 1 (5 with resnet50), the others 0')
    group.add_argument('--optimizer_type', '--optimizer', type=str.lower, help='adamw, adam, sgd (momentum 0.9); adam* '
                       'and sgd* add --proxy_update momentum, and without the star --recipe momentum_proxy has '
                       '--proxy_update gradient (its spelling)')
    group.add_argument('--lr', type=float, help='learning rate of the network; papers: 1e-4, Momentum Proxy 1e-3 (its '
                       'author later used 2e-5), Asymptotic 4e-5 and Proxy Anchor 6e-4 on sop and isc')
    group.add_argument('--trunk_lr', type=float, help='learning rate of the trunk; papers: 1 x lr')
    group.add_argument('--proxy_lr', type=float, help='learning rate of the proxies; papers: 100 x lr, Momentum Proxy '
                       '1 x lr')
    group.add_argument('--weight_decay', '--weight-decay', type=float, help='papers: 1e-4, Asymptotic and Momentum 0')
    group.add_argument('--clip_value', type=float, help='clip each gradient entry to +-value; 0 is off; Proxy '
                       'Anchor 10')
    group.add_argument('--lr_schedule', choices=SCHEDULE_NAMES, help='step: every --lr_decay_step epochs; multistep: '
                       'at --lr_milestones; cosine: to zero; constant. Papers: step, Asymptotic and Momentum multistep')
    group.add_argument('--lr_decay_step', '--lr-decay-step', type=int, help='epochs between the steps; papers: 5, '
                       'Proxy Anchor 5 to 20 by data set and trunk')
    group.add_argument('--lr_decay_gamma', '--lr-decay-gamma', type=float, help='factor at a step or milestone; '
                       'papers: 0.5, multistep 0.1, Proxy Anchor 0.25 on sop and isc')
    group.add_argument('--lr_milestones', type=fraction_list, help='fractions of the epochs; papers: Asymptotic 0.5, '
                       'Momentum 0.5,0.8')
    group.add_argument('--drop_last', type=switch, metavar='{0,1}', help='leave a last, smaller batch out; papers: 0, '
                       'Proxy Anchor 1')

    group = parser.add_argument_group('the run')
    group.add_argument('--recalls', type=int_list, help='values of K; papers: 1,2,4,8 (sop 1,10,100,1000; isc '
                       '1,10,20,30,40,50; Proxy Anchor 1,2,4,8,16,32)')
    group.add_argument('--val_ratio', type=float, default=0.0, help='share of the training classes, two at least, that '
                       'is held out and chooses the epoch in place of the test classes; 0 chooses on the test classes, '
                       'as the papers do [0]')
    group.add_argument('--allow_seen', action='store_true', help='measure although test classes are among those '
                       'trained on; evaluate.py, report.py and export.py say so beside their numbers')
    group.add_argument('--epoch0', type=switch, default=True, metavar='{0,1}', help='measure R@1 of the untouched '
                       'trunk (average pooling, no linear layer) before the training, unless its weights are random '
                       'or those of --init [1]')
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
    group.add_argument('--shard_proxies', action='store_true', help='with several processes: each holds its share of '
                       'the proxies and of their optimizer state; for millions of classes')
    group.add_argument('--amp', choices=('auto', 'on', 'off'), default='auto', help='compute the network in bfloat16; '
                       'auto: where the device is fast at it. The loss is float32 always [%(default)s]')
    group.add_argument('--compile', action='store_true', help='compile the network with torch.compile: '
                       '20 seconds to minutes before the first step, faster steps then with some trunks (ResNet50 by '
                       '9 %% on a CPU, twice as fast on an H100); needs a C++ compiler on a CPU')
    group.add_argument('--results_dir', type=user_path, default='results', help='where the run\'s files go '
                       '[%(default)s]')
    group.add_argument('--log_to', default='', metavar='SERVICE,...', help='tell tensorboard (in '
                       '{results_dir}/tensorboard), wandb or trackio what the statistics say, the settings and the '
                       'curves; several with commas between [none]')
    group.add_argument('--remark', default='', help='added to the run\'s name')
    group.add_argument('--resume', action='store_true', help='go on from the run\'s last checkpoint; with a larger '
                       '--num_epochs past its end, where --lr_schedule is step or constant')
    group.add_argument('--overwrite', action='store_true', help='replace the files of a run of the same name')
    return parser


def loss_name(text: str) -> str:
    """Read the name of a loss: of ours in any case, of pytorch-metric-learning as its class is spelt."""
    return text if text.startswith(PML) else text.lower()


def get_runs(argv: list[str] | None = None, description: str | None = None) -> tuple[str, list[argparse.Namespace]]:
    """Parse the command line and settle every setting: flag, else recipe.

    Returns:
        the name of the runs without their seeds, and the settings of each run, one for each seed.

    Raises:
        UserError: for a value that is not known or out of range, a contradiction, or a flag without effect.
    """
    args = get_parser(description).parse_args(argv)
    args.data_name = canonical_data_name(args.data_name)
    args.backbone_type = canonical_backbone(args.backbone_type)
    args.log_to = service_list(args.log_to)
    given = {name for name, value in vars(args).items() if value is not None}
    starred = bool(args.optimizer_type) and args.optimizer_type.endswith('*')  # Momentum Proxy's adam* and sgd*
    if args.optimizer_type is not None:
        args.optimizer_type = args.optimizer_type.removesuffix('*')
    args.given = sorted(given)
    borrowed = args.loss_name is not None and args.loss_name.startswith(PML)
    if args.loss_name is not None and not borrowed:
        check_choice('--loss_name', args.loss_name, [*LOSSES, *COMBINED_LOSSES, f'{PML}NAME'])
    if args.momentum is not None and not (args.recipe or args.loss_name or args.proxy_update or args.optimizer_type):
        raise UserError(f'--momentum {args.momentum} belongs to two systems: add --recipe asymptotic_proxy or '
                        '--recipe momentum_proxy')
    default = args.loss_name if args.loss_name in RECIPES else 'balanced_proxy'
    args.recipe = check_choice('--recipe', default if args.recipe is None else args.recipe, RECIPES)
    if args.seeds and args.seed is not None:
        raise UserError(f'--seed {args.seed} and --seeds contradict each other; leave one of them out')
    args.seed = args.seed or 0
    if args.init is not None and args.weights not in (None, 'none'):
        raise UserError('--init and --weights contradict each other: both say where the trunk starts; leave one out')
    args.weights = 'none' if args.init is not None else args.weights or 'imagenet'
    settings = recipe_settings(args.recipe, args.data_name, args.backbone_type)
    if borrowed:
        settle_borrowed(args, starred)
    else:
        settle_rule(args, settings, starred)
        settle_loss(args, settings)
    for name, value in settings.items():
        if name not in ('temperature', 'margin') and getattr(args, name, 0) is None:
            setattr(args, name, value)
    settle_start(args, given)
    check_choice('--optimizer_type', args.optimizer_type, OPTIMIZER_NAMES)
    check_effect(args, settings, given)
    args.resize_size = resize_for(args.image_size) if args.resize_size is None else args.resize_size
    check_ranges(args)
    check_warm_up(args, given)
    if args.proxy_update == 'momentum':
        args.proxy_lr = None
    elif args.proxy_lr is None:
        args.proxy_lr = args.lr * settings['proxy_lr_factor']
    args.trunk_lr = args.trunk_lr or args.lr * settings['trunk_lr_factor']
    args.on_collapse = args.on_collapse or ('stop' if args.proxy_update == 'momentum' else 'warn')
    runs = [argparse.Namespace(**{**vars(args), 'seed': seed, 'run': name_run(args, settings, given, seed)})
            for seed in args.seeds or (args.seed,)]
    return name_run(args, settings, given, 0), runs


def settle_rule(args: argparse.Namespace, settings: dict, starred: bool) -> None:
    """Settle loss and rule of the proxies, which can be said by the loss, by itself, or by a starred optimizer."""
    args.loss_name = args.loss_name or settings['loss_name']
    combined = COMBINED_LOSSES.get(args.loss_name, {})
    args.base_loss = combined.get('loss_name', args.loss_name)
    rules = {f'--loss_name {args.loss_name}': combined.get('proxy_update'),
             f'--proxy_update {args.proxy_update}': args.proxy_update,
             f'--optimizer_type {args.optimizer_type}*': 'momentum' if starred else None}
    rules = {flag: rule for flag, rule in rules.items() if rule}
    if len(set(rules.values())) > 1:
        remedy = f'; use --loss_name {combined["loss_name"]}' if combined else '; leave one of them out'
        raise UserError(f'{" and ".join(rules)} contradict each other: the proxies move in one way{remedy}')
    default = settings['proxy_update']
    if default == 'momentum' and args.optimizer_type is not None:  # without a star, in Momentum Proxy's spelling
        default = 'gradient'
    args.proxy_update = next(iter(rules.values()), default)
    if args.momentum is not None and args.proxy_update != 'momentum':
        raise UserError(f'--momentum {args.momentum} has no effect while the proxies move by {args.proxy_update}; add '
                        '--proxy_update momentum, or leave it out')
    if args.proxy_update == 'momentum' and args.momentum is None:
        args.momentum = MOMENTUM


def settle_borrowed(args: argparse.Namespace, starred: bool) -> None:
    """Refuse what a loss of pytorch-metric-learning has no use for; its own weights learn by the gradient."""
    others = {'scale': 'say it in --loss_args', 'temperature': 'say it in --loss_args', 'margin': 'say it in '
              '--loss_args', 'momentum': 'its weights learn by the gradient', 'proxy_init': 'it starts its weights '
              'itself', 'shard_proxies': 'each process holds its weights'}
    for name, reason in others.items():
        value = getattr(args, name)
        if value is not None and value is not False:  # 0 says something
            raise UserError(f'--{name} {value} has no effect on --loss_name {args.loss_name}: {reason}')
    if starred or args.proxy_update not in (None, 'gradient'):
        raise UserError(f'--proxy_update {args.proxy_update or "momentum"} is not for --loss_name {args.loss_name}: '
                        'its weights are its own, and learn by the gradient of all its terms; leave it out')
    args.base_loss, args.proxy_update = args.loss_name, 'gradient'
    args.scale, args.proxy_init = None, 'unit'


def settle_loss(args: argparse.Namespace, settings: dict) -> None:
    """Settle scale, which can also be said as temperature, and margin."""
    if args.scale is not None and args.temperature is not None:
        raise UserError(f'--scale {args.scale} and --temperature {args.temperature} say the same (temperature = '
                        '1 / scale); leave one of them out')
    of_recipe = settings if args.loss_name == settings['loss_name'] else {}
    if args.temperature is None and args.scale is None:
        args.temperature = of_recipe.get('temperature') or COMBINED_LOSSES.get(args.loss_name, {}).get('temperature')
    if args.temperature is not None:
        if not 1e-6 <= args.temperature < float('inf'):
            raise UserError(f'--temperature {args.temperature} must be a number above 1e-6')
        args.scale = 1 / args.temperature
    loss = LOSSES[args.base_loss]
    if args.margin is not None and loss.margin is None:
        raise UserError(f'--margin {args.margin} has no effect: {args.loss_name} has no margin; leave it out')
    args.scale = loss.scale if args.scale is None else args.scale
    args.margin = of_recipe.get('margin', loss.margin) if args.margin is None else args.margin


def settle_start(args: argparse.Namespace, given: set) -> None:
    """Leave the linear layer of --init as it is, whatever the recipe says of its start."""
    if args.init is None:
        return
    if 'linear_init' in given and args.linear_init != 'random':
        raise UserError(f'--linear_init {args.linear_init} and --init contradict each other: both say where the linear '
                        'layer starts; leave one of them out')
    args.linear_init = 'random'


def check_effect(args: argparse.Namespace, settings: dict, given: set) -> None:
    """Refuse flags that would change nothing."""
    borrowed = args.loss_name.startswith(PML)
    useless = {
        'proxy_lr': args.proxy_update == 'momentum' and 'proxies that move by momentum have no learning rate',
        'lr_decay_step': args.lr_schedule != 'step' and f'--lr_schedule {args.lr_schedule} has no such step',
        'lr_milestones': args.lr_schedule != 'multistep' and f'--lr_schedule {args.lr_schedule} has no milestones',
        'lr_decay_gamma': args.lr_schedule in ('cosine', 'constant') and f'--lr_schedule {args.lr_schedule} has none',
        'proxy_init': args.proxy_update == 'momentum' and 'mean' not in (args.proxy_init, settings['proxy_init']) and
        'proxies that move by momentum start as unit random rows',
        'drop_last': args.images_per_class > 0 and '--images_per_class makes full batches only',
        'loss_args': args.loss_args and not borrowed and 'it is for the losses pml:NAME',
        'miner': args.miner and not borrowed and 'it is for the losses pml:NAME',
        'miner_args': args.miner_args and not args.miner and 'there is no --miner',
    }
    for name, reason in useless.items():
        if name in given and reason:
            raise UserError(f'--{name} {getattr(args, name)} has no effect: {reason}; leave it out')
    if args.resume and args.overwrite:
        raise UserError('--resume and --overwrite contradict each other; leave one of them out')


def check_ranges(args: argparse.Namespace) -> None:
    """Refuse numbers out of range, with the flag."""
    check_between(args, {
        'feature_dim': (1, LARGEST['feature_dim']), 'image_size': (16, LARGEST['side']), 'num_workers': (0, 1024),
        'resize_size': (args.image_size if args.resize_size else 0, LARGEST['side']),
        'cache_size': (0, LARGEST['side']),
        'num_epochs': (1, None), 'warm_up': (0, None), 'lr_decay_step': (1, None), 'seed': (0, None),
        'batch_size': (1, None), 'images_per_class': (0, None),
        'lr': (SMALL, LARGE), 'trunk_lr': (SMALL, LARGE), 'proxy_lr': (SMALL, LARGE), 'lr_decay_gamma': (SMALL, LARGE),
        'scale': (SMALL, LARGE), 'weight_decay': (0, LARGE), 'clip_value': (0, LARGE), 'margin': (0, LARGE),
        'momentum': (SMALL, 1), 'min_crop': (SMALL, 1), 'flip': (0, 1), 'color_jitter': (0, 1),
        'grayscale': (0, 1), 'val_ratio': (0, 0.999)})
    side = args.resize_size or args.image_size
    if 0 < args.cache_size < side:
        raise UserError(f'--cache_size {args.cache_size} is smaller than the {side} pixels of a test image '
                        f'(--resize_size): it would be enlarged; build and name a cache of at least {side} pixels')
    if args.recalls[0] != 1:
        raise UserError(f'--recalls {",".join(map(str, args.recalls))} must begin with 1, by which the best epoch is '
                        'chosen')


def check_warm_up(args: argparse.Namespace, given: set) -> None:
    """Refuse a warm-up that leaves the trunk frozen in all epochs, unless it was asked for."""
    if args.warm_up >= args.num_epochs and 'warm_up' not in given:
        raise UserError(f'--num_epochs {args.num_epochs} ends within the warm-up of the recipe {args.recipe}, '
                        f'{args.warm_up} epochs in which the trunk is frozen: it would never learn; add --warm_up 0, '
                        f'or --warm_up {args.warm_up} if only the linear layer and the proxies shall')


def name_run(args: argparse.Namespace, settings: dict, given: set, seed: int) -> str:
    """Name the run: data set, trunk, loss, feature length, then what differs from the recipe of that loss."""
    loss_recipe = args.loss_name if args.loss_name in RECIPES else 'balanced_proxy'
    recipe_rule = COMBINED_LOSSES.get(args.loss_name, settings)['proxy_update']
    parts = [
        args.data_name, args.backbone_type, args.loss_name, args.feature_dim,
        args.recipe if args.recipe != loss_recipe else '',
        args.proxy_update if args.proxy_update != recipe_rule else '',
        args.loss_args, args.miner, args.miner_args,
        f't{1 / args.scale:.4g}' if given & {'scale', 'temperature'} else '',
        f'd{args.margin:g}' if 'margin' in given else '',
        f'm{args.momentum:g}' if 'momentum' in given else '',
        args.crop_type if args.crop_type != 'uncropped' else '',
        f'val{args.val_ratio:g}' if args.val_ratio else '',
        f'seed{seed}' if seed else '',
        args.remark]
    return run_name(*parts)

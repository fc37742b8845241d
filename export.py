"""Export a run's model to ONNX, or as a folder for a model hub, and check that it embeds as before.

    python export.py --model results/RUN_model.pth --onnx model.onnx
    python export.py --model results/RUN_model.pth --onnx model.onnx --int8      # also writes model_int8.onnx
    python export.py --model results/RUN_model.pth --folder FOR_THE_HUB          # nothing is uploaded

The ONNX model maps uint8 RGB images (N, 3, S, S), 0 to 255, any N, to unit embeddings (N, D), float32; pixel range,
channel order, mean and std are part of it. Resizing the short side and the centre crop to S are not: the file's
metadata hold their sizes. The folder holds weights (model.safetensors), settings (config.json) and a model card
(README.md); every script that reads a model file also reads such a folder. Each export embeds the test images of the
run's data set again, and a table compares R@1, embeddings, speed and size with those of the model.
"""
import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import statistics
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path

from common.errors import UserError, reason_of
from common.files import MADE_HERE, check_replaceable
from utils import Parser, check_between, run_script, user_path

PACKAGES = {'onnx': ('onnx', 'onnxruntime', 'onnxscript'), 'folder': ('safetensors',)}  # needed by each flag
CALIBRATION_IMAGES = 256  # training images whose activations set the ranges of --int8
TIMED_BATCH = 16  # images
TIMED_TURNS = 7
FOLDER_FILES = ('model.safetensors', 'config.json', 'README.md')


# ---------------------------------------------------- command line -------------------------------------------------
def get_args(argv: list[str] | None = None):
    """Parse and check the command line: packages must be installed, and no file of another program be replaced."""
    parser = Parser(description=__doc__)
    parser.add_argument('--model', '--resume', required=True, type=user_path, metavar='FILE', help='RUN_model.pth of a '
                        'run, or its name in --results_dir')
    parser.add_argument('--onnx', type=user_path, metavar='FILE', help='write an ONNX file')
    parser.add_argument('--int8', action='store_true', help='also write FILE_int8.onnx beside --onnx, statically '
                        'quantised to 8-bit integers and calibrated on training images')
    parser.add_argument('--folder', type=user_path, help='write model.safetensors, config.json and a model card')
    parser.add_argument('--data_path', type=user_path, default='/home/data', help='folder that holds the data sets '
                        '[%(default)s]')
    parser.add_argument('--num_images', type=int, metavar='N', help='compare on fewer test images: whole classes, '
                        'until there are N; 0 needs no data set and compares on random pixels [all]')
    parser.add_argument('--batch_size', type=int, default=64, help='images embedded at once [%(default)s]')
    parser.add_argument('--num_workers', type=int, default=2, help='processes that decode images [%(default)s]')
    parser.add_argument('--results_dir', type=user_path, default='results', help='where models that are named without '
                        'a folder are read [%(default)s]')
    args = parser.parse_args(argv)
    check_between(args, {'num_images': (0, None), 'batch_size': (1, 2**31), 'num_workers': (0, 1024)})
    if args.int8 and (args.onnx is None or args.num_images == 0):
        raise UserError('--int8 needs --onnx FILE, and training images: leave --num_images 0 out')
    flags = [flag for flag in PACKAGES if getattr(args, flag) is not None]
    if not flags:
        raise UserError('nothing to export: add --onnx FILE or --folder FOLDER')
    for flag in flags:
        missing = [name for name in PACKAGES[flag] if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f'--{flag} needs {", ".join(missing)}; install with: pip install -r '
                            'requirements-export.txt')
    targets = list_targets(args)
    if len({target.resolve() for _, target in targets}) < len(targets):
        raise UserError('--onnx and --folder name the same file; name different ones')
    for flag, target in targets:
        check_replaceable(target, flag)
    return args


def int8_file(onnx_file: Path) -> Path:
    """Return where --int8 writes: model.onnx -> model_int8.onnx."""
    return onnx_file.with_name(f'{onnx_file.stem}_int8{onnx_file.suffix}')


def list_targets(args) -> list[tuple[str, Path]]:
    """Return [(flag, file), ...] of the files to be written."""
    targets = []
    if args.onnx is not None:
        targets.append(('--onnx', Path(args.onnx)))
    if args.int8:
        targets.append(('--int8', int8_file(Path(args.onnx))))
    if args.folder is not None:
        targets += [('--folder', Path(args.folder) / name) for name in FOLDER_FILES]
    return targets


if __name__ == '__main__':  # --help and mistakes need not wait for the imports below
    ARGS = run_script(get_args)

import torch
from torch import nn

from common.distributed import progress
from common.files import make_folder, write_atomically
from common.results import RunFiles, find_result
from imagedata.loading import RetrievalDataset, make_test_loaders, make_transform, open_data
from model import EmbeddingNet
from retrieval.database import ORIGIN, DataBase, Subset, check_seen, load_data_base, seen_classes
from retrieval.embedding import describe_origin, format_results, make_data_base, measure, measure_open_set_of
from retrieval.metrics import NUMBERS_OF_QUERIES
from retrieval.model_file import load_model, model_fingerprint
from retrieval.onnx_file import TOLERANCE, OnnxNet, embed_probe

CPU = torch.device('cpu')


# ---------------------------------------------------- ONNX ---------------------------------------------------------
@contextlib.contextmanager
def quiet():
    """Suppress the exporters' warnings and messages."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(logging.NOTSET)


def describe_interface(model: EmbeddingNet, run: dict) -> dict[str, str]:
    """Return the metadata of an ONNX file: what a program that embeds with it needs to know, and retrieval.onnx_file.

    The fingerprint is that of the model: embeddings in float32 differ from its own by rounding.
    """
    size, origin = model.config.image_size, {key: run[key] for key in ORIGIN if key in run}
    return {'made_by': MADE_HERE, 'run': str(run['args'].get('run')), 'network': json.dumps(asdict(model.config)),
            'images': f'uint8 RGB (N, 3, {size}, {size}), 0 to 255',
            'resize_size': str(run['args']['resize_size']), 'interpolation': model.interpolation,
            'fingerprint': model_fingerprint(run), 'origin': json.dumps(origin, default=str),
            'probe': json.dumps(embed_probe(model, size).tolist())}


def to_onnx(model: EmbeddingNet, metadata: dict[str, str]) -> bytes:
    """Return the contents of an ONNX file: input `images` (N, 3, S, S) of any N, output `embeddings`.

    Raises:
        UserError: if the backbone cannot be traced or expressed in ONNX, or the file would be larger than the 2 GB
            that ONNX allows.
    """
    import onnx

    size = model.config.image_size
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)  # a batch of 1 would be traced as a constant
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(model.eval(), (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                                          strict=False)
            exported = torch.onnx.export(program, dynamo=True, verbose=False, input_names=['images'],
                                         output_names=['embeddings'], dynamic_shapes=({0: 'N'},)).model_proto
        onnx.helper.set_model_props(exported, metadata)
        for node in exported.graph.node:
            del node.metadata_props[:]  # the exporter's notes contain paths of this machine
        return exported.SerializeToString()
    except Exception as error:  # torch and protobuf raise errors of many types
        reason = reason_of(error.__cause__ or error)  # the message of the exporter itself is a general one
        raise UserError(f'--onnx: {model.config.backbone_type} cannot be exported to ONNX ({reason}); --folder may '
                        'still work') from None


def quantise(contents: bytes, images: torch.Tensor, metadata: dict[str, str], backbone_type: str) -> bytes:
    """Return an ONNX model in 8-bit integers, calibrated on images (N, 3, S, S) uint8.

    Weights are signed, with a scale per channel; activations are unsigned, between their smallest and largest value.
    Its fingerprint is its own: its embeddings fit those of no other model.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = iter(progress(images.split(TIMED_BATCH), desc='calibrate'))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {'images': batch.numpy()}

    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            original, prepared, quantised = (str(Path(folder) / name) for name in ('original', 'prepared', 'quantised'))
            Path(original).write_bytes(contents)
            quant_pre_process(original, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared, quantised, Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                weight_type=quantization.QuantType.QInt8, activation_type=quantization.QuantType.QUInt8)
            exported = onnx.load(quantised)
    except Exception as error:  # onnx, onnxruntime and protobuf raise errors of many types
        raise UserError(f'--int8: {backbone_type} cannot be quantised ({reason_of(error)}); leave it out') from None
    fingerprint = hashlib.sha256(exported.SerializeToString()).hexdigest()
    metadata = {key: value for key, value in metadata.items() if key != 'probe'}
    onnx.helper.set_model_props(exported, {**metadata, 'fingerprint': fingerprint})
    return exported.SerializeToString()


# ---------------------------------------------------- comparison ---------------------------------------------------
def first_classes(split: dict, num_images: int | None) -> dict:
    """Reduce the test (or query and gallery) subsets of a split to its first classes with `num_images` queries.

    None keeps all classes.
    """
    if num_images is None:
        return split
    kept, count = set(), 0
    for label, paths in split['test' if 'test' in split else 'query'].items():
        if count >= num_images:
            break
        kept.add(label)
        count += len(paths)
    reduced = dict(split)
    for name in ('test', 'query', 'gallery'):
        if name in split:
            reduced[name] = {label: paths for label, paths in split[name].items() if label in kept}
    return reduced


def check_equal(network: nn.Module, images: torch.Tensor, expected: torch.Tensor, flag: str) -> None:
    """Raise a UserError if a network's embeddings of images, in a batch or alone, are not those expected (N, D)."""
    for batch in (images, images[:1]):
        with torch.inference_mode():
            difference = float((network(batch) - expected[:len(batch)]).abs().max())
        if not difference <= TOLERANCE:  # NaN is not
            raise UserError(f'{flag}: the embeddings of the exported model differ by up to {difference:.2g}; nothing '
                            'is written: export with other versions of torch, onnx and onnxruntime')


def time_networks(networks: dict[str, nn.Module], images: torch.Tensor) -> dict[str, float]:
    """Return the median seconds in which each network embeds the images; the networks take turns."""
    seconds = {name: [] for name in networks}
    with torch.inference_mode():
        for turn in range(TIMED_TURNS + 1):
            for name, network in networks.items():
                start = time.perf_counter()
                network(images)
                if turn > 0:  # the first one warms up
                    seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


class Comparison:
    """Embeds test images with the model and its exports, and compares them in a table.

    Args:
        model: the network that is exported.
        run: contents of its model file.
        args: data_path, num_images, batch_size and num_workers of the command line.

    Attributes:
        data: the data set; None compares on random pixels.
        images: the first images, uint8 (at most TIMED_BATCH, 3, S, S).
        expected: the model's data base, of all images that are compared.
    """

    def __init__(self, model: EmbeddingNet, run: dict, args):
        self.networks, self.data_bases, self.sizes = {}, {}, {}  # by name
        self.data = None
        size = model.config.image_size
        if args.num_images == 0:
            self.images = torch.randint(0, 256, (TIMED_BATCH, 3, size, size), dtype=torch.uint8,
                                        generator=torch.Generator().manual_seed(0))
        else:
            self.data = open_data(args.data_path, run['args']['data_name'], run['args']['crop_type'])
            self.transform = make_transform(False, size, run['args']['resize_size'], model.interpolation)
            compared = self.data._replace(split=first_classes(self.data.split, args.num_images))
            self.loaders = make_test_loaders(compared, self.transform, args.batch_size, args.num_workers, CPU)
            self.images = stack_images(self.loaders['test'].dataset, TIMED_BATCH)
        self.is_complete = self.data is not None and args.num_images is None
        self.add('the model', model, sum(value.nbytes for value in model.state_dict().values()))
        self.expected = self.data_bases['the model']

    def add(self, name: str, network: nn.Module, num_bytes: int) -> None:
        """Embed the images with a network."""
        if self.data is not None:
            data_base = make_data_base(network, self.loaders, CPU, amp=False)
        else:
            with torch.inference_mode():
                data_base = DataBase([], Subset([], None, network(self.images)))
        self.networks[name], self.data_bases[name], self.sizes[name] = network, data_base, num_bytes

    def calibration_images(self) -> torch.Tensor:
        """Return training images (n, 3, S, S), uint8, evenly spread over the classes."""
        return stack_images(RetrievalDataset(self.data, 'train', self.transform), CALIBRATION_IMAGES, spread=True)

    def table(self) -> str:
        """Return the table as Markdown."""
        batch, single = time_networks(self.networks, self.images), time_networks(self.networks, self.images[:1])
        lines = [f'| | R@1 | binary | largest difference | img/s, {len(self.images)} at once | ms, one image | MB |',
                 '|---|---|---|---|---|---|---|']
        for name, data_base in self.data_bases.items():
            recalls = '- | -'
            if self.data is not None:
                metrics = measure(data_base, (1,), CPU)
                recalls = f'{metrics["dense"]["R@1"]:.2f} | {metrics["binary"]["R@1"]:.2f}'
            difference = max(float((subset.features - self.expected.subsets[part].features).abs().max())
                             for part, subset in data_base.subsets.items())
            speed = f'{len(self.images) / batch[name]:.1f} ({batch["the model"] / batch[name]:.1f} x)'
            lines.append(f'| {name} | {recalls} | {difference:.1e} | {speed} | {1e3 * single[name]:.1f} | '
                         f'{self.sizes[name] / 1e6:.1f} |')
        return '\n'.join(lines)


def stack_images(dataset: RetrievalDataset, count: int, spread: bool = False) -> torch.Tensor:
    """Return at most `count` images (n, 3, S, S) of a data set: the first ones, or evenly spread ones."""
    count = min(count, len(dataset))
    indices = [index * len(dataset) // count for index in range(count)] if spread else range(count)
    return torch.stack([dataset[index][0] for index in indices])


# ---------------------------------------------------- a folder for a hub -------------------------------------------
def describe_protocol(settings: dict, num_seen: int) -> str:
    """Return sentences that say what the model card's numbers were measured on.

    Args:
        settings: `args` of the model file.
        num_seen: number of test classes that the model was trained on.
    """
    sentences = ['The test classes were not trained on.']
    if num_seen:
        sentences = [f'{num_seen} of the test classes were TRAINED ON.']
    sentences.append('Recall@K is exact: a query does not find itself, and tied negatives count half.')
    sentences.append('Binary codes are the signs of the embeddings, compared by Hamming distance.')
    if settings.get('pretrained'):
        return ' '.join(sentences)
    if settings.get('val_ratio'):
        sentences.append('The epoch was chosen on held-out training classes.')
    elif 'trained_on' in settings:
        sentences.append(f'The epoch was chosen on the test classes of {settings["trained_on"]}.')
    else:
        sentences.append('The epoch was chosen on the test classes, as in the papers, which makes the numbers slightly '
                         'optimistic.')
    return ' '.join(sentences)


def measure_for_card(model: EmbeddingNet, run: dict, data_base: DataBase) -> dict:
    """Return the results of a data base, as `format_results` takes them."""
    settings = run['args']
    results = measure(data_base, tuple(settings['recalls']), CPU)
    results['open_set'] = measure_open_set_of(data_base, CPU)
    results['measured_on'] = {
        'data_name': settings['data_name'], 'crop_type': settings['crop_type'], 'flip_tta': model.config.flip_tta,
        'image_size': model.config.image_size, 'resize_size': settings['resize_size'],
        'classes': len(data_base.class_names),
        'seen_classes': len(check_seen(seen_classes(run), data_base.class_names, allowed=True))}
    return results


def render_card(model: EmbeddingNet, run: dict, data_base: DataBase | None, folder_name: str) -> str:
    """Return the model card, Markdown with YAML metadata; without a data base it has no numbers."""
    import jinja2

    settings, table, protocol, metrics = run['args'], '', '', []
    if data_base is not None:
        results = measure_for_card(model, run, data_base)
        table = format_results(results)
        protocol = describe_protocol(settings, results['measured_on']['seen_classes'])
        metrics = [{'type': f'{kind} {name}', 'value': round(value, 2)} for kind in ('dense', 'binary')
                   for name, value in results.get(kind, {}).items() if name not in NUMBERS_OF_QUERIES]
    template = jinja2.Template((Path(__file__).parent / 'templates/model_card.md').read_text(), trim_blocks=True,
                               undefined=jinja2.StrictUndefined)
    return template.render(
        title=settings.get('run'), yaml_name=json.dumps(str(settings.get('run'))), settings=settings,
        yaml_data_name=json.dumps(settings['data_name']), yaml_metrics=json.dumps(metrics), config=model.config,
        feature_dim=model.feature_dim, interpolation=model.interpolation, table=table, protocol=protocol,
        origin=describe_origin(run), folder=folder_name, made_by=MADE_HERE)


def write_folder(model: EmbeddingNet, run: dict, data_base: DataBase | None, folder: Path) -> None:
    """Write weights, settings and, last, a model card."""
    from safetensors.torch import save

    weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    config = {'made_by': MADE_HERE, **{name: value for name, value in run.items() if name != 'state_dict'}}
    contents = {'model.safetensors': save(weights, {'format': 'pt', 'made_by': MADE_HERE}),
                'config.json': json.dumps(config, indent=2, default=str).encode(),
                'README.md': render_card(model, run, data_base, folder.resolve().name).encode()}
    for name in FOLDER_FILES:
        write_atomically(folder / name, lambda file, name=name: file.write(contents[name]))


# ---------------------------------------------------- main --------------------------------------------------------
def export_onnx(args, model: EmbeddingNet, run: dict, comparison: Comparison) -> None:
    """Write the ONNX file, once it embeds as the model does, and with --int8 the quantised one."""
    file, metadata = Path(args.onnx), describe_interface(model, run)
    contents = to_onnx(model, metadata)
    network = OnnxNet(contents)
    expected = comparison.expected.test.features[:len(comparison.images)]
    check_equal(network, comparison.images, expected, '--onnx')
    write_atomically(file, lambda target: target.write(contents))
    comparison.add(file.name, network, len(contents))
    if args.int8:
        # No data base of the run is of these settings, so none is searched with this file.
        metadata = describe_interface(model, {**run, 'args': {**run['args'], 'precision': 'int8'}})
        quantised = quantise(contents, comparison.calibration_images(), metadata, model.config.backbone_type)
        file = int8_file(file)
        write_atomically(file, lambda target: target.write(quantised))
        comparison.add(file.name, OnnxNet(quantised), len(quantised))


def export_folder(args, model: EmbeddingNet, run: dict, comparison: Comparison) -> None:
    """Write the folder for a hub, and load it again."""
    folder = Path(args.folder)
    # Among few classes retrieval is easier, so a part of the test images gives no numbers for the card.
    write_folder(model, run, comparison.expected if comparison.is_complete else None, folder)
    comparison.add(folder.name, load_model(folder, CPU)[0], (folder / 'model.safetensors').stat().st_size)


def main(args) -> None:
    """Export what the command line names, and print the comparison."""
    file = find_result('--model', RunFiles.ENDINGS['model'], args.model, args.results_dir)
    model, run = load_model(file, CPU)
    for flag, target in list_targets(args):
        make_folder(flag, target.parent)
    comparison = Comparison(model, run, args)
    if args.onnx is not None:
        export_onnx(args, model, run, comparison)
    if args.folder is not None:
        export_folder(args, model, run, comparison)
    data_base = file.with_name(file.name.replace(RunFiles.ENDINGS['model'], RunFiles.ENDINGS['data_base']))
    if args.num_images is None and data_base != file and data_base.is_file():
        metrics = measure(load_data_base(data_base), (1,), CPU)
        print(f'R@1 of {data_base.name}: {metrics["dense"]["R@1"]:.2f}, binary {metrics["binary"]["R@1"]:.2f}')
    images = 'random pixels' if comparison.data is None else f'{len(comparison.expected.test.images):,} test images'
    print(f'{images}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}:\n{comparison.table()}')
    print('written: ' + ', '.join(str(target) for _, target in list_targets(args)))


if __name__ == '__main__':
    run_script(lambda: main(ARGS))

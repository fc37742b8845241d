"""Export a run's model to ONNX, to torch.export or as a folder for a hub, and check at once that it embeds as before.

    python export.py --model results/RUN_model.pth --onnx model.onnx
    python export.py --model results/RUN_model.pth --onnx model.onnx --int8      # model_int8.onnx beside it as well
    python export.py --model results/RUN_model.pth --torch model.pt2
    python export.py --model results/RUN_model.pth --folder FOR_THE_HUB          # nothing is uploaded

All of them take uint8 RGB images (N, 3, S, S) from 0 to 255, any N, and return unit embeddings (N, D), float32; range,
channel order, mean and std are inside. Outside stay the resize of the short side and the centre crop to S, whose sizes
stand in the files. A folder holds weights (safetensors), settings (config.json) and a model card (README.md); it is
read wherever a model file is. What is exported embeds test images of the run's data set, which are compared with those
of the model; a table shows R@1, the largest difference of a number in an embedding, time and size.
"""
import contextlib
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

PACKAGES = {'onnx': ('onnx', 'onnxruntime', 'onnxscript'), 'folder': ('safetensors',), 'torch': ()}  # by flag
CALIBRATION_IMAGES = 256  # of the training images, evenly spread: their activations set the ranges of --int8
TOLERANCE = 1e-3  # in a number of an embedding; float32 on two engines differs by about 1e-6
TURNS, AT_ONCE = 7, 16  # of the timing; images in a batch
FOLDER_FILES = ('model.safetensors', 'config.json', 'README.md')


# ---------------------------------------------------- command line -------------------------------------------------
def get_args(argv: list[str] | None = None):
    """Parse the command line; what is to be written must be replaceable, and its packages installed."""
    parser = Parser(description=__doc__)
    parser.add_argument('--model', '--resume', required=True, type=user_path, metavar='FILE', help='model of a run, '
                        'RUN_model.pth, or its name in --results_dir')
    parser.add_argument('--onnx', type=user_path, metavar='FILE', help='write an ONNX file')
    parser.add_argument('--int8', action='store_true', help='write a second one beside --onnx, FILE_int8.onnx, in '
                        '8-bit integers: static quantisation, calibrated on training images')
    parser.add_argument('--torch', type=user_path, metavar='FILE', help='write a program of torch.export, as model.pt2')
    parser.add_argument('--folder', type=user_path, help='write model.safetensors, config.json and a model card')
    parser.add_argument('--data_path', type=user_path, default='/home/data', help='folder that holds the data sets '
                        '[%(default)s]')
    parser.add_argument('--num_images', type=int, metavar='N', help='test images to check on: whole classes until '
                        'there are N; 0 needs no data set and checks on random pixels [all]')
    parser.add_argument('--batch_size', type=int, default=64, help='images embedded at once [%(default)s]')
    parser.add_argument('--num_workers', type=int, default=2, help='processes that decode images [%(default)s]')
    parser.add_argument('--results_dir', type=user_path, default='results', help='where --model is, if it is named '
                        'without a folder [%(default)s]')
    args = parser.parse_args(argv)
    check_between(args, {'num_images': (0, None), 'batch_size': (1, 2**31), 'num_workers': (0, 1024)})
    if args.int8 and (args.onnx is None or args.num_images == 0):
        raise UserError('--int8 needs --onnx FILE, and training images: leave --num_images 0 out')
    flags = [flag for flag in PACKAGES if getattr(args, flag) is not None]
    if not flags:
        raise UserError('nothing to export: add --onnx FILE, --torch FILE or --folder FOLDER')
    for flag in flags:
        missing = [name for name in PACKAGES[flag] if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f'--{flag} needs {", ".join(missing)}; install them with: pip install -r '
                            'requirements-export.txt')
    files = targets(args)
    if len(set(files.values())) < len(files):
        raise UserError('--onnx, --torch and --folder name one file twice; give each its own')
    for name, file in files.items():
        check_replaceable(file, f'--{name.split()[0]}')
    return args


def targets(args) -> dict[str, Path]:
    """Return the files that a command line asks for, by its flag and what they are."""
    files = {flag: Path(getattr(args, flag)) for flag in ('onnx', 'torch') if getattr(args, flag) is not None}
    if args.int8:
        files['onnx int8'] = files['onnx'].with_name(f'{files["onnx"].stem}_int8{files["onnx"].suffix}')
    if args.folder is not None:
        files |= {f'folder {name}': Path(args.folder) / name for name in FOLDER_FILES}
    return files


if __name__ == '__main__':  # --help and mistakes need not wait for the imports below
    ARGS = run_script(get_args)

import torch
from torch import nn

from common.distributed import progress
from common.files import make_folder, write_atomically
from common.results import RunFiles, find_result
from imagedata.loading import RetrievalDataset, make_test_loaders, make_transform, open_data
from model import EmbeddingNet
from retrieval.database import DataBase, Subset, check_seen, load_data_base, seen_classes

from retrieval.embedding import describe_origin, format_results, make_data_base, measure
from retrieval.metrics import NUMBERS_OF_QUERIES, measure_open_set
from retrieval.model_file import load_model

CPU = torch.device('cpu')


# ---------------------------------------------------- what is exported ---------------------------------------------
class OnnxNetwork(nn.Module):
    """An ONNX model in onnxruntime, to be called like an EmbeddingNet; as many threads as torch."""

    def __init__(self, contents: bytes, feature_dim: int):
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')  # it would take torch's time
        self.session = onnxruntime.InferenceSession(contents, options, providers=['CPUExecutionProvider'])
        self.feature_dim = feature_dim

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (N, D), float32, of uint8 RGB images (N, 3, S, S)."""
        return torch.from_numpy(self.session.run(None, {'images': images.numpy()})[0])


class TorchNetwork(nn.Module):
    """A program of torch.export, to be called like an EmbeddingNet."""

    def __init__(self, contents: bytes, feature_dim: int):
        super().__init__()
        self.feature_dim = feature_dim
        with quiet():
            self.program = torch.export.load(io.BytesIO(contents)).module()

    def eval(self) -> 'TorchNetwork':
        return self  # the program is one of evaluation, and knows no other mode

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (N, D), float32, of uint8 RGB images (N, 3, S, S)."""
        return self.program(images)


@contextlib.contextmanager
def quiet():
    """Keep the exporters' warnings and notes from what this script says."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(logging.NOTSET)


def trace(model: EmbeddingNet) -> torch.export.ExportedProgram:
    """Return the network as a program for batches (N, 3, S, S) of any N.

    Raises:
        UserError: if its trunk cannot be traced.
    """
    images = torch.zeros(2, 3, model.config.image_size, model.config.image_size, dtype=torch.uint8)  # 1 is a case apart
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(model.eval(), (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                                          strict=False)
    except Exception as error:  # whatever the trunk's code stumbles over
        raise UserError(f'--model: {model.config.backbone_type} cannot be exported by torch.export '
                        f'({reason_of(error)}); --folder needs no tracing') from None
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop('stack_trace', None)  # it names the folders of this machine
    return program


def describe_input(model: EmbeddingNet, run: dict) -> dict[str, str]:
    """Return what a program that embeds with the exported files has to know, as texts."""
    return {'made_by': MADE_HERE, 'run': str(run['args'].get('run')), 'network': json.dumps(asdict(model.config)),
            'images': f'uint8 RGB (N, 3, {model.config.image_size}, {model.config.image_size}), 0 to 255',
            'resize_size': str(run['args']['resize_size']), 'interpolation': model.interpolation}


def to_torch(program, about: dict[str, str]) -> bytes:
    """Return the contents of a .pt2 file, with a text `about.json`."""
    file = io.BytesIO()
    with quiet():
        torch.export.save(program, file, extra_files={'about.json': json.dumps(about)})
    return file.getvalue()


def to_onnx(program, about: dict[str, str], backbone_type: str) -> bytes:
    """Return the contents of an ONNX file: input `images`, output `embeddings`.

    Raises:
        UserError: if the trunk holds what ONNX has no word for, or the file would be larger than the 2 GB of a
            message.
    """
    import onnx

    try:
        with quiet():
            exported = torch.onnx.export(program, dynamo=True, verbose=False, input_names=['images'],
                                         output_names=['embeddings'], dynamic_shapes=({0: 'N'},)).model_proto
        onnx.helper.set_model_props(exported, about)
        for node in exported.graph.node:
            del node.metadata_props[:]  # the exporter's own notes, which name folders of this machine
        return exported.SerializeToString()
    except Exception as error:  # the exporter has a family of errors, protobuf one for the size
        reason = reason_of(error.__cause__ or error)  # the exporter's own first line is a general one
        raise UserError(f'--onnx: {backbone_type} cannot be exported to ONNX ({reason}); --torch and '
                        '--folder may still do') from None


def quantise(contents: bytes, images: torch.Tensor, about: dict[str, str], backbone_type: str) -> bytes:
    """Return an ONNX model in 8-bit integers, calibrated on images (N, 3, S, S) uint8.

    Weights are signed, a scale each channel, activations unsigned with the smallest and largest value seen.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = iter(progress(images.split(AT_ONCE), desc='calibrate'))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {'images': batch.numpy()}

    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            whole, prepared, small = (str(Path(folder) / name) for name in ('whole', 'prepared', 'small'))
            Path(whole).write_bytes(contents)
            quant_pre_process(whole, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared, small, Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                weight_type=quantization.QuantType.QInt8, activation_type=quantization.QuantType.QUInt8)
            found = onnx.load(small)
    except Exception as error:  # of onnx, onnxruntime and protobuf, each with errors of its own
        raise UserError(f'--int8: {backbone_type} cannot be quantised ({reason_of(error)}); leave it out') from None
    onnx.helper.set_model_props(found, about)
    return found.SerializeToString()


# ---------------------------------------------------- checks -------------------------------------------------------
def first_classes(split: dict, num_images: int | None) -> dict:
    """Return a split whose test (or query and gallery) subsets hold whole classes until there are num_images of them;
    None keeps all.
    """
    if num_images is None:
        return split
    queries, kept, count = split['test' if 'test' in split else 'query'], [], 0
    for label, paths in queries.items():
        if count >= num_images:
            break
        kept.append(label)
        count += len(paths)
    return {name: {label: paths for label, paths in subset.items() if label in kept}
            if name in ('test', 'query', 'gallery') else subset for name, subset in split.items()}


def seconds_of(networks: dict[str, nn.Module], images: torch.Tensor) -> dict[str, float]:
    """Return the median seconds in which each network embeds the images; they take turns."""
    found = {name: [] for name in networks}
    with torch.inference_mode():
        for turn in range(TURNS + 1):
            for name, network in networks.items():
                start = time.perf_counter()
                network(images)
                if turn:  # the first one is slow
                    found[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in found.items()}


def check_equal(network: nn.Module, images: torch.Tensor, expected: torch.Tensor, flag: str) -> None:
    """Refuse a network in float32 whose embeddings of some images are not those expected (N, D).

    Raises:
        UserError: with the largest difference.
    """
    for part in (images, images[:1]):
        with torch.inference_mode():
            difference = float((network(part) - expected[:len(part)]).abs().max())
        if not difference <= TOLERANCE:
            raise UserError(f'{flag}: the exported model differs from this one by {difference:.2g} in an embedding; '
                            'nothing is written: export with other versions of torch, onnx and onnxruntime')


class Bench:
    """Images to check exported models on, and what was found.

    Args:
        model: the network that is exported.
        run: contents of its model file.
        args: of the command line.
    """

    def __init__(self, model: EmbeddingNet, run: dict, args):
        self.rows, self.networks, self.data = {}, {}, None
        side = model.config.image_size
        self.images = torch.randint(0, 256, (AT_ONCE, 3, side, side), dtype=torch.uint8,
                                    generator=torch.Generator().manual_seed(0))
        if args.num_images != 0:
            self.data = open_data(args.data_path, run['args']['data_name'], run['args']['crop_type'])
            self.transform = make_transform(False, side, run['args']['resize_size'], model.interpolation)
            some = self.data._replace(split=first_classes(self.data.split, args.num_images))
            self.loaders = make_test_loaders(some, self.transform, args.batch_size, args.num_workers, CPU)
            dataset = self.loaders['test'].dataset
            self.images = torch.stack([dataset[index][0] for index in range(min(AT_ONCE, len(dataset)))])
        size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
        self.expected = self.add('the model', model, size)

    def add(self, name: str, network: nn.Module, size: int) -> DataBase:
        """Embed the test images, or the random ones where there is no data, with a network of a size in bytes."""
        self.networks[name] = network
        if self.data is None:
            with torch.inference_mode():
                found = DataBase([], Subset([], None, network(self.images)))
        else:
            found = make_data_base(network, self.loaders, CPU, amp=False)
        self.rows[name] = (found, size)
        return found

    def calibration_images(self) -> torch.Tensor:
        """Return training images (n, 3, S, S), uint8, evenly spread over the classes."""
        dataset = RetrievalDataset(self.data, 'train', self.transform)
        count = min(CALIBRATION_IMAGES, len(dataset))
        return torch.stack([dataset[index * len(dataset) // count][0] for index in range(count)])

    def table(self) -> str:
        """Return the table, in Markdown: R@1 in per cent, differences, images per second, milliseconds, MB."""
        many, one = seconds_of(self.networks, self.images), seconds_of(self.networks, self.images[:1])
        lines = [f'| | R@1 | binary | largest difference | img/s, {len(self.images)} at once | ms, one image | MB |',
                 '|---|---|---|---|---|---|---|']
        for name, (found, size) in self.rows.items():
            recalls = ['-', '-']
            if self.data is not None:
                metrics = measure(found, (1,), CPU)
                recalls = [f'{metrics[kind]["R@1"]:.2f}' for kind in ('dense', 'binary')]
            difference = max(float((subset.features - self.expected.subsets[part].features).abs().max())
                             for part, subset in found.subsets.items())
            lines.append(f'| {name} | {" | ".join(recalls)} | {difference:.1e} | {len(self.images) / many[name]:.1f} '
                         f'({many["the model"] / many[name]:.1f} x) | {1e3 * one[name]:.1f} | {size / 1e6:.1f} |')
        return '\n'.join(lines)


# ---------------------------------------------------- a folder for a hub -------------------------------------------
def describe_protocol(run: dict, seen: int) -> str:
    """Say in a sentence or two what the numbers of a run's data base are numbers of."""
    settings = run['args']
    chosen = ('on held out training classes' if settings.get('val_ratio') else
              f'on the test classes of {settings["trained_on"]}' if 'trained_on' in settings else
              'on the test classes, as in the papers, which makes its numbers a little too good')
    classes = f'{seen} of these classes were TRAINED ON' if seen else 'Classes that were not trained on'
    of_training = '' if settings.get('zero_shot') else (
        f'; binary are the signs of the embeddings, by Hamming distance. The epoch was chosen {chosen}')
    return (f'{classes}. Recall@K is exact: the query itself is left out by its index, tied negatives count as half'
            f'{of_training}.')


def model_card(model: EmbeddingNet, run: dict, data_base: DataBase | None, folder: str) -> str:
    """Return the model card, Markdown with YAML before it; without a data base it has no numbers."""
    import jinja2

    settings, results, seen = run['args'], None, []
    kinds = ('dense',) if settings.get('zero_shot') else ('dense', 'binary')
    if data_base is not None:
        seen = check_seen(seen_classes(run), data_base.class_names, allowed=True)
        results = {**measure(data_base, tuple(settings['recalls']), CPU, kinds), 'open_set': measure_open_set(
            *data_base.tensors()), 'measured_on': {
            'data_name': settings['data_name'], 'crop_type': settings['crop_type'], 'flip_tta': model.config.flip_tta,
            'image_size': model.config.image_size, 'resize_size': settings['resize_size'],
            'classes': len(data_base.class_names), 'seen_classes': len(seen)}}
    metrics = [{'type': f'{kind} {name}', 'value': round(value, 2)} for kind in kinds if results
               for name, value in results[kind].items() if name not in NUMBERS_OF_QUERIES]
    template = jinja2.Template((Path(__file__).parent / 'templates/model_card.md').read_text(), trim_blocks=True,
                               undefined=jinja2.StrictUndefined)
    return template.render(
        name=json.dumps(str(settings.get('run'))), title=settings.get('run'), made_by=MADE_HERE, settings=settings,
        config=model.config, feature_dim=model.feature_dim, interpolation=model.interpolation,
        table=results and format_results(results), metrics=json.dumps(metrics),
        data_name=json.dumps(settings['data_name']), protocol=describe_protocol(run, len(seen)),
        origin=describe_origin(run), folder=Path(folder).resolve().name)


def write_folder(model: EmbeddingNet, run: dict, data_base: DataBase | None, folder: str) -> None:
    """Write weights, settings and a model card; the card comes last."""
    from safetensors.torch import save

    weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    config = {'made_by': MADE_HERE, **{name: value for name, value in run.items() if name != 'state_dict'}}
    contents = {'model.safetensors': save(weights, {'format': 'pt', 'made_by': MADE_HERE}),
                'config.json': json.dumps(config, indent=2, default=str).encode(),
                'README.md': model_card(model, run, data_base, folder).encode()}
    for name in FOLDER_FILES:
        write_atomically(Path(folder) / name, lambda file, name=name: file.write(contents[name]))


# ---------------------------------------------------- main --------------------------------------------------------
def export(args, model: EmbeddingNet, run: dict, bench: Bench) -> None:
    """Write what the command line asks for, each file after its first comparison."""
    files, backbone, about = targets(args), model.config.backbone_type, describe_input(model, run)
    program = trace(model) if args.onnx is not None or args.torch is not None else None
    small = next(iter(bench.expected.subsets.values())).features[:len(bench.images)]

    def keep(flag: str, contents: bytes, kind: type) -> None:
        network = kind(contents, model.feature_dim)
        if flag != 'onnx int8':
            check_equal(network, bench.images, small, f'--{flag}')
        write_atomically(files[flag], lambda file: file.write(contents))
        bench.add(files[flag].name, network, len(contents))

    if args.onnx is not None:
        whole = to_onnx(program, about, backbone)
        keep('onnx', whole, OnnxNetwork)
        if args.int8:
            keep('onnx int8', quantise(whole, bench.calibration_images(), about, backbone), OnnxNetwork)
    if args.torch is not None:
        keep('torch', to_torch(program, about), TorchNetwork)
    if args.folder is not None:
        whole = bench.data is not None and args.num_images is None  # a part of the images would flatter the model
        write_folder(model, run, bench.expected if whole else None, args.folder)
        loaded, _ = load_model(args.folder, CPU)
        bench.add(Path(args.folder).name, loaded, (Path(args.folder) / FOLDER_FILES[0]).stat().st_size)


def main(args) -> None:
    """Export what the command line names, and print what was compared."""
    file = find_result('--model', RunFiles.ENDINGS['model'], args.model, args.results_dir)
    model, run = load_model(file, CPU)
    for flag, target in targets(args).items():
        make_folder(f'--{flag.split()[0]}', target.parent)
    bench = Bench(model, run, args)
    export(args, model, run, bench)
    data_base = file.with_name(file.name.replace(RunFiles.ENDINGS['model'], RunFiles.ENDINGS['data_base']))
    if args.num_images is None and data_base != file and data_base.is_file():
        metrics = measure(load_data_base(data_base), (1,), CPU)
        print(f'R@1 of {data_base.name}: {metrics["dense"]["R@1"]:.2f}, binary {metrics["binary"]["R@1"]:.2f}')
    what = f'{len(bench.expected.test.images):,} test images' if bench.data is not None else 'random pixels'
    print(f'{what}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}:\n{bench.table()}')
    print('written: ' + ', '.join(map(str, targets(args).values())))


if __name__ == '__main__':
    run_script(lambda: main(ARGS))

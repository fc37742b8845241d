"""Model files, `{run}_model.pth` and what export.py writes: what they hold, and how to load them."""
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch

from common.errors import UserError, reason_of
from common.files import LARGEST_FEATURE_DIM, LARGEST_SIDE, check_fields, is_folder_name, is_whole, load
from model import EmbeddingNet, NetConfig
from retrieval.onnx_file import OnnxNet, load_onnx_file

# The settings of a run that are used after the training; model files and data bases hold them as `args`.
SAVED_SETTINGS = {
    'data_name': is_folder_name, 'crop_type': lambda value: value in ('uncropped', 'cropped'),
    'batch_size': is_whole(1), 'resize_size': is_whole(0, LARGEST_SIDE),
    'amp': lambda value: value in ('auto', 'on', 'off'),
    'recalls': lambda value: len(value) > 0 and all(map(is_whole(1), value)) and list(value) == sorted(value)}
MODEL_SCHEMA = {'config': dict, 'state_dict': dict, 'args': dict}


def load_model(path: str | Path, device: torch.device | str = 'cpu') -> tuple[EmbeddingNet | OnnxNet, dict]:
    """Build the network of a `{run}_model.pth`, or of a folder or an ONNX file of export.py.

    Returns:
        the network, and the file's contents.

    Raises:
        UserError: as `load_model_file`, or if an ONNX file is asked to run elsewhere than on the CPU.
    """
    check_device(path, device)
    contents = load_model_file(path)
    if 'network' in contents:
        return contents['network'], contents
    try:
        model = EmbeddingNet(NetConfig(**contents['config']), 'none')
        expected = model.state_dict()
        for name, value in contents['state_dict'].items():
            if name in expected and value.is_floating_point() != expected[name].is_floating_point():
                raise TypeError(f'{name} is of {value.dtype}')
        model.load_state_dict(contents['state_dict'])
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f'{path} does not fit its own description ({reason_of(error)}); it was damaged or made by '
                        'another version') from None
    return model.to(device, memory_format=torch.channels_last).eval(), contents


def check_device(path: str | Path, device: torch.device | str) -> None:
    """Raise a UserError if a file is an ONNX file and the device is not the CPU."""
    if Path(path).suffix == '.onnx' and torch.device(device).type != 'cpu':
        raise UserError(f'--device {device}: {path} is an ONNX file, which runs on the CPU; add --device cpu, or name '
                        'the model that it was exported from')


def load_model_file(path: str | Path) -> dict:
    """Load a `{run}_model.pth`, or a folder of export.py: {'config', 'state_dict', 'args', ...}.

    An ONNX file, FILE.onnx, has `network` and `fingerprint` in place of `state_dict`.

    Raises:
        UserError: if the file is missing, corrupt, or not a model of this project.
    """
    path = Path(path)
    if path.is_dir():
        contents = load_exported_folder(path)
    else:
        contents = load_onnx_file(path) if path.suffix == '.onnx' else load(path, 'model', MODEL_SCHEMA)
    check_fields(contents['args'], SAVED_SETTINGS, path, 'model')
    check_fields(contents['config'], {'feature_dim': is_whole(0, LARGEST_FEATURE_DIM),
                                      'image_size': is_whole(1, LARGEST_SIDE)}, path, 'model')
    if 'network' not in contents and not all(map(is_plain_tensor, contents['state_dict'].values())):
        raise UserError(f'{path} is not a valid model: its state_dict holds other things than plain tensors; do not '
                        'trust this file')
    return contents


def is_plain_tensor(value) -> bool:
    """Tell whether a value of an untrusted file is a dense tensor, real and not larger in memory than in the file."""
    return (torch.is_tensor(value) and value.layout == torch.strided and value.device.type == 'cpu'
            and not value.is_quantized and not value.is_complex() and not value.is_neg()
            and value.numel() * value.element_size() <= value.untyped_storage().nbytes())


def load_exported_folder(folder: Path) -> dict:
    """Load config.json and model.safetensors of a folder as one dict; raises UserError as `load` does."""
    if not (folder / 'config.json').is_file():
        raise UserError(f'{folder} holds no config.json; name a model file, or a folder that export.py wrote')
    try:
        from safetensors.torch import load_file

        contents = {**json.loads((folder / 'config.json').read_text(encoding='utf-8')),
                    'state_dict': load_file(folder / 'model.safetensors')}
    except ImportError:
        raise UserError(f'{folder} holds a model as safetensors; to read it: pip install safetensors') from None
    except Exception as error:  # safetensors has errors of its own, and a damaged JSON file raises several
        raise UserError(f'{folder} cannot be read as a model ({reason_of(error)})') from None
    check_fields(contents, MODEL_SCHEMA, folder, 'model')
    return contents


def model_contents(model: EmbeddingNet, origin: dict) -> dict:
    """Return what a model file holds: the architecture, the weights, and how they were made (`args` and more)."""
    return {'config': asdict(model.config), 'state_dict': model.state_dict(), **origin}


def model_fingerprint(contents: dict) -> str:
    """Return a hexadecimal hash of a model file's contents, equal for two models of equal architecture and weights.

    An ONNX file in float32 holds that of the model that it was exported from, one in 8-bit integers another one.
    """
    if 'network' in contents:
        return contents['fingerprint']
    digest = hashlib.sha256(json.dumps(contents['config'], sort_keys=True).encode())
    for name, value in sorted(contents['state_dict'].items()):
        digest.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

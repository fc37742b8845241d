"""Pretrained weights: download them, read them from a file, and load them into a network without its head."""
import pickle
import urllib.error
import urllib.request

import torch
from torch import nn

from common.errors import UserError, reason_of
from common.files import load

NO_DOWNLOAD = 'download the file elsewhere and pass it as --weights FILE, or train from scratch with --weights none'
HUB_FILES = ('model.safetensors', 'pytorch_model.bin')
HUB_TIMEOUT = 10  # seconds
WRAPPERS = ('state_dict', 'model', 'model_state_dict')  # keys under which checkpoints hold a state dict
PREFIXES = ('module.', '_orig_mod.')  # of DataParallel and torch.compile


def load_weights(weights: str, url: str) -> dict | None:
    """Return the state dict that `--weights` names: None for `none`, a download for `imagenet`, else a file.

    The download is cached and checked against the hash in its file name.
    """
    if weights == 'none':
        return None
    if weights != 'imagenet':
        return read_weights(weights)
    try:
        return torch.hub.load_state_dict_from_url(url, map_location='cpu', check_hash=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # RuntimeError: the hash differs
        raise UserError(f'the ImageNet weights could not be downloaded from {url} ({reason_of(error)}); {NO_DOWNLOAD}'
                        ) from None


def read_weights(file: str) -> dict:
    """Read a state dict from a file of torch.save, also from within a checkpoint, or from a .safetensors file.

    Raises:
        UserError: if there is none in the file.
    """
    if file.endswith('.safetensors'):
        return read_safetensors(file)
    contents = load(file, 'weights file')
    if isinstance(contents, dict) and {'config', 'state_dict', 'args'} <= contents.keys():
        raise UserError(f'--weights {file} is the model of a run, not the weights of a backbone; to start from it, use '
                        f'--init {file}')
    top = contents
    for key in WRAPPERS:
        if isinstance(contents, dict) and isinstance(contents.get(key), dict):
            contents = contents[key]
    if not isinstance(contents, dict) or not contents or not all(
            isinstance(key, str) and torch.is_tensor(value) for key, value in contents.items()):
        found = f': its keys are {", ".join(map(str, list(top)[:5]))}' if isinstance(top, dict) and top else ''
        raise UserError(f'--weights {file} holds no state dict (a dict of tensors by name){found}')
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in contents):
            contents = {key.removeprefix(prefix): value for key, value in contents.items()}
    return contents


def read_safetensors(file: str) -> dict:
    """Read a .safetensors file, as the Hugging Face hub has them; raises UserError if it cannot be read."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f'--weights {file}: to read it, pip install safetensors') from None
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f'--weights {file} cannot be read ({reason_of(error)})') from None


def check_hub(repository: str) -> None:
    """Check that a model of the Hugging Face hub is in the local cache, or that the hub answers.

    timm itself tries for almost a minute.

    Raises:
        UserError: if it does neither.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if any(isinstance(try_to_load_from_cache(repository, name), str) for name in HUB_FILES):
        return
    request = urllib.request.Request(constants.ENDPOINT, method='HEAD')
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        return  # it answers, whatever it says
    except OSError as error:
        raise UserError(f'{constants.ENDPOINT} cannot be reached ({reason_of(error)}); on another machine download '
                        f'{constants.ENDPOINT}/{repository}/resolve/main/{HUB_FILES[0]} and pass that file as --weights'
                        ) from None


def fill_backbone(module: nn.Module, state_dict: dict | None, head: tuple[str, ...], name: str) -> nn.Module:
    """Load a state dict strictly, except for the keys of the classification head, which start with one of `head`."""
    if state_dict is None:
        return module
    state_dict = {key: value for key, value in state_dict.items() if not key.startswith(head)}
    expected = module.state_dict()
    missing = [key for key in expected if key not in state_dict and not key.endswith('num_batches_tracked')]
    unexpected = [key for key in state_dict if key not in expected]
    reshaped = [key for key in expected if key in state_dict
                and getattr(state_dict[key], 'shape', None) != expected[key].shape]
    if missing or unexpected or reshaped:
        raise UserError(f'--weights do not fit {name}: {len(missing)} of its {len(expected)} tensors are missing, '
                        f'{len(unexpected)} are unexpected, {len(reshaped)} have another shape (for instance '
                        f'{(missing + unexpected + reshaped)[0]}); pass the weights of {name}')
    module.load_state_dict(state_dict, strict=False)  # files of old PyTorch lack num_batches_tracked
    return module

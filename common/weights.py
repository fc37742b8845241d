"""Pretrained weights: download them, read them from a file, and load them into a network without its head."""
import pickle

import torch
from torch import nn

from common.errors import UserError, reason_of
from common.files import load

NO_DOWNLOAD = 'download the file elsewhere and pass it as --weights FILE, or train from scratch with --weights none'


def load_weights(weights: str, url: str) -> dict | None:
    """Return the state dict that `--weights` names: None for `none`, a download for `imagenet`, else a file.

    The download is cached and checked against the hash in its file name.
    """
    if weights == 'none':
        return None
    if weights != 'imagenet':
        contents = load(weights, 'weights file')
        if isinstance(contents, dict) and {'config', 'state_dict', 'args'} <= contents.keys():
            raise UserError(f'--weights {weights} is the model of a run, not the weights of a backbone; to start from '
                            f'it, use --init {weights}')
        contents = contents.get('state_dict', contents) if isinstance(contents, dict) else None
        if not isinstance(contents, dict) or not contents or not all(
                isinstance(key, str) and torch.is_tensor(value) for key, value in contents.items()):
            raise UserError(f'--weights {weights} holds no state dict (a dict of tensors by name)')
        return contents
    try:
        return torch.hub.load_state_dict_from_url(url, map_location='cpu', check_hash=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # RuntimeError: the hash differs
        raise UserError(f'the ImageNet weights could not be downloaded from {url} ({reason_of(error)}); {NO_DOWNLOAD}'
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

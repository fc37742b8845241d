"""ONNX files of export.py: a model in onnxruntime, on the CPU, that is called like an EmbeddingNet.

    network = load_onnx_file('model.onnx')['network']      # `load_model` does the same for every kind of model file

Nothing of the file is executed but its graph. Its metadata say what model it holds and how images are prepared.
"""
import json
from pathlib import Path

import torch
from torch import nn

from common.errors import UserError, reason_of
from common.files import check_fields
from model import NetConfig

SCHEMA = {'config': dict, 'args': dict, 'fingerprint': str,
          'interpolation': lambda name: name in ('bilinear', 'bicubic')}
TOLERANCE = 1e-3  # largest difference in an embedding; that of two float32 engines is about 1e-6


class OnnxNet(nn.Module):
    """The graph of an ONNX file, with as many threads as torch.

    Attributes:
        metadata: of the file, {str: str}.
        config, interpolation: as those of an EmbeddingNet; set by `load_onnx_file`.
    """

    def __init__(self, contents: bytes):
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')  # or idle threads slow torch down
        self.session = onnxruntime.InferenceSession(contents, options, providers=['CPUExecutionProvider'])
        self.metadata = self.session.get_modelmeta().custom_metadata_map
        self.feature_dim = self.session.get_outputs()[0].shape[-1]
        self.mean = torch.empty(0)  # that of the pixels is in the graph; this one says where images go, to the CPU

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (N, D), float32, of uint8 RGB images (N, 3, S, S)."""
        return torch.from_numpy(self.session.run(['embeddings'], {'images': images.numpy()})[0])


@torch.no_grad()
def embed_probe(network: nn.Module, side: int) -> torch.Tensor:
    """Return the embedding (D,) of an image of side px that tells networks apart."""
    pixels = torch.arange(3 * side**2) * 37 % 256
    return network(pixels.to(torch.uint8).view(1, 3, side, side))[0]


def load_onnx_file(path: Path) -> dict:
    """Load an ONNX file as what a model file holds, with `network` and `fingerprint` in place of `state_dict`.

    Raises:
        UserError: if onnxruntime is missing, or the file is missing, damaged, or not one of export.py.
    """
    if not path.is_file():
        raise UserError(f'there is no model {path}')
    try:
        network = OnnxNet(path.read_bytes())
    except ImportError:
        raise UserError(f'{path} needs onnxruntime; install it with: pip install onnxruntime') from None
    except Exception as error:  # onnxruntime raises errors of many types
        raise UserError(f'{path} cannot be read as an ONNX file ({reason_of(error)})') from None
    metadata = network.metadata
    missing = [key for key in ('fingerprint', 'network', 'origin', 'interpolation') if key not in metadata]
    if missing:
        raise UserError(f'{path} was not written by export.py of this version: its metadata lack '
                        f'{", ".join(missing)}; export the model again')
    try:
        contents = {**json.loads(metadata['origin']), 'config': json.loads(metadata['network']), 'network': network,
                    'fingerprint': metadata['fingerprint'], 'interpolation': metadata['interpolation']}
        network.config, network.interpolation = NetConfig(**contents['config']), contents['interpolation']
        side = network.config.image_size
        interface = [(value.name, value.type, value.shape[1:])
                     for value in (*network.session.get_inputs(), *network.session.get_outputs())]
        if interface != [('images', 'tensor(uint8)', [3, side, side]),
                         ('embeddings', 'tensor(float)', [network.config.feature_dim or network.feature_dim])]:
            raise ValueError(f'its graph maps {interface}')
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f'{path} does not fit its own description ({reason_of(error)}); it was damaged or made by '
                        'another version') from None
    check_fields(contents, SCHEMA, path, 'model')
    check_probe(network, path)
    return contents


def check_probe(network: OnnxNet, path: Path) -> None:
    """Raise a UserError if the file embeds otherwise than its model: ONNX has no checksums, and converters of other
    programs keep the metadata. Files in 8-bit integers hold no probe, since processors round them differently.
    """
    if 'probe' in network.metadata:
        try:
            expected = torch.tensor(json.loads(network.metadata['probe']))
            difference = float((embed_probe(network, network.config.image_size) - expected).abs().max())
        except Exception as error:  # onnxruntime and torch raise errors of many types
            raise UserError(f'{path} cannot embed an image ({reason_of(error)})') from None
        if not difference <= TOLERANCE:  # NaN is not
            raise UserError(f'{path} does not embed as the model that it names (it differs by {difference:.2g}): it '
                            'was damaged, or changed by another program; export the model again')

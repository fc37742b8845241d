"""Tiny runs that are trained in this process, without their curves, which take longer to draw than the run to train."""
from pathlib import Path

import pytest
import torch
from conftest import call_main
from faults import TINY

import train
from common.results import RunFiles
from training.options import RunOptions, parse_options

NAME = 'car_timm-test_resnet_balanced_proxy_16'  # of a run with TINY


def draw_nothing(_table, target: Path, _title) -> Path:
    """Write empty curves."""
    for file in (target, target.with_suffix('.pdf')):
        file.write_bytes(b'')
    return target


def options_of(data_path: Path, results: Path, *words) -> RunOptions:
    """Return the options of a run with TINY."""
    [options] = parse_options([str(word) for word in (
        *TINY, '--num_workers', 0, '--data_path', data_path, '--results_dir', results, *words)])
    return options


def train_tiny(data_path: Path, results: Path, *words) -> Path:
    """Call train.py's main with TINY; returns the folder with the run's files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'draw_curves', draw_nothing)
        call_main(train, *TINY, '--num_workers', 0, '--data_path', data_path, '--results_dir', results, *words)
    return results


def train_in_group(data_path: Path, results: Path, *words) -> None:
    """Train a run in a process that has joined its group already."""
    options = options_of(data_path, results, *words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'draw_curves', draw_nothing)
        train.train(options, RunFiles(results, options.run), torch.device('cpu'))

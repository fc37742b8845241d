"""The statistics of a run as a CSV file, and what its files say of the code and the machine that made them."""
import subprocess

import pandas as pd
import pytest
import torch

from common.errors import UserError
from training import statistics
from training.statistics import describe_split, provenance, read_statistics, save_statistics, split_fingerprint

SPLIT = {'train': {'a': ['1.jpg', '2.jpg'], 'b': ['3.jpg']}, 'test': {'c': ['4.jpg', '5.jpg']}}
ROWS = [{'epoch': 1, 'loss': 2.5, 'dense_R@1': 100 / 3}, {'epoch': 2, 'loss': 1.25, 'dense_R@1': 200 / 3}]


def test_statistics_are_read_as_they_were_saved_to_the_last_digit(tmp_path):
    save_statistics(ROWS, {}, tmp_path / 's.csv')
    assert read_statistics(tmp_path / 's.csv').to_dict('records') == ROWS


def test_settings_and_provenance_stand_behind_what_was_measured(tmp_path):
    save_statistics(ROWS, {'recalls': (1, 2), 'lr': 0.1, 'margin': None}, tmp_path / 's.csv', {'torch': '2.9'})
    table = pd.read_csv(tmp_path / 's.csv', dtype=str)
    assert list(table) == ['epoch', 'loss', 'dense_R@1', 'args.recalls', 'args.lr', 'args.margin', 'made.torch']
    assert table['args.recalls'].tolist() == ['1,2', '1,2']
    assert (table['args.lr'][0], table['made.torch'][1]) == ('0.1', '2.9')
    assert table['args.margin'].isna().all()


@pytest.mark.parametrize('text', ['', 'loss\n1\n', 'epoch,loss\n', 'epoch,loss\n1,2\n4,5,6\n', 'epoch\nx\n',
                                  'epoch\n-1\n', 'epoch,loss\n1,"2\n'])
def test_a_file_that_holds_no_statistics_is_refused(tmp_path, text):
    (tmp_path / 's.csv').write_text(text)
    with pytest.raises(UserError, match=r's\.csv is no statistics file') as error:
        read_statistics(tmp_path / 's.csv')
    assert '\n' not in str(error.value)


def test_bytes_that_are_no_text_and_a_missing_file_are_refused(tmp_path):
    (tmp_path / 's.csv').write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match='is no statistics file'):
        read_statistics(tmp_path / 's.csv')
    with pytest.raises(UserError, match='there is no statistics file .*; train.py writes them'):
        read_statistics(tmp_path / 'nowhere.csv')


@pytest.mark.parametrize(('outputs', 'commit', 'changed'), [
    ({'rev-parse': 'ab12\n', 'status': ''}, 'ab12', 'no'),
    ({'rev-parse': 'ab12\n', 'status': ' M x.py\n'}, 'ab12', 'yes'), ({}, 'unknown', 'unknown')])
def test_provenance_names_commit_versions_device_and_processes(monkeypatch, outputs, commit, changed):
    def run(words, **_):
        if words[3] not in outputs:
            raise subprocess.CalledProcessError(128, words)
        return subprocess.CompletedProcess(words, 0, outputs[words[3]])

    monkeypatch.setattr(statistics.subprocess, 'run', run)
    made = provenance(torch.device('cpu'))
    assert (made['commit'], made['changed_since']) == (commit, changed)
    assert (made['torch'], made['device'], made['processes']) == (str(torch.__version__), 'cpu', 1)


def test_a_split_is_known_by_its_classes_images_and_subsets():
    one = split_fingerprint(SPLIT)
    assert one == split_fingerprint({'train': {'a': ['1.jpg', '2.jpg'], 'b': ['3.jpg']},
                                     'test': {'c': ['4.jpg', '5.jpg']}})
    for other in ({**SPLIT, 'test': {'c': ['4.jpg']}}, {**SPLIT, 'train': {'a': ['2.jpg', '1.jpg'], 'b': ['3.jpg']}},
                  {**SPLIT, 'query': {}}):
        assert split_fingerprint(other) != one


def test_the_data_of_a_run_are_described_by_their_numbers():
    described = describe_split({**SPLIT, 'class_names': {'a': 'Audi'}})
    assert described['images'] == 'train: 3 of 2 classes, test: 2 of 1 classes'

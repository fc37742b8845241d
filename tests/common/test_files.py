"""Files are written whole or not at all, and read without executing anything in them."""
import errno
import json
import multiprocessing
import os
import zipfile
from types import SimpleNamespace

import pytest
import torch

from common import files
from common.errors import UserError
from common.files import (MADE_HERE, check_fields, check_paths, check_replaceable, image_file, is_folder_name,
                          is_whole, load, lock, make_folder, read_json, readable, remove_torn, save, save_json,
                          stamp_of, write_atomically)


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------- writing ----------------------------------------------------
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    file = tmp_path / 'a.txt'
    write_atomically(file, lambda target: target.write(b'old'))

    def fail(target):
        target.write(b'half of the n')
        raise KeyError('a bug')

    with pytest.raises(KeyError):
        write_atomically(file, fail)
    assert (file.read_bytes(), names_in(tmp_path)) == (b'old', ['a.txt'])
    write_atomically(file, lambda target: target.write(b'new'))
    assert (file.read_bytes(), names_in(tmp_path)) == (b'new', ['a.txt'])


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda number: events.append(os.fstat(number).st_size) or fsync(number))
    monkeypatch.setattr(os, 'replace', lambda *paths: events.append('renamed') or replace(*paths))
    write_atomically(tmp_path / 'a.txt', lambda target: target.write(b'12345'))
    assert events == [5, 'renamed']


@pytest.mark.parametrize('hidden', [False, True])
def test_a_full_disk_is_one_line_that_says_that_the_old_file_is_untouched(tmp_path, hidden):
    def fail(_target):
        try:
            raise OSError(errno.ENOSPC, 'No space left on device')
        except OSError:
            if hidden:  # as torch.save does
                raise RuntimeError('unexpected pos 64 vs 0') from None
            raise

    with pytest.raises(UserError, match=r'cannot write .*a\.txt: No space left on device; .* untouched'):
        write_atomically(tmp_path / 'a.txt', fail)
    assert names_in(tmp_path) == []


def test_only_temporary_files_of_the_given_names_are_removed(tmp_path):
    for name in ('.a[1].txt.0123abcd', '.a1.txt.0123abcd', '.a[1].txt.0123abc', '.a[1].txt.0123abcx', 'a[1].txt'):
        (tmp_path / name).touch()
    remove_torn(tmp_path, ['a[1].txt'])
    assert names_in(tmp_path) == ['.a1.txt.0123abcd', '.a[1].txt.0123abc', '.a[1].txt.0123abcx', 'a[1].txt']


def hold(path, entered, leave) -> None:
    with lock(path, 'taken'):
        entered.set()
        leave.wait(60)


def test_a_lock_is_held_by_one_process_and_freed_when_it_is_killed(tmp_path):
    context = multiprocessing.get_context('fork')
    entered, leave = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / '.lock', entered, leave))
    process.start()
    assert entered.wait(60)
    with pytest.raises(UserError, match='taken'), lock(tmp_path / '.lock', 'taken'):
        pass
    process.kill()
    process.join()
    with lock(tmp_path / '.lock', 'taken'):
        assert (tmp_path / '.lock').exists()
    assert names_in(tmp_path) == []


def test_a_folder_that_cannot_be_written_to_is_named_with_its_flag(tmp_path):
    assert make_folder('--results_dir', tmp_path / 'a/b').is_dir()
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='--results_dir .*file cannot be written to'):
        make_folder('--results_dir', tmp_path / 'file')


def test_files_from_elsewhere_are_not_replaced(tmp_path):
    assert check_replaceable(tmp_path / 'new.html') == tmp_path / 'new.html'
    (tmp_path / 'ours.html').write_text(f'<!-- {MADE_HERE} -->')
    check_replaceable(tmp_path / 'ours.html')
    (tmp_path / 'theirs.html').write_text('mine')
    for target in (tmp_path / 'theirs.html', tmp_path):
        with pytest.raises(UserError, match='--figure .* was not written by these scripts'):
            check_replaceable(target, '--figure')


# ---------------------------------------------------- reading ----------------------------------------------------
CONTENTS = {'rows': [{'epoch': 1, 'loss': 0.5}], 'sizes': (1, 2), 'state': {'w': torch.arange(6).view(2, 3)}, 'n': None}


def test_contents_are_loaded_as_they_were_saved(tmp_path):
    save(CONTENTS, tmp_path / 'c.pth')
    loaded = load(tmp_path / 'c.pth', 'checkpoint')
    assert torch.equal(loaded['state'].pop('w'), CONTENTS['state']['w'])
    assert loaded == {**CONTENTS, 'state': {}}


def test_a_bit_that_flipped_in_a_tensor_is_noticed(tmp_path):
    file = tmp_path / 'c.pth'
    save({'w': torch.full((64,), 1.5)}, file)
    data = bytearray(file.read_bytes())
    position = data.index(torch.full((64,), 1.5).numpy().tobytes()) + 100
    data[position] ^= 4
    file.write_bytes(data)
    assert zipfile.is_zipfile(file)
    with pytest.raises(UserError, match=r'c\.pth cannot be read as a model: it is corrupt'):
        load(file, 'model')


def test_a_file_that_would_execute_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath('executed').touch, ())

    torch.save({'args': Evil()}, tmp_path / 'evil.pth')
    with pytest.raises(UserError, match='holds more than tensors and plain values'):
        load(tmp_path / 'evil.pth', 'model')
    assert names_in(tmp_path) == ['evil.pth']


@pytest.mark.parametrize('data', [b'', b'x', b'PK\x03\x04' + bytes(50)])
def test_a_file_that_is_something_else_is_refused(tmp_path, data):
    (tmp_path / 'c.pth').write_bytes(data)
    with pytest.raises(UserError, match=r'c\.pth cannot be read as a data base') as error:
        load(tmp_path / 'c.pth', 'data base')
    assert '\n' not in str(error.value)
    with pytest.raises(UserError, match='there is no data base'):
        load(tmp_path / 'd.pth', 'data base')


def test_fields_that_are_missing_or_do_not_fit_are_named(tmp_path):
    schema = {'epoch': is_whole(1, 9), 'args': dict, 'rows': lambda rows: len(rows) == 2}
    check_fields({'epoch': 9, 'args': {}, 'rows': [1, 2], 'more': 0}, schema, 'f.pth', 'checkpoint')
    with pytest.raises(UserError, match='is not a checkpoint of this project: it lacks epoch, rows'):
        check_fields({'args': {}}, schema, 'f.pth', 'checkpoint')
    for contents in ([1], None, 'text'):
        with pytest.raises(UserError, match='it lacks epoch, args, rows'):
            check_fields(contents, schema, 'f.pth', 'checkpoint')
    for epoch in (0, 10, 1.0, True, '1'):
        with pytest.raises(UserError, match='is not a valid checkpoint: epoch, rows cannot be used'):
            check_fields({'epoch': epoch, 'args': {}, 'rows': 7}, schema, 'f.pth', 'checkpoint')


def test_json_is_read_where_it_fits_and_none_otherwise(tmp_path):
    file = tmp_path / 'a.json'
    save_json({'id': 'x', 'n': 1}, file)
    assert read_json(file, {'id': str}) == json.loads(file.read_text()) == {'id': 'x', 'n': 1}
    assert read_json(file, {'id': int}) is None
    assert read_json(tmp_path / 'nowhere.json', {}) is None
    for data in (b'', b'{', b'[1]', b'\xff\xfe'):
        file.write_bytes(data)
        assert read_json(file, {'id': str}) is None


# ---------------------------------------------------- paths ------------------------------------------------------
@pytest.mark.parametrize('path', ['../x.jpg', '/x.jpg', 'a/../../x.jpg', '..', 'a\\..\\b', 'a\0b'])
def test_a_path_that_leaves_its_folder_is_refused(path):
    with pytest.raises(UserError, match=r'split\.pth: the image .* lies outside'):
        check_paths('split.pth', ['a/b.jpg', path])


def test_paths_inside_a_folder_pass_with_dots_in_their_names():
    check_paths('split.pth', ['a/b.jpg', 'a..b/c..jpg', '...', 'a/./b.jpg'])


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / 'root').mkdir()
    (tmp_path / 'root/a.jpg').touch()
    assert image_file(tmp_path / 'root', 'a.jpg') == tmp_path / 'root/a.jpg'
    (tmp_path / 'secret.jpg').touch()
    (tmp_path / 'root/b.jpg').symlink_to(tmp_path / 'secret.jpg')
    with pytest.raises(UserError, match='is a link out of its folder'):
        image_file(tmp_path / 'root', 'b.jpg')


def test_a_folder_name_is_no_path_not_hidden_and_printable():
    assert all(map(is_folder_name, ('car', 'my photos', 'ähren', 'a.b', 'a\u00a0b', '3\u202fPM', 'a\u3000', 'a\u200d')))
    assert not any(map(is_folder_name, ('a/b', '..', '.hidden', 'a\nb', 'a\x7f', 'a\udcff', '/a', 'a/', 3, None)))


@pytest.mark.parametrize('time', [2**63 + 10**18, -2**63 - 10**18])
def test_a_time_beyond_2262_is_a_stamp(tmp_path, monkeypatch, time):
    (tmp_path / 'x.jpg').write_bytes(b'x')
    monkeypatch.setattr('os.stat', lambda _: SimpleNamespace(st_size=1, st_mtime_ns=time))
    assert torch.tensor(stamp_of(tmp_path / 'x.jpg'))[1].sign() == (1 if time > 0 else -1)


def test_a_stamp_changes_with_size_or_time_and_is_none_without_a_file(tmp_path):
    file = tmp_path / 'a.txt'
    assert stamp_of(file) is None
    file.write_text('abc')
    os.utime(file, ns=(5, 10**18 + 7))
    assert stamp_of(file) == [3, 10**18 + 7]
    assert stamp_of(file / 'below') is None


def test_a_name_that_is_no_utf8_can_be_printed():
    name = os.fsdecode(b'caf\xe9.jpg')
    assert readable(name).encode().decode() == readable(name)
    assert readable('café.jpg') == 'café.jpg'
    assert files.LARGEST_SIDE > 0

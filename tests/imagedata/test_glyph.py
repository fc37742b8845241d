"""The data set `glyph`: characters that differ, and the same bytes for the same seed."""
import random

import numpy as np
import pytest
import torch
from raw_trees import write_image

from common.errors import UserError
from imagedata.glyph import GLYPH_SIZE, draw_glyph, drawable_characters, make_glyph


@pytest.fixture(scope='module')
def characters():
    return drawable_characters(120)


def pngs(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob('*.png')}


def test_characters_of_several_typefaces_come_simple_letters_first(characters):
    assert [character for character, _ in characters[:5]] == list('ABCDE')
    assert len({character for character, _ in characters}) == 120
    assert all(len(faces) >= 3 for _, faces in characters)


@pytest.mark.parametrize('lookalikes', ['Oo', 'Ss', 'Zz'])
def test_of_characters_that_look_alike_one_is_taken(characters, lookalikes):
    assert len(set(lookalikes) & {character for character, _ in characters}) == 1


@pytest.mark.slow
def test_glyph_has_hundreds_of_characters_that_differ():
    characters = drawable_characters(900)
    assert len({character for character, _ in characters}) == 900
    assert all(len(faces) >= 3 for _, faces in characters)
    lookalikes = {'A', '\u0391', '\u0410'}  # Latin, Greek, Cyrillic
    assert len(lookalikes & {character for character, _ in characters}) == 1
    with pytest.raises(UserError, match='--glyph_classes 100000 is too many'):
        drawable_characters(10**5)


def test_images_of_a_character_differ(characters):
    images = [draw_glyph(*characters[7], random.Random(seed)) for seed in (1, 1, 2)]
    assert images[0].size == (GLYPH_SIZE, GLYPH_SIZE)
    assert images[0].tobytes() == images[1].tobytes()
    assert images[0].tobytes() != images[2].tobytes()


def test_glyph_is_the_same_bytes_for_the_same_seed(tmp_path):
    for name, seed in (('one', 3), ('two', 3), ('three', 4)):
        (tmp_path / name).mkdir()
        make_glyph(tmp_path / name, 9, 2, seed)
    assert len(pngs(tmp_path / 'one')) == 18
    assert pngs(tmp_path / 'one') == pngs(tmp_path / 'two')
    assert pngs(tmp_path / 'one') != pngs(tmp_path / 'three')


def test_two_thirds_of_the_characters_are_training_classes(tmp_path):
    make_glyph(tmp_path, 9, 2, 0)
    assert [len(list((tmp_path / subset).iterdir())) for subset in ('train', 'test')] == [6, 3]


def test_glyph_made_with_other_settings_leaves_the_images_of_others(tmp_path):
    make_glyph(tmp_path, 6, 2, 0)
    write_image(tmp_path / 'train/mine/1.jpg', 1, 1)
    make_glyph(tmp_path, 9, 3, 0)
    assert (tmp_path / 'train/mine/1.jpg').is_file()
    assert len(pngs(tmp_path)) == 27


def test_glyph_made_with_the_same_settings_is_left_as_it_is(tmp_path):
    make_glyph(tmp_path, 6, 2, 0)
    next(tmp_path.glob('train/*/0000.png')).unlink()
    make_glyph(tmp_path, 6, 2, 0)
    assert len(pngs(tmp_path)) == 11


def test_a_folder_of_another_origin_is_not_drawn_into(tmp_path):
    (tmp_path / 'train').mkdir()
    with pytest.raises(UserError, match='holds train or test, but was not made by this script'):
        make_glyph(tmp_path, 6, 2, 0)


@pytest.mark.parametrize(('num_classes', 'num_images'), [(2, 2), (3, 1)])
def test_too_few_classes_or_images_are_refused(tmp_path, num_classes, num_images):
    with pytest.raises(UserError, match=f'--glyph_classes {num_classes} and --glyph_images {num_images}'):
        make_glyph(tmp_path, num_classes, num_images, 0)


def test_pixels_alone_do_not_tell_characters_apart(characters):
    """The nearest neighbour on raw pixels shows the same character, among 40, in less than 30 % of the cases."""
    labels = torch.arange(40).repeat_interleave(10)
    images = [np.asarray(draw_glyph(*characters[3 * label], random.Random(number)), np.float32)
              for number, label in enumerate(labels.tolist())]
    pixels = torch.from_numpy(np.stack(images)).flatten(1)
    features = torch.nn.functional.normalize(pixels - pixels.mean(1, keepdim=True), dim=-1)
    nearest = (features @ features.T).fill_diagonal_(-2).argmax(1)
    assert 1 / 40 < (labels[nearest] == labels).float().mean() < 0.3

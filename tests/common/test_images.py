"""Images of any origin: upright, 8-bit RGB, or broken."""
import numpy as np
import pytest
from PIL import Image
from raw_trees import HEIGHT, WIDTH, write_image

from common.images import BrokenImage, load_image, load_tile, open_image, resize_for, to_image


def test_test_images_are_resized_by_256_over_224():
    assert [resize_for(size) for size in (224, 48)] == [256, 54]


def test_16_bit_images_keep_their_greys(tmp_path):
    ramp = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    Image.fromarray(ramp).save(tmp_path / 'ramp.png')
    grey = np.asarray(load_image(tmp_path / 'ramp.png'))[..., 0]
    np.testing.assert_allclose(grey, ramp / 257, atol=1)


def test_photographs_are_turned_upright(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :15] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / 'photo.jpg', exif=exif)
    image = np.asarray(load_image(tmp_path / 'photo.jpg'))
    assert image.shape == (30, 20, 3)
    assert image[:10].mean() > 250
    assert image[20:].mean() < 5


@pytest.mark.parametrize(('mode', 'is_rgb'), [('RGB', True), ('L', False), ('P', False), ('RGBA', False)])
def test_an_image_of_any_mode_is_read_as_rgb_and_told_from_one_that_is(tmp_path, mode, is_rgb):
    write_image(tmp_path / 'x.png', 1, 1, mode)
    image, file_is_rgb = open_image(tmp_path / 'x.png')
    assert (image.mode, image.size, file_is_rgb) == ('RGB', (WIDTH, HEIGHT), is_rgb)


def test_floating_point_images_have_no_known_range(tmp_path):
    Image.fromarray(np.zeros((5, 7), np.float32)).save(tmp_path / 'x.tif')
    with pytest.raises(BrokenImage, match='floating-point'):
        load_image(tmp_path / 'x.tif')


def test_a_missing_file_is_broken(tmp_path):
    with pytest.raises(BrokenImage, match='No such file'):
        load_image(tmp_path / 'x.jpg')


def test_arrays_are_images_if_they_are_bytes():
    array = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    assert np.array_equal(to_image(array), array)
    for wrong in (array.astype(np.float32), array[..., :2], array[0, 0]):
        with pytest.raises(BrokenImage, match='expected a uint8 array'):
            to_image(wrong)


def test_a_tile_of_a_file_that_cannot_be_read_is_grey(tmp_path):
    write_image(tmp_path / 'x.png', 1, 1)
    tile, readable = load_tile(tmp_path / 'x.png', 32)
    assert (tile.size, readable) == ((32, 32), True)
    tile, readable = load_tile(tmp_path / 'gone.png', 32)
    assert (tile.size, readable, tile.getpixel((0, 0))) == ((32, 32), False, (0xBB,) * 3)

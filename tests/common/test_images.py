"""Images of any origin: upright, 8-bit RGB, or broken."""
import contextlib
import io
import subprocess
import sys

import numpy as np
import PIL
import pytest
from conftest import REPOSITORY
from PIL import Image, ImageOps
from raw_trees import HEIGHT, WIDTH, make_special_file, write_image

from common import images
from common.images import BrokenImage, load_image, load_tile, open_image, resize_for, to_image


def test_test_images_are_resized_by_256_over_224():
    assert [resize_for(size) for size in (224, 48)] == [256, 54]


def test_16_bit_images_keep_their_greys(tmp_path):
    ramp = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    Image.fromarray(ramp).save(tmp_path / 'ramp.png')
    grey = np.asarray(load_image(tmp_path / 'ramp.png'))[..., 0]
    np.testing.assert_allclose(grey, ramp / 257, atol=1)


@pytest.mark.parametrize('mode', ['I;16', 'I;16B', 'I'])
@pytest.mark.parametrize(('largest', 'divisor'), [(65535, 257), (255, 1)])
def test_16_bit_images_of_any_kind_are_converted_in_parts(mode, largest, divisor, monkeypatch):
    monkeypatch.setattr(images, 'ROWS_AT_ONCE', 3)
    values = np.random.default_rng(0).integers(0, largest + 1, (10, 7))
    values[9, 6] = largest  # in the last part
    image = Image.fromarray(values.astype(np.int32))
    if mode != 'I':
        image = Image.frombytes(mode, (7, 10), values.astype('>u2' if mode == 'I;16B' else '<u2').tobytes())
    assert np.array_equal(np.asarray(to_image(image))[..., 1], values // divisor)


@pytest.mark.slow
def test_a_large_16_bit_image_takes_little_memory(tmp_path):
    Image.fromarray(np.full((9000, 9500), 40000, np.uint16)).save(tmp_path / 'x.png')
    command = ('import pathlib, sys; from common.images import load_image; load_image(pathlib.Path(sys.argv[1])); '
               'print(pathlib.Path("/proc/self/status").read_text())')
    result = subprocess.run([sys.executable, '-c', command, tmp_path / 'x.png'], capture_output=True, check=True,
                            cwd=REPOSITORY, text=True)
    peak = int(result.stdout.split('VmHWM:')[1].split()[0])  # kB
    assert peak < 700_000  # the image 171 MB, its RGB pixels 342 MB


def test_a_photograph_of_108_megapixels_is_decoded_at_half_its_size(tmp_path):
    Image.new('L', (12_000, 9_000), 90).save(tmp_path / 'x.jpg')
    image = load_image(tmp_path / 'x.jpg')
    assert (image.size, image.getpixel((5999, 4499))) == ((6000, 4500), (90, 90, 90))


@pytest.mark.parametrize(('limit', 'shrink'), [(2000, 1), (1999, 2), (500, 2), (499, 4)])
@pytest.mark.parametrize('end', [None, -2])
def test_a_photograph_is_shrunk_no_more_than_it_must_be(tmp_path, monkeypatch, limit, shrink, end):
    monkeypatch.setattr(images, 'DECODED_PIXELS', limit)
    noise(40, 50).save(tmp_path / 'x.jpg')
    with Image.open(tmp_path / 'x.jpg') as image:
        image.draft(None, (50 // shrink, 40 // shrink))
        expected = np.asarray(image)
    (tmp_path / 'x.jpg').write_bytes((tmp_path / 'x.jpg').read_bytes()[:end])  # with and without its end marker
    assert np.array_equal(load_image(tmp_path / 'x.jpg'), expected)
    assert expected.shape[0] == 40 // shrink


@pytest.mark.parametrize(('name', 'options'), [('x.jpg', {}), ('x.png', {}), ('x.webp', {}),
                                               ('x.jpg', {'progressive': True})])
def test_an_image_of_too_many_pixels_is_refused(tmp_path, monkeypatch, name, options):
    monkeypatch.setattr(images, 'MAX_PIXELS', 1999)
    monkeypatch.setattr(images, 'DECODED_PIXELS', 1500)
    noise(40, 50).save(tmp_path / name, **options)
    with pytest.raises(BrokenImage, match='50 x 40 pixels exceed the limit of 1,.*: a decompression bomb?'):
        load_image(tmp_path / name)


def test_a_box_in_a_photograph_that_is_shrunk_holds_what_it_held(tmp_path, monkeypatch):
    monkeypatch.setattr(images, 'DECODED_PIXELS', 500)
    pixels = np.zeros((40, 50, 3), np.uint8)
    pixels[8:24, 16:32] = 255
    Image.fromarray(pixels).save(tmp_path / 'x.jpg', subsampling=0, quality=100)
    crop = images.open_stored(tmp_path / 'x.jpg').crop((16, 8, 32, 24))
    assert crop.size == (8, 8)
    assert np.asarray(crop).min() > 240


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


def test_all_eight_orientations_are_turned_as_pillow_turns_them(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for orientation in range(10):  # 0 and 9 are none
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / 'photo.png', exif=exif)
        with Image.open(tmp_path / 'photo.png') as image:
            assert np.array_equal(load_image(tmp_path / 'photo.png'), ImageOps.exif_transpose(image))


@pytest.mark.parametrize(('mode', 'is_rgb'), [('RGB', True), ('L', False), ('P', False), ('RGBA', False)])
def test_an_image_of_any_mode_is_read_as_rgb_and_told_from_one_that_is(tmp_path, mode, is_rgb):
    write_image(tmp_path / 'x.png', 1, 1, mode)
    image, file_is_rgb = open_image(tmp_path / 'x.png')
    assert (image.mode, image.size, file_is_rgb) == ('RGB', (WIDTH, HEIGHT), is_rgb)


def two_logos(mode: str):
    """Yield two images of one hidden colour, each transparent but for another half, and what they look like."""
    for half in (slice(0, 20), slice(20, 40)):
        pixels = np.full((10, 40, 4), (200, 30, 60, 0), np.uint8)
        pixels[:, half, 3] = 255
        expected = np.full((10, 40, 3), 255, np.uint8)
        expected[:, half] = (200, 30, 60)
        image = Image.fromarray(pixels)
        if mode in ('LA', 'L'):
            grey = np.full((10, 40, 2), (90, 0), np.uint8)
            grey[:, half, 1] = 255
            image = Image.fromarray(grey)
            expected[:, half] = 90
        if mode in ('P', 'L', 'RGB'):  # one palette index, grey or colour is transparent
            opaque = {'P': 0, 'L': 90, 'RGB': (200, 30, 60)}[mode]
            image = Image.new(mode, (40, 10), {'P': 1, 'L': 91, 'RGB': (200, 31, 60)}[mode])
            if mode == 'P':
                image.putpalette([200, 30, 60, 200, 30, 60])
            image.paste(opaque, (half.start, 0, half.stop, 10))
            image.info['transparency'] = {'P': 1, 'L': 91, 'RGB': (200, 31, 60)}[mode]
        if mode == 'PA':
            image = image.convert('PA')
        yield image, expected


@pytest.mark.parametrize(('mode', 'suffix'), [('RGBA', 'png'), ('RGBA', 'webp'), ('RGBA', 'tif'), ('LA', 'png'),
                                              ('P', 'png'), ('P', 'gif'), ('L', 'png'), ('RGB', 'png')])
def test_what_is_transparent_is_white(tmp_path, mode, suffix):
    for image, expected in two_logos(mode):
        options = {'lossless': True, 'exact': True} if suffix == 'webp' else {}
        image.save(tmp_path / f'logo.{suffix}', **options)
        assert np.array_equal(load_image(tmp_path / f'logo.{suffix}'), expected)


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'PA', 'P', 'L', 'RGB'])
def test_what_is_transparent_in_an_image_in_memory_is_white(mode):
    for image, expected in two_logos(mode):
        difference = np.abs(np.asarray(to_image(image)).astype(int) - expected)
        assert difference.max() <= (60 if mode == 'PA' else 0)  # the conversion to PA has a web palette


def test_half_transparent_pixels_are_half_white():
    assert to_image(Image.new('RGBA', (3, 2), (0, 100, 200, 128))).getpixel((0, 0)) == (127, 177, 227)


def test_an_alpha_channel_that_covers_all_changes_no_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.putalpha(255)
    assert np.array_equal(to_image(image), pixels)


def noise(height: int = 45, width: int = 70) -> Image.Image:
    """Return a photograph-like image whose sides are no multiples of a JPEG block."""
    rng = np.random.default_rng(3)
    ramp = np.add.outer(np.arange(height), np.arange(width))[..., None]
    return Image.fromarray((ramp + rng.integers(0, 60, (height, width, 3))).astype(np.uint8))


def bad_exif_blocks() -> list[bytes]:
    """Return EXIF blocks, damaged in many ways."""
    exif = Image.Exif()
    exif[0x010f] = 'Maker'
    exif[0x011a] = 72.0
    exif.get_ifd(0x8769)[0x829a] = 0.1
    block = exif.tobytes()
    rng = np.random.default_rng(0)
    blocks = [block[:6] + b'XX' + block[8:], block[:8], block[:11], block[:16], b'Exif\0\0', b'no EXIF at all']
    for _ in range(60):
        damaged = bytearray(block)
        for position in rng.integers(6, len(block), 3):
            damaged[position] = rng.integers(256)
        blocks.append(bytes(damaged))
    return blocks


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
def test_a_bad_exif_block_breaks_no_photograph(kind):
    noise().save(plain := io.BytesIO(), kind)
    expected = np.asarray(load_image(plain))
    for block in bad_exif_blocks():
        noise().save(file := io.BytesIO(), kind, exif=block)
        image = load_image(file)
        assert sorted(image.size) == sorted((70, 45))  # an orientation may have come about
        assert sorted(to_image(Image.open(file)).size) == sorted((70, 45))
        assert image.size != (70, 45) or np.asarray(image).sum() == expected.sum()


@pytest.mark.parametrize('options', [{}, {'progressive': True}, {'subsampling': 0, 'quality': 95},
                                     {'restart_marker_blocks': 3}])
@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
def test_a_jpeg_without_its_end_marker_is_read_if_its_pixels_are_whole(tmp_path, mode, options):
    noise().convert(mode).save(tmp_path / 'x.jpg', **options)
    data = (tmp_path / 'x.jpg').read_bytes()
    whole = np.asarray(load_image(tmp_path / 'x.jpg'))
    for ending in (b'', b'\xff', bytes(4096)):
        (tmp_path / 'x.jpg').write_bytes(data[:-2] + ending)
        assert np.array_equal(load_image(tmp_path / 'x.jpg'), whole)
        assert np.array_equal(load_image(io.BytesIO(data[:-2] + ending)), whole)
    for lost in (5, 8, *range(13, len(data), 97)):
        (tmp_path / 'x.jpg').write_bytes(data[:-lost])
        with pytest.raises(BrokenImage):
            load_image(tmp_path / 'x.jpg')


def test_a_progressive_jpeg_that_lacks_whole_scans_is_broken(tmp_path):
    noise().save(tmp_path / 'x.jpg', progressive=True)
    data = (tmp_path / 'x.jpg').read_bytes()
    scans = [start for start in range(len(data)) if data[start:start + 2] == b'\xff\xda']
    tables = [data.rindex(b'\xff\xc4', 0, start) for start in scans[1:]]  # each scan's Huffman tables come before it
    for start in (*scans[1:], *tables):
        (tmp_path / 'x.jpg').write_bytes(data[:start])
        with pytest.raises(BrokenImage, match='truncated'):
            load_image(tmp_path / 'x.jpg')


@pytest.mark.parametrize(('num_scans', 'is_read'), [(80, True), (1000, False)])
def test_a_jpeg_of_a_thousand_scans_is_broken(tmp_path, num_scans, is_read):
    noise().save(tmp_path / 'x.jpg', progressive=True)
    data = (tmp_path / 'x.jpg').read_bytes()
    last = data[data.rindex(b'\xff\xda'):-2]
    (tmp_path / 'x.jpg').write_bytes(data[:-2] + num_scans * last + data[-2:])
    for file in (tmp_path / 'x.jpg', io.BytesIO((tmp_path / 'x.jpg').read_bytes())):
        with contextlib.nullcontext() if is_read else pytest.raises(BrokenImage, match='more than 100 scans'):
            assert load_image(file).size == (70, 45)


def test_a_tile_decodes_no_more_of_a_photograph_than_it_shows(tmp_path, monkeypatch):
    noise(400, 600).save(tmp_path / 'x.jpg')
    sizes, pad = [], images.ImageOps.pad
    monkeypatch.setattr(images.ImageOps, 'pad', lambda image, *rest, **more: sizes.append(image.size) or pad(
        image, *rest, **more))
    tile, is_read = load_tile(tmp_path / 'x.jpg', 48)
    assert is_read
    assert sizes == [(150, 100)]
    whole = pad(load_image(tmp_path / 'x.jpg'), (48, 48), color='white')
    assert np.abs(np.asarray(tile).astype(int) - np.asarray(whole)).mean() < 2


def test_what_phones_append_to_a_photograph_is_not_taken_for_scans(tmp_path):
    noise().save(tmp_path / 'x.jpg', progressive=True)
    whole = load_image(tmp_path / 'x.jpg')
    with open(tmp_path / 'x.jpg', 'ab') as file:
        file.write(200 * b'video\xff\xda')
    assert np.array_equal(load_image(tmp_path / 'x.jpg'), whole)


@pytest.mark.parametrize(('name', 'kind'), [('x.gif', 'GIF'), ('x.webp', 'WEBP'), ('x.apng', 'PNG'), ('x.tif', 'TIFF'),
                                            ('x.mpo', 'MPO')])
def test_of_several_images_the_first_is_read(tmp_path, name, kind):
    Image.new('RGB', (9, 7), 'red').save(tmp_path / name, kind, save_all=True,
                                         append_images=[Image.new('RGB', (9, 7), 'blue')])
    image = load_image(tmp_path / name)
    assert image.size == (9, 7)
    np.testing.assert_allclose(image.getpixel((4, 4)), (255, 0, 0), atol=2)


@pytest.mark.parametrize(('name', 'mode', 'options', 'tolerance'), [
    ('x.jpg', 'CMYK', {}, 3), ('x.tif', 'CMYK', {}, 1), ('x.png', 'P', {}, 3),
    pytest.param('x.tif', 'YCbCr', {}, 3, marks=pytest.mark.skipif(int(PIL.__version__.split('.')[0]) < 13,
                                                                   reason='Pillow before 13 cannot read such a file')),
    ('x.tif', 'P', {'compression': 'tiff_lzw'}, 3), ('x.png', '1', {}, 3), ('x.tif', '1', {'compression': 'group4'}, 3),
    ('x.jpg', 'L', {}, 3), ('x.jp2', 'RGBA', {}, 3), ('x.png', 'RGB', {'icc_profile': b'no profile'}, 1)])
def test_a_photograph_looks_the_same_in_any_mode(tmp_path, name, mode, options, tolerance):
    noise().convert('L' if mode == '1' else 'RGB').convert(mode).save(tmp_path / name, **options)
    means = np.asarray(load_image(tmp_path / name)).mean((0, 1))
    np.testing.assert_allclose(means, np.asarray(noise()).mean((0, 1)), atol=tolerance)


@pytest.mark.parametrize('suffix', ['png', 'gif', 'webp', 'bmp', 'tif', 'jp2', 'ppm'])
@pytest.mark.parametrize('size', [0, 1, 40, 0.5])
def test_a_truncated_file_is_broken(tmp_path, suffix, size):
    noise().save(tmp_path / f'x.{suffix}')
    data = (tmp_path / f'x.{suffix}').read_bytes()
    (tmp_path / f'x.{suffix}').write_bytes(data[:size if size >= 1 else int(size * len(data))])
    with pytest.raises(BrokenImage):
        load_image(tmp_path / f'x.{suffix}')


def test_a_png_without_its_end_is_read(tmp_path):
    noise().save(tmp_path / 'x.png')
    data = (tmp_path / 'x.png').read_bytes()
    (tmp_path / 'x.png').write_bytes(data[:-12])
    assert np.array_equal(load_image(tmp_path / 'x.png'), noise())


@pytest.mark.parametrize('sound', [False, True])
def test_a_file_of_gigabytes_of_zeros_is_not_read_into_memory(tmp_path, sound):
    if sound:
        noise().save(tmp_path / 'x.jpg')
    with open(tmp_path / 'x.jpg', 'ab') as file:
        file.truncate(2**36)  # sparse
    with contextlib.nullcontext() if sound else pytest.raises(BrokenImage, match='cannot identify'):
        assert load_image(tmp_path / 'x.jpg').size == (70, 45)


@pytest.mark.parametrize('data', [b'<svg xmlns="http://www.w3.org/2000/svg"/>', b'<!doctype html><html>404', b'GIF89a',
                                  b'\0\5\x16\7\0\2\0\0Mac OS X        ', b'version https://git-lfs.github.com/spec/v1'])
def test_what_is_no_image_whatever_its_name_is_broken(tmp_path, data):
    (tmp_path / 'x.jpg').write_bytes(data)
    with pytest.raises(BrokenImage):
        load_image(tmp_path / 'x.jpg')


def test_a_transparent_grey_level_of_16_bits_is_shown_on_white(tmp_path):
    pixels = np.array([[0, 51400, 257]], np.uint16)
    Image.fromarray(pixels).save(tmp_path / 'x.png', transparency=0)
    with Image.open(tmp_path / 'x.png') as image:
        assert (image.mode, image.info['transparency']) == ('I;16', 0)
    assert np.asarray(load_image(tmp_path / 'x.png'))[0, :, 0].tolist() == [255, 200, 1]


@pytest.mark.parametrize('options', [{'tiffinfo': {274: 6}}, {'tiffinfo': {274: 6}, 'compression': 'tiff_lzw'}])
def test_a_tiff_is_turned_upright_once(tmp_path, options):
    image = Image.new('RGB', (40, 20), 'red')
    image.paste('blue', (0, 0, 20, 20))
    image.save(tmp_path / 'x.tif', **options)
    upright = load_image(tmp_path / 'x.tif')
    assert (upright.size, upright.getpixel((5, 2)), upright.getpixel((5, 37))) == ((20, 40), (0, 0, 255), (255, 0, 0))


def test_floating_point_images_have_no_known_range(tmp_path):
    Image.fromarray(np.zeros((5, 7), np.float32)).save(tmp_path / 'x.tif')
    with pytest.raises(BrokenImage, match='floating-point'):
        load_image(tmp_path / 'x.tif')


def test_a_missing_file_is_broken(tmp_path):
    with pytest.raises(BrokenImage, match='No such file'):
        load_image(tmp_path / 'x.jpg')


@pytest.mark.parametrize('kind', ['pipe', 'socket', 'device', 'folder', 'link to itself', 'link to a pipe'])
def test_what_is_no_regular_file_is_broken_and_never_waited_for(tmp_path, kind):
    make_special_file(tmp_path / 'x.jpg', kind)
    for read in (load_image, to_image):
        with pytest.raises(BrokenImage, match='not a regular file|Too many levels of symbolic links'):
            read(tmp_path / 'x.jpg')
    assert not load_tile(tmp_path / 'x.jpg', 32)[1]


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


@pytest.mark.parametrize('size', [(1, 60_000), (60_000, 1)])
def test_a_tile_of_a_thin_image_is_an_image(tmp_path, size):
    Image.new('RGB', size, 'red').save(tmp_path / 'x.png')
    tile, readable = load_tile(tmp_path / 'x.png', 32)
    assert (tile.size, readable) == ((32, 32), True)
    assert (32, (255, 0, 0)) in tile.getcolors()


@pytest.mark.parametrize('error', [MemoryError(), ValueError('no'), OSError('no'), RuntimeError('no')])
def test_whatever_goes_wrong_in_decoding_is_a_broken_image(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    write_image(tmp_path / 'x.png', 1, 1)
    monkeypatch.setattr(Image.Image, 'convert', fail)
    with pytest.raises(BrokenImage, match='no|MemoryError'):
        load_image(tmp_path / 'x.png')
    with pytest.raises(BrokenImage, match='no|MemoryError'):
        to_image(Image.new('L', (3, 3)))
    assert not load_tile(tmp_path / 'x.png', 32)[1]

"""Split files, transforms, and the order and augmentation of the batches, which workers and epochs do not mix up."""
import numpy as np
import pytest
import torch
from PIL import Image
from raw_trees import HEIGHT, WIDTH, write_image
from torchvision.transforms import v2 as transforms

from common.errors import UserError
from common.files import save
from common.images import BrokenImage
from imagedata.loading import (
    BatchSampler,
    ImageData,
    RetrievalDataset,
    batches_in_order,
    hold_out,
    make_loader,
    make_test_loaders,
    make_transform,
    open_data,
)

CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def data_path(tmp_path_factory):
    """A data path with a converted data set `mine`: three training classes of 4 images, two test classes of 2."""
    root = tmp_path_factory.mktemp('data') / 'mine'
    split = {'train': {}, 'test': {}}
    for subset, classes, num_images in (('train', 'abc', 4), ('test', 'de', 2)):
        for label in classes:
            paths = [f'uncropped/{label}_{number}.png' for number in range(num_images)]
            for number, path in enumerate(paths):
                write_image(root / path, ord(label), number)
            split[subset][label] = paths
    save({**split, 'class_names': {'a': 'Ara'}}, root / 'uncropped_data_dicts.pth')
    return root.parent


def split_with(tmp_path, contents):
    (tmp_path / 'mine').mkdir()
    save(contents, tmp_path / 'mine/uncropped_data_dicts.pth')
    return open_data(tmp_path, 'mine').split


# ---------------------------------------------------- split files --------------------------------------------------
def test_a_data_set_that_is_not_there_is_named_with_a_suggestion(data_path):
    with pytest.raises(UserError, match=r"no such data set in .*; did you mean 'mine'\? .there are: mine"):
        open_data(data_path, 'mina')


@pytest.mark.parametrize(('name', 'crop_type', 'message'), [
    ('glyph', 'uncropped', 'glyph is not in .* yet; make it with: python data_utils.py .* --data_name glyph'),
    ('raw', 'uncropped', 'raw is not converted yet .*; run: python data_utils.py --data_path .* --data_name raw'),
    ('mine', 'cropped', '--crop_type cropped: mine has no bounding boxes'),
    ('no', 'uncropped', 'no such data set')])
def test_a_split_that_is_not_there_names_the_command_that_makes_it(data_path, name, crop_type, message):
    (data_path / 'raw').mkdir(exist_ok=True)
    with pytest.raises(UserError, match=message):
        open_data(data_path, name, crop_type)


@pytest.mark.parametrize(('contents', 'message'), [
    ({'train': {'a': 'x.jpg'}, 'test': {}}, r'train is not \{label: \[path, ...\]\}; convert again: python'),
    ({'train': {'a': ['x.jpg']}, 'test': 5}, 'test is not'), ({'train': {'a': ['x.jpg']}}, 'query is not'),
    ({'train': {'a': ['x.jpg']}, 'test': {'b': []}}, 'no images in test'),
    ({'train': {'a': ['../x.jpg']}, 'test': {'b': ['y.jpg']}}, r'the image .\.\./x.jpg')])
def test_a_split_file_of_other_contents_is_refused(tmp_path, contents, message):
    with pytest.raises(UserError, match=message):
        split_with(tmp_path, contents)


def test_labels_that_are_numbers_become_strings(tmp_path):
    split = split_with(tmp_path, {'train': {1: ['x.jpg'], 2: []}, 'test': {3: ['y.jpg']}, 'class_names': {1: 'one'}})
    assert split == {'train': {'1': ['x.jpg']}, 'test': {'3': ['y.jpg']}, 'class_names': {'1': 'one'}}


def test_classes_are_held_out_by_the_seed(data_path):
    split = {'train': {label: ['1', '2'] for label in 'abcdefghij'}, 'class_names': {}}
    first, again, other = (hold_out(split, 0.3, seed) for seed in (0, 0, 1))
    assert first == again
    assert first['val'].keys() != other['val'].keys()
    assert len(first['val']) == 3
    assert first['val'].keys() | first['train'].keys() == split['train'].keys()
    assert len(hold_out(split, 0.01, 0)['val']) == 2  # with one class, every retrieved image would be correct


def test_holding_out_too_many_classes_is_an_error():
    with pytest.raises(UserError, match='--val_ratio 0.9 of 5 training classes holds out 4'):
        hold_out({'train': {label: ['1', '2'] for label in 'abcde'}}, 0.9, 0)
    with pytest.raises(UserError, match='none of which has two images'):
        hold_out({'train': {label: ['1'] for label in 'abcde'}}, 0.4, 0)


# ---------------------------------------------------- images and transforms ----------------------------------------
def test_a_data_set_numbers_its_classes_and_names_them(data_path):
    dataset = RetrievalDataset(open_data(data_path, 'mine'), 'train', make_transform(False, 16))
    assert dataset.labels == [0] * 4 + [1] * 4 + [2] * 4
    assert dataset.class_names == ['Ara', 'b', 'c']


def test_test_images_are_resized_and_centre_cropped():
    image = Image.new('RGB', (WIDTH, HEIGHT))
    image.putpixel((WIDTH // 2, HEIGHT // 2), (255, 0, 0))
    tensor = make_transform(False, 35, HEIGHT)(image)
    assert tensor.shape == (3, 35, 35)
    assert tensor.dtype == torch.uint8
    assert tensor[0].nonzero().tolist() == [[18, 18]]  # cropped from row 2 = (40 - 35) / 2 and column 6
    assert make_transform(False, 224)(image).shape == (3, 224, 224)


def test_without_a_resize_size_the_whole_image_is_squeezed():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    squeezed = make_transform(False, 35, 0)(image)
    expected = np.asarray(image.resize((35, 35), Image.BILINEAR))  # PIL's own resize, which knows no crop
    assert np.array_equal(squeezed.permute(1, 2, 0), expected)


@pytest.mark.parametrize('size', [(1, 60_000), (60_000, 1), (3, 50_000)])
@pytest.mark.parametrize('words', [(False, 32), (False, 32, 0), (False, 32, 300), (True, 32)])
def test_a_thin_image_is_transformed_without_gigabytes(size, words, monkeypatch):
    largest = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, 'resize', lambda image, new, *args, **kwargs: (
        largest.append(new[0] * new[1]), resize(image, new, *args, **kwargs))[1])
    transform = make_transform(*words)
    assert transform(Image.new('RGB', size, (9, 99, 199))).unique().tolist() == [9, 99, 199]
    assert transform(torch.full((3, *size), 7, dtype=torch.uint8)).unique().tolist() == [7]
    assert max(largest) < 5e6


@pytest.mark.parametrize('size', [(40, 48), (10, 320), (320, 10)])
def test_an_ordinary_image_is_resized_whole(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    whole = transforms.Compose([transforms.Resize(36), transforms.CenterCrop(32), transforms.PILToTensor()])
    assert torch.equal(make_transform(False, 32, 36)(image), whole(image))


@pytest.mark.parametrize('error', [MemoryError(), ValueError('no'), OSError('no'), RuntimeError('no')])
def test_an_image_that_cannot_be_transformed_is_broken_and_named(data_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    dataset = RetrievalDataset(open_data(data_path, 'mine'), 'test', make_transform(False, 16))
    monkeypatch.setattr(Image.Image, 'resize', fail)
    with pytest.raises(BrokenImage, match='it cannot be transformed: (no|MemoryError)'):
        dataset.transform(Image.new('RGB', (40, 30)))
    with pytest.raises(UserError, match='d_0.png is broken .it cannot be transformed: (no|MemoryError)'):
        dataset[0]


def test_a_missing_image_is_named(data_path):
    data = ImageData(data_path / 'mine', {'test': {'1': ['uncropped/gone.jpg']}, 'class_names': {}})
    dataset = RetrievalDataset(data, 'test', make_transform(False, 16))
    with pytest.raises(UserError, match='gone.jpg is missing or broken .*; convert the data set again'):
        dataset[0]


# ---------------------------------------------------- order and augmentation ---------------------------------------
def make_set(data_path, epoch):
    dataset = RetrievalDataset(open_data(data_path, 'mine'), 'train', make_transform(True, 16), seed=5)
    sampler = BatchSampler(dataset.labels, 4, seed=5)
    dataset.set_epoch(epoch)
    sampler.set_epoch(epoch)
    return dataset, sampler


def test_workers_change_nothing_and_see_each_new_epoch(data_path):
    dataset, sampler = make_set(data_path, 1)
    loader = make_loader(dataset, sampler, 2, CPU)  # its workers persist from epoch to epoch
    for epoch in (1, 2):
        dataset.set_epoch(epoch)
        sampler.set_epoch(epoch)
        expected = make_loader(*make_set(data_path, epoch), 0, CPU)
        for (images, labels), (other_images, other_labels) in zip(loader, expected, strict=True):
            assert torch.equal(images, other_images)
            assert torch.equal(labels, other_labels)


@pytest.mark.parametrize('error', [EOFError, ConnectionResetError])
def test_a_connection_that_breaks_means_that_a_worker_has_died(data_path, monkeypatch, error):
    loader = make_loader(*make_set(data_path, 1), 1, CPU)
    batches = iter(loader)
    next(batches)

    def break_off(*_):
        raise error

    monkeypatch.setattr(loader._iterator, '_try_get_data', break_off)
    with pytest.raises(RuntimeError, match='DataLoader worker'):
        next(batches)


def test_each_epoch_has_its_own_order_and_augmentation(data_path):
    order = {epoch: [index for batch in make_set(data_path, epoch)[1] for index in batch] for epoch in (1, 2)}
    assert order[1] != order[2]
    assert sorted(order[1]) == sorted(order[2]) == list(range(12))
    images = {epoch: make_set(data_path, epoch)[0][3][0] for epoch in (1, 2)}
    assert not torch.equal(images[1], images[2])


def test_augmentation_leaves_the_global_generator_alone(data_path):
    dataset, _ = make_set(data_path, 1)
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    dataset[0]
    assert torch.rand(1) == expected


def test_a_loader_leaves_the_global_generator_alone(data_path):
    loader = make_loader(*make_set(data_path, 1), 0, CPU)
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    list(loader)
    assert torch.rand(1) == expected


def test_balanced_batches_hold_k_images_of_each_class():
    labels = [0] * 5 + [1] * 3 + [2] * 7 + [3] * 4
    sampler = BatchSampler(labels, 9, images_per_class=3, seed=1)
    assert len(sampler) == 19 // 9
    for batch in sampler:
        drawn = [labels[index] for index in batch]
        assert sorted(drawn.count(label) for label in set(drawn)) == [3, 3, 3]
        assert len(set(batch)) == 9  # no class has fewer than 3, so nothing is drawn twice


def test_a_class_of_too_few_images_is_drawn_from_with_replacement():
    batch = next(iter(BatchSampler([0, 1, 1, 1, 1], 4, images_per_class=2)))
    assert batch.count(0) == 2  # class 0 has one image


@pytest.mark.parametrize(('drop_last', 'sizes'), [(False, [4, 4, 3]), (True, [4, 4])])
def test_the_last_batch_is_kept_or_dropped(drop_last, sizes):
    sampler = BatchSampler([0] * 11, 4, drop_last=drop_last)
    assert [len(batch) for batch in sampler] == sizes
    assert len(sampler) == len(sizes)


@pytest.mark.parametrize(('batch_size', 'images_per_class', 'message'), [
    (10, 4, 'must be a multiple of --images_per_class 4'), (21, 0, 'the 20 training images'),
    (18, 3, 'needs 6 classes')])
def test_a_batch_that_does_not_fit_is_an_error(batch_size, images_per_class, message):
    with pytest.raises(UserError, match=message):
        BatchSampler([index % 5 for index in range(20)], batch_size, images_per_class)


def test_processes_share_each_batch(monkeypatch):
    whole = list(BatchSampler([0] * 11, 5, seed=3))
    shares = []
    for rank in range(2):
        monkeypatch.setattr('imagedata.loading.world_size', lambda: 2)
        monkeypatch.setattr('imagedata.loading.world_rank', lambda rank=rank: rank)
        shares.append(list(BatchSampler([0] * 11, 5, seed=3)))
    assert [first + second for first, second in zip(*shares, strict=True)] == whole
    assert [len(batch) for batch in shares[0]] == [2, 2, 0]


# ---------------------------------------------------- test loaders -------------------------------------------------
def test_a_whole_data_set_is_read_in_order():
    assert batches_in_order(7, 3) == [range(0, 3), range(3, 6), range(6, 7)]


def test_queries_and_gallery_share_their_labels(data_path):
    images = open_data(data_path, 'mine').split['train']
    split = {'train': {}, 'query': {'a': images['a'][:1]}, 'gallery': {'b': images['b'][:2], 'a': images['a'][1:]},
             'class_names': {}}
    loaders = make_test_loaders(ImageData(data_path / 'mine', split), make_transform(False, 16), 5, 0, CPU)
    assert {name: loader.dataset.labels for name, loader in loaders.items()} == {
        'test': [0], 'gallery': [1, 1, 0, 0, 0]}

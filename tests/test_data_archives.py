"""The classic sets, on small files of the official layouts."""

import functools
import http.server
import io
import tarfile
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from jaxrobust.data import load, source
from jaxrobust.data.decoding import decode_image


@pytest.fixture
def random():
    return np.random.default_rng(0)


def jpeg(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="JPEG", quality=95)
    return stream.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def register(monkeypatch, builder, archives):
    """Makes small archives, {url: path}, the official ones."""
    from tensorflow_datasets.core.download import checksums

    infos = {url: checksums.compute_url_info(path) for url, path in archives.items()}
    monkeypatch.setattr(builder, "url_infos", infos)


def manual(data_dir):
    folder = data_dir / "downloads" / "manual"
    folder.mkdir(parents=True)
    return folder


def cifar_file(random, count, label_bytes, classes):
    images = random.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = random.integers(0, classes, count, np.uint8)
    planes = images.transpose(0, 3, 1, 2).reshape(count, -1)
    columns = [labels[:, None] // 5, labels[:, None]][-label_bytes:]
    return np.concatenate([*columns, planes], axis=1).tobytes(), images, labels


def cifar10_archive(random, path):
    files, images, labels = {}, [], []
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        files[f"cifar-10-batches-bin/{name}"], x, y = cifar_file(random, 4, 1, 10)
        images.append(x)
        labels.append(y)
    write_tar(path, files)
    return np.concatenate(images), np.concatenate(labels)


def assert_holds(data, images, labels, first=0):
    """The data set holds exactly these examples, found by their index."""
    rows = np.argsort(data.indices)
    np.testing.assert_array_equal(data.indices[rows], first + np.arange(len(images)))
    np.testing.assert_array_equal(data.images[rows], images.astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(data.labels[rows], labels)


def test_cifar10_is_read_from_its_binary_archive(tmp_path, monkeypatch, random):
    from jaxrobust.data import classic

    path = manual(tmp_path) / "cifar-10-binary.tar.gz"
    images, labels = cifar10_archive(random, path)
    url = classic.CIFAR_URL + path.name
    register(monkeypatch, classic.JaxrobustCifar10, {url: path})
    train = load("cifar10", data_dir=tmp_path)
    assert_holds(train, images[:20], labels[:20])
    assert train.class_names[3] == "cat"
    assert_holds(load("cifar10", "test", data_dir=tmp_path), images[20:], labels[20:], first=50_000)


def test_cifar100_takes_the_fine_label_and_its_names(tmp_path, monkeypatch, random):
    from jaxrobust.data import classic

    path = manual(tmp_path) / "cifar-100-binary.tar.gz"
    train, train_images, train_labels = cifar_file(random, 12, 2, 100)
    test, test_images, test_labels = cifar_file(random, 5, 2, 100)
    fine = "\n".join(f"fine{i}" for i in range(100)) + "\n\n"
    files = {"train.bin": train, "test.bin": test, "fine_label_names.txt": fine.encode()}
    write_tar(path, {f"cifar-100-binary/{name}": content for name, content in files.items()})
    url = classic.CIFAR_URL + path.name
    register(monkeypatch, classic.JaxrobustCifar100, {url: path})
    for _ in range(2):  # the second time the names come from the prepared folder
        data = load("cifar100", data_dir=tmp_path)
        assert_holds(data, train_images, train_labels)
        assert data.class_names == tuple(f"fine{i}" for i in range(100))
    assert_holds(load("cifar100", "test", data_dir=tmp_path), test_images, test_labels, 50_000)


def test_a_cut_cifar_file_is_refused():
    from jaxrobust.data.classic import cifar_records

    with pytest.raises(ValueError, match="3072 bytes does not hold records of 3073"):
        list(cifar_records(bytes(3072), 1))


def test_svhn_counts_the_digit_ten_as_zero(tmp_path, monkeypatch, random):
    import scipy.io

    from jaxrobust.data import classic

    folder, archives, kept = manual(tmp_path), {}, {}
    for split, count in (("train", 10), ("test", 4)):
        images = random.integers(0, 256, (count, 32, 32, 3), np.uint8)
        labels = np.arange(1, count + 1, dtype=np.uint8)
        path = folder / f"{split}_32x32.mat"
        scipy.io.savemat(path, {"X": np.moveaxis(images, 0, -1), "y": labels[:, None]})
        archives[classic.SVHN_URL + path.name] = path
        kept[split] = images, labels % 10
    register(monkeypatch, classic.JaxrobustSvhn, archives)
    assert_holds(load("svhn", data_dir=tmp_path), *kept["train"])
    assert_holds(load("svhn", "test", data_dir=tmp_path), *kept["test"], first=73_257)


def test_imagenette_is_resized_cropped_and_grey_photographs_become_rgb(
    tmp_path, monkeypatch, random
):
    from jaxrobust.data import classic

    ids, files = list(classic.IMAGENETTE_CLASSES), {}
    shapes = [(160, 200, 3), (240, 160, 3), (160, 160)]
    for number, shape in enumerate(shapes * 2):
        content = jpeg(random.integers(0, 256, shape, np.uint8))
        split, wordnet_id = ("train", "val")[number // 3], ids[number]
        files[f"imagenette2-160/{split}/{wordnet_id}/{wordnet_id}_{number}.JPEG"] = content
    files["imagenette2-160/noisy_imagenette.csv"] = b"path,label"
    path = manual(tmp_path) / "imagenette2-160.tgz"
    write_tar(path, files)
    url = classic.IMAGENETTE_URL + path.name
    register(monkeypatch, classic.JaxrobustImagenette, {url: path})
    train = load("imagenette", data_dir=tmp_path)
    assert train.images.shape == (3, 160, 160, 3)
    assert sorted(train.labels) == sorted(train.indices) == [0, 1, 2]
    assert train.class_names[1] == "English springer"
    grey = train.images[train.indices == 2][0]
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])
    validation = source("imagenette/160px", "validation", data_dir=tmp_path, size=64)
    assert sorted(validation[i]["index"] for i in range(3)) == [3, 4, 5]
    assert validation[0]["image"].shape == (64, 64, 3)


def test_tiny_imagenet_reads_labels_of_validation_images_from_the_annotations(
    tmp_path, monkeypatch, random
):
    from jaxrobust.data import classic

    # The official set has 200 classes; their list need not be sorted.
    ids = [f"n{number:08d}" for number in range(200)]
    words = "".join(f"{one}\tthing{int(one[1:]) // 2}, other word\n" for one in ids)
    top, picture = "tiny-imagenet-200", jpeg(random.integers(0, 256, (64, 64, 3), np.uint8))
    annotated = {"val_0.JPEG": 7, "val_1.JPEG": 3}
    rows = "".join(f"{f}\t{ids[label]}\t0\t0\t62\t62\n" for f, label in annotated.items())
    path = manual(tmp_path) / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr(f"{top}/wnids.txt", "\n".join(reversed(ids)))
        packed.writestr(f"{top}/words.txt", words)
        packed.writestr(f"{top}/val/val_annotations.txt", rows)
        packed.writestr(f"{top}/test/images/test_0.JPEG", picture)
        for file in annotated:
            packed.writestr(f"{top}/val/images/{file}", picture)
        for label in (5, 2, 9):
            packed.writestr(f"{top}/train/{ids[label]}/images/{ids[label]}_0.JPEG", picture)
    url = classic.TINY_IMAGENET_URL
    register(monkeypatch, classic.JaxrobustTinyImagenet, {url: path})
    train = load("tiny_imagenet", data_dir=tmp_path)
    validation = load("tiny_imagenet", "validation", data_dir=tmp_path)
    assert sorted(train.labels) == [2, 5, 9]
    assert validation.labels[np.argsort(validation.indices)].tolist() == [7, 3]
    assert len({*train.indices, *validation.indices}) == 5
    assert train.class_names[2:4] == (f"thing1 ({ids[2]})", f"thing1 ({ids[3]})")
    expected = decode_image(picture, 3, None).astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(train.images[0], expected)


def test_a_foreign_archive_is_refused(tmp_path):
    (manual(tmp_path) / "cifar-10-binary.tar.gz").write_bytes(b"not the archive")
    with pytest.raises(ValueError, match=r"manual/cifar-10-binary.tar.gz is not the official"):
        load("cifar10", data_dir=tmp_path)


def test_an_unreachable_archive_says_where_to_place_it(tmp_path, monkeypatch):
    from jaxrobust.data import classic

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(classic, "CIFAR_URL", "http://127.0.0.1:9/")  # nobody answers there
    with pytest.raises(ConnectionError) as caught:
        load("cifar10", data_dir=tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert "http://127.0.0.1:9/cifar-10-binary.tar.gz" in message
    assert str(tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz") in message


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_an_archive_is_downloaded_once_and_checked(tmp_path, monkeypatch, random):
    from jaxrobust.data import classic

    (tmp_path / "web").mkdir()
    path = tmp_path / "web" / "cifar-10-binary.tar.gz"
    images, labels = cifar10_archive(random, path)
    handler = functools.partial(Quiet, directory=path.parent)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        base = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(classic, "CIFAR_URL", base)
        register(monkeypatch, classic.JaxrobustCifar10, {base + path.name: path})
        data = load("cifar10", "test", data_dir=tmp_path / "data")
        server.shutdown()
        serving.join()
    assert_holds(data, images[20:], labels[20:], first=50_000)
    # Prepared files lost, server gone: the downloaded archive is still there.
    (tmp_path / "data" / "jaxrobust_cifar10").rename(tmp_path / "lost")
    again = load("cifar10", "test", data_dir=tmp_path / "data")
    np.testing.assert_array_equal(again.images, data.images)


def test_registered_sums_are_complete():
    from jaxrobust.data import birds, classic

    urls = set(classic.JaxrobustCifar10.url_infos)
    assert urls == {
        classic.CIFAR_URL + "cifar-10-binary.tar.gz",
        classic.CIFAR_URL + "cifar-100-binary.tar.gz",
        classic.SVHN_URL + "train_32x32.mat",
        classic.SVHN_URL + "test_32x32.mat",
        classic.IMAGENETTE_URL + "imagenette2-160.tgz",
        classic.IMAGENETTE_URL + "imagenette2-320.tgz",
        classic.TINY_IMAGENET_URL,
        birds.IMAGES_URL,
        birds.MAPS_URL,
    }

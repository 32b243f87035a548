"""The finetuning stage: the language model is replaced and frozen, and only the assistant's turns are targets."""

import hashlib
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import mm
from mm.batch import IGNORED
from shards.format import Record
from shards.reader import ShardSet
from shards.writer import write_shards
from stages.finetune import main

FROZEN = {"language_model.*": None, "extra_embeddings": None}


@pytest.fixture
def conversations(square_record, tmp_path):
    """Conversations of two turns about a square."""
    records = []
    for index in range(8):
        record = square_record(index)
        turns = [
            {"role": "user", "content": [{"type": "image", "image": "png"}, {"type": "text", "text": "colour?"}]},
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": "sure?"},
            {"role": "assistant", "content": "yes"},
        ]
        values = {"id": record.id, "split": "train", "task": "chat", "language": "en", "messages": turns}
        records.append(Record(record.id, values, {"png": record.media["png"]}))
    write_shards(records, tmp_path / "conversations")
    return tmp_path / "conversations"


@pytest.fixture
def instruct_folder(language_model_folder, tmp_path):
    """A language model of the same shape with other weights."""
    folder = tmp_path / "instruct"
    shutil.copytree(language_model_folder, folder)
    state = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def finetune_config(run_folder, conversations, tmp_path):
    """finetune_config(**changes) -> (file, run folder)."""

    def write(**changes):
        values = {
            "output": str(tmp_path / "chat"),
            "start_from": str(run_folder),
            "data": [{"path": str(conversations)}],
            "training": {"steps": 2, "batch_size": 4, "learning_rates": {**FROZEN, "*": 1e-3}, "workers": 0},
            **changes,
        }
        file = tmp_path / "finetune.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        return file, tmp_path / "chat"

    return write


def weights_hash(state: dict) -> str:
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


def test_the_language_model_is_replaced_and_stays_frozen(finetune_config, instruct_folder):
    file, folder = finetune_config(language_model=str(instruct_folder))
    main(["--config", str(file)])
    model, processor = mm.load(folder)
    expected = load_file(instruct_folder / "model.safetensors")
    state = model.language_model.state_dict()
    assert weights_hash({name: state[name] for name in expected}) == weights_hash(expected)
    assert str(instruct_folder) in (folder / "config.yaml").read_text()
    text = mm.Sample(processor.tokenizer.encode("hello there"))
    assert torch.equal(model(mm.collate([text])), model.language_model(torch.tensor([text.tokens])))


def test_the_encoder_and_the_adapter_train(finetune_config, run_folder):
    file, folder = finetune_config()
    main(["--config", str(file)])
    before, after = mm.load(run_folder)[0].state_dict(), mm.load(folder)[0].state_dict()
    for part in ("vision_encoder", "image_adapter"):
        names = [name for name in before if name.startswith(part)]
        assert any(not torch.equal(before[name], after[name]) for name in names)


def test_without_another_language_model_the_run_keeps_its_own(finetune_config, run_folder):
    file, folder = finetune_config()
    main(["--config", str(file)])
    before, after = mm.load(run_folder)[0].language_model, mm.load(folder)[0].language_model
    assert weights_hash(before.state_dict()) == weights_hash(after.state_dict())


def test_only_the_assistants_turns_are_targets(conversations, run_folder):
    _, processor = mm.load(run_folder)
    sample = processor.record_example(ShardSet(conversations)[0])
    targets = [token for token, label in zip(sample.tokens, sample.labels, strict=True) if label != IGNORED]
    text = processor.tokenizer.decode(targets)
    assert "red" in text and "yes" in text and "colour" not in text and "sure" not in text


def test_permissions_for_messages_stay_with_the_run(finetune_config, run_folder):
    file, folder = finetune_config(allow_control_tokens=True, allow_omitted_text=True)
    main(["--config", str(file)])
    assert mm.load(run_folder)[1].allow_control_tokens is False
    _, processor = mm.load(folder)
    assert processor.allow_control_tokens and processor.allow_omitted_text
    sample = processor.prompt([{"role": "user", "content": "a <|end|> b"}])
    assert sample.tokens.count(processor.tokenizer.eos_token_id) == 2


def test_the_loss_falls(finetune_config):
    training = {"steps": 30, "batch_size": 8, "learning_rates": {**FROZEN, "*": 1e-2}, "workers": 0, "log_every": 5}
    file, folder = finetune_config(training=training)
    main(["--config", str(file)])
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_from": "nowhere"}, "nowhere"),
        (
            {"training": {"steps": 1, "batch_size": 1, "learning_rates": {"*": 1e-3}}},
            "freezes the language model",
        ),
    ],
)
def test_mistakes_end_with_one_line_and_write_nothing(finetune_config, capsys, changes, message):
    file, folder = finetune_config(**changes)
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(file), "--quiet"])
    shown = capsys.readouterr().err.strip()
    assert ended.value.code == 1 and message in shown and "\n" not in shown and not folder.exists()


def test_a_language_model_of_another_shape_is_refused(finetune_config, language_model_folder, tmp_path, capsys):
    wider = tmp_path / "wider"
    shutil.copytree(language_model_folder, wider)
    described = json.loads((wider / "config.json").read_text())
    described["num_hidden_layers"] -= 1
    (wider / "config.json").write_text(json.dumps(described))
    state = load_file(wider / "model.safetensors")
    last = f"model.layers.{described['num_hidden_layers']}."
    save_file(
        {name: tensor for name, tensor in state.items() if not name.startswith(last)}, wider / "model.safetensors"
    )
    file, folder = finetune_config(language_model=str(wider))
    with pytest.raises(SystemExit):
        main(["--config", str(file)])
    shown = capsys.readouterr().err
    assert f"num_layers {described['num_hidden_layers']} in place of" in shown and not folder.exists()

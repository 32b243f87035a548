"""Speech on a CPU: a conformer layer, BEST-RQ's targets and the log-mel features, each beside other implementations.

    python -m benchmarks.speech
    python -m benchmarks.speech --seconds 5 --repetitions 1

The conformer layer has the preset's shape (width 1536, 24 heads, kernel 7) and runs on one utterance of 30 s (750
frames). Its floor is the time of its ten matrix products with weights, by the faster of PyTorch's two kernels, without
attention and norms. The share of padding is measured in steps drawn from shards (written by
`python -m demos.speech_sets`), unsorted and in buckets of duration.
"""

import argparse
import sys
from collections.abc import Callable
from itertools import islice, product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchaudio.compliance import kaldi
from torchaudio.models.conformer import ConformerLayer as TorchaudioLayer
from transformers import Wav2Vec2ConformerConfig
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import (
    Wav2Vec2ConformerEncoderLayer,
    Wav2Vec2ConformerRotaryPositionalEmbedding,
)

from benchmarks.measure import interleave, machine, seconds_of, spread, write_results
from data_prep.sources.recordings import ASTERISK_LANGUAGES
from layers.linear import linear
from layers.rotary import RotaryConfig, rotary_angles
from mm.training.data import DataSource, RecordDataset
from mm.training.sampler import LengthBuckets, step_indices
from mm.training.speech import PaddingMeter
from speech.best_rq import BestRqConfig, RandomQuantizer
from speech.conformer import STACK, ConformerLayer, SpeechEncoderConfig
from speech.features import FRAMES_PER_SECOND, NUM_MELS, SAMPLE_RATE, log_mel

BROADCAST_AT_ONCE = 64  # frames whose distances to one codebook, 16 numbers each, take 34 MB
LAYER_TARGET, QUANTISER_TARGET, FEATURES_TARGET = 1.25, 20.0, 2.0


def layers(config: SpeechEncoderConfig) -> dict[str, Callable[[Tensor], Tensor]]:
    """One layer of each implementation, without dropout; each takes x [1, S, W]."""
    ours = ConformerLayer(config).eval()
    head_dim = config.width // config.num_heads
    audio = TorchaudioLayer(config.width, config.ffn_width, config.num_heads, config.kernel_size).eval()
    theirs = Wav2Vec2ConformerConfig(
        hidden_size=config.width,
        intermediate_size=config.ffn_width,
        num_attention_heads=config.num_heads,
        conv_depthwise_kernel_size=config.kernel_size,
        position_embeddings_type="rotary",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        conformer_conv_dropout=0.0,
    )
    theirs._attn_implementation = "sdpa"
    wav2vec2 = Wav2Vec2ConformerEncoderLayer(theirs).eval()
    positions = Wav2Vec2ConformerRotaryPositionalEmbedding(theirs)

    def run_ours(x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        return ours(x, rotary_angles(RotaryConfig(config.rotary_theta), head_dim, places, x.dtype), None)

    return {
        "ours": run_ours,
        "torchaudio": lambda x: audio(x.transpose(0, 1), None),
        "transformers": lambda x: wav2vec2(x, relative_position_embeddings=positions(x))[0],
        "floor, oneDNN": _products(config, linear),
        "floor, MKL": _products(config, F.linear),
    }


def _products(config: SpeechEncoderConfig, product: Callable) -> Callable[[Tensor], Tensor]:
    """The layer's matrix products with weights: two feed-forwards, attention, and the two of the convolution module."""
    width, inner = config.width, config.ffn_width
    shapes = [(inner, width), (width, inner), *[(width, width)] * 4, (2 * width, width), (width, width)]
    shapes += [(inner, width), (width, inner)]
    weights = [nn.Parameter(torch.randn(shape) * shape[1] ** -0.5) for shape in shapes]

    def run(x: Tensor) -> Tensor:
        inputs, total = {width: x}, 0.0
        for weight in weights:
            out = product(inputs[weight.shape[1]], weight)
            if out.shape[-1] == inner:
                inputs[inner] = out
            total = total + out[..., 0].sum()  # gives every product a gradient
        return total

    return run


def measure_layer(seconds: float, repetitions: int) -> dict:
    config = SpeechEncoderConfig()
    x = torch.randn(1, round(seconds * FRAMES_PER_SECOND / STACK), config.width)
    contestants = layers(config)
    results = {}
    for mode in ("forward", "training"):

        def work(run: Callable[[Tensor], Tensor], mode: str = mode) -> None:
            if mode == "forward":
                with torch.no_grad():  # not inference_mode: the peer caches its positions between passes
                    run(x)
            else:
                run(x.clone().requires_grad_()).sum().backward()

        timed = {name: seconds_of(lambda run=run, work=work: work(run)) for name, run in contestants.items()}
        taken = interleave(timed, repetitions)
        spreads = {name: spread(values) for name, values in taken.items()}
        floor = min(spreads["floor, oneDNN"]["median"], spreads["floor, MKL"]["median"])
        results[mode] = {
            "frames": x.shape[1],
            "seconds": spreads,
            "over_floor": {name: spreads[name]["median"] / floor for name in ("ours", "torchaudio", "transformers")},
        }
    return results


def measure_quantiser(seconds: float, repetitions: int) -> dict:
    """BEST-RQ's targets of one utterance: by cosine in one product, and by a broadcast distance of unit vectors."""
    quantizer = RandomQuantizer(STACK * NUM_MELS, BestRqConfig())
    stacked = torch.randn(round(seconds * FRAMES_PER_SECOND / STACK), STACK * NUM_MELS)
    found = {}

    def broadcast() -> None:
        vectors = F.normalize(stacked @ quantizer.projection, dim=-1)
        codes = [
            torch.cat([(part[:, None] - book).square().sum(-1).argmin(-1) for part in vectors.split(BROADCAST_AT_ONCE)])
            for book in quantizer.codebooks
        ]
        found["broadcast"] = torch.stack(codes, 1)

    def ours() -> None:
        found["ours"] = quantizer(stacked)

    taken = interleave({"ours": seconds_of(ours), "broadcast": seconds_of(broadcast)}, repetitions)
    spreads = {name: spread(values) for name, values in taken.items()}
    return {
        "frames": len(stacked),
        "same_codes": float((found["ours"] == found["broadcast"]).float().mean()),
        "seconds": spreads,
        "ratio": spreads["broadcast"]["median"] / spreads["ours"]["median"],
    }


def measure_features(seconds: float, repetitions: int) -> dict:
    import kaldi_native_fbank as knf

    waveform = 0.1 * torch.randn(round(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0))
    options = knf.FbankOptions()
    options.frame_opts.dither, options.mel_opts.num_bins = 0.0, NUM_MELS
    samples = (waveform * 32_768).tolist()  # the input type that its binding reads fastest
    found = {}

    def native() -> None:
        computer = knf.OnlineFbank(options)
        computer.accept_waveform(SAMPLE_RATE, samples)
        computer.input_finished()
        found["native"] = np.stack([computer.get_frame(index) for index in range(computer.num_frames_ready)])

    def audio() -> None:
        found["torchaudio"] = kaldi.fbank(waveform[None] * 32_768, num_mel_bins=NUM_MELS, dither=0.0)

    def ours() -> None:
        found["ours"] = log_mel(waveform)

    contestants = {"ours": ours, "kaldi-native-fbank": native, "torchaudio": audio}
    taken = interleave({name: seconds_of(work) for name, work in contestants.items()}, repetitions)
    spreads = {name: spread(values) for name, values in taken.items()}
    return {
        "seconds_of_sound": seconds,
        "largest_difference": {
            name: float((torch.as_tensor(found[name]) - found["ours"]).abs().max()) for name in ("native", "torchaudio")
        },
        "seconds": spreads,
        "ratio": {name: spreads[name]["median"] / spreads["ours"]["median"] for name in contestants if name != "ours"},
    }


def measure_padding(folders: list[str]) -> dict:
    """The share of padding in steps of 16 and of 32, by the number of steps whose samples are sorted together."""
    dataset = RecordDataset([DataSource(folder) for folder in folders], lambda record: record)
    seconds = dataset.durations()
    shares = {}
    for batch_size, bucket_steps in product((16, 32), (1, 10, 50)):
        padding = PaddingMeter()
        buckets = LengthBuckets(seconds, batch_size, bucket_steps) if bucket_steps > 1 else None
        drawn = step_indices(len(dataset), batch_size, seed=0, buckets=buckets)
        for indices in islice(drawn, len(dataset) // batch_size):
            padding.update((FRAMES_PER_SECOND * seconds[indices]).int().tolist())
        shares[f"{batch_size} recordings, {bucket_steps}"] = padding.pop()["padding_share"]
    return {"recordings": len(dataset), "hours": float(seconds.sum()) / 3600, "shares": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the utterance")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--data", nargs="*", default=[f"data/speech/asterisk_{name}" for name in ASTERISK_LANGUAGES])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = {
        "layer": measure_layer(arguments.seconds, arguments.repetitions),
        "quantiser": measure_quantiser(arguments.seconds, arguments.repetitions),
        "features": measure_features(arguments.seconds, 3 * arguments.repetitions),
    }
    if all(Path(folder).exists() for folder in arguments.data):
        rows["padding"] = measure_padding(arguments.data)
    print("| what | implementation | median, ms | times |\n|---|---|---|---|")
    for mode, row in rows["layer"].items():
        for name, taken in row["seconds"].items():
            over = f"{row['over_floor'][name]:.2f} x the floor" if name in row["over_floor"] else ""
            print(f"| conformer layer, {mode} | {name} | {1e3 * taken['median']:.0f} | {over} |")
    for name, taken in rows["quantiser"]["seconds"].items():
        ratio = "" if name == "ours" else f"{rows['quantiser']['ratio']:.1f} x ours"
        print(f"| targets of 16 codebooks | {name} | {1e3 * taken['median']:.1f} | {ratio} |")
    for name, taken in rows["features"]["seconds"].items():
        ratio = "" if name == "ours" else f"{rows['features']['ratio'][name]:.1f} x ours"
        print(f"| log-mel | {name} | {1e3 * taken['median']:.1f} | {ratio} |")
    for name, share in rows.get("padding", {"shares": {}})["shares"].items():
        print(f"| padding, steps of {name} steps sorted together | | | {share:.1%} |")
    if "padding" not in rows:
        print(
            f"padding: not measured, {', '.join(arguments.data)} are written by python -m demos.speech_sets",
            file=sys.stderr,
        )
    print(
        f"\ntargets: layer <= {LAYER_TARGET} x the floor, targets >= {QUANTISER_TARGET:.0f} x, "
        f"features >= {FEATURES_TARGET:.0f} x kaldi-native-fbank"
    )
    print(f"written: {write_results('speech', {'machine': machine(), 'rows': rows})}")


if __name__ == "__main__":
    main()

"""What bf16 or 8 bits for a language model's matrices change: its distributions of the next token on held-out text.

    python -m benchmarks.weight_only --language-model MODEL.gguf --text docs/training.md

Printed for bf16 (the tables too; products in FP32), and for int8 and FP8 with a scale per output channel of each linear
layer inside the decoder layers (`training.frozen_language_model`): the KL divergence from the model's own distribution,
in nats per token; the share of tokens whose most probable successor stays; the perplexity; and the bytes of the layers'
matrices. The text must be one that the model was not fitted to.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mm.convert.llama
from layers.weight_only import STORED
from mm.language_model import LanguageModel
from mm.parallel.tables import kept_as_stored
from mm.training.precision import weight_only


@contextmanager
def rounded(matrices: Sequence[nn.Parameter]) -> Iterator[None]:
    """Context in which FP32 matrices have the nearest values that bf16 holds."""
    original = [matrix.detach().clone() for matrix in matrices]
    with torch.no_grad():
        for matrix in matrices:
            matrix.copy_(matrix.bfloat16())
        try:
            yield
        finally:
            for matrix, values in zip(matrices, original, strict=True):
                matrix.copy_(values)


@torch.no_grad()
def log_probs(model: LanguageModel, windows: Tensor) -> Tensor:
    """Log-probabilities of the next token in each window, FP32 [N, T - 1, V]. Args: windows: tokens, int64 [N, T]."""
    return torch.stack([model(window[None])[0, :-1].float().log_softmax(-1) for window in windows])


def compare(model: LanguageModel, windows: Tensor) -> dict[str, dict[str, float]]:
    """The numbers of each kind of storage, by its name; "unchanged" is the model itself."""
    expected, targets = log_probs(model, windows), windows[:, 1:, None]
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    rows = {"unchanged": {"kl": 0.0, "same": 1.0, "bytes": float(sum(p.nbytes for p in matrices))}}
    found = {"unchanged": expected}
    for kind in ("bf16", *STORED):
        if kind == "bf16":
            num_bytes = sum(matrix.numel() for matrix in matrices) * 2
            with rounded([model.get_parameter(name) for name in kept_as_stored(model)]):
                found[kind] = log_probs(model, windows)
        else:
            with weight_only(model.model.layers, kind):
                found[kind] = log_probs(model, windows)
                num_bytes = sum(buffer.nbytes for buffer in model.model.layers.buffers())
        kl = F.kl_div(found[kind], expected, log_target=True, reduction="none").sum(-1).mean()
        same = (found[kind].argmax(-1) == expected.argmax(-1)).float().mean()
        rows[kind] = {"kl": float(kl), "same": float(same), "bytes": float(num_bytes)}
    for kind, values in found.items():
        rows[kind]["perplexity"] = float((-values.gather(-1, targets).mean()).exp())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language-model", required=True, help="a Hugging Face folder or a GGUF file")
    parser.add_argument("--text", required=True, nargs="+", type=Path, help="text files")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="of a window")
    arguments = parser.parse_args()
    model = mm.convert.llama.load(arguments.language_model, dtype=torch.float32).requires_grad_(False).eval()
    tokenizer = mm.convert.llama.load_tokenizer(arguments.language_model)
    tokens = tokenizer("\n".join(path.read_text(encoding="utf-8") for path in arguments.text))["input_ids"]
    count = min(arguments.windows, len(tokens) // arguments.tokens)
    if not count:
        parser.error(f"the text has {len(tokens)} tokens; give at least {arguments.tokens}")
    windows = torch.tensor(tokens[: count * arguments.tokens]).unflatten(0, (count, -1))
    print(f"{windows.numel()} tokens in windows of {arguments.tokens}")
    print("| storage | KL, nats per token | same next token | perplexity | MB of matrices |\n|---|---|---|---|---|")
    for kind, row in compare(model, windows).items():
        cells = (f"{row['kl']:.2e}", f"{row['same']:.2%}", f"{row['perplexity']:.3f}", f"{row['bytes'] / 1e6:.1f}")
        print(f"| {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

"""One LoRA step of a Llama: ours against Hugging Face PEFT on PyTorch, in one run.

    python -m benchmarks.decoder_step --peak_tflops=989              # a GPU; the dense bf16 peak
    python -m benchmarks.decoder_step --shape=tiny --rounds=1        # any CPU

Random weights, made on the device; rank 16 on every linear kernel but the head, float32 adapters,
AdamW, clipping, no dropout. "llama-1b" has the shape of Llama-3.2-1B with a bfloat16 base, "tiny"
is float32. Each side runs in processes of its own, in turn, on the same tokens. Ours is the step
of train.py, compiled with its state donated; rows are read whole, as on the other side, but for
"packed", which gets the segments of train.py's batches. On a GPU attention is cuDNN's but for "xla
attention"; the other side has PyTorch's fused attention, and bfloat16 autocast on a bfloat16 base.

Printed: tokens per second (the median of a process's steps; then the median, least and most over
the rounds), the peak memory (of the device; of the process on a CPU), the time to the end of the
first step (compilation included), and model FLOP utilisation, the FLOPs that the mathematics needs
over those that the device could have done:

    tokens (4 (K + V D) + 6 A + 6 L T N H) / (seconds peak)

with K entries of the layers' linear kernels, V D of the head, A of the adapters, L layers, T tokens
of a row, N heads of size H. A frozen kernel costs 2 FLOPs forward and 2 for the gradient of its
input, a trained one 2 more; causal attention costs half of its two products, 2 T N H, and twice
that backward. What is computed again (remat, chunks of the loss) does not count.
"""

import argparse
import functools
import json
import resource
import shutil
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks import processes

RANK, ALPHA = 16, 32
COMPILERS = ("c++", "g++", "clang++")
_LLAMA = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "tie_word_embeddings": True,
}


class Shape(NamedTuple):
    """A model and the batches that it is measured on, rows x tokens."""

    config: dict[str, Any]
    dtype: str
    batches: tuple[tuple[int, int], ...]


SHAPES = {
    "llama-1b": Shape(
        {
            **_LLAMA,
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "intermediate_size": 8192,
            "max_position_embeddings": 131_072,
        },
        "bfloat16",
        ((8, 1024), (1, 512)),
    ),
    "tiny": Shape(
        {
            **_LLAMA,
            "vocab_size": 4096,
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "intermediate_size": 1024,
            "max_position_embeddings": 2048,
        },
        "float32",
        ((2, 128),),
    ),
}
# Options of the decoder, beside chunk (tokens of a row whose logits exist at a time; None: all) and
# packed. The first is the one that the others are compared by.
OURS: dict[str, dict[str, Any]] = {
    "scan": {},
    "unrolled": {"scan_layers": False},
    "remat dots": {"remat": "dots"},
    "remat full": {"remat": "full"},
    "whole logits": {"chunk": None},
    "packed": {"packed": True},
    "xla attention": {"attention": "xla"},
}
PEFT = ("peft eager", "peft compiled")


def tokens_of(shape: Shape, rows: int, length: int) -> np.ndarray:
    """Random tokens and, in the last column, the target of the last of them."""
    generator = np.random.default_rng(0)
    return generator.integers(0, shape.config["vocab_size"], (rows, length + 1), dtype=np.int32)


# ---------------------------------------------------------------------------------------- ours


def ours(shape: Shape, tokens: np.ndarray, side: str) -> tuple[Callable[[], Any], Any]:
    """A function that makes one step of train.py and waits for it, and one that tells the peak."""
    import jax

    import train

    run, batch = experiment_of(shape, tokens, **OURS[side])
    state, tx = train.initial_state(run, 1000, None)
    step = jax.jit(train.make_step(run, tx), donate_argnums=0)
    held, batch = [state], jax.device_put(batch)

    def one() -> None:
        held[0], metrics = step(held[0], run.params, batch)
        metrics.loss.block_until_ready()

    stats = jax.devices()[0].memory_stats
    return one, lambda: (stats() or {}).get("peak_bytes_in_use")


def experiment_of(
    shape: Shape,
    tokens: np.ndarray,
    *,
    packed: bool = False,
    chunk: int | None = 128,
    attention: str = "cudnn",
    method: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """What train.py would make of a config: here with random weights and one batch."""
    import jax

    import pefts
    from configs.base import decoder_language
    from models.decoder import Decoder
    from models.decoder_config import DecoderConfig
    from training import experiment, language
    from training.objective import Experiment

    dtypes = {"dtype": shape.dtype, "param_dtype": shape.dtype}
    if jax.default_backend() != "gpu" or shape.dtype == "float32":
        attention = "auto"  # cuDNN's is for bfloat16 on NVIDIA GPUs
    model = Decoder(DecoderConfig.from_hf(shape.config, **dtypes, attention=attention, **options))
    params = jax.jit(model.init)(jax.random.key(0), tokens[:1, :8])["params"]
    config = decoder_language("decoder_step")
    config.method = method or {
        "method": "lora",
        "rank": RANK,
        "alpha": float(ALPHA),
        "targets": "all-linear",
    }
    axes = pefts.infer_axes(model.apply, params, tokens[:1, :8])
    length = tokens.shape[1] - 1
    pieces = functools.partial(_with_chunk, language.call, chunk or length)
    objective = language.OBJECTIVE._replace(call=pieces)
    peft = experiment.method(config, axes)
    ones = np.ones((len(tokens), length), np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "mask": ones if packed else None,
        "segments": ones if packed else None,
        "weight": ones.astype(np.float32),
    }
    return Experiment(config, None, {}, model, params, None, peft, objective), batch


def _with_chunk(call: Callable[..., Any], chunk: int, apply: Callable[..., Any]) -> Any:
    return call(functools.partial(apply, chunk=chunk))


# ---------------------------------------------------------------------------------------- peft


def peft(
    shape: Shape, tokens: np.ndarray, side: str, config: Any = None
) -> tuple[Callable[[], Any], Any]:
    """The same with transformers, peft and torch; LoRA unless there is another PeftConfig."""
    import peft as hf_peft
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, shape.dtype)
    sizes = {name: value for name, value in shape.config.items() if name != "model_type"}
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**sizes), dtype=dtype, attn_implementation="sdpa"
        )
    lora = hf_peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = hf_peft.get_peft_model(model, config or lora).train()
    model.config.use_cache = False
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    assert all(weight.dtype == torch.float32 for weight in weights)
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    run = torch.compile(model) if side == "peft compiled" else model
    ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
    mixed = torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def one() -> None:
        optimizer.zero_grad(set_to_none=True)
        with mixed:
            logits = run(input_ids=ids[:, :-1]).logits
            flat = logits.float().flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(flat, ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        loss.item()
        if device == "cuda":
            torch.cuda.synchronize()

    return one, lambda: torch.cuda.max_memory_allocated() if device == "cuda" else None


# ---------------------------------------------------------------------------------------- one run


def measure(shape: str, rows: int, length: int, steps: int, side: str) -> dict[str, float]:
    """Seconds of the steps of one side, in this process."""
    build = ours if side in OURS else peft
    run, device_peak = build(SHAPES[shape], tokens_of(SHAPES[shape], rows, length), side)
    first, middle = processes.step_seconds(run, steps)
    peak = device_peak() or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": middle, "first_s": first, "peak_mib": peak / 2**20}


def in_process(side: str, size: tuple[int, int], arguments: argparse.Namespace) -> Any:
    """`measure` in a fresh process; the last line of its errors where it fails."""
    given = (arguments.shape, *size, arguments.steps, side)
    out = processes.child("benchmarks.decoder_step", given)
    if out.returncode:
        return (out.stderr.strip().splitlines() or [f"exit status {out.returncode}"])[-1]
    return json.loads(out.stdout.strip().splitlines()[-1])


def flops(config: dict[str, Any], rows: int, length: int) -> float:
    """FLOPs of one LoRA step; see the top of this file.

    >>> tiny = SHAPES["tiny"].config
    >>> flops(tiny, 1, 128) / 128 / 4  # 4,980,736 of it for frozen kernels and the head
    5718016.0
    """
    width, middle = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    narrow = config["num_key_value_heads"] * config["head_dim"]
    kernels = [(width, heads), (width, narrow), (width, narrow), (heads, width)]
    kernels += [(width, middle), (width, middle), (middle, width)]
    layers = config["num_hidden_layers"]
    frozen = layers * sum(a * b for a, b in kernels) + config["vocab_size"] * width
    trained = layers * RANK * sum(a + b for a, b in kernels)
    return rows * length * (4.0 * frozen + 6 * trained + 6 * layers * length * heads)


# ---------------------------------------------------------------------------------------- table


def sides_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """What is measured; a side that this machine cannot run is named."""
    chosen = arguments.sides.split(",") if arguments.sides else [*OURS, *PEFT]
    unknown = [side for side in chosen if side not in (*OURS, *PEFT)]
    if unknown:
        raise ValueError(f"--sides: {unknown} are none of {[*OURS, *PEFT]}")
    left_out = {}
    if SHAPES[arguments.shape].dtype == "float32":
        left_out["xla attention"] = "in float32 every side of ours has it"
    if not any(map(shutil.which, COMPILERS)):
        left_out["peft compiled"] = f"torch.compile needs one of {', '.join(COMPILERS)}"
    for side in chosen:
        if side in left_out:
            print(f"{side}: left out, {left_out[side]}")
    return tuple(side for side in chosen if side not in left_out)


def show(
    size: tuple[int, int], rounds: list[dict[str, Any]], arguments: argparse.Namespace
) -> None:
    """Print the table of one batch, and each side's speed as a multiple of the first of peft's."""
    count = size[0] * size[1]
    needed = flops(SHAPES[arguments.shape].config, *size)
    print(f"\n{arguments.shape}, {size[0]} x {size[1]} tokens, LoRA r={RANK}, {len(rounds)} rounds")
    heads = f"{'tokens/s (min - max)':>30}{'step ms':>10}{'peak MiB':>11}{'first step s':>14}"
    print(f"{'':16}{heads}{'MFU':>8}{'speed / peft':>24}")
    for side in rounds[0]:
        failed = [r[side] for r in rounds if isinstance(r[side], str)]
        if failed:
            print(f"{side:16}  failed: {failed[0][:120]}")
            continue
        middle = {k: statistics.median(r[side][k] for r in rounds) for k in rounds[0][side]}
        speeds = sorted(count / r[side]["seconds"] for r in rounds)
        spread = f"{statistics.median(speeds):,.0f} ({speeds[0]:,.0f} - {speeds[-1]:,.0f})"
        peak = arguments.peak_tflops
        used = f"{needed / middle['seconds'] / (peak * 1e12):.1%}" if peak else "-"
        print(
            f"{side:16}{spread:>30}{1000 * middle['seconds']:10,.1f}{middle['peak_mib']:11,.0f}"
            f"{middle['first_s']:14.1f}{used:>8}{_ratios(side, rounds):>24}"
        )


def _ratios(side: str, rounds: list[dict[str, Any]]) -> str:
    """Round by round: seconds of eager peft over those of a side."""
    pairs = [(r.get(PEFT[0]), r[side]) for r in rounds]
    found = sorted(a["seconds"] / b["seconds"] for a, b in pairs if isinstance(a, dict))
    if not found:
        return "-"
    return f"{statistics.median(found):.2f} ({found[0]:.2f} - {found[-1]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA step of a Llama, ours and peft")
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sides", help="some of them, separated by commas")
    parser.add_argument("--peak_tflops", type=float, help="of the device, for the utilisation")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        shape, rows, length, steps, side = arguments.child
        print(json.dumps(measure(shape, int(rows), int(length), int(steps), side)))
        return
    try:
        sides = sides_of(arguments)
    except ValueError as error:
        parser.error(str(error))
    for size in SHAPES[arguments.shape].batches:
        turns = range(arguments.rounds)
        rounds = [{side: in_process(side, size, arguments) for side in sides} for _ in turns]
        show(size, rounds, arguments)


if __name__ == "__main__":
    main()

"""One training step of every method as a multiple of LoRA's: ours, and Hugging Face PEFT's.

    python -m benchmarks.method_step                        # any CPU: a small Llama in float32
    python -m benchmarks.method_step --shape=llama-1b       # a GPU
    python -m benchmarks.method_step --methods=oft,boft

Random weights, all linear kernels of a Llama but the head unless a method has kernels of its own,
AdamW. Ours is the step of train.py, compiled; PEFT's is eager. Each side runs in one process; in
each round every method takes its turn, LoRA first, so that a ratio is of steps near in time. Shown
is the median over rounds, with the least and the most.

  ours       our step over our LoRA's
  peft       PEFT's step over PEFT's LoRA's
  ours/peft  our step over PEFT's LoRA's: below 1, this method is faster here than LoRA there
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import decoder_step, processes
from benchmarks.decoder_step import SHAPES, Shape, tokens_of

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Entry(NamedTuple):
    """A method here, and what makes the same in PEFT: the name of a config class and its fields."""

    ours: dict[str, Any]
    theirs: tuple[str, dict[str, Any]] | None = None


ENTRIES = {
    "lora": Entry(
        {"method": "lora", "rank": 16, "alpha": 32.0}, ("LoraConfig", {"r": 16, "lora_alpha": 32})
    ),
    "dora": Entry(
        {"method": "dora", "rank": 16, "alpha": 32.0},
        ("LoraConfig", {"r": 16, "lora_alpha": 32, "use_dora": True}),
    ),
    "adalora": Entry(
        {"method": "adalora", "init_rank": 16, "target_rank": 8, "total_steps": 1000},
        ("AdaLoraConfig", {"init_r": 16, "target_r": 8, "total_step": 1000}),
    ),
    "vera": Entry({"method": "vera", "rank": 256}, ("VeraConfig", {"r": 256})),
    "ia3": Entry(
        {"method": "ia3", "targets": None},
        (
            "IA3Config",
            {
                "target_modules": ["k_proj", "v_proj", "down_proj"],
                "feedforward_modules": ["down_proj"],
            },
        ),
    ),
    "oft": Entry({"method": "oft", "block_size": 32}, ("OFTConfig", {"oft_block_size": 32})),
    "boft": Entry({"method": "boft", "block_size": 4}, ("BOFTConfig", {"boft_block_size": 4})),
    "miss": Entry({"method": "miss", "rank": 64}, ("MissConfig", {"r": 64})),
    "loha": Entry({"method": "loha", "rank": 16}, ("LoHaConfig", {"r": 16})),
    "lokr": Entry({"method": "lokr", "rank": 16}, ("LoKrConfig", {"r": 16})),
    "hira": Entry({"method": "hira", "rank": 32}, ("HiraConfig", {"r": 32})),
    "randlora": Entry({"method": "randlora", "rank": 32}, ("RandLoraConfig", {"r": 32})),
    "nola": Entry({"method": "nola", "rank": 16}),
    "mos": Entry({"method": "mos"}),
    "vb_lora": Entry({"method": "vb_lora"}),
    "flora": Entry({"method": "flora", "rank": 16}),
}


def measured(step: Callable[[], None], reference: Callable[[], None], rounds: int) -> list[Any]:
    """(seconds of the step, seconds of the reference) of every round, both warmed up."""
    for run in (reference, step):
        run()
        run()
    return [(processes.seconds(step), processes.seconds(reference)) for _ in range(rounds)]


def ours(shape: Shape, rows: int, length: int, name: str) -> Callable[[], None]:
    """A function that makes one step of train.py with the named method."""
    import jax

    from training import step

    tokens = tokens_of(shape, rows, length)
    options = {"targets": "all-linear", **ENTRIES[name].ours}
    given = {key: value for key, value in options.items() if value is not None}
    run, batch = decoder_step.experiment_of(shape, tokens, method=given)
    state, tx = step.initial_state(run, 1000, None)
    jitted = jax.jit(step.make_step(run, tx), donate_argnums=0)
    held, batch = [state], jax.device_put(batch)

    def one() -> None:
        held[0], metrics = jitted(held[0], run.params, batch)
        metrics.loss.block_until_ready()

    return one


def peft(shape: Shape, rows: int, length: int, name: str) -> Callable[[], None]:
    """The same with transformers, peft and torch."""
    import peft as hf_peft

    kind, fields = ENTRIES[name].theirs or ("", {})
    config = getattr(hf_peft, kind)(
        **{"target_modules": LINEAR, "task_type": "CAUSAL_LM", **fields}
    )
    return decoder_step.peft(shape, tokens_of(shape, rows, length), "peft eager", config)[0]


def measure(side: str, shape: str, rows: int, length: int, rounds: int, names: list[str]) -> Any:
    """{method: pairs of seconds}, or the text of its error, of one side in this process."""
    build, found = {"ours": ours, "peft": peft}[side], {}
    reference = build(SHAPES[shape], rows, length, "lora")
    for name in names:
        try:
            step = build(SHAPES[shape], rows, length, name)
            found[name] = measured(step, reference, rounds)
        except (ValueError, TypeError, AttributeError) as error:
            found[name] = f"{type(error).__name__}: {error}"[:160]
    return found


def in_process(side: str, names: list[str], arguments: argparse.Namespace) -> Any:
    rows, length = SHAPES[arguments.shape].batches[0]
    given = (side, arguments.shape, rows, length, arguments.rounds, ",".join(names))
    out = processes.child("benchmarks.method_step", given)
    if out.returncode:
        sys.exit(out.stderr)
    return json.loads(out.stdout.strip().splitlines()[-1])


def ratio(pairs: Any) -> str:
    """Median (least - most) of the pairs' ratios.

    >>> ratio([(2.0, 1.0), (3.0, 1.0), (8.0, 2.0)])
    '3.00 (2.00 - 4.00)'
    """
    if not isinstance(pairs, list):
        return str(pairs or "-")
    found = sorted(mine / reference for mine, reference in pairs)
    return f"{statistics.median(found):.2f} ({found[0]:.2f} - {found[-1]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="steps of methods as multiples of LoRA's")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", help="some of them, separated by commas")
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        side, shape, rows, length, rounds, names = arguments.child
        found = measure(side, shape, int(rows), int(length), int(rounds), names.split(","))
        print(json.dumps(found))
        return
    names = arguments.methods.split(",") if arguments.methods else list(ENTRIES)
    unknown = [name for name in names if name not in ENTRIES]
    if unknown:
        parser.error(f"--methods: {unknown} are none of {list(ENTRIES)}")
    mine = in_process("ours", names, arguments)
    theirs = in_process("peft", [n for n in names if ENTRIES[n].theirs], arguments)
    base = statistics.median(pair[1] for pairs in theirs.values() for pair in pairs)
    rows, length = SHAPES[arguments.shape].batches[0]
    print(f"{arguments.shape}, {rows} x {length} tokens, {arguments.rounds} rounds; PEFT's LoRA ")
    print(f"{'':12}{'ours':>22}{'peft':>22}{'ours/peft':>12}")
    for name in names:
        pairs = mine[name]
        against = statistics.median(p[0] for p in pairs) / base if isinstance(pairs, list) else 0
        print(f"{name:12}{ratio(pairs):>22}{ratio(theirs.get(name)):>22}{against:12.2f}")


if __name__ == "__main__":
    main()

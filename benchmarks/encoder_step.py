"""One LoRA training step of MiniLM: ours against Hugging Face PEFT on PyTorch, in one run.

    python -m benchmarks.encoder_step --rounds 5

Each side runs in processes of its own, in turn (ours, peft, ours, ...), on the same random tokens,
the same kernels (every linear one of the six layers), rank 8, AdamW, no dropout, float32, and as
many threads as the machine has cores. Printed: milliseconds per step (the median of a process's
steps; then the median, least and most over the rounds), the ratio round by round, the peak memory
of the process, and the time to the end of the first step (ours compiles in it).
"""

import argparse
import json
import resource
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import processes

RANK, CLASSES, SIDES = 8, 10, ("ours", "peft")


def make_batch(batch_size: int, length: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "tokens": generator.integers(1000, 30000, (batch_size, length), dtype=np.int32),
        "mask": np.ones((batch_size, length), np.int32),
        "label": generator.integers(0, CLASSES, batch_size, dtype=np.int32),
    }


def ours(batch: dict[str, np.ndarray]) -> Callable[[], Any]:
    """A function that makes one step and waits for it."""
    import jax
    import optax

    import models
    import pefts

    model, params, _ = models.load("minilm", num_labels=CLASSES)
    axes = pefts.infer_axes(model.apply, params, batch["tokens"], batch["mask"])
    head = pefts.full(targets="classifier")
    peft = pefts.chain(head, pefts.lora(rank=RANK, axes=axes))
    state = peft.init(jax.random.key(0), params)
    tx = optax.adamw(1e-3)
    forward = pefts.apply(model.apply)

    def loss_fn(trainable: Any, params: Any) -> jax.Array:
        bound = peft.bind(params, state._replace(trainable=trainable))
        logits = forward({"params": bound}, batch["tokens"], batch["mask"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    @jax.jit
    def step(trainable: Any, opt_state: Any, params: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(trainable, params)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, loss

    held = [state.trainable, tx.init(state.trainable)]

    def run() -> None:
        *held[:], loss = step(*held, params)
        loss.block_until_ready()

    return run


def peft(batch: dict[str, np.ndarray]) -> Callable[[], Any]:
    """The same step with transformers, peft and torch."""
    import peft as hf_peft
    import torch
    import transformers

    import models

    encoder = transformers.AutoModel.from_pretrained(models.folder("minilm")).eval()
    pattern = r"encoder\.layer\..*\.(query|key|value|dense)"
    config = hf_peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=pattern)
    encoder = hf_peft.get_peft_model(encoder, config).eval()
    head = torch.nn.Linear(encoder.config.hidden_size, CLASSES)
    weights = [p for p in encoder.parameters() if p.requires_grad] + list(head.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    tokens, mask, label = (torch.from_numpy(batch[name]).long() for name in batch)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        hidden = encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        torch.nn.functional.cross_entropy(head(pooled), label).backward()
        optimizer.step()

    return run


def measure(side: str, batch_size: int, length: int, steps: int) -> dict[str, float]:
    """Seconds of the steps of one side, in this process."""
    build = {"ours": ours, "peft": peft}[side]
    run = build(make_batch(batch_size, length))
    first, middle = processes.step_seconds(run, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"step_ms": 1000 * middle, "first_s": first, "peak_mib": peak}


def in_process(side: str, arguments: argparse.Namespace) -> dict[str, float]:
    """`measure` in a fresh process."""
    out = processes.child(
        "benchmarks.encoder_step", (side, arguments.batch, arguments.length, arguments.steps)
    )
    out.check_returncode()
    return json.loads(out.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA step, ours and peft")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        side, *sizes = arguments.child
        print(json.dumps(measure(side, *map(int, sizes))))
        return
    rounds = [{s: in_process(s, arguments) for s in SIDES} for _ in range(arguments.rounds)]
    print(f"{arguments.batch} x {arguments.length} tokens, LoRA r={RANK} on all linear kernels")
    print(f"{'':6}{'step ms (min - max)':>28}{'peak MiB':>12}{'first step s':>14}")
    for side in SIDES:
        ms = sorted(r[side]["step_ms"] for r in rounds)
        middle = {k: statistics.median(r[side][k] for r in rounds) for k in rounds[0][side]}
        spread = f"{middle['step_ms']:.0f} ({ms[0]:.0f} - {ms[-1]:.0f})"
        print(f"{side:6}{spread:>28}{middle['peak_mib']:12,.0f}{middle['first_s']:14.1f}")
    ratios = sorted(r["ours"]["step_ms"] / r["peft"]["step_ms"] for r in rounds)
    memory = [r["ours"]["peak_mib"] / r["peft"]["peak_mib"] for r in rounds]
    print(
        f"step time, ours / peft: {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} - {ratios[-1]:.2f}); peak memory: {statistics.median(memory):.2f}"
    )


if __name__ == "__main__":
    main()

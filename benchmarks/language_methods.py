"""Every method on a small language model: what it learns of a new text, what it forgets of its own.

    python -m benchmarks.language_methods --base=stories260K --steps=150

stories260K (`python -m models.llama2c`) is adapted to tiny Shakespeare by the method section of
every configs/minilm_stdlib_docs_*.py, for the same steps on the same batches; learning rates are
three times those of these configs, as LoRA's is. The table has the perplexity of the test text and,
before and after, that of stories which the unadapted base wrote itself (temperature 1, a fixed
seed): what it costs to forget them. Finished methods are kept in runs/language_methods/*.json.
"""

import argparse
import importlib
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import models
import pefts
import train
from benchmarks.methods import PREFIX, ROOT, SHARED, names
from configs.base import Config
from data import language
from data.written import plain
from models.generate import Sampling, generate
from training import evaluate, experiment, writing
from training.checkpoint import write_atomically
from training.objective import Experiment, Opening, Writing

OUT = ROOT / "runs" / "language_methods"
CONFIG = "stories260k_tinyshakespeare_lora"
LEARNING_RATE_FACTOR = 3.0
STORIES, STORY_TOKENS = 64, 200
WIDTH = 32  # the smaller side of the narrowest kernel of stories260K: no rank is above it


def config_of(name: str, base: str, steps: int) -> Config:
    """The language config with another config's method and, scaled, its learning rate."""
    config = importlib.import_module(f"configs.{CONFIG}").get_config()
    other = importlib.import_module(f"configs.{name}").get_config()
    other.train.steps = steps
    if "warmup" in other.method:  # a schedule in steps, made for a longer run
        other.method.warmup = (steps // 8, steps // 3)
    if "exclude" in other.method:  # names of an encoder's parts
        del other.method.exclude
    if other.method.get("rank", 0) > WIDTH:
        other.method.rank = WIDTH
    config.method, config.model.source, config.train.steps = other.method, base, steps
    config.task.root = str(SHARED)
    config.optimizer.learning_rate = LEARNING_RATE_FACTOR * other.optimizer.learning_rate
    return config


def stories(base: str) -> list[str]:
    """What the unadapted base writes by itself."""
    model, params, _ = models.load(base)
    tokenizer = models.load_tokenizer(base)
    start = np.asarray(tokenizer.encode([""]), np.int32)[:, :1].repeat(STORIES, axis=0)

    def write(key: jax.Array) -> Any:
        mask, sampling = np.ones_like(start), Sampling(1.0)
        variables, stop = {"params": params}, models.stop_tokens(base)
        return generate(
            *(model.apply, model.config, variables, start, mask, key),
            new_tokens=STORY_TOKENS,
            stop=stop,
            sampling=sampling,
        )

    found = jax.jit(write)(jax.random.key(0))
    rows = zip(np.asarray(found.tokens), np.asarray(found.lengths), strict=True)
    return [tokenizer.decode(row[:length].tolist()) for row, length in rows]


def perplexity(run: Experiment, forward: Any, argument: Any, texts: Sequence[str]) -> float:
    """Of texts that are in no split."""
    tokenizer = models.load_tokenizer(run.config.model.source)
    length = run.config.data.max_length
    rows = language.tokenise([plain(text) for text in texts], tokenizer, max_length=length)
    held = run._replace(rows={"own": rows})
    return evaluate.score(held, forward, argument, "own").summary()["perplexity"]


def run(name: str, base: str, steps: int, own: Sequence[str]) -> dict[str, Any]:
    """Train one method; what it reads and writes after that."""
    session = train.prepare(config_of(name, base, steps))
    state, adapted = session.state, session.run
    for step in range(session.steps):
        state, metrics = session.update(state, session.place(session.batches[step]))
    if not bool(metrics.finite):
        raise FloatingPointError(f"{name}: the loss is not finite")
    argument, forward = (adapted.params, state.peft_state), evaluate.adapted_forward(adapted)
    text = ""
    if adapted.peft.traits.decodes:
        (text,) = writing.write(adapted, argument, [Opening("ROMEO:")], Writing(40, 0.7))
    return {
        "method": name.removeprefix(PREFIX),
        "trainable": pefts.count(state.peft_state.trainable),
        "test": evaluate.score(adapted, forward, argument, "test").summary()["perplexity"],
        "own": perplexity(adapted, forward, argument, own),
        "text": text,
        "steps": steps,
    }


def unadapted(base: str, own: Sequence[str]) -> dict[str, Any]:
    """The base itself."""
    plain_run = experiment.build(config_of(f"{PREFIX}lora", base, 1))
    forward = evaluate.forward(plain_run)
    scores = evaluate.score(plain_run, forward, plain_run.params, "test")
    return {
        "method": "*none*",
        "trainable": 0,
        "test": scores.summary()["perplexity"],
        "own": perplexity(plain_run, forward, plain_run.params, own),
        "text": "",
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, the best first."""
    base = next(row for row in rows if not row["trainable"])
    lines = [
        "| method | trainable | Shakespeare | own stories | forgetting, nats |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: row["test"]):
        forgotten = math.log(row["own"] / base["own"])
        lines.append(
            f"| {row['method']} | {row['trainable']:,} | {row['test']:.1f} | {row['own']:.1f} "
            f"| {forgotten:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", default="stories260K", help="the folder of the base")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--only", nargs="*", help="some methods")
    given = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    own = stories(given.base)
    rows = [unadapted(given.base, own)]
    for name in names():
        method = name.removeprefix(PREFIX)
        file = OUT / f"{method}.json"
        if given.only and method not in given.only:
            continue
        if not file.exists():
            try:
                found = run(name, given.base, given.steps, own)
            except ValueError as error:
                # A base without biases, or with a tied head, has nothing for some methods.
                print(f"{method}: {error}")
                continue
            write_atomically(file, json.dumps(found, indent=2) + "\n")
        rows.append(json.loads(file.read_text(encoding="utf-8")))
        print(f"{method}: {rows[-1]['test']:.2f}, own {rows[-1]['own']:.2f}")
    print(table(rows))
    for row in rows:
        print(f"\n{row['method']}\nROMEO:{row['text']}")


if __name__ == "__main__":
    main()

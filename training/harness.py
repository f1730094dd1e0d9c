"""Scores of a decoder by EleutherAI's lm-evaluation-harness (the package lm_eval).

    python -m training.harness --run=runs/NAME --tasks=arc_easy,gsm8k --limit=100

    lm = harness_model(model, params, tokenizer)
    lm_eval.simple_evaluate(lm, tasks=["arc_easy"])

Batches have one size and are padded on the left to lengths that are powers of two, so that few
programs are compiled: one for every pair of lengths (row, scored end of it), one for every length
of prompts and way of continuing them.

Shape legend: B batch, T tokens, S scored tokens at the end of a row, P pieces of C tokens each,
D hidden size, V vocabulary.
"""

import argparse
import difflib
import functools
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import models
import pefts
from models.decoder import Decoder
from models.generate import Sampling, generate
from models.tokenizer import Tokenizer
from training import checkpoint, experiment, report
from training.writing import behind, filled, left_padded

INSTALL = "pip install 'lm_eval>=0.4.13'"
RESULTS = "harness.json"
SHORTEST = 16  # rows are padded to this at least
STATIC = ("new_tokens", "stop", "sampling")  # a program for each way of continuing
PIECE = 128  # tokens of a row whose logits exist at a time
NEW_TOKENS = 256  # where a task does not say, as in the harness's own models
# What a task may call the number of new tokens; the first that it gives counts.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Options of other libraries that change nothing at these values.
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0}
KEPT = (
    "results",
    "groups",
    "group_subtasks",
    "versions",
    "n-shot",
    "n-samples",
    "higher_is_better",
)


class Continuation(NamedTuple):
    """How prompts are continued: until one of some texts, by so many tokens, greedily or not."""

    until: tuple[str, ...] = ()
    new_tokens: int = NEW_TOKENS
    sampling: Sampling = Sampling()


class Engine(NamedTuple):
    """A decoder behind two jitted functions, and how its batches are made."""

    tokenizer: Tokenizer
    params: Any
    batch_size: int
    max_length: int
    stop_ids: tuple[int, ...]
    prefix_id: int | None  # of the token before a text that has nothing before it
    virtual: int  # tokens that an adapter puts in front of every call
    score: Callable[..., Any]  # (params, tokens, mask, targets) -> log p and is likeliest, (B, S)
    write: Callable[..., Any]  # (params, tokens, mask, key, **STATIC) -> Generated


def harness_model(
    model: nn.Module,
    params: Any,
    tokenizer: Tokenizer,
    *,
    apply: Callable[..., Any] | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    stop_ids: Sequence[int] = (),
) -> Any:
    """A decoder as a language model of the harness, an `lm_eval.api.model.LM`.

    Args:
      model: a decoder; gives the configuration, and `apply` if none is given.
      params: its parameters; bound ones (`peft.bind(params, state)`) where `apply` is adapted.
      tokenizer: the model's.
      apply: model.apply, or `pefts.apply(model.apply)`.
      batch_size: rows of every batch.
      max_length: tokens that the model reads at most; the rest of a context is cut on the left. By
        default the positions that the model was trained for.
      stop_ids: tokens that end a continuation, beside the tokenizer's end of text.

    Raises:
      ImportError: lm_eval is not installed.
      ValueError: the model is no decoder, or batch_size or max_length is out of range. Later: an
        empty continuation or one beyond max_length, generation options that are not built here,
        generation with virtual tokens.

    Source: lm-evaluation-harness, github.com/EleutherAI/lm-evaluation-harness.
    """
    if not isinstance(model, Decoder):
        raise ValueError(f"model is a {type(model).__name__}; the harness takes decoders alone")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    run = model.apply if apply is None else apply
    virtual = _virtual(run, params)
    positions, learned = model.config.max_positions - virtual, model.config.max_length is not None
    length = positions if max_length is None else max_length
    if length < 2 or (learned and length > positions):
        bound = f" and at most {positions}, the model's positions" if learned else ""
        raise ValueError(f"max_length={length} must be at least 2{bound}")
    ends = {tokenizer.end_id, *stop_ids} - {None}
    (begins,) = tokenizer.encode([""])
    engine = Engine(
        tokenizer,
        params,
        batch_size,
        length,
        tuple(sorted(ends)),
        begins[0] if begins else tokenizer.end_id,
        virtual,
        jax.jit(functools.partial(_score, run)),
        jax.jit(functools.partial(_write, run, model.config), static_argnames=STATIC),
    )
    return _model_class()(engine)


def _virtual(apply: Callable[..., Any], params: Any) -> int:
    tokens = np.ones((1, 2), np.int32)
    logits = jax.eval_shape(lambda params: apply({"params": params}, tokens, tokens), params)
    return logits.shape[1] - tokens.shape[1]


class Requests:
    """The half of a `TemplateLM` that depends on the model.

    A class, because the harness asks for one; without its other half, because lm_eval may be
    absent. Texts are split into context and continuation by that half.
    """

    cache_hook: Any  # the harness's own

    def __init__(self, engine: Engine):
        super().__init__()
        self.engine = engine

    @property
    def eot_token_id(self) -> int | None:
        return self.engine.tokenizer.end_id

    @property
    def prefix_token_id(self) -> int:
        return _prefix(self.engine)

    @property
    def max_length(self) -> int:
        return self.engine.max_length

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        del kwargs
        return encode(self.engine, string, add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        del kwargs
        found = likelihoods(self.engine, [(before, ids) for _, before, ids in requests])
        for (texts, *_), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        del disable_tqdm
        texts = [request.args[0] for request in requests]
        windows = [_windows(self.engine, text) for text in texts]
        found = iter(likelihoods(self.engine, [pair for pairs in windows for pair in pairs]))
        totals = [sum(next(found)[0] for _ in pairs) for pairs in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        del disable_tqdm
        asked = [request.args for request in requests]
        texts = continuations(self.engine, asked)
        for given, text in zip(asked, texts, strict=True):
            self.cache_hook.add_partial("generate_until", given, text)
        return texts


@functools.cache
def _model_class() -> type:
    return type("HarnessModel", (Requests, _package("lm_eval.api.model").TemplateLM), {})


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ImportError(f"the evaluation harness is not installed: {INSTALL}") from error


# ---------------------------------------------------------------------------------------- tokens


def encode(engine: Engine, text: str, special: bool) -> list[int]:
    """Ids of a text, with the special tokens in front unless it begins with them as written."""
    ((ids, _),) = engine.tokenizer.encode_spans([text], special=False)
    if not special or (ids and ids[0] == engine.prefix_id):
        return ids
    return engine.tokenizer.encode([text])[0]


def _prefix(engine: Engine) -> int:
    if engine.prefix_id is None:
        raise ValueError(
            f"the tokenizer in {engine.tokenizer.folder} has no token that begins or ends a text;"
            " a text without context needs one: name it as eos_token in tokenizer_config.json"
        )
    return engine.prefix_id


def _windows(engine: Engine, text: str) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) pairs that together score each token of a text once.

    The token that begins a text is given, not scored.
    """
    split = _package("lm_eval.utils")
    ids = encode(engine, text, False)
    pairs = split.get_rolling_token_windows(ids, _prefix(engine), engine.max_length, 1)
    return [split.make_disjoint_window(pair) for pair in pairs]


def _bucket(length: int, most: int) -> int:
    """The power of two that so many tokens are padded to.

    >>> [_bucket(n, 100) for n in (1, 16, 17, 65)]
    [16, 16, 32, 100]
    """
    return min(most, max(SHORTEST, 1 << (length - 1).bit_length()))


def _batches(lengths: Sequence[int], size: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Row numbers, the longest rows first: those of a batch, and filled up to `size`."""
    return filled(sorted(range(len(lengths)), key=lambda i: -lengths[i]), size)


# ---------------------------------------------------------------------------------------- scoring


def likelihoods(
    engine: Engine, pairs: Sequence[tuple[list[int], list[int]]]
) -> list[tuple[float, bool]]:
    """log p(continuation | context) of every pair, and whether each token is the likeliest."""
    rows = [_joined(engine, *pair) for pair in pairs]
    counts = [len(continuation) for _, continuation in pairs]
    found = [(0.0, True)] * len(rows)
    for chosen, batch in _batches([len(row) for row in rows], engine.batch_size):
        longest = max(len(rows[i]) - 1 for i in batch)
        tokens, mask = left_padded(
            [rows[i][:-1] for i in batch], _bucket(longest, engine.max_length)
        )
        ends = _bucket(max(counts[i] for i in batch), engine.max_length)
        targets, _ = left_padded([rows[i] for i in batch], ends)
        scores, likeliest = map(np.asarray, engine.score(engine.params, tokens, mask, targets))
        for at, i in enumerate(chosen):
            total = scores[at, -counts[i] :].sum(dtype=np.float64)
            found[i] = float(total), bool(likeliest[at, -counts[i] :].all())
    return found


def _joined(engine: Engine, context: list[int], continuation: list[int]) -> list[int]:
    """Both, cut on the left to what the model reads and the token behind it."""
    if not continuation:
        raise ValueError(
            f"a continuation of the context {engine.tokenizer.decode(context)!r} has no token of"
            " its own; give it some text"
        )
    if len(continuation) > engine.max_length:
        raise ValueError(
            f"a continuation has {len(continuation)} tokens, the model reads at most"
            f" max_length={engine.max_length}; leave that task out"
        )
    # A context of spaces alone gives them all to the continuation.
    context = context or [_prefix(engine)]
    return [*context, *continuation][-engine.max_length - 1 :]


def _score(apply: Callable[..., Any], params: Any, tokens: Any, mask: Any, targets: Any) -> Any:
    def method(module: Decoder, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _of_the_end(module, module.hidden(tokens, mask), targets)

    # One call, so that an adapted `apply` sees each of its kernels read.
    return apply({"params": params}, tokens, mask, method=method)


def _of_the_end(
    module: Decoder, x_BxTxD: jax.Array, targets_BxS: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """log p of the targets of the last S tokens, and whether each is the likeliest; (B, S)."""
    batch, length = targets_BxS.shape
    pieces = -(-length // PIECE)
    before = pieces * -(-length // pieces) - length
    x_BxSxD = jnp.pad(x_BxTxD[:, -length:], ((0, 0), (before, 0), (0, 0)))
    y_BxPxC = jnp.pad(targets_BxS, ((0, 0), (before, 0))).reshape(batch, pieces, -1)

    def piece(module: Decoder, carry: None, x_BxCxD: jax.Array, y_BxC: jax.Array) -> Any:
        logits_BxCxV = module.logits(x_BxCxD)
        chosen_BxC = jnp.take_along_axis(logits_BxCxV, y_BxC[..., None], axis=-1)[..., 0]
        log_p_BxC = chosen_BxC - jax.nn.logsumexp(logits_BxCxV, axis=-1)
        return carry, (log_p_BxC, jnp.argmax(logits_BxCxV, axis=-1) == y_BxC)

    over = nn.scan(
        piece, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1
    )
    x_BxPxCxD = x_BxSxD.reshape(*y_BxPxC.shape, -1)
    found = over(module, None, x_BxPxCxD, y_BxPxC)[1]  # pyright: ignore[reportCallIssue]
    log_p_BxS, likeliest_BxS = (value.reshape(batch, -1)[:, before:] for value in found)
    return log_p_BxS, likeliest_BxS


# ---------------------------------------------------------------------------------------- writing


def continuations(engine: Engine, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """The text behind every (prompt, generation options), before the first of its stop texts."""
    ways = [read_options(options) for _, options in asked]
    texts = [""] * len(asked)
    for number, how in enumerate(dict.fromkeys(ways)):
        rows = [i for i, way in enumerate(ways) if way == how]
        key = jax.random.fold_in(jax.random.key(0), number)
        found = _continue(engine, [asked[i][0] for i in rows], how, key)
        for i, text in zip(rows, found, strict=True):
            texts[i] = text
    return texts


def read_options(options: Mapping[str, Any]) -> Continuation:
    """What a task's generation options ask for.

    Raises:
      ValueError: an option that is not built here, or one out of range.

    >>> read_options({"until": "Q:", "max_gen_toks": 3}).until
    ('Q:',)
    """
    given = dict(options)
    until = given.pop("until", None) or ()
    lengths = [given.pop(name) for name in LENGTHS if given.get(name) is not None]
    sample, temperature = given.pop("do_sample", None), given.pop("temperature", None)
    if sample is False or (sample is None and temperature is None):
        temperature = 0.0
    top_k, top_p = given.pop("top_k", None) or 0, given.pop("top_p", None)
    unknown = {k: v for k, v in given.items() if v is not None and v != NEUTRAL.get(k)}
    if unknown:
        raise ValueError(
            f"generation options {unknown} are not built here; known are until, do_sample,"
            f" temperature, top_k, top_p, {', '.join(LENGTHS)}"
        )
    return Continuation(
        (until,) if isinstance(until, str) else tuple(until),
        int(lengths[0]) if lengths else NEW_TOKENS,
        Sampling(
            1.0 if temperature is None else float(temperature),
            int(top_k),
            1.0 if top_p is None else float(top_p),
        ),
    )


def _continue(
    engine: Engine, prompts: Sequence[str], how: Continuation, key: jax.Array
) -> list[str]:
    """The continuations of prompts that are continued alike."""
    if engine.virtual:
        raise ValueError(
            f"the adapter puts {engine.virtual} tokens of its own in front of every call, so it"
            " cannot continue a text token by token; take tasks that score given texts"
        )
    room = engine.max_length - how.new_tokens
    if room < 1:
        raise ValueError(
            f"max_gen_toks={how.new_tokens} leaves no room for a prompt: the model reads at most"
            f" max_length={engine.max_length} tokens"
        )
    write = functools.partial(
        engine.write,
        engine.params,
        new_tokens=how.new_tokens,
        stop=_stop_ids(engine.tokenizer, engine.stop_ids, how.until),
        sampling=how.sampling,
    )
    rows = [(encode(engine, text, True) or [_prefix(engine)])[-room:] for text in prompts]
    texts = [""] * len(rows)
    for number, (chosen, batch) in enumerate(_batches([*map(len, rows)], engine.batch_size)):
        length = _bucket(max(len(rows[i]) for i in batch), room)
        tokens, mask = left_padded([rows[i] for i in batch], length)
        out = write(tokens, mask, jax.random.fold_in(key, number))
        new, lengths = np.asarray(out.tokens), np.asarray(out.lengths)
        for at, i in enumerate(chosen):
            texts[i] = _text(engine, rows[i], new[at, : lengths[at]].tolist(), how.until)
    return texts


def _write(apply: Callable[..., Any], config: Any, params: Any, *rows: Any, **how: Any) -> Any:
    return generate(apply, config, {"params": params}, *rows, **how)


@functools.lru_cache(maxsize=64)
def _stop_ids(tokenizer: Tokenizer, ends: tuple[int, ...], until: tuple[str, ...]) -> Any:
    """Tokens behind which nothing is read: those that end a text or hold a whole stop text."""
    texts = [text for text in until if text]
    ids = range(tokenizer.vocab_size) if texts else ()
    found = {one for one in ids if any(text in tokenizer.decode([one]) for text in texts)}
    return tuple(sorted(found | set(ends)))


def _text(engine: Engine, prompt: list[int], new: list[int], until: tuple[str, ...]) -> str:
    if new and new[-1] in engine.stop_ids:
        new = new[:-1]
    text = behind(engine.tokenizer, prompt, new)
    for end in until:
        text = text.split(end)[0] if end else text
    return text


# ---------------------------------------------------------------------------------------- a run


def evaluate(
    run_folder: Path,
    tasks: Sequence[str],
    *,
    adapter: Path | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Scores a run of train.py on tasks of the harness, and writes them into its folder.

    Args:
      run_folder: made by train.py.
      tasks: names of tasks or groups, or paths of their YAML files.
      adapter: its adapter file; RUN/adapter.safetensors by default.
      include_path: a folder with further tasks.
      limit: examples of each task.
      num_fewshot: examples in front of each question; the task's own number by default.
      batch_size: rows of every batch.

    Raises:
      ImportError: lm_eval is not installed.
      ValueError: no such run or task, or a method or an option that cannot be served.
    """
    evaluator = _package("lm_eval.evaluator")
    source = checkpoint.read_config(run_folder).model.source
    manager = _package("lm_eval.tasks").TaskManager(include_path=include_path)
    _check_tasks(tasks, manager.all_tasks)
    run, state = experiment.load_run(run_folder, adapter)
    lm = harness_model(
        run.model,
        run.peft.bind(run.params, state),
        models.load_tokenizer(source),
        apply=pefts.apply(run.model.apply),
        batch_size=batch_size,
        stop_ids=models.stop_tokens(source),
    )
    found = evaluator.simple_evaluate(
        lm,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        log_samples=False,
    )
    facts = {"limit": limit, "num_fewshot": num_fewshot, "lm_eval": found["lm_eval_version"]}
    kept = facts | {name: found[name] for name in KEPT if name in found}
    text = json.dumps(kept, indent=2, default=_package("lm_eval.utils").handle_non_serializable)
    checkpoint.write_atomically(run_folder / RESULTS, text + "\n")
    return kept


def _check_tasks(tasks: Sequence[str], known: Sequence[str]) -> None:
    for name in tasks:
        if name not in known and not Path(name).is_file():
            near = difflib.get_close_matches(name, known)
            raise ValueError(
                f"--tasks: {name!r} is none of the {len(known):,} tasks of the harness and no YAML"
                f" file; near {near}; --include_path=FOLDER adds tasks of your own"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="score a run by lm-evaluation-harness")
    parser.add_argument("--run", type=Path, required=True, help="a run folder of train.py")
    parser.add_argument("--tasks", required=True, help="names, separated by commas")
    parser.add_argument("--adapter", type=Path, help="RUN/adapter.safetensors if absent")
    parser.add_argument("--include_path", help="a folder with tasks of your own")
    parser.add_argument("--limit", type=int, help="examples of each task")
    parser.add_argument("--num_fewshot", type=int, help="examples in front of a question")
    parser.add_argument("--batch_size", type=int, default=8)
    options = vars(parser.parse_args())
    folder, tasks = options.pop("run"), options.pop("tasks").split(",")
    try:
        found = evaluate(folder, tasks, **options)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(1, f"error: {error}\n")
    table = _package("lm_eval.utils").make_table
    report.console.print(table(found), markup=False, highlight=False)
    if found.get("groups"):
        report.console.print(table(found, "groups"), markup=False, highlight=False)
    report.show_files({"results": folder / RESULTS})


if __name__ == "__main__":
    main()

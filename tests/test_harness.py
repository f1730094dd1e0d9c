"""lm-evaluation-harness on our decoders: its own torch model and direct computations agree."""

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util

import models
import pefts
from configs.base import decoder_language
from models import create, llama2c
from models.generate import Sampling
from models.tokenizer import Tokenizer
from training import checkpoint, experiment, harness

STORIES = Path(__file__).parents[1] / "../shared/weights/stories260K"
TEXTS = ("the cat", "a", "it is 3 o'clock", "x = [1, 2, 3]\n", "why? ", "Lily", "no\n\n")
LONGEST = 56
SCALE = 8.0  # larger weights: fresh ones make every token about as likely as any other


class Base(NamedTuple):
    """A tiny random decoder, called on one row without padding on its left."""

    model: Any
    params: Any
    tokenizer: Tokenizer
    run: Callable[[Any, np.ndarray], jax.Array]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode([text])[0]

    def log_p(self, ids: Sequence[int]) -> np.ndarray:
        """log p after every token, by all tokens of the vocabulary, in float64."""
        tokens = np.zeros((1, LONGEST), np.int32)
        tokens[0, : len(ids)] = ids
        logits = np.asarray(self.run(self.params, tokens)[0], np.float64)
        logits = logits[len(logits) - LONGEST :][: len(ids)]
        return logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))

    def score(self, context: Sequence[int], continuation: Sequence[int]) -> float:
        rows = self.log_p([*context, *continuation])[len(context) - 1 : -1]
        return rows[np.arange(len(continuation)), list(continuation)].sum()

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The next tokens, each the likeliest."""
        for _ in range(count):
            ids = [*ids, int(np.argmax(self.log_p(ids)[-1]))]
        return ids[len(ids) - count :]


def made(model: Any, params: Any, tokenizer: Tokenizer, apply: Any = None) -> Base:
    run = apply or model.apply
    jitted = jax.jit(lambda params, tokens: run({"params": params}, tokens))
    return Base(model, params, tokenizer, jitted)


@pytest.fixture(scope="module")
def base(decoder_base: Path) -> Base:
    model, params, _ = models.load(decoder_base)
    flat: dict[Any, Any] = traverse_util.flatten_dict(params)
    scaled = {path: leaf if path[-1] == "scale" else SCALE * leaf for path, leaf in flat.items()}
    params = traverse_util.unflatten_dict(scaled)
    return made(model, params, models.load_tokenizer(decoder_base))


@pytest.fixture(scope="module")
def lm(base: Base) -> Any:
    pytest.importorskip("lm_eval", reason="the harness is an extra of its own")
    return harness.harness_model(base.model, base.params, base.tokenizer, batch_size=3)


@pytest.fixture
def ask() -> Callable[..., Any]:
    """ask(method, (arguments), ...): the answers to requests as the harness makes them."""
    api = pytest.importorskip("lm_eval.api.instance", reason="the harness is an extra of its own")

    def answers(method: Any, *arguments: tuple[Any, ...]) -> Any:
        kind = method.__name__
        return method([api.Instance(kind, {}, args, i) for i, args in enumerate(arguments)])

    return answers


# ---------------------------------------------------------------------------- scores of texts


def test_loglikelihoods_are_those_of_the_logits(base: Base, lm: Any, ask: Any) -> None:
    pairs = [(one, f" {other}") for one in TEXTS[:5] for other in TEXTS]
    found = ask(lm.loglikelihood, *pairs)
    assert len({round(value, 3) for value, _ in found}) == len(pairs)
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        whole, cut = base.encode(context + continuation), len(base.encode(context.rstrip()))
        expected = base.score(whole[:cut], whole[cut:])
        assert value == pytest.approx(expected, abs=2e-4), (context, continuation)


def test_spaces_move_to_the_continuation_and_texts_may_begin(base: Base, lm: Any, ask: Any) -> None:
    encode, end = base.encode, base.tokenizer.end_id or 0
    (moved, _), (same, _), (alone, _), (blank, _) = ask(
        lm.loglikelihood, ("ab  ", "cd"), ("ab", "  cd"), ("", "cd"), ("  ", "cd")
    )
    assert moved == pytest.approx(same, abs=1e-6)
    assert moved == pytest.approx(base.score(encode("ab"), encode("  cd")), abs=1e-4)
    assert abs(moved - base.score(encode("ab  "), encode("cd"))) > 0.5
    assert alone == pytest.approx(base.score([end], encode("cd")), abs=1e-4)
    assert blank == pytest.approx(base.score([end], encode("  cd")), abs=1e-4)


def test_greedy_continuations_are_known_as_such(base: Base, lm: Any) -> None:
    pairs, expected = [], []
    for count, text in enumerate(TEXTS, start=1):
        context = base.encode(text)
        greedy = base.greedy(context, count)
        for wrong in (None, 0, count - 1):
            pairs.append((context, [i ^ 1 if at == wrong else i for at, i in enumerate(greedy)]))
            expected.append(wrong is None)
    found = harness.likelihoods(lm.engine, pairs)
    assert [greedy for _, greedy in found] == expected


def test_rolling_scores_every_token_once(base: Base, lm: Any, ask: Any) -> None:
    short = harness.harness_model(
        base.model, base.params, base.tokenizer, batch_size=3, max_length=6
    )
    texts = ["Once upon a time", "a", ""]
    whole, cut = (ask(one.loglikelihood_rolling, *[(t,) for t in texts]) for one in (lm, short))
    end, ids = base.tokenizer.end_id or 0, base.encode(texts[0])
    assert whole[0] == pytest.approx(base.score([end], ids), abs=2e-4)
    assert len(ids) == 16
    windows = [([end], ids[:6]), (ids[5:6], ids[6:12]), (ids[9:12], ids[12:])]
    expected = sum(base.score(context, scored) for context, scored in windows)
    assert cut[0] == pytest.approx(expected, abs=2e-4) and abs(cut[0] - whole[0]) > 1e-2
    assert whole[1] == pytest.approx(base.score([end], base.encode("a")), abs=1e-4)
    assert whole[2] == cut[2] == 0.0


def test_long_contexts_are_cut_on_the_left(base: Base, ask: Any) -> None:
    pytest.importorskip("lm_eval", reason="the harness is an extra of its own")
    lm = harness.harness_model(base.model, base.params, base.tokenizer, max_length=8)
    ids = base.encode("0123456789abcd")
    ((found, _),) = ask(lm.loglikelihood, ("0123456789", "abcd"))
    assert found == pytest.approx(base.score(ids[5:10], ids[10:]), abs=1e-4)
    assert abs(found - base.score(ids[:10], ids[10:])) > 1e-2
    with pytest.raises(ValueError, match="a continuation has 9 tokens, .* max_length=8"):
        ask(lm.loglikelihood, ("x", "123456789"))
    with pytest.raises(ValueError, match="max_gen_toks=8 leaves no room .* max_length=8"):
        ask(lm.generate_until, ("x", {"max_gen_toks": 8}))


def test_few_programs_serve_all_lengths(lm: Any, ask: Any) -> None:
    before = lm.engine.score._cache_size()
    ask(lm.loglikelihood, *[("x" * n, "y" * m) for n in range(1, 28) for m in (1, 5)])
    assert lm.engine.score._cache_size() <= before + 2  # rows of 16 and of 32


def test_pieces_of_the_logits_are_put_together(
    base: Base, lm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "PIECE", 6)  # of 16 tokens: three pieces, two tokens too many
    pieced = harness.harness_model(base.model, base.params, base.tokenizer, batch_size=3)
    ids = base.encode("0123456789abcd")
    pairs = [(ids[:n], ids[n:]) for n in (1, 4, 12)]
    found, expected = (harness.likelihoods(one.engine, pairs) for one in (pieced, lm))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.skipif(
    not STORIES.is_dir(), reason="the weights (../shared/weights/stories260K) are not here"
)
def test_a_text_begins_with_its_own_token_once(ask: Any, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the harness is an extra of its own")
    llama2c.convert(STORIES / "stories260K.bin", STORIES / "tok512.bin", tmp_path)
    model, params, _ = models.load(tmp_path)
    lm = harness.harness_model(model, params, models.load_tokenizer(tmp_path), batch_size=4)
    base = made(model, params, models.load_tokenizer(tmp_path))
    begins, whole = lm.prefix_token_id, base.encode("Once upon a time")
    assert begins == whole[0] == 1 and lm.tok_encode("<s>Once") == base.encode("Once")
    pairs = ("Once upon a", " time"), ("Once upon a", " tree"), ("", "Once upon a time")
    (time, sure), (tree, unsure), (alone, _) = ask(lm.loglikelihood, *pairs)
    cut = len(base.encode("Once upon a"))
    assert cut == len(whole) - 1 and sure and not unsure and tree < time
    assert time == pytest.approx(base.score(whole[:cut], whole[cut:]), abs=1e-4)
    (rolled,) = ask(lm.loglikelihood_rolling, ("Once upon a time",))
    assert alone == pytest.approx(rolled, abs=1e-4)
    assert rolled == pytest.approx(base.score([begins], whole[1:]), abs=1e-4)
    text = ask(lm.generate_until, ("Once upon", {"until": [","], "max_gen_toks": 16}))
    assert text == [" a time"]


# ---------------------------------------------------------------------------- written texts


def test_texts_end_before_their_stop_texts(base: Base, lm: Any, ask: Any) -> None:
    greedy = {"max_gen_toks": 8, "until": []}
    free = ask(lm.generate_until, *[(text, greedy) for text in TEXTS])
    for text, whole in zip(TEXTS, free, strict=True):
        row = base.encode(text)
        new = [*base.greedy(row, 8), 0]
        new = new[: new.index(0)]
        assert base.tokenizer.decode(row + new) == text + whole
    for width in (1, 2):  # one token, and two of which none is a stop text
        whole = max(free, key=lambda text: len(set(text)))
        stop = whole[3 : 3 + width]
        options = {"max_gen_toks": 8, "until": ["", stop, "never to be found"]}
        before = whole.split(stop)[0]
        assert len(before) < len(whole)
        prompt = TEXTS[free.index(whole)]
        assert ask(lm.generate_until, (prompt, options)) == [before]
        assert ask(lm.generate_until, (prompt, {**options, "until": stop})) == [before]


def test_generation_stops_at_a_token_that_holds_a_stop_text(base: Base) -> None:
    (letter,) = base.encode("q")
    assert harness._stop_ids(base.tokenizer, (0,), ("q",)) == (0, letter)
    assert harness._stop_ids(base.tokenizer, (0, 9), ("qu", "")) == (0, 9)


def test_requests_are_answered_in_their_order(lm: Any, ask: Any) -> None:
    drawn = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
    ways = ({"max_gen_toks": 8}, drawn, {"max_gen_toks": 3, "do_sample": False, "temperature": 2})
    asked = [(text, ways[i % 3]) for i, text in enumerate(TEXTS)]
    texts = ask(lm.generate_until, *asked)
    assert texts == ask(lm.generate_until, *asked)
    greedy = {"max_gen_toks": 8}
    for i, ((prompt, way), text) in enumerate(zip(asked, texts, strict=True)):
        (alone,) = ask(lm.generate_until, (prompt, way if i % 3 != 1 else greedy))
        assert (alone == text) == (i % 3 != 1), prompt


def test_options_are_read_as_the_harness_writes_them() -> None:
    read = harness.read_options
    assert read({}) == harness.Continuation((), 256, Sampling(0.0))
    assert read({"until": "a", "max_tokens": 4, "temperature": 0.0}) == (("a",), 4, Sampling())
    assert read({"max_gen_toks": 5, "max_tokens": 4})[1] == 5
    assert read({"do_sample": False, "temperature": 0.7})[2] == Sampling(0.0)
    assert read({"temperature": 0.7, "top_k": 5})[2] == Sampling(0.7, top_k=5)
    assert read({"do_sample": True, "top_p": 0.9})[2] == Sampling(1.0, top_p=0.9)
    assert read({"num_beams": 1, "repetition_penalty": None}) == read({})
    with pytest.raises(ValueError, match="{'num_beams': 4} are not built here"):
        read({"num_beams": 4})


# ---------------------------------------------------------------------------- its own torch model


def test_its_torch_model_answers_the_same(lm: Any, ask: Any, decoder_base: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="parity is measured against it")
    torch = pytest.importorskip("torch", reason="parity is measured against torch")
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="needs accelerate")
    model = transformers.AutoModelForCausalLM.from_pretrained(decoder_base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(SCALE if parameter.ndim > 1 else 1.0)
    file = str(decoder_base / "tokenizer.json")
    named = {"eos_token": create.END, "pad_token": create.END}
    theirs = huggingface.HFLM(
        pretrained=model,
        tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_file=file, **named),
        batch_size=3,
        device="cpu",
    )
    assert theirs.max_length == lm.max_length
    pairs = [(one, two) for one in (*TEXTS, "") for two in (" yes", "no", "a  b " * 3)]
    for kind, asked in (("loglikelihood", pairs), ("loglikelihood_rolling", [(t,) for t in TEXTS])):
        found, expected = (ask(getattr(one, kind), *asked) for one in (lm, theirs))
        np.testing.assert_allclose(found, expected, atol=5e-4, rtol=0, err_msg=kind)
    options = {"until": ["e"], "max_gen_toks": 8, "do_sample": False}
    asked = [(text, options) for text in TEXTS]
    assert ask(lm.generate_until, *asked) == ask(theirs.generate_until, *asked)


# ---------------------------------------------------------------------------- adapters


def adapted(base: Base, method: Callable[..., pefts.Peft], **options: Any) -> tuple[Any, Any, Any]:
    axes = pefts.infer_axes(base.model.apply, base.params, np.zeros((1, 4), np.int32))
    peft = method(**options, axes=axes)
    state = jax.jit(peft.init)(jax.random.key(0), base.params)
    state = jax.jit(pefts.randomize)(jax.random.key(1), state)
    lm = harness.harness_model(
        base.model,
        peft.bind(base.params, state),
        base.tokenizer,
        apply=pefts.apply(base.model.apply),
    )
    return lm, peft, state


def test_an_adapter_answers_as_its_merged_model(base: Base, lm: Any, ask: Any) -> None:
    one, peft, state = adapted(base, pefts.lora, rank=2, alpha=4.0, targets="(q|down)_proj/kernel")
    merged = jax.jit(peft.merge)(base.params, state)
    other = harness.harness_model(base.model, merged, base.tokenizer, batch_size=7)
    pairs = [(text, " yes") for text in TEXTS]
    with_it, without, folded = (ask(x.loglikelihood, *pairs) for x in (one, lm, other))
    np.testing.assert_allclose(with_it, folded, atol=1e-3)
    assert min(abs(a[0] - b[0]) for a, b in zip(with_it, without, strict=True)) > 1e-2
    asked = [(text, {"max_gen_toks": 8}) for text in TEXTS]
    found = ask(one.generate_until, *asked)
    assert found == ask(other.generate_until, *asked)
    assert found != ask(lm.generate_until, *asked)


def test_virtual_tokens_are_scored_around_and_not_generated_with(base: Base, ask: Any) -> None:
    pytest.importorskip("lm_eval", reason="the harness is an extra of its own")
    lm, peft, state = adapted(base, pefts.prompt, length=3)
    assert lm.max_length == base.model.config.max_positions - 3
    ((found, _),) = ask(lm.loglikelihood, ("ab", "cd"))
    bound = peft.bind(base.params, state)
    direct = made(base.model, bound, base.tokenizer, pefts.apply(base.model.apply))
    expected = direct.score(base.encode("ab"), base.encode("cd"))
    assert found == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="puts 3 tokens of its own in front of every call"):
        ask(lm.generate_until, ("ab", {}))


# ---------------------------------------------------------------------------- tasks, end to end

CHOICE = """task: animals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/animals.jsonl}}, cache_dir: {folder}/cache}}
output_type: multiple_choice
test_split: test
doc_to_text: "Q: {{{{question}}}} A:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
WRITTEN = """task: echo
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/echo.jsonl}}, cache_dir: {folder}/cache}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with two tasks of four examples; the texts that `echo` expects are set later."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "animals.yaml").write_text(CHOICE.format(folder=folder))
    (folder / "echo.yaml").write_text(WRITTEN.format(folder=folder))
    choices = ["cat", "a dog", "one horse"]
    rows = [{"question": q, "choices": choices, "label": i % 3} for i, q in enumerate(TEXTS[:4])]
    (folder / "animals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_echo(folder: Path, prompts: Sequence[str], answers: Sequence[str]) -> None:
    rows = [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]
    (folder / "echo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def a_run(decoder_base: Path, tmp_path: Path) -> tuple[Path, Base]:
    """What train.py leaves of a run, as far as it is read again, and its merged model."""
    config = decoder_language("toy", "tiny")
    (tmp_path / "text.txt").write_text("".join(f"{n} is a number\n\n" for n in range(200)))
    config.model.source = str(decoder_base)
    config.task = {"name": "text", "path": str(tmp_path / "text.txt"), "block": 60}
    config.method = {"method": "lora", "rank": 4, "alpha": 64.0}
    folder = tmp_path / "run"
    checkpoint.claim(folder, config)
    run = experiment.build(config)
    state = run.peft.init(jax.random.key(0), run.params)
    state = jax.jit(pefts.randomize)(jax.random.key(2), state)
    pefts.save(folder / "adapter.safetensors", run.peft, state, run.params)
    merged = jax.jit(run.peft.merge)(run.params, state)
    return folder, made(run.model, merged, models.load_tokenizer(decoder_base))


def test_a_run_is_scored_on_tasks_of_ones_own(
    a_run: tuple[Path, Base], tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    harness_tasks = pytest.importorskip("lm_eval.tasks", reason="the harness is an extra")
    # Without looking through the thousands of the harness.
    manager = functools.partial(harness_tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(harness_tasks, "TaskManager", manager)
    run_folder, base = a_run
    lm = harness.harness_model(base.model, base.params, base.tokenizer, batch_size=3)
    prompts = list(TEXTS[:4])
    texts = harness.continuations(
        lm.engine, [(text, {"until": "\n", "max_gen_toks": 6}) for text in prompts]
    )
    write_echo(tasks, prompts, [texts[0], "something else", texts[2], texts[3]])
    right = 0
    for i, line in enumerate((tasks / "animals.jsonl").read_text().splitlines()):
        row = json.loads(line)
        before = base.encode(f"Q: {row['question']} A:")
        ends = [base.encode(f" {choice}") for choice in row["choices"]]
        right += int(np.argmax([base.score(before, ids) for ids in ends])) == i % 3
    arguments = f"--run={run_folder} --tasks=animals,echo --include_path={tasks} --batch_size=3"
    monkeypatch.setattr(sys, "argv", ["harness", *arguments.split()])
    harness.main()
    results = json.loads((run_folder / harness.RESULTS).read_text())
    assert results["results"]["animals"]["acc,none"] == pytest.approx(right / 4)
    assert results["results"]["echo"]["exact_match,none"] == pytest.approx(3 / 4)
    assert results["n-samples"]["echo"]["effective"] == 4
    shown = capsys.readouterr().out
    assert "exact_match" in shown and "0.75" in shown and harness.RESULTS in shown


# ---------------------------------------------------------------------------- errors


def test_bad_arguments_are_refused(base: Base, lm: Any, ask: Any) -> None:
    make = harness.harness_model
    with pytest.raises(ValueError, match="model is a Dense; the harness takes decoders"):
        make(nn.Dense(3), base.params, base.tokenizer)
    with pytest.raises(ValueError, match="batch_size=0"):
        make(base.model, base.params, base.tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="max_length=1 must be at least 2$"):
        make(base.model, base.params, base.tokenizer, max_length=1)
    with pytest.raises(ValueError, match="has no token of its own"):
        ask(lm.loglikelihood, ("ab", ""))
    ends = lm.engine._replace(prefix_id=None)
    with pytest.raises(ValueError, match="no token that begins or ends a text"):
        harness.likelihoods(ends, [([], [5])])


def test_unknown_tasks_are_named_with_their_neighbours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'arc_esy' is none of the 2 tasks .* near \['arc_easy'"):
        harness._check_tasks(["gsm8k", "arc_esy"], ["arc_easy", "gsm8k"])
    file = tmp_path / "own.yaml"
    file.touch()
    harness._check_tasks([str(file)], [])


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the harness is an extra of its own")
    with pytest.raises(ValueError, match="holds no run"):
        harness.evaluate(tmp_path, ["arc_easy"])


def test_its_absence_says_what_to_install(
    base: Base, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def find_spec(name: str, *_: Any) -> None:
        if name.partition(".")[0] == "lm_eval":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=find_spec), *sys.meta_path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    harness._model_class.cache_clear()
    with pytest.raises(ImportError, match=r"not installed: pip install 'lm_eval>=0\.4\.13'"):
        harness.harness_model(base.model, base.params, base.tokenizer)
    monkeypatch.setattr(sys, "argv", ["harness", "--run=x", "--tasks=a"])
    with pytest.raises(SystemExit):
        harness.main()
    assert "pip install" in capsys.readouterr().err

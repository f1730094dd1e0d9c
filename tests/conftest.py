"""Eight CPU devices and JAX at its strictest, for every test."""

import functools
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxlib

# Compiling is most of what tests do. Level 0 halves the time it takes, leaving out the emitters for
# fusions halves the rest, and programs this small are not worth cutting into parts (a quarter of
# what is left); XLA dies of flags it does not know, and later versions may not know the last ones.
FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")
if jaxlib.__version__.startswith("0.10."):
    FLAGS += ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import pytest  # noqa: E402
import tiny_checkpoint  # noqa: E402

import data  # noqa: E402
from configs.base import Config, decoder_language  # noqa: E402
from data import stdlib_docs  # noqa: E402

MANY_MAPS = 20_000  # of the 65,530 that Linux allows a process
LIBRARY_TASKS = ("docstrings", "python_sources", "stdlib_docs")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from subject import row_id  # noqa: E402
from tiny_decoders import decoders  # noqa: E402, F401 (a fixture)
from tiny_encoders import bert_folder, checkpoints, transformers  # noqa: E402, F401 (fixtures)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker for a file, or for a row of the table: rows are half of the suite."""
    for item in items:
        row = getattr(item, "callspec", None) and item.callspec.params.get("subject")  # type: ignore[attr-defined]
        group = item.path.stem + (f"-{row_id(row)}" if row else "")
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs are kept in pytest's cache: half a second run's time, a tenth of a first's.

    A folder for each worker, as JAX does not write its files at once.
    """
    if config.cache is not None:
        worker = os.environ.get("PYTEST_XDIST_WORKER", "alone")
        folder = config.cache.mkdir(f"programs-{worker}")
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="module", autouse=True)
def programs_are_let_go_in_time() -> Iterator[None]:
    """Each compiled program is a few memory maps: a worker that kept all would run out of them."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def tasks_of_the_library_are_made_once() -> Iterator[None]:
    """Seconds, for the many tests that build an experiment."""
    original = data.load

    @functools.cache
    def kept(name: str, options: str) -> Any:
        return original(name, **json.loads(options))

    def load(name: str, **options: Any) -> Any:
        if name not in LIBRARY_TASKS or "root" in options:
            return original(name, **options)
        return kept(name, json.dumps(options, sort_keys=True))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", load)
        yield


@pytest.fixture(scope="session", autouse=True)
def the_library_is_parsed_once() -> Iterator[None]:
    """Three seconds, for the many tests that load the default task."""
    original, library = stdlib_docs.read_docs, Path(sysconfig.get_path("stdlib"))
    parsed = functools.cache(lambda: list(original(library)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            stdlib_docs, "read_docs", lambda at: parsed() if at == library else original(at)
        )
        yield


@pytest.fixture
def key() -> jax.Array:
    """A random key; fold_in or split it for more."""
    return jax.random.key(0)


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64, for what the papers' own code computed in it."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def optax_promotes_its_step_count() -> Iterator[None]:
    """For whole training steps: optax's Adam mixes integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a tiny random BERT."""
    return tiny_checkpoint.write(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def decoder_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a tiny random Llama."""
    return tiny_checkpoint.write_decoder(tmp_path_factory.mktemp("decoder_base"))


@pytest.fixture
def language_config(decoder_base: Path, tmp_path: Path) -> Config:
    """A run of LoRA on a tiny random Llama, to learn a page of made-up sums."""
    config = decoder_language("toy", "tiny")
    text = "".join(f"{n % 10} times {n % 7} is what?\n\n" for n in range(400))
    (tmp_path / "text.txt").write_text(text)
    config.model.source = str(decoder_base)
    config.task = {"name": "text", "path": str(tmp_path / "text.txt"), "block": 60}
    config.method = {"method": "lora", "rank": 4, "alpha": 8.0}
    config.optimizer.learning_rate = 0.02
    config.train.steps, config.train.eval_every = 25, 25
    return config

"""Any optimizer on the project's own small decoder, by a name behind the config's.

Command: python train.py --config=configs/python_decoder_optimizers.py:fira
Names: those of pefts.OPTIMIZERS, "adamw", "adam8bit_galore"; ":fira,tiny" shrinks the run.
Before it: python -m models.create python_decoder --task=python_sources --characters=4000000
Time: 3 minutes on 2 CPU cores for 240 batches of 8 x 256 tokens, the first-order ones.
Result: see the table of python -m benchmarks.pretraining in the README.

Those for all parameters start from random weights; the ones for adapters train LoRA, or
tensor-train adapters, on the same model. Learning rates are those of the benchmark where it has the
optimizer, and else a guess from their papers, scaled.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs.base import Config, decoder_language

LORA = {"method": "lora", "rank": 4, "alpha": 8.0}
CORES = {"method": "tensor_train", "bottleneck": 16, "rank": 4}


class Entry(NamedTuple):
    """What differs between two optimizers' runs."""

    learning_rate: float
    options: dict[str, Any]
    method: dict[str, Any] = {"method": "full", "targets": r".*"}
    optimizer: str = ""  # its name, if it is not the entry's
    schedule: str = "cosine"


LOW_RANK = {"rank": 48, "update_interval": 50}
ENTRIES = {
    "adam8bit": Entry(3e-3, {}),
    "adam8bit_galore": Entry(
        1e-2, {**LOW_RANK, "scale": 1.0, "inner": "scale_by_adam8bit"}, optimizer="galore"
    ),
    "adamw": Entry(3e-3, {}),
    "adazeta": Entry(
        1e-3, {"eps": 1e-2, "max_queries": 4, "epoch_steps": 1}, CORES, schedule="constant"
    ),
    "allora": Entry(3e-3, {"eta": 10.0}, LORA),
    "apollo": Entry(1e-2, LOW_RANK),
    "badam": Entry(3e-3, {"interval": 20}),
    "fira": Entry(1e-2, {**LOW_RANK, "scale": 1.0}),
    "frugal": Entry(1e-3, {"density": 0.25, "update_interval": 50}),
    "galore": Entry(1e-2, {**LOW_RANK, "scale": 1.0}),
    "hift": Entry(3e-3, {}, schedule="constant"),
    "lisa": Entry(3e-3, {"gamma": 2, "interval": 10}),
    "lora_fa": Entry(3e-3, {"scaling": 2.0}, LORA),
    "lora_plus": Entry(3e-3, {"ratio": 16.0}, LORA),
    "mezo": Entry(1e-5, {"eps": 1e-3}, schedule="constant"),
    "owlore": Entry(3e-3, {"gamma": 2, "interval": 10, "rank": 48}),
    "riemannian": Entry(3e-3, {}, LORA),
    "sparse_mezo": Entry(2e-5, {"eps": 1e-3}, schedule="constant"),
}


def get_config(mode: str = "") -> Config:
    """`mode`: "", the name of an entry, "tiny", or both with a comma between."""
    name, _, size = (",tiny" if mode == "tiny" else mode).partition(",")
    if (name and name not in ENTRIES) or size not in ("", "tiny"):
        raise ValueError(
            f"config mode {mode!r} is none of {sorted(ENTRIES)}, alone or with ',tiny' behind it."
        )
    config = decoder_language("_".join(filter(None, ("python_decoder_optimizers", name))), size)
    config.model.source = "tiny-llama" if size else "python_decoder"
    config.task.name, config.task.packages = "python_sources", False
    if not size:
        config.data.max_length, config.data.batch_size, config.data.eval_batch_size = 256, 8, 16
        config.train.steps, config.train.eval_every, config.train.save_every = 240, 120, 120
    entry = ENTRIES[name or "adamw"]
    options = {**entry.options, **({"rank": 4} if size and "rank" in entry.options else {})}
    config.method = ConfigDict(entry.method)
    config.optimizer.name = entry.optimizer or name or "adamw"
    config.optimizer.learning_rate, config.optimizer.schedule = entry.learning_rate, entry.schedule
    config.optimizer.options = ConfigDict(options)
    config.optimizer.weight_decay = 0.0
    if config.optimizer.name == "owlore":  # its layers' shares of outliers; here all alike
        layers = 2 if size else 4
        config.optimizer.options.probabilities = (1 / layers,) * layers
    return config

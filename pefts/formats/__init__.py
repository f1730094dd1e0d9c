"""Hugging Face PEFT's adapter formats, one file per family; FORMATS[method] goes both ways."""

from pefts.formats import adalora, lora, vera
from pefts.formats.contract import Format

FORMATS: dict[str, Format] = {
    "adalora": adalora.FORMAT,
    "dora": lora.FORMAT,
    "lora": lora.FORMAT,
    "vera": vera.FORMAT,
}

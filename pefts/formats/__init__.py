"""Hugging Face PEFT's adapter formats, one file per family: `FORMATS[method]` converts both "
"ways."""

from pefts.formats import lora, vera
from pefts.formats.contract import Format

FORMATS: dict[str, Format] = {
    "dora": lora.FORMAT,
    "lora": lora.FORMAT,
    "vera": vera.FORMAT,
}

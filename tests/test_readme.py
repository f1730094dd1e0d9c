"""The README says what the code does: its table, its example, its files, its commands."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import pefts.__main__

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_method_table_is_the_code_s() -> None:
    between = README.split("<!-- methods -->")[1].split("<!-- end of methods -->")[0]
    assert between.strip() == pefts.__main__.table(), "paste what `python -m pefts` prints"


def test_the_first_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(blocks("python")[0], "README.md", "exec"), names)
    assert pefts.count(names["grads"]) == pefts.count(names["state"].trainable) > 0
    peft, state = pefts.load(tmp_path / "adapter.safetensors", names["params"])
    jax.tree.map(lambda a, b: (a == b).all() or pytest.fail("differs"), state, names["state"])
    assert peft.config["rank"] == 4


def test_every_file_it_names_exists() -> None:
    for name in re.findall(r"(?:configs|docs)/[\w./]+", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"--config=(\S+\.py)", README):
        assert (ROOT / name).exists(), name


def test_commands_are_known() -> None:
    shell = "\n".join(blocks("bash"))
    assert "make run" in shell and "make test" in shell
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", shell):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for script in sorted(set(re.findall(r"python (\w+\.py)", README))):
        done = subprocess.run(
            [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert script.removesuffix(".py") in done.stdout, done.stderr

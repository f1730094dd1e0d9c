"""Adapter files: exact round trips, atomic writes, and every refusal."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

import pefts
from pefts import fingerprint, io
from pefts.bound import Rule
from pefts.core import Declaration, Traits, factory
from pefts.targets import selection

AXES = {"layers": "lio"}


def base(seed: int = 0) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(seed), 4)
    return {
        "layers": {
            "query": {"kernel": jax.random.normal(keys[0], (3, 6, 4))},
            "up": {"kernel": jax.random.normal(keys[1], (3, 6, 10))},
        },
        "classifier": {"kernel": jax.random.normal(keys[2], (6, 2)), "bias": jnp.zeros(2)},
        "embed": {"embedding": jax.random.normal(keys[3], (9, 6))},
    }


def cast(params: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def low_rank() -> pefts.Peft:
    return pefts.lora(
        rank=2, alpha=3.0, targets=r"query|up", rank_pattern={"up": 3}, axes=AXES, dropout=0.1
    )


METHODS = {
    "lora": low_rank,
    "full": lambda: pefts.full(targets=["classifier"]),
    "chain": lambda: pefts.chain(low_rank(), pefts.full(targets=["classifier", "embed"])),
    "partition": lambda: pefts.partition(
        {
            "a": pefts.lora(rank=2, axes=AXES),
            "b": pefts.chain(pefts.bitfit(), pefts.lora(rank=1, targets="kernel")),
        },
        {"query|up": "a", "classifier": "b"},
    ),
    "vera": lambda: pefts.METHODS["vera"](rank=5, targets=r"query|up", axes=AXES),
}


def fresh(name: str) -> tuple[pefts.Peft, pefts.PeftState]:
    if name not in pefts.METHODS and name not in ("chain", "partition"):
        pytest.skip(f"pefts has no method {name}")
    peft = METHODS[name]()
    state = peft.init(jax.random.key(1), base())
    return peft, pefts.randomize(jax.random.key(2), state)


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def saved(tmp_path: Path, name: str = "lora") -> Path:
    peft, state = fresh(name)
    pefts.save(tmp_path / "adapter.safetensors", peft, state, base())
    return tmp_path / "adapter.safetensors"


def rewrite(file: Path, edit: Any) -> Path:
    """Change a file's (header, tensors) in place."""
    metadata, tensors = io.open_tensors(file)
    header = json.loads(metadata[io.HEADER])
    edit(header, tensors)
    safetensors.numpy.save_file(tensors, file, {io.HEADER: json.dumps(header)})
    return file


@pytest.mark.parametrize("name", METHODS)
def test_a_state_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    peft, state = fresh(name)
    pefts.save(tmp_path / "adapter.safetensors", peft, state, base())
    loaded, restored = pefts.load(tmp_path / "adapter.safetensors", base())
    assert_same(restored, state)
    assert loaded.config == json.loads(json.dumps(peft.config))
    assert_same(loaded.merge(base(), restored), peft.merge(base(), state))


def test_numpy_and_low_precision_leaves_keep_their_dtype(tmp_path: Path) -> None:
    peft, state = fresh("lora")
    for dtype in (jnp.bfloat16, jnp.float16, ml_dtypes.float8_e4m3fn):
        low = jax.tree.map(lambda leaf, d=dtype: np.asarray(leaf).astype(d), state)
        pefts.save(tmp_path / "a", peft, low, base())
        assert_same(pefts.load(tmp_path / "a", base())[1], low)


def test_transposed_arrays_are_written_in_their_logical_order(tmp_path: Path) -> None:
    peft, state = fresh("lora")
    strided = jax.tree.map(lambda leaf: np.asfortranarray(np.asarray(leaf)), state)
    pefts.save(tmp_path / "a", peft, strided, base())
    assert_same(pefts.load(tmp_path / "a", base())[1], state)


def test_sharded_states_and_bases_give_the_same_bytes(tmp_path: Path) -> None:
    peft, state = fresh("lora")
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    last = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))

    def shard(leaf: jax.Array) -> jax.Array:
        even = leaf.ndim == 3 and leaf.shape[-1] % 2 == 0
        return jax.device_put(leaf, last if even else NamedSharding(mesh, PartitionSpec()))

    sharded, placed = jax.tree.map(shard, state), jax.tree.map(shard, base())
    assert not sharded.trainable["layers/query/kernel"]["B"].is_fully_replicated
    pefts.save(tmp_path / "one", peft, state, base())
    pefts.save(tmp_path / "many", peft, sharded, placed)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()


def test_a_bfloat16_copy_of_the_base_is_the_same_base(tmp_path: Path) -> None:
    file = saved(tmp_path)
    assert_same(pefts.load(file, cast(base(), jnp.bfloat16))[1], fresh("lora")[1])
    peft, state = fresh("lora")
    pefts.save(file, peft, state, cast(base(), jnp.bfloat16))
    pefts.load(file, base())


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path)
    with pytest.raises(ValueError, match=r"another base: 2 of 2 .*'layers/query/kernel'"):
        pefts.load(file, base(seed=1))
    other = base()
    other["layers"]["up"]["kernel"] = other["layers"]["up"]["kernel"].at[2, 5, 9].add(0.5)
    with pytest.raises(ValueError, match=r"another base: 1 of 2 .*'layers/up/kernel'"):
        pefts.load(file, other)
    assert_same(pefts.load(file, other, check_base="shapes")[1], fresh("lora")[1])
    with pytest.raises(ValueError, match="check_base='nothing'"):
        pefts.load(file, other, check_base="nothing")


def test_a_base_of_another_shape_or_structure_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path)
    wider = base()
    wider["layers"]["up"]["kernel"] = jnp.zeros((3, 6, 12))
    with pytest.raises(ValueError, match=r"another base: 'layers/up/kernel' was \(3, 6, 10\)"):
        pefts.load(file, wider, check_base="shapes")
    renamed = base()
    renamed["layers"]["up_proj"] = renamed["layers"].pop("up")
    with pytest.raises(ValueError, match=r"do not have \(near names: \['layers/up_proj/kernel'"):
        pefts.load(file, renamed)


def test_leaves_outside_the_adapter_and_replaced_leaves_may_differ(tmp_path: Path) -> None:
    peft, state = fresh("chain")
    pefts.save(tmp_path / "a", peft, state, base())
    other = base()
    other["classifier"] = base(seed=5)["classifier"]
    loaded, restored = pefts.load(tmp_path / "a", other)
    assert_same(loaded.merge(other, restored), peft.merge(base(), state))


def test_the_fingerprint_sees_every_position_and_any_exchange() -> None:
    x = jnp.arange(24, dtype=jnp.float32).reshape(4, 6)
    marks = {fingerprint.checksum(x.at[i, j].add(100.0)) for i in range(4) for j in range(6)}
    assert len(marks | {fingerprint.checksum(x)}) == 25
    assert fingerprint.checksum(x[::-1]) != fingerprint.checksum(x)
    assert fingerprint.checksum(x.T) != fingerprint.checksum(x)
    assert fingerprint.checksum({"q": x, "scale": x[0]}) != fingerprint.checksum(x)


def test_rounding_is_bfloat16s() -> None:
    bits = jax.random.bits(jax.random.key(0), (4096,), jnp.uint32)
    values = np.asarray(bits).view(np.float32)
    values = values[np.isfinite(values)]
    rounded = values.astype(ml_dtypes.bfloat16)
    assert fingerprint.checksum(values) == fingerprint.checksum(rounded)
    assert fingerprint.checksum(np.float32(1e-39)) != fingerprint.checksum(np.float32(0))


def test_missing_and_extra_leaves_are_refused(tmp_path: Path) -> None:
    name = "trainable:layers/query/kernel:A"
    with pytest.raises(ValueError, match=f"damaged: missing leaves \\['{name}'"):
        pefts.load(rewrite(saved(tmp_path), lambda header, t: t.pop(name)), base())

    def drop(header: Any, tensors: Any) -> None:
        del tensors[name], header["leaves"][name]

    with pytest.raises(ValueError, match=f"no state of lora .* missing leaves \\['{name}'"):
        pefts.load(rewrite(saved(tmp_path), drop), base())

    def add(header: Any, tensors: Any) -> None:
        tensors["trainable:layers/query/kernel:C"] = tensors[name]
        header["leaves"]["trainable:layers/query/kernel:C"] = header["leaves"][name]

    with pytest.raises(ValueError, match="extra leaves .*kernel:C"):
        pefts.load(rewrite(saved(tmp_path), add), base())


def test_wrong_shapes_are_refused(tmp_path: Path) -> None:
    name = "trainable:layers/query/kernel:A"

    def widen(header: Any, tensors: Any) -> None:
        tensors[name] = np.zeros((3, 6, 5), np.float32)

    with pytest.raises(ValueError, match=r"has shape \(3, 6, 5\) and the header says \(3, 6, 2\)"):
        pefts.load(rewrite(saved(tmp_path), widen), base())

    def widen_both(header: Any, tensors: Any) -> None:
        widen(header, tensors)
        header["leaves"][name]["shape"] = [3, 6, 5]

    with pytest.raises(ValueError, match=r"has shape \(3, 6, 5\), lora makes \(3, 6, 2\)"):
        pefts.load(rewrite(saved(tmp_path), widen_both), base())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    def spoil(header: Any, tensors: Any) -> None:
        tensors["trainable:layers/up/kernel:B"] = np.full((3, 3, 10), value, np.float32)

    with pytest.raises(ValueError, match="NaN or Inf in 'trainable:layers/up/kernel:B'"):
        pefts.load(rewrite(saved(tmp_path), spoil), base())
    peft, state = fresh("lora")
    state.trainable["layers/up/kernel"]["B"] = jnp.full((3, 3, 10), value)
    with pytest.raises(ValueError, match="state has NaN or Inf"):
        pefts.save(tmp_path / "b", peft, state, base())
    assert not (tmp_path / "b").exists()


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path)
    whole = file.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            pefts.load(file, base())
    with pytest.raises(ValueError, match="does not exist"):
        pefts.load(tmp_path / "absent", base())
    file.write_bytes(b"\x80\x04\x95" + bytes(64))
    with pytest.raises(ValueError, match="pickled files"):
        pefts.load(file, base())
    safetensors.numpy.save_file({"x": np.zeros(2)}, file)
    with pytest.raises(ValueError, match="not written by pefts.save.*import_hf"):
        pefts.load(file, base())
    safetensors.numpy.save_file({"x": np.zeros(2)}, file, {io.HEADER: "{"})
    with pytest.raises(ValueError, match="damaged"):
        pefts.load(file, base())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", 99, r"format_version=99; pefts \S+ reads 1"),
        ("config", {"method": "lorra"}, "'lorra' is unknown.*'lora'"),
        ("config", {"method": "lora", "ranks": 3}, "no argument 'ranks'"),
        ("config", {"method": "lora", "rank": 0}, "rank=0"),
        ("config", [], "cannot be rebuilt"),
    ],
)
def test_headers_of_another_version_or_method_are_refused(
    field: str, value: Any, message: str, tmp_path: Path
) -> None:
    file = rewrite(saved(tmp_path), lambda header, t: header.update({field: value}))
    with pytest.raises(ValueError, match=message):
        pefts.load(file, base())


def test_an_incomplete_header_is_refused(tmp_path: Path) -> None:
    file = rewrite(saved(tmp_path), lambda header, t: header.pop("leaves"))
    with pytest.raises(ValueError, match=r"lacks \['leaves'\]"):
        pefts.load(file, base())


def test_states_that_do_not_belong_to_the_method_are_not_saved(tmp_path: Path) -> None:
    peft, state = fresh("lora")
    with pytest.raises(ValueError, match="saved one by one"):
        pefts.save(tmp_path / "a", peft, pefts.stack([state, state]), base())
    with pytest.raises(ValueError, match="missing leaves"):
        pefts.save(tmp_path / "a", METHODS["chain"](), state, base())
    labelled = pefts.partition({"a": pefts.bitfit()}, lambda path: "a")
    made = labelled.init(jax.random.key(0), base())
    with pytest.raises(ValueError, match="partition cannot be stored.*give patterns"):
        pefts.save(tmp_path / "a", labelled, made, base())
    keys = jax.tree.map(lambda leaf: leaf, state)
    keys.trainable["layers/up/kernel"]["B"] = jax.random.split(jax.random.key(0), (3, 3, 10))
    with pytest.raises(ValueError, match="holds random keys"):
        pefts.save(tmp_path / "a", peft, keys, base())
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(tmp_path)
    before = file.read_bytes()

    def fail(tensors: Any, name: str, metadata: Any) -> None:
        Path(name).write_bytes(before[:50])
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    peft, state = fresh("lora")
    with pytest.raises(OSError, match=r"could not be written \(No space left.*nothing was changed"):
        pefts.save(file, peft, state, base())
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == [file.name]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    peft, state = fresh("lora")
    with pytest.raises(OSError, match="could not be written"):
        pefts.save(tmp_path / "file" / "adapter", peft, state, base())
    pefts.save(tmp_path / "new" / "folder" / "adapter", peft, state, base())
    assert os.listdir(tmp_path / "new" / "folder") == ["adapter"]


def sparse(width: int) -> pefts.Peft:
    """A method whose state shapes depend on values: the `width` rows of largest norm."""

    @factory
    def rows(count: int = 1, **select: Any) -> Declaration:
        def prepare(sites: Any, matrix_of: Any, stats: Any) -> Any:
            norms = [np.linalg.norm(np.asarray(matrix_of(site)), axis=-1) for site in sites]
            largest = [tuple(int(row) for row in np.argsort(-n)[:count]) for n in norms]
            chosen = zip(sites, largest, strict=True)
            return tuple(replace(site, static=(("rows", rows),)) for site, rows in chosen), stats

        def init(key: jax.Array, W: jax.Array, *, site: Any, stats: Any) -> tuple[dict, dict]:
            chosen = jnp.array(dict(site.static)["rows"], jnp.int32)
            return {"delta": jnp.ones((count, site.d_out))}, {"rows": chosen}

        def effective(W: jax.Array, p: Any, call: Any) -> jax.Array:
            return W.at[p["rows"]].add(p["delta"].astype(W.dtype))

        traits = Traits(shapes_from_values=True, identity_at_init=False)
        return Declaration(Rule(init, effective), selection(**select), traits, prepare=prepare)

    return rows(count=width, targets="classifier/kernel")


def test_a_method_whose_shapes_depend_on_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = sparse(2)
    monkeypatch.setitem(pefts.METHODS, "rows", lambda count, **select: sparse(count))
    state = peft.init(jax.random.key(0), base())
    pefts.save(tmp_path / "a", peft, state, base())
    loaded, restored = pefts.load(tmp_path / "a", base())
    assert_same(restored, state)
    assert_same(loaded.merge(base(), restored), peft.merge(base(), state))
    chained = pefts.chain(peft, low_rank(), pefts.bitfit())
    state = chained.init(jax.random.key(0), base())
    pefts.save(tmp_path / "a", chained, state, base())
    assert_same(pefts.load(tmp_path / "a", base())[1], state)


def test_a_file_loads_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Nothing of the writer's process is needed: checksums and names are the same elsewhere."""
    file = saved(tmp_path, "chain")
    leaves = {
        path.replace("/", "|"): np.asarray(leaf)
        for path, leaf in pefts.paths.flatten(base()).items()
    }
    np.savez(tmp_path / "base.npz", **leaves)
    code = (
        "import sys, numpy as np, pefts; from pefts import paths\n"
        "flat = {k.replace('|', '/'): v for k, v in np.load(sys.argv[1]).items()}\n"
        "peft, state = pefts.load(sys.argv[2], paths.unflatten(flat))\n"
        "print(peft.config['method'], pefts.count(state))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "base.npz"), str(file)],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["chain", str(pefts.count(fresh("chain")[1]))]

"""Where arrays live: one mesh of all devices, the batch split over its "data" axis."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh(batch_size: int, parts: int = 1) -> Mesh:
    """All devices in one "data" axis.

    Raises:
      ValueError: parts below 1; the batch, or each of its parts if it is computed in several, does
        not divide over the devices.
    """
    if parts < 1:
        raise ValueError(f"train.accumulate={parts} must be at least 1 part of a batch")
    devices = jax.devices()
    multiple = len(devices) * parts
    if batch_size % multiple:
        each = f" in {parts} parts (train.accumulate)" if parts > 1 else ""
        raise ValueError(
            f"data.batch_size={batch_size}{each} does not divide over {len(devices)} devices: make "
            f"it a multiple of {multiple}, for instance "
            f"{max(1, round(batch_size / multiple)) * multiple}."
        )
    # Auto: XLA chooses the shardings inside the step, so models need no annotations.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """The tree with a copy of every array on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_batch(mesh: Mesh, batch: Any) -> Any:
    """The batch with its rows divided over the devices."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))

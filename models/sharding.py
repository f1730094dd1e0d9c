"""Where arrays live: one mesh of all devices, the batch split over its "data" axis."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh(batch_size: int) -> Mesh:
    """All devices in one "data" axis.

    Raises:
      ValueError: the batch does not divide over the devices.
    """
    devices = jax.devices()
    if batch_size % len(devices):
        raise ValueError(
            f"data.batch_size={batch_size} does not divide over {len(devices)} devices: make it a "
            f"multiple of {len(devices)}, for instance "
            f"{max(1, round(batch_size / len(devices))) * len(devices)}."
        )
    # Auto: XLA chooses the shardings inside the step, so models need no annotations.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """The tree with a copy of every array on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_batch(mesh: Mesh, batch: Any) -> Any:
    """The batch with its rows divided over the devices."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))

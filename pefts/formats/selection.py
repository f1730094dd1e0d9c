"""adapter_config.json: its checks, and which modules it selects by Hugging Face PEFT's rules."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pefts.formats.contract import Format

# Fields of every type that pefts.hf_format reads itself, and fields that describe the folder.
COMMON = (
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "peft_type",
    "target_modules",
)
ABOUT = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
)


def checked(config: Mapping[str, Any], format: Format, source: str) -> dict[str, Any]:
    """The config with defaults filled in.

    Raises:
      ValueError: a field asks for what pefts cannot represent, or is unknown.
    """
    known = {*COMMON, *ABOUT, *format.fields, *format.accepted, *format.ignored}
    for field, value in config.items():
        if field in format.accepted and not _among(value, format.accepted[field]):
            reason = format.reasons.get(field, "pefts has no counterpart of it.")
            raise ValueError(f"{source}: {field}={value!r} cannot be imported: {reason}")
        if field not in known and value not in (None, False, {}, [], ""):
            raise ValueError(
                f"{source}: {field}={value!r} is a field of {format.peft_type} that pefts does not "
                f"know; what it changes would be lost. Known: {sorted(known)}."
            )
    bias = config.get("bias") or "none"
    known_biases = format.biases or ("none",)
    if bias not in known_biases:
        raise ValueError(
            f"{source}: bias={bias!r} cannot be imported; choose one of {known_biases}."
        )
    return {**format.fields, **config, "bias": bias}


def outright(fields: Mapping[str, Any], format: Format) -> dict[str, Any]:
    """The config fields of leaves that are trained outright, as far as the type has them.

    Raises:
      ValueError: trained biases or modules, for a type whose files hold none.
    """
    if fields["bias"] not in (format.biases or ("none",)):
        raise ValueError(
            f"biases are trained outright (bias={fields['bias']!r}), and peft stores none beside "
            f"{format.peft_type}: merge them into the base, or do not train them."
        )
    if fields["modules_to_save"] and not format.saves_modules:
        raise ValueError(
            f"{fields['modules_to_save']} are trained outright, and peft stores no modules beside "
            f"{format.peft_type}: merge them into the base, or do not train them."
        )
    known = {"bias": bool(format.biases), "modules_to_save": format.saves_modules}
    return {name: value for name, value in fields.items() if known[name]}


def _among(value: Any, accepted: Iterable[Any]) -> bool:
    # 0 == False in Python; a config's 0 is no False.
    return any(type(value) is type(choice) and value == choice for choice in accepted)


def selected(config: Mapping[str, Any], modules: Iterable[str]) -> set[str] | None:
    """The modules an adapter has by peft's rules, or None where they need peft's own tables."""
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return None
    return {name for name in modules if _is_target(config, targets, name)}


def _is_target(config: Mapping[str, Any], targets: str | list[str], name: str) -> bool:
    if _listed(config.get("exclude_modules") or (), name):
        return False
    if any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in config.get("modules_to_save") or ()):
        return False
    if isinstance(targets, str) or name in targets:
        return _listed(targets, name)
    return _listed(targets, name) and _in_layers(config, name)


def _listed(names: str | Iterable[str], name: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == other or name.endswith(f".{other}") for other in names)


def _in_layers(config: Mapping[str, Any], name: str) -> bool:
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    patterns = config.get("layers_pattern") or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        prefix = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
        found = re.match(rf"{prefix}{pattern}\.(\d+)\.", name)
        if found:
            return int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def by_pattern(table: Mapping[str, Any], name: str, default: Any) -> Any:
    """peft's rank_pattern and alpha_pattern: the first key that is the end of the module's path."""
    for pattern, value in table.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def targets_for(chosen: Iterable[str], modules: Iterable[str]) -> list[str] | str:
    """target_modules that selects exactly `chosen` among the model's modules."""
    chosen = sorted(chosen)
    others = set(modules) - set(chosen)
    if any(_listed(chosen, name) for name in others):
        return "^(" + "|".join(re.escape(name) for name in chosen) + ")$"
    return chosen

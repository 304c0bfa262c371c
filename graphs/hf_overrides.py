"""The user's `--override key=value`: a Hugging Face config with some of its keys replaced.

Keys are those of `config.json` that the runtime reads, `dtype` and `quantization` (fp8 | none); any
other is refused, so that a misspelt override cannot pass for one that took effect.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from graphs.hf_config import FP8_CONFIG, OVERRIDE_KEYS, UnsupportedModel, refuse

# Two spellings of one thing: an override may use one of them.
_SYNONYMS = (
    ("dtype", "torch_dtype"),
    ("quantization", "quantization_config"),
    ("rope_scaling", "rope_parameters"),
)


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """`key=value` strings as a mapping; values are JSON where they parse as JSON, else text.

    Raises:
        UnsupportedModel: no `=`, an unknown key, or one key with two values.
    """
    parsed: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not key:
            raise refuse("override", "key=value", item, "write --override n_routed_experts=32")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text.strip()
        if key in parsed and parsed[key] != value:
            raise refuse(f"override {key}", "one value", [parsed[key], value], "give it once")
        parsed[key] = value
    _check_override_keys(parsed)
    return parsed


def _check_override_keys(overrides: Mapping[str, Any]) -> None:
    for key in overrides:
        if key not in OVERRIDE_KEYS:
            import difflib

            near = difflib.get_close_matches(key, OVERRIDE_KEYS, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else ""
            raise refuse("override", "a config.json key that this runtime reads", key, hint)
    for pair in _SYNONYMS:
        if all(name in overrides for name in pair):
            both = {name: overrides[name] for name in pair}
            raise refuse("override", f"one of {' and '.join(pair)}", both, "give one of them")
    rope = overrides.get("rope_parameters", overrides.get("rope_scaling"))
    if isinstance(rope, dict) and "rope_theta" in rope and "rope_theta" in overrides:
        both = {"rope_theta": overrides["rope_theta"], "inside": rope["rope_theta"]}
        raise refuse("override", "rope_theta once", both, "give one of them")


def apply_overrides(
    hf: Mapping[str, Any], overrides: Mapping[str, Any], *, layers: int | None
) -> dict[str, Any]:
    """The config with the overrides in it; `hf` is left alone.

    Raises:
        UnsupportedModel: an unknown override, or two that contradict each other or `layers`.
    """
    if layers is not None and "num_hidden_layers" in overrides:
        raise UnsupportedModel(
            f"--layers {layers} and override num_hidden_layers={overrides['num_hidden_layers']} "
            "contradict each other: expected one of them; --layers runs the first layers of a model"
        )
    _check_override_keys(overrides)
    merged = dict(hf)
    for key, value in overrides.items():
        # The other spelling of the same thing must not survive in the file's own words.
        for pair in _SYNONYMS:
            if key in pair:
                for name in pair:
                    _keep_theta(merged, merged.pop(name, None))
        if key == "quantization":
            if value not in ("fp8", "none", None):
                raise refuse("override quantization", "fp8 or none", value)
            merged["quantization_config"] = FP8_CONFIG if value == "fp8" else None
        else:
            merged[key] = value
    if "num_attention_heads" in overrides and "num_key_value_heads" not in overrides:
        merged.pop("num_key_value_heads", None)
    if "rope_theta" in overrides:
        for name in ("rope_scaling", "rope_parameters"):
            if isinstance(merged.get(name), dict):
                merged[name] = {**merged[name], "rope_theta": overrides["rope_theta"]}
    return merged


def _keep_theta(merged: dict[str, Any], dropped: Any) -> None:
    if isinstance(dropped, dict) and "rope_theta" in dropped:
        merged.setdefault("rope_theta", dropped["rope_theta"])

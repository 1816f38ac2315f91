"""Model configurations: a Hugging Face `config.json`, read strictly into one spelling per field.

`load_config` takes a shipped name, a file, a checkpoint folder or a mapping, applies `KEY=VALUE` overrides, and returns a
frozen `ModelConfig` whose contradictions have been ruled out, so that the model files need not check anything.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from ..ir.errors import DscError, faults, require
from .json_file import read_json

_SHIPPED = Path(__file__).with_name("configs")

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_EXPERTS = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "first_k_dense_replace")
_GROUPS = ("n_group", "topk_group", "routed_scaling_factor")

# What a config.json of each family must hold. Where transformers and the released code disagree about a default, the field is
# listed here, so that it is never guessed.
REQUIRED: dict[str, tuple[str, ...]] = {
    "deepseek_v3": (*_SIZES, *_LATENT, *_EXPERTS, *_GROUPS, "norm_topk_prob"),
    "kimi_k2": (*_SIZES, *_LATENT, *_EXPERTS, *_GROUPS, "norm_topk_prob"),
    "deepseek_v2": (*_SIZES, *_LATENT, *_EXPERTS, "routed_scaling_factor"),
    "deepseek": (*_SIZES, *_EXPERTS),
    "llama": _SIZES,
}

# null means that the model has none; everywhere else null means that the field is missing.
_NULLABLE = ("q_lora_rank", "n_shared_experts")

_SIGMOID_GATE = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True}
_SOFTMAX_GATE = {"scoring_func": "softmax", "topk_method": "greedy"}
# Fields that older or newer files of a family leave out because the code of the family fixes them.
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": _SIGMOID_GATE,
    "kimi_k2": _SIGMOID_GATE,
    "deepseek_v2": {**_SOFTMAX_GATE, "rope_interleave": True},
    "deepseek": _SOFTMAX_GATE,
    "llama": {},
}
# Other spellings in use, with the one kept here.
_ALIASES = {
    "torch_dtype": "dtype",
    "num_mtp_layers": "num_nextn_predict_layers",
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
}


class YarnScaling(BaseModel):
    """YaRN context extension (arXiv 2309.00071, section 3.4), as in `rope_scaling` of a config.json with type "yarn"."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    rope_type: Literal["yarn"] = "yarn"
    factor: PositiveFloat
    original_max_position_embeddings: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True


class ModelConfig(BaseModel):
    """A model's hyper-parameters under their Hugging Face names; fields that this class does not know are kept as they are.

    Sizes count elements; those of a mechanism that the family lacks are 0. `rope_scaling` is None for plain RoPE. `dtype` is the
    type of every parameter but the gate's correction bias. Defaults that are not obvious: `aux_loss_alpha` 1e-4 and
    `mtp_loss_weight` 0.3 (DeepSeek-V3 report, section 4.2).
    """

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, protected_namespaces=())

    model_type: str
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    max_position_embeddings: PositiveInt
    rms_norm_eps: PositiveFloat = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    initializer_range: PositiveFloat = 0.02

    rope_theta: PositiveFloat = 10000.0
    rope_scaling: YarnScaling | None = None
    rope_interleave: bool = False
    partial_rotary_factor: float | None = None

    q_lora_rank: PositiveInt | None = None
    kv_lora_rank: NonNegativeInt = 0
    qk_nope_head_dim: NonNegativeInt = 0
    qk_rope_head_dim: NonNegativeInt = 0
    v_head_dim: NonNegativeInt = 0

    n_routed_experts: NonNegativeInt = 0
    n_shared_experts: NonNegativeInt = 0
    num_experts_per_tok: NonNegativeInt = 0
    moe_intermediate_size: NonNegativeInt = 0
    first_k_dense_replace: NonNegativeInt = 0
    moe_layer_freq: PositiveInt = 1
    n_group: PositiveInt = 1
    topk_group: PositiveInt = 1
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "greedy"
    scoring_func: Literal["sigmoid", "softmax"] = "softmax"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    aux_loss_alpha: float = 1e-4

    num_nextn_predict_layers: NonNegativeInt = 0
    mtp_loss_weight: float = 0.3

    quantization_config: dict[str, Any] | None = None

    @property
    def latent_attention(self) -> bool:
        """Whether the family uses multi-head latent attention (MLA); grouped-query attention otherwise."""
        return self.model_type in ("deepseek_v3", "kimi_k2", "deepseek_v2")

    @property
    def mixture_of_experts(self) -> bool:
        """Whether the family has routed experts at all."""
        return self.model_type != "llama"

    @property
    def rope_dim(self) -> int:
        """How many elements of a head are rotated: the decoupled part in MLA, the whole head otherwise."""
        return self.qk_rope_head_dim if self.latent_attention else self.head_dim

    def is_moe_layer(self, index: int) -> bool:
        """Whether decoder layer `index` (from 0) has routed experts instead of one dense feed-forward network."""
        return self.mixture_of_experts and index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields under the names used here; `load_config` reads them back to an equal object."""
        return self.model_dump(mode="json")

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> ModelConfig:
        problems = [message for holds, message in self._laws() if not holds]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _laws(self) -> Iterable[tuple[bool, str]]:
        yield self.hidden_act == "silu", f'hidden_act = "{self.hidden_act}" is not supported, expected "silu"'
        for field in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            yield not getattr(self, field), f"{field} = true is not supported, expected false"
        rotated = self.partial_rotary_factor
        yield rotated in (None, 1), f"partial_rotary_factor = {rotated} is not supported, expected 1"
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.latent_attention:
            yield kv_heads == heads, f"num_key_value_heads = {kv_heads} differs from num_attention_heads = {heads} in latent attention"
        else:
            yield heads % kv_heads == 0, f"num_attention_heads = {heads} is not divisible by num_key_value_heads = {kv_heads}"
        for field in (*(_LATENT[1:] if self.latent_attention else ()), *((_EXPERTS[0], *_EXPERTS[2:4]) if self.mixture_of_experts else ())):
            yield getattr(self, field) > 0, f"{field} must be positive, found {getattr(self, field)}"
        yield self.rope_dim % 2 == 0, f"the rotated head dimension must be even, found {self.rope_dim}"
        if self.mixture_of_experts:
            yield from self._expert_laws()
        mtp = self.num_nextn_predict_layers
        yield mtp == 0 or self.mixture_of_experts, f'num_nextn_predict_layers = {mtp} needs experts, but model_type is "{self.model_type}"'

    def _expert_laws(self) -> Iterable[tuple[bool, str]]:
        experts, top_k = self.n_routed_experts, self.num_experts_per_tok
        yield top_k <= experts, f"num_experts_per_tok = {top_k} exceeds n_routed_experts = {experts}"
        dense, layers = self.first_k_dense_replace, self.num_hidden_layers
        yield dense <= layers, f"first_k_dense_replace = {dense} exceeds num_hidden_layers = {layers}"
        if self.topk_method == "greedy":
            return
        groups, top_groups = self.n_group, self.topk_group
        yield experts % groups == 0, f"n_routed_experts = {experts} is not divisible by n_group = {groups}"
        yield top_groups <= groups, f"topk_group = {top_groups} exceeds n_group = {groups}"
        reachable = experts // groups * top_groups
        yield top_k <= reachable, f"num_experts_per_tok = {top_k} exceeds the {reachable} experts in topk_group = {top_groups} groups"


def shipped() -> tuple[str, ...]:
    """The names of the configurations that come with dsc, sorted."""
    return tuple(sorted(path.stem for path in _SHIPPED.glob("*.json")))


def load_config(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | Sequence[str] = ()) -> ModelConfig:
    """Read a configuration and apply overrides.

    `source` is a shipped name (see `shipped`), the path of a config.json, a folder that holds one, or the parsed mapping.
    `overrides` are `KEY=VALUE` texts or a mapping; a VALUE that is text is parsed as JSON and, failing that, is a string.
    Raises DscError, one line naming the file, what was found and what was expected.
    """
    where, raw = ("configuration", dict(source)) if isinstance(source, Mapping) else _read(source)
    fields = _canonical(raw, where)
    changes = _parse_overrides(overrides)
    for key in changes:
        _require_known(_ALIASES.get(key, key), fields)
    fields |= _canonical(changes, "overrides")
    return _validate(fields, where)


def _read(source: str | Path) -> tuple[str, dict[str, Any]]:
    path = Path(source)
    if str(source) in shipped():
        return str(source), json.loads((_SHIPPED / f"{source}.json").read_text(encoding="utf-8"))
    if path.is_dir():
        path = path / "config.json"
        require(path.is_file(), f"{path.parent}: found a folder without config.json, expected a checkpoint folder")
    elif not path.is_file():
        hint = _suggest(str(source), shipped()) or f"; shipped: {', '.join(shipped())}"
        raise DscError(f"{source}: found neither a file, nor a folder, nor a shipped model{hint}")
    return str(path), read_json(path)


def _parse_overrides(overrides: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    if isinstance(overrides, Mapping):
        pairs = list(overrides.items())
    else:
        pairs = []
        for text in overrides:
            key, equals, value = text.partition("=")
            require(bool(equals and key.strip()), f'override "{text}": expected KEY=VALUE')
            pairs.append((key.strip(), value))
    return {key: _parse_value(value) if isinstance(value, str) else value for key, value in pairs}


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _require_known(key: str, fields: Mapping[str, Any]) -> None:
    known = {*ModelConfig.model_fields, *fields, "rope_parameters"}
    require(key in known, f'unknown configuration field "{key}"{_suggest(key, known)}')


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, sorted(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _canonical(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One spelling per field, and `rope_scaling` None or a mapping whose kind is under `rope_type`."""
    fields: dict[str, Any] = {}
    for key, value in raw.items():
        name = _ALIASES.get(key, key)
        require(name not in fields or fields[name] == value, f"{where}: {key} = {value!r} contradicts {name} = {fields.get(name)!r}")
        fields[name] = value
    rope = fields.pop("rope_parameters", None)  # transformers 5 puts rope_theta and rope_scaling into one mapping
    if rope is not None:
        require(isinstance(rope, Mapping), f"{where}: rope_parameters is {rope!r}, expected an object")
        scaling = dict(rope)
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in scaling:
                fields[key] = scaling.pop(key)
        fields["rope_scaling"] = scaling
    if "rope_scaling" in fields:
        fields["rope_scaling"] = _canonical_scaling(fields["rope_scaling"], where)
    return fields


def _canonical_scaling(scaling: Any, where: str) -> dict[str, Any] | None:
    if scaling is None:
        return None
    require(isinstance(scaling, Mapping), f"{where}: rope_scaling is {scaling!r}, expected an object or null")
    fields = dict(scaling)
    old = fields.pop("type", None)
    kind = fields.setdefault("rope_type", old if old is not None else "default")
    require(kind in ("default", "yarn"), f'{where}: rope_scaling type "{kind}" is not supported, expected "yarn" or "default"')
    return None if kind == "default" else fields


def _validate(fields: dict[str, Any], where: str) -> ModelConfig:
    kind, known = fields.get("model_type"), ", ".join(sorted(REQUIRED))
    if kind is None:
        raise DscError(f"{where}: model_type is missing, expected one of {known}")
    if not isinstance(kind, str) or kind not in REQUIRED:
        raise DscError(f"{where}: model_type = {json.dumps(kind)} is unknown, expected one of {known}")
    needed = REQUIRED[kind] + (("n_group", "topk_group") if fields.get("topk_method") == "group_limited_greedy" else ())
    missing = [name for name in needed if fields.get(name) is None and not (name in _NULLABLE and name in fields)]
    require(not missing, f'{where}: missing {", ".join(missing)}, which model_type "{kind}" needs')
    fields = _FAMILY_DEFAULTS[kind] | {name: value for name, value in fields.items() if value is not None}
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    if "head_dim" not in fields:
        fields["head_dim"] = _default_head_dim(fields, where)
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        raise DscError(f"{where}: {faults(error.errors())}") from None


def _default_head_dim(fields: Mapping[str, Any], where: str) -> Any:
    """What transformers takes where a config.json leaves `head_dim` out."""
    if "qk_rope_head_dim" in fields:
        return fields["qk_rope_head_dim"]
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads > 0):
        return 1  # the wrong field itself is reported by its own type rule
    require(hidden % heads == 0, f"{where}: hidden_size = {hidden} is not divisible by num_attention_heads = {heads}, and no head_dim")
    return hidden // heads

"""Architecture of Llama 4 as data, in Hugging Face's field names: text decoder (spec §1) and image encoder (§4)."""

from dataclasses import dataclass, fields, replace
from typing import Any

from herd.errors import ConfigError


@dataclass(frozen=True)
class RopeScaling:
    """The llama3 rule: wavelengths beyond original_max / low are slowed down by `factor` (spec §2.2)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if min(self.factor, self.low_freq_factor, self.original_max_position_embeddings) <= 0:
            raise ConfigError(f"rope scaling needs positive numbers, not {self}")
        low, high = self.low_freq_factor, self.high_freq_factor
        if high < low:
            raise ConfigError(f"rope scaling has high_freq_factor {high} below low_freq_factor {low}")

    def to_hf(self) -> dict[str, Any]:
        return {"rope_type": "llama3", **{f.name: getattr(self, f.name) for f in fields(self)}}


@dataclass(frozen=True)
class TextConfig:
    """One decoder. Layers are local (RoPE, chunked attention) or global (NoPE, full attention)."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int  # routed and shared experts
    intermediate_size_mlp: int  # dense layers
    num_local_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    interleave_moe_layer_step: int = 1
    moe_layers: tuple[int, ...] | None = None  # overrides the step
    nope_layer_interval: int | None = 4  # None: no layer is global
    no_rope_layers: tuple[int, ...] | None = None  # overrides the interval; 1 = RoPE, 0 = NoPE, as in Hugging Face
    attention_chunk_size: int | None = 8192  # None: local layers see everything before them
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    use_qk_norm: bool = True
    rms_norm_eps: float = 1e-5
    attn_temperature_tuning: bool = True
    floor_scale: int = 8192
    attn_scale: float = 0.1
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        positive = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
        positive += ["head_dim", "max_position_embeddings", "floor_scale"]
        # Null means "none" for these two; a dense model's step is never used (Hugging Face writes 0, spec §1.5).
        positive += [n for n in ("attention_chunk_size", "nope_layer_interval") if getattr(self, n) is not None]
        positive += ["interleave_moe_layer_step"] if self.moe_layers is None and self.num_local_experts else []
        _check_positive(self, positive)
        layers = range(self.num_hidden_layers)
        widths = {"intermediate_size" if self.is_moe(i) else "intermediate_size_mlp" for i in layers}
        _check_positive(self, sorted(widths))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key/value heads evenly"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary embedding needs an even number")
        if self.no_rope_layers is not None and len(self.no_rope_layers) != self.num_hidden_layers:
            raise ConfigError(
                f"no_rope_layers lists {len(self.no_rope_layers)} layers, the model has {self.num_hidden_layers}"
            )
        outside = sorted(set(self.moe_layers or ()) - set(layers))
        if outside:
            raise ConfigError(f"moe_layers names layers {outside}; the model has layers 0 to {layers[-1]}")
        if any(self.is_moe(i) for i in layers) and not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ConfigError(f"num_experts_per_tok is {self.num_experts_per_tok} of {self.num_local_experts} experts")

    def is_local(self, layer: int) -> bool:
        """True for RoPE layers with chunked attention, False for global (NoPE) layers."""
        if self.no_rope_layers is not None:
            return bool(self.no_rope_layers[layer])
        return self.nope_layer_interval is None or (layer + 1) % self.nope_layer_interval != 0

    def is_moe(self, layer: int) -> bool:
        """True where the feed-forward is a mixture of experts, False where it is dense."""
        if self.moe_layers is not None:
            return layer in self.moe_layers
        return self.num_local_experts > 0 and (layer + 1) % self.interleave_moe_layer_step == 0

    @property
    def global_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_hidden_layers) if not self.is_local(i))

    def num_parameters(self, *, active: bool = False) -> int:
        """Parameters of the text model; with `active`, those one token passes through (spec §1.4)."""
        c = self
        attention = c.hidden_size * c.head_dim * 2 * (c.num_attention_heads + c.num_key_value_heads)
        expert = 3 * c.hidden_size * c.intermediate_size
        experts = c.num_experts_per_tok if active else c.num_local_experts
        moe = c.hidden_size * c.num_local_experts + (experts + 1) * expert
        dense = 3 * c.hidden_size * c.intermediate_size_mlp
        layers = sum(
            attention + 2 * c.hidden_size + (moe if c.is_moe(i) else dense) for i in range(c.num_hidden_layers)
        )
        embeddings = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
        return layers + embeddings + c.hidden_size

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "TextConfig":
        """Read a Hugging Face config.json: text-only or multimodal (its text part), written by v4 or v5."""
        raw = raw.get("text_config", raw)
        if raw.get("model_type") not in ("llama4_text", "llama4"):
            raise ConfigError(f"model_type is {raw.get('model_type')!r}; expected 'llama4_text' or 'llama4'")
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in raw.items() if k in known and v is not None}
        missing = [f for f in _REQUIRED if f not in values]
        if missing:
            raise ConfigError(f"config.json lacks {', '.join(missing)}")
        _refuse_foreign(raw)
        rope = raw.get("rope_parameters") or {}
        values["rope_theta"] = float(raw.get("rope_theta") or rope.get("rope_theta") or 500000.0)
        values["rope_scaling"] = _rope_scaling(raw.get("rope_scaling") or rope)
        values["attention_chunk_size"] = raw.get("attention_chunk_size", 8192)
        values["attn_temperature_tuning"] = bool(raw.get("attn_temperature_tuning", True))
        # transformers writes the second name, Meta and we the first.
        values["nope_layer_interval"] = raw.get("nope_layer_interval", raw.get("no_rope_layer_interval", 4))
        # An empty list of RoPE flags means "the default rule" (spec §1.2), an empty list of MoE layers means a dense
        # model: so read both in transformers.
        values["no_rope_layers"] = tuple(raw["no_rope_layers"]) if raw.get("no_rope_layers") else None
        values["moe_layers"] = tuple(raw["moe_layers"]) if raw.get("moe_layers") is not None else None
        eos = raw.get("eos_token_id")
        values["eos_token_id"] = tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,))
        cfg = cls(**values)
        return _with_layer_types(cfg, raw["layer_types"]) if raw.get("layer_types") else cfg

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers and `from_hf` read back to the same model."""
        skip = ("rope_scaling", "no_rope_layers", "moe_layers")
        raw: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skip}
        raw["eos_token_id"] = list(self.eos_token_id) or None
        raw["no_rope_layers"] = [int(self.is_local(i)) for i in range(self.num_hidden_layers)]
        raw["moe_layers"] = [i for i in range(self.num_hidden_layers) if self.is_moe(i)]
        scaling = self.rope_scaling.to_hf() if self.rope_scaling else None
        raw["rope_scaling"] = scaling
        raw["rope_parameters"] = {"rope_theta": self.rope_theta, **(scaling or {"rope_type": "default"})}
        raw |= {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "hidden_act": "silu"}
        raw |= {"attention_bias": False, "attention_dropout": 0.0, "output_router_logits": False}
        return raw


@dataclass(frozen=True)
class VisionConfig:
    """The image encoder, the projector into the decoder, and the ids that stand for images in a text."""

    hidden_size: int = 1408
    num_hidden_layers: int = 34
    num_attention_heads: int = 16
    intermediate_size: int = 5632
    image_size: int = 336  # pixels of a tile's side
    patch_size: int = 14
    num_channels: int = 3
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    pixel_shuffle_ratio: float = 0.5
    vision_output_dim: int = 4096
    projector_input_dim: int = 4096
    projector_output_dim: int = 4096
    boi_token_index: int = 200080
    eoi_token_index: int = 200081
    image_token_index: int = 200092  # takes the place of one patch

    def __post_init__(self) -> None:
        _check_positive(self, [f.name for f in fields(self) if f.type is int or f.type == "int"])
        if self.num_channels != 3:
            raise ConfigError(f"num_channels is {self.num_channels}; images have 3, red, green and blue")
        if self.image_size % self.patch_size:
            raise ConfigError(f"tiles of {self.image_size} pixels cannot be cut into patches of {self.patch_size}")
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ConfigError(
                f"{self.num_attention_heads} heads cannot share hidden_size {self.hidden_size} in whole pairs for "
                "width and height"
            )
        shrunk = self.pixel_shuffle_ratio * self.grid
        if not 0 < self.pixel_shuffle_ratio <= 1 or shrunk % 1 or self.grid % shrunk:
            raise ConfigError(f"pixel_shuffle_ratio {self.pixel_shuffle_ratio} does not divide {self.grid} patches")
        if self.projector_input_dim != self.projector_output_dim or self.vision_output_dim != self.projector_input_dim:
            raise ConfigError(
                f"vision_output_dim {self.vision_output_dim}, projector_input_dim {self.projector_input_dim} and "
                f"projector_output_dim {self.projector_output_dim} must be the same"
            )

    @property
    def grid(self) -> int:
        """Patches on a tile's side."""
        return self.image_size // self.patch_size

    @property
    def shuffled(self) -> int:
        """Neighbouring patches that become one token."""
        return round(1 / self.pixel_shuffle_ratio) ** 2

    @property
    def tokens_per_tile(self) -> int:
        return self.grid**2 // self.shuffled

    def num_parameters(self, hidden_size: int) -> int:
        """Parameters of encoder, adapter and projector into a decoder of this hidden_size (spec §4.2)."""
        c = self
        D, F, out = c.hidden_size, c.intermediate_size, c.projector_output_dim
        block = 4 * (D * D + D) + (D * F + F) + (F * D + D) + 4 * D
        patches = c.num_channels * c.patch_size**2 * D
        encoder = patches + D + (c.grid**2 + 1) * D + 4 * D + c.num_hidden_layers * block
        adapter = D * c.shuffled * c.projector_input_dim + c.projector_input_dim * out
        return encoder + adapter + c.vision_output_dim * hidden_size

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "VisionConfig | None":
        """The image part of a Hugging Face config.json; None if it describes a text model."""
        vision = raw.get("vision_config")
        if not isinstance(vision, dict):
            return None
        if vision.get("model_type", "llama4_vision_model") != "llama4_vision_model":
            raise ConfigError(f"the vision model is {vision['model_type']!r}; expected 'llama4_vision_model'")
        known = {f.name for f in fields(cls)}
        values = {k: v for part in (raw, vision) for k, v in part.items() if k in known and v is not None}
        missing = [f.name for f in fields(cls)[:13] if f.name not in values and f.name != "rope_theta"]
        if missing:
            raise ConfigError(f"vision_config lacks {', '.join(missing)}")
        values["rope_theta"] = float((vision.get("rope_parameters") or vision).get("rope_theta") or 10000.0)
        for name, expected in _VISION_FIXED.items():
            if vision.get(name, expected) != expected:
                raise ConfigError(f"{name} of the vision model is {vision[name]!r}; Llama 4 has {expected!r}")
        return cls(**values)

    def to_hf(self, text: TextConfig) -> dict[str, Any]:
        """A config.json of a multimodal model with this decoder."""
        raw: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        head = {name: raw.pop(name) for name in ("boi_token_index", "eoi_token_index", "image_token_index")}
        raw |= {"model_type": "llama4_vision_model", **_VISION_FIXED}
        raw["rope_parameters"] = {"rope_theta": self.rope_theta, "rope_type": "default"}
        decoder = text.to_hf()
        head |= {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4"}
        head["tie_word_embeddings"] = text.tie_word_embeddings
        del decoder["architectures"]
        return {**head, "text_config": decoder, "vision_config": raw}


# What transformers' class could have otherwise and Llama 4 does not.
_VISION_FIXED = {
    "hidden_act": "gelu",
    "multi_modal_projector_bias": False,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}


def _check_positive(cfg: TextConfig | VisionConfig, names: list[str]) -> None:
    for name in names:
        value = getattr(cfg, name)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")


_REQUIRED = tuple(f.name for f in fields(TextConfig))[:11]


def _refuse_foreign(raw: dict[str, Any]) -> None:
    """ConfigError for settings of Hugging Face's class that no Llama 4 uses and this model does not have."""
    for name, expected in (("hidden_act", "silu"), ("attention_bias", False)):
        if raw.get(name, expected) != expected:
            raise ConfigError(f"{name} is {raw[name]!r}; Llama 4 has {expected!r}")


def _with_layer_types(cfg: TextConfig, types: list[str]) -> TextConfig:
    """transformers can give every layer full attention (a null chunk to us); other mixtures we cannot express."""
    if any(cfg.is_local(i) for i in range(cfg.num_hidden_layers)) and set(types) == {"full_attention"}:
        return replace(cfg, attention_chunk_size=None)
    expected = ["chunked_attention" if cfg.is_local(i) else "full_attention" for i in range(cfg.num_hidden_layers)]
    if types != expected:
        raise ConfigError(f"layer_types is {types}; with these RoPE layers Llama 4 has {expected}")
    return cfg


def _rope_scaling(raw: dict[str, Any]) -> RopeScaling | None:
    # The first transformers releases wrote no type beside the factors and always meant llama3.
    kind = raw.get("rope_type") or raw.get("type") or ("llama3" if "factor" in raw else "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConfigError(f"rope scaling type {kind!r} is not part of Llama 4; expected 'llama3' or none")
    try:
        return RopeScaling(*(raw[f.name] for f in fields(RopeScaling)))
    except KeyError as missing:
        raise ConfigError(f"rope scaling lacks {missing}") from None


SCOUT = TextConfig(
    vocab_size=202048,
    hidden_size=5120,
    num_hidden_layers=48,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=8192,
    intermediate_size_mlp=16384,
    num_local_experts=16,
    num_experts_per_tok=1,
    max_position_embeddings=10485760,
    rope_scaling=RopeScaling(16.0, 1.0, 1.0, 8192),
    bos_token_id=200000,
    eos_token_id=(200001, 200007, 200008),
    pad_token_id=200018,
)
MAVERICK = replace(
    SCOUT,
    num_local_experts=128,
    interleave_moe_layer_step=2,
    max_position_embeddings=1048576,
    rope_scaling=None,
    use_qk_norm=False,
)
# Never released: assumption A of spec §1.5, chosen to meet the published 288B active of about 2T parameters.
BEHEMOTH_ASSUMED = replace(
    SCOUT,
    hidden_size=16384,
    num_hidden_layers=96,
    num_attention_heads=128,
    intermediate_size=24064,
    intermediate_size_mlp=48128,
    max_position_embeddings=1048576,
)
VISION = VisionConfig()  # of Scout and Maverick
PRESETS = {"scout": SCOUT, "maverick": MAVERICK, "behemoth-assumed": BEHEMOTH_ASSUMED}

"""Every number the library uses: sizes from a checkpoint's own config files, the method's values from the paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from consistory.weights.errors import ConsistoryError

Json = Mapping[str, Any]


def _per_level(value: Any, levels: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels
    if not all(isinstance(each, int) for each in values):
        raise ConsistoryError(
            f"the checkpoint's UNet is not uniform within a level ({list(values)}), as those of SSD-1B and Vega: "
            "use a model of SDXL's own shape"
        )
    return values


@dataclass(frozen=True)
class UNetConfig:
    """An SDXL-like UNet. Tuples have one entry per resolution level, finest first."""

    channels: int  # of the latents
    widths: tuple[int, ...]
    blocks: int  # residual blocks a level (the decoder has one more)
    attended: tuple[bool, ...]  # which levels have attention
    depths: tuple[int, ...]  # transformer blocks per attention module
    heads: tuple[int, ...]
    context_width: int
    size_features: int  # sinusoidal features of each of the six size ids
    added_width: int  # pooled width + 6 * size_features
    groups: int
    norm_eps: float
    sample_size: int  # latent height and width the checkpoint was trained at
    linear_projection: bool  # 1x1 projections around a transformer as linear layers (SDXL) or convolutions
    mid_attended: bool = True  # False: the middle is a single residual block, as in small ControlNets

    @classmethod
    def from_json(cls, d: Json) -> UNetConfig:
        """From the `config.json` of diffusers' UNet2DConditionModel.

        Raises ConsistoryError for a UNet whose blocks differ within a level.
        """
        levels = len(d["block_out_channels"])
        return cls(
            channels=d["in_channels"],
            widths=tuple(d["block_out_channels"]),
            blocks=d["layers_per_block"],
            attended=tuple(name == "CrossAttnDownBlock2D" for name in d["down_block_types"]),
            depths=_per_level(d.get("transformer_layers_per_block", 1), levels),
            # `attention_head_dim` holds the number of heads: a naming slip that every published config shares.
            heads=_per_level(d.get("num_attention_heads") or d["attention_head_dim"], levels),
            context_width=d["cross_attention_dim"],
            size_features=d["addition_time_embed_dim"],
            added_width=d["projection_class_embeddings_input_dim"],
            groups=d["norm_num_groups"],
            norm_eps=d.get("norm_eps", 1e-5),
            sample_size=d["sample_size"],
            linear_projection=d.get("use_linear_projection", False),
            mid_attended=d.get("mid_block_type") != "UNetMidBlock2D",
        )


@dataclass(frozen=True)
class ControlNetConfig:
    """A ControlNet: the encoder it copies, and the convolutions that bring a picture to the latents' size."""

    encoder: UNetConfig
    image_channels: int
    hint_widths: tuple[int, ...]  # each after the first halves the picture

    @property
    def stride(self) -> int:
        """Pixels per latent."""
        return 2 ** (len(self.hint_widths) - 1)

    @classmethod
    def from_json(cls, d: Json) -> ControlNetConfig:
        """From the `config.json` of diffusers' ControlNetModel, which does not say the size it was trained at."""
        return cls(
            encoder=UNetConfig.from_json({"sample_size": 0, **d}),
            image_channels=d.get("conditioning_channels", 3),
            hint_widths=tuple(d["conditioning_embedding_out_channels"]),
        )


@dataclass(frozen=True)
class VAEConfig:
    image_channels: int
    latent_channels: int
    widths: tuple[int, ...]  # per level, finest first; each level after the first halves the image
    blocks: int
    groups: int
    scaling_factor: float  # latents = scaling_factor * posterior mean

    @property
    def stride(self) -> int:
        """Pixels per latent."""
        return 2 ** (len(self.widths) - 1)

    @classmethod
    def from_json(cls, d: Json) -> VAEConfig:
        """From the `config.json` of diffusers' AutoencoderKL."""
        return cls(
            image_channels=d["in_channels"],
            latent_channels=d["latent_channels"],
            widths=tuple(d["block_out_channels"]),
            blocks=d["layers_per_block"],
            groups=d["norm_num_groups"],
            scaling_factor=d["scaling_factor"],
        )


@dataclass(frozen=True)
class TextConfig:
    vocabulary: int
    positions: int
    width: int
    hidden: int  # of the feed-forward layers
    layers: int
    heads: int
    activation: str  # "quick_gelu" | "gelu"
    norm_eps: float
    projection: int | None  # width of the pooled state, or None for an encoder that has no projection

    @classmethod
    def from_json(cls, d: Json) -> TextConfig:
        """From the `config.json` of transformers' CLIPTextModel or CLIPTextModelWithProjection."""
        projects = d.get("architectures") == ["CLIPTextModelWithProjection"]
        return cls(
            vocabulary=d["vocab_size"],
            positions=d["max_position_embeddings"],
            width=d["hidden_size"],
            hidden=d["intermediate_size"],
            layers=d["num_hidden_layers"],
            heads=d["num_attention_heads"],
            activation=d["hidden_act"],
            norm_eps=d.get("layer_norm_eps", 1e-5),
            projection=d["projection_dim"] if projects else None,
        )


@dataclass(frozen=True)
class VisionConfig:
    """CLIP's image encoder."""

    image_size: int  # pixels, height and width
    patch_size: int
    width: int
    hidden: int  # of the feed-forward layers
    layers: int
    heads: int
    activation: str  # "quick_gelu" | "gelu"
    norm_eps: float
    projection: int

    @classmethod
    def from_json(cls, d: Json) -> VisionConfig:
        """From the `vision_config` of transformers' CLIPModel, with its `projection_dim`."""
        return cls(
            image_size=d["image_size"],
            patch_size=d["patch_size"],
            width=d["hidden_size"],
            hidden=d["intermediate_size"],
            layers=d["num_hidden_layers"],
            heads=d["num_attention_heads"],
            activation=d["hidden_act"],
            norm_eps=d["layer_norm_eps"],
            projection=d["projection_dim"],
        )


# What a model predicts, and whether its noise ends at no signal at all (zero terminal SNR).
PREDICTIONS = {"epsilon": ("epsilon", False), "v": ("v_prediction", False), "v-ztsnr": ("v_prediction", True)}


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule the model was trained with, and how sampling strides over it."""

    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    offset: int = 1  # added to every timestep ("leading" spacing)
    final_alpha_one: bool = False  # after the last step: alpha_bar = 1 (True) or alpha_bar of t = 0 (False)
    prediction: str = "epsilon"  # what the UNet predicts: "epsilon" | "v_prediction"
    zero_terminal_snr: bool = False  # betas rescaled so that the last timestep is pure noise
    trailing: bool = False  # timesteps are counted from the noisiest one ("trailing") or from the cleanest ("leading")

    @classmethod
    def from_json(cls, d: Json, prediction_name: str | None = None) -> ScheduleConfig:
        """From diffusers' `scheduler_config.json`. Whatever sampler it names, sampling here is DDIM.

        prediction_name: one of `PREDICTIONS`, whatever the file says.
        Raises ConsistoryError for a schedule that is neither SDXL's nor a v-prediction variant of it.
        """
        if prediction_name is not None:
            if prediction_name not in PREDICTIONS:
                raise ConsistoryError(f"the prediction is {prediction_name!r}: use one of {', '.join(PREDICTIONS)}")
            kind, zero_terminal_snr = PREDICTIONS[prediction_name]
            d = {**d, "prediction_type": kind, "rescale_betas_zero_snr": zero_terminal_snr}
        prediction, betas = d.get("prediction_type", "epsilon"), d.get("beta_schedule", "scaled_linear")
        if not {"num_train_timesteps", "beta_start", "beta_end"} <= d.keys():
            raise ConsistoryError(
                f"the checkpoint's schedule ({d.get('_class_name', 'unnamed')}) has no betas, unlike SDXL's: "
                "use another checkpoint"
            )
        if prediction == "epsilon" and d.get("rescale_betas_zero_snr"):
            raise ConsistoryError(
                "the checkpoint's schedule starts at pure noise (rescale_betas_zero_snr), where epsilon tells nothing "
                "of the picture: use a checkpoint that predicts v; if this one does, load it with prediction v-ztsnr"
            )
        if prediction not in ("epsilon", "v_prediction") or betas != "scaled_linear":
            raise ConsistoryError(
                f"the checkpoint's schedule (beta_schedule {betas}, prediction_type {prediction}) is not SDXL's: "
                "use a checkpoint with scaled_linear betas that predicts epsilon or v_prediction"
            )
        return cls(
            train_steps=d["num_train_timesteps"],
            beta_start=d["beta_start"],
            beta_end=d["beta_end"],
            offset=d.get("steps_offset", 0),
            final_alpha_one=d.get("set_alpha_to_one", False),
            prediction=prediction,
            zero_terminal_snr=bool(d.get("rescale_betas_zero_snr")),
            trailing=d.get("timestep_spacing") == "trailing" or bool(d.get("rescale_betas_zero_snr")),
        )

    @property
    def prediction_name(self) -> str:
        """One of `PREDICTIONS`."""
        return next(name for name, kind in PREDICTIONS.items() if kind == (self.prediction, self.zero_terminal_snr))

    def spaced(self, spacing: str | None) -> ScheduleConfig:
        """With "leading" or "trailing" timesteps; None leaves them as they are.

        Those asked to be trailing end without noise, as Euler's sampling does, which distilled checkpoints are for.
        Raises ConsistoryError for another spacing, and where leading ones would leave out the pure noise.
        """
        if spacing is None:
            return self
        if spacing not in ("leading", "trailing"):
            raise ConsistoryError(f'spacing is {spacing!r}: use "leading" or "trailing"')
        if spacing == "leading" and self.zero_terminal_snr:
            raise ConsistoryError("the checkpoint's sampling has to start at pure noise: use trailing spacing")
        if spacing == "leading":
            return replace(self, trailing=False)
        return replace(self, trailing=True, final_alpha_one=True)


@dataclass(frozen=True)
class FreeU:
    """FreeU (Si et al. 2023): backbone factors b and skip factors s of the first two decoder levels."""

    s1: float = 0.6
    s2: float = 0.4
    b1: float = 1.1
    b2: float = 1.2


@dataclass(frozen=True)
class QueryBlend:
    """Eq. 4: Q* = (1 - v) Q + v Q_vanilla, with v falling linearly from `start` to `end` over the first steps."""

    start: float = 0.9
    end: float = 0.8
    fraction: float = 0.1  # of the steps


@dataclass(frozen=True)
class PhotoConfig:
    """How real photos take part as anchors (App. E).

    method: "inversion": they follow the noise maps of an edit-friendly DDPM inversion, made from latents noised
        independently at every step; "noise": at every step they are the photo's latents with one and the same noise.
    guidance: of the inversion and its reproduction. It plays a part only if photos read each other: otherwise an
        inversion is reproduced exactly under any guidance.
    align_keys: AdaIN of the anchors' self-attention keys.
    anchors_read: whether they read each other.
    """

    method: str = "inversion"
    guidance: float = 2.0
    align_keys: bool = True
    anchors_read: bool = False

    def __post_init__(self) -> None:
        """Raises ConsistoryError for a value out of range."""
        if self.method not in ("inversion", "noise"):
            raise ConsistoryError(f'method is {self.method!r}: use "inversion" or "noise"')


def _fields(name: str, part: QueryBlend | FreeU | None) -> dict[str, float]:
    return {} if part is None else {f"{name}.{field}": value for field, value in vars(part).items()}


@dataclass(frozen=True)
class ConsistoryConfig:
    """The method's settings; the defaults are the published values (paper §4 and App. A).

    sdsa: subject-driven self-attention (§4.1).
    masking: anchors share only their subject's keys; if False, all of them (the paper's "no mask" ablation).
    separate_subjects: each concept's patches read, and draw features from, the same concept's patches only; if False,
        those of all concepts (§4.5). Patches of no concept read all in either case.
    dropout: probability that a shared key is dropped (§4.2).
    query_blend: vanilla query blending (§4.2, eq. 4), or None.
    injection: feature injection (§4.3), which needs a first pass.
    alpha: weight of the injected feature (eq. 6).
    injection_window: first and last injection step as fractions of the number of steps; both ends inclusive.
    dift_timestep: where DIFT features are taken (§4.3).
    first_pass: "dift" stops the first pass once it has its DIFT features, but not before injection starts; "full" runs
        it to the end.
    mask_history: recorded steps that a mask averages over, or None for all so far.
    freeu: FreeU factors, or None.
    """

    sdsa: bool = True
    masking: bool = True
    separate_subjects: bool = False
    dropout: float = 0.5
    query_blend: QueryBlend | None = QueryBlend()
    injection: bool = True
    alpha: float = 0.8
    injection_window: tuple[float, float] = (1 / 10, 1 / 3)
    dift_timestep: int = 261
    first_pass: str = "dift"
    mask_history: int | None = None
    freeu: FreeU | None = None

    def __post_init__(self) -> None:
        """Raises ConsistoryError for a value out of range, or of another type: it could not be saved with a story."""
        for name in ("sdsa", "masking", "separate_subjects", "injection"):
            if not isinstance(getattr(self, name), bool):
                raise ConsistoryError(f"{name} is {getattr(self, name)!r}: use True or False")
        if not isinstance(self.injection_window, tuple | list) or len(self.injection_window) != 2:
            raise ConsistoryError(f"injection_window is {self.injection_window}: use two fractions of the steps")
        for name, kind in (("query_blend", QueryBlend), ("freeu", FreeU)):
            if not isinstance(getattr(self, name), (kind, type(None))):
                raise ConsistoryError(f"{name} is {getattr(self, name)!r}: use {kind.__name__}() or None")
        first, last = self.injection_window
        shares = {"dropout": self.dropout, "alpha": self.alpha}
        shares |= {"injection_window[0]": first, "injection_window[1]": last} | _fields("query_blend", self.query_blend)
        for name, value in shares.items():
            if not isinstance(value, float | int) or not 0 <= value <= 1:
                raise ConsistoryError(f"{name} is {value!r}: use a number from 0 to 1, one of Python's own")
        if first > last:
            raise ConsistoryError(f"injection_window is {self.injection_window}: use two rising fractions of the steps")
        for name, value in _fields("freeu", self.freeu).items():
            if not isinstance(value, float | int):
                raise ConsistoryError(f"{name} is {value!r}: use a number, one of Python's own")
        for name, whole in (("dift_timestep", self.dift_timestep), ("mask_history", self.mask_history)):
            if not isinstance(whole, int) and not (whole is None and name == "mask_history"):
                raise ConsistoryError(f"{name} is {whole!r}: use a whole number, one of Python's own")
        if self.separate_subjects and not self.masking:
            raise ConsistoryError("separate_subjects needs masks to tell the subjects apart: use masking=True")
        if self.first_pass not in ("dift", "full"):
            raise ConsistoryError(f'first_pass is {self.first_pass!r}: use "dift" or "full"')
        if self.mask_history is not None and self.mask_history < 1:
            raise ConsistoryError(f"mask_history is {self.mask_history}: use 1 or more steps, or None for all so far")

    @property
    def uses_anchors(self) -> bool:
        """Whether anything flows from the anchors to other pictures."""
        return self.sdsa or self.injection

    @classmethod
    def from_dict(cls, d: Json) -> ConsistoryConfig:
        """From what `dataclasses.asdict` made of one, also by way of JSON."""
        blend, freeu = d["query_blend"], d["freeu"]
        return cls(**{
            **d,
            "query_blend": blend and QueryBlend(**blend),
            "freeu": freeu and FreeU(**freeu),
            "injection_window": tuple(d["injection_window"]),
        })  # fmt: skip

    @classmethod
    def paper(cls) -> ConsistoryConfig:
        """As printed, for 50 steps: queries blend over the first five, injection acts for t in [680, 900]."""
        return cls(query_blend=QueryBlend(fraction=0.08), injection_window=(0.1, 0.3))

    @classmethod
    def reference(cls) -> ConsistoryConfig:
        """What the authors' released implementation does, as recorded from its runs."""
        return cls(query_blend=QueryBlend(end=0.81836735), first_pass="full", mask_history=20)

    @classmethod
    def control(cls) -> ConsistoryConfig:
        """For use with ControlNet, where the paper drops more of the anchors."""
        return cls(dropout=0.7)

    @classmethod
    def photos(cls) -> ConsistoryConfig:
        """For photos as anchors: without mask dropout.

        Dropout keeps the layouts of pictures that are drawn together apart. Photos keep theirs in any case, and new
        pictures do not fall into it (`bench/photos.py`).
        """
        return cls(dropout=0.0)

    @classmethod
    def vanilla(cls) -> ConsistoryConfig:
        """Plain SDXL: every part of the method off."""
        return cls(sdsa=False, query_blend=None, injection=False)

"""The transformer: a Llama trunk (RMSNorm, RoPE, SwiGLU, no biases, untied head) that text and patches share.

    h = embed(tokens), with patches.encode(z, t) at the patch positions            (linear, or half a U-Net)
    h = h + attention(norm(h));  h = h + ffn(norm(h)), ffn(x) = w2(silu(w1 x) * w3 x)   for each layer
    h = h + norm(attention(h));  h = h + norm(ffn(h))                                   instead, with norm = "post"
    logits = output(norm(h)) at the text positions asked for;  predictions = patches.decode(norm(h)) at the patches

The model is pure: it draws no noise, computes no loss and does not know what a prediction means.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from transfusion.model import mask as masks
from transfusion.model.cache import Cache, LayerCache
from transfusion.model.lora import MODULE_OF, LoraConfig
from transfusion.model.patches import LinearPatches
from transfusion.model.paths import IMAGE, TEXT, Linear, Norm, Order, is_adapter, products, text_twin
from transfusion.model.refine import FACTOR, Refine
from transfusion.model.rope import RopeScaling, angles, rotate
from transfusion.model.unet import STAGES, UNetPatches
from transfusion.model.varlen import VarlenMask, varlen_attention, varlen_mask
from transfusion.sequence import Batch, check_image_positions

NORMS = ("pre", "post")
SEPARABLE = ("ffn", "attention", "norms")
Mask = Tensor | BlockMask | VarlenMask  # bool [B, 1, L, L], or what FlexAttention or attention by document reads
PART = {"feed_forward": "ffn", "attention": "attention"}  # module of a layer -> which of SEPARABLE it is


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the trunk. `channels` and `patch_size` are of the latents, P = channels * patch_size^2."""

    dim: int = 256
    n_layers: int = 6
    n_heads: int = 4
    n_kv_heads: int = 0  # 0 = n_heads
    head_width: int = 0  # 0 = dim / n_heads
    ffn_dim: int = 0  # 0 = 8/3 dim, rounded up to a multiple of 256, as in Llama
    vocab_size: int = 0  # 0 = the tokenizer's, and what else is written as tokens
    patch_size: int = 2
    channels: int = 0  # 0 = the codec's
    sides: int = 0  # > 0: images are written with their size, each side at most so many patches
    rope_base: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    norm: str = "pre"  # of a layer: before attention and feed-forward; or "post", behind them, as in Swin and Chameleon
    norm_eps: float = 1e-5
    qk_norm: bool = False
    separate: tuple[str, ...] = ()  # what patches have weights of their own for (MoT): some of SEPARABLE
    lora: LoraConfig = field(default_factory=LoraConfig)
    image_positions: str = "raster"  # rotary coordinates of patches; or "axial"
    causal_images: bool = False  # patches see only the patches before them (the paper's ablation)
    patch_positions: bool = False  # add sinusoids of row and column to every patch
    time_scale: bool = False  # the noise level also scales every patch
    refine_width: int = 0  # channels of the convolutions behind the linear read-out; 0 = none
    patches: str = "linear"  # how images enter and leave, a key of PATCHES; "codes": as tokens of the codec's codebook
    unet_width: int = 64  # of U-Net patches: channels of the first stage, each further one has twice as many
    unet_blocks: int = 2  # of U-Net patches: residual blocks a stage, on the way down and on the way up

    def __post_init__(self):
        if self.n_heads < 1 or self.n_layers < 1:
            raise ValueError(f"n_heads = {self.n_heads}, n_layers = {self.n_layers}: at least 1 of each")
        if self.head_dim < 4 or self.head_dim % 4 or (self.dim % self.n_heads and not self.head_width):
            raise ValueError(
                f"dim = {self.dim}, n_heads = {self.n_heads}, head_width = {self.head_width}: a head's width is a "
                "multiple of 4, and dim / n_heads where head_width is 0"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads = {self.n_heads} must be a multiple of n_kv_heads = {self.n_kv_heads}")
        if self.refine_width < 0 or (self.refine_width and self.patch_size % FACTOR):
            raise ValueError(
                f"refine_width = {self.refine_width}, patch_size = {self.patch_size}: set refine_width=0 for none; "
                "above 0 it wants an even patch_size"
            )
        if self.norm not in NORMS:
            raise ValueError(f"norm = {self.norm!r}: choose one of {', '.join(NORMS)}")
        if len(set(self.separate)) < len(self.separate) or not set(self.separate) <= set(SEPARABLE):
            raise ValueError(f"separate = {list(self.separate)}: choose some of {', '.join(SEPARABLE)}, each once")
        if self.patches not in PATCHES:
            raise ValueError(f"patches = {self.patches!r}: choose one of {', '.join(PATCHES)}")
        if self.patches == "codes" and (self.patch_size > 1 or self.patch_positions or self.time_scale):
            raise ValueError(
                f"patches = 'codes', patch_size = {self.patch_size}, patch_positions = {self.patch_positions}, "
                f"time_scale = {self.time_scale}: codes are tokens of one cell; set patch_size=1, the others to false"
            )
        if self.patches == "codes" and (self.separate or (self.lora.r and "image" in self.lora.paths)):
            raise ValueError(
                f"patches = 'codes', separate = {list(self.separate)}, lora.paths = {list(self.lora.paths)}: codes are "
                "tokens, which go through the text path; set separate=[], lora.paths=text"
            )
        if self.patches == "unet":
            if self.patch_size not in STAGES:
                raise ValueError(
                    f"patches = 'unet', patch_size = {self.patch_size}: each stage of a U-Net halves the image; set "
                    f'patch_size to one of {", ".join(map(str, STAGES))}, or patches="linear"'
                )
            if self.unet_width < 1 or self.unet_blocks < 1:
                raise ValueError(f"unet_width = {self.unet_width}, unet_blocks = {self.unet_blocks}: at least 1 each")
            if self.time_scale or self.refine_width:
                raise ValueError(
                    f"patches = 'unet', time_scale = {self.time_scale}, refine_width = {self.refine_width}: a U-Net "
                    "has blocks that do what these do for linear patches; set time_scale=false, refine_width=0"
                )
        check_image_positions(self.image_positions)

    @property
    def head_dim(self) -> int:
        return self.head_width or self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def hidden_dim(self) -> int:
        return self.ffn_dim or -(-8 * self.dim // 3 // 256) * 256

    @property
    def patch_dim(self) -> int:
        return self.channels * self.patch_size**2

    @property
    def sorts(self) -> bool:
        """Whether text and patches take different weights anywhere in the trunk."""
        return bool(self.separate or self.lora.r)


def matrix(config: ModelConfig, name: str, n_in: int, n_out: int) -> Linear:
    """A layer's matrix of that name, with a twin and adapters as the config says."""
    adapted = config.lora.r > 0 and name in config.lora.target_modules
    return Linear(n_in, n_out, PART[MODULE_OF[name]] in config.separate, config.lora if adapted else None)


PATCHES = {  # what stands between noisy patches and the transformer, on both sides
    "linear": lambda c: LinearPatches(c.dim, c.patch_dim, c.patch_positions, c.time_scale),
    "codes": lambda c: None,
    "unet": lambda c: UNetPatches(c.dim, c.channels, c.patch_size, c.unet_width, c.unet_blocks, c.patch_positions),
}


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = matrix(config, "wq", config.dim, config.n_heads * config.head_dim)
        self.wk = matrix(config, "wk", config.dim, config.kv_heads * config.head_dim)
        self.wv = matrix(config, "wv", config.dim, config.kv_heads * config.head_dim)
        self.wo = matrix(config, "wo", config.n_heads * config.head_dim, config.dim)
        separate = "attention" in config.separate
        self.q_norm = Norm(config.head_dim, config.norm_eps, separate) if config.qk_norm else None
        self.k_norm = Norm(config.head_dim, config.norm_eps, separate) if config.qk_norm else None
        self.varlen_attention = varlen_attention  # kept out of graphs where the block is compiled

    def heads(self, x: Tensor, path: int) -> list[Tensor]:
        """q, k, v [..., H, K] of a stream [..., D]."""
        q, k, v = (a.unflatten(-1, (-1, self.head_dim)) for a in products((self.wq, self.wk, self.wv), x, path))
        if self.q_norm is not None:
            q, k = self.q_norm(q.float(), path), self.k_norm(k.float(), path)
        return [q, k, v]

    def forward(
        self,
        streams: list[Tensor],
        order: Order,
        cos: Tensor,
        sin: Tensor,
        mask: Mask | None,
        cache: LayerCache | None,
    ) -> list[Tensor]:
        of_streams = [self.heads(x, path) for path, x in enumerate(streams)]
        q, k, v = (order.join(parts).transpose(1, 2) for parts in zip(*of_streams))  # [B, H, L, K]
        q, k = (rotate(a.float(), cos, sin) for a in (q, k))
        if cache is not None:
            k, v = cache.extend(k, v)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if isinstance(mask, VarlenMask):
            out = self.varlen_attention(q, k, v, mask)
        elif isinstance(mask, BlockMask):
            out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return [self.wo(x, path) for path, x in enumerate(order.split(out.transpose(1, 2).flatten(2)))]


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = matrix(config, "w1", config.dim, config.hidden_dim)
        self.w3 = matrix(config, "w3", config.dim, config.hidden_dim)
        self.w2 = matrix(config, "w2", config.hidden_dim, config.dim)

    def forward(self, x: Tensor, path: int) -> Tensor:
        gate, up = products((self.w1, self.w3), x, path)
        return self.w2(F.silu(gate) * up, path)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.post, separate = config.norm == "post", "norms" in config.separate
        self.attention_norm = Norm(config.dim, config.norm_eps, separate)
        self.attention = Attention(config)
        self.ffn_norm = Norm(config.dim, config.norm_eps, separate)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        streams: list[Tensor],  # [rows [B, L, D]], or [text [M, D], patches [N, D]]
        order: Order,
        cos: Tensor,
        sin: Tensor,
        mask: Mask | None,
        cache: LayerCache | None = None,
    ) -> list[Tensor]:
        if self.post:
            x = self.attention(streams, order, cos, sin, mask, cache)
            streams = [h + self.attention_norm(a.float(), path) for path, (h, a) in enumerate(zip(streams, x))]
            return [h + self.ffn_norm(self.feed_forward(h, path).float(), path) for path, h in enumerate(streams)]
        x = [self.attention_norm(h, path) for path, h in enumerate(streams)]
        streams = [h + a for h, a in zip(streams, self.attention(x, order, cos, sin, mask, cache))]
        return [h + self.feed_forward(self.ffn_norm(h, path), path) for path, h in enumerate(streams)]


class Transfusion(nn.Module):
    """Tokens, noisy patches, noise levels, places and a mask in; logits and patch predictions out."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if not config.vocab_size or not config.channels:
            raise ValueError(
                f"model.vocab_size = {config.vocab_size}, model.channels = {config.channels}: set both, or let "
                "`transfusion train` take them from the tokenizer and the codec"
            )
        self.config = config
        # by hand: its own initialisation, on meta, would import torch's compiler, which takes a second and more
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim), freeze=False)
        self.patches = PATCHES[config.patches](config)
        self.refine = Refine(config.patch_dim, config.patch_size, config.refine_width) if config.refine_width else None
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = Norm(config.dim, config.norm_eps, "norms" in config.separate)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.compiled = False

    def forward(
        self,
        tokens: Tensor,  # [B, L]
        place: Tensor,  # [B, L, 4] rotary coordinates, row and column
        mask: Mask | None,  # None: every position sees all
        z: Tensor,  # [N, P] noisy patches
        t: Tensor,  # [I] noise level of each image
        patch_image: Tensor,  # [N] image of each patch
        grids: tuple[tuple[int, int], ...],  # [I] rows and columns of each image's patches
        patch_at: Tensor,  # [N] flat position of each patch
        text_at: Tensor,  # [M] flat positions whose next token is asked for
        cache: list[LayerCache] | None = None,
        trunk: Callable[..., Tensor] | None = None,  # in place of `self.trunk`
        head: Callable[[Tensor], Tensor] | None = None,  # in place of `self.output`, of states [M, D]
    ) -> tuple[Tensor, Tensor]:
        """(logits [M, V] or what `head` makes of the states instead, predictions [N, P])."""
        h, skips = self.tok_embeddings(tokens), None  # [B, L, D]
        dtype = self.output.weight.dtype  # bfloat16 in an engine (precision.py); in training autocast chooses
        if len(z):
            grid = place.flatten(0, 1)[patch_at, 2:]
            patches, skips = self.patches.encode(z.to(dtype), t, patch_image, grid, grids)
            h = h.flatten(0, 1).index_copy(0, patch_at, patches.to(h.dtype)).view_as(h)
        c = self.config
        # outside of the trunk: its graph would find them anew for each number of q and k
        cos, sin = angles(place, c.head_dim, c.rope_base, c.rope_scaling)
        h = (trunk or self.trunk)(h, cos, sin, mask, patch_at, cache).flatten(0, 1)
        # heads compute only where something is asked for: text_at, and the patches
        logits = (head or self.output)(self.norm(h[text_at], TEXT).to(dtype))
        p = z
        if self.patches is not None:
            p = self.patches.decode(self.norm(h[patch_at], IMAGE).to(dtype), skips, t, grids)
        if self.refine is not None and len(z):
            p = p + self.refine(p, t, grids)
        return logits, p

    def trunk(
        self, h: Tensor, cos: Tensor, sin: Tensor, mask: Mask | None, patch_at: Tensor, cache: list[LayerCache] | None
    ) -> Tensor:
        """h [B, L, D] through the layers; cos and sin [B, 1, L, K] of its places' angles, patch_at [N]."""
        order = Order(h.shape[:2], patch_at if self.config.sorts else None)
        streams = order.split(h)
        for i, layer in enumerate(self.layers):
            streams = layer(streams, order, cos, sin, mask, None if cache is None else cache[i])
        return order.join(streams)

    def init_weights(self):
        """Normal(0, 0.02), the two layers that write to the residual stream scaled down by sqrt(2 n_layers) (GPT-2)."""
        nn.init.normal_(self.tok_embeddings.weight, std=0.02)
        nn.init.normal_(self.output.weight, std=0.02)
        if self.patches is not None:
            self.patches.init_weights()
        for name, p in self.layers.named_parameters():
            if p.ndim == 1:
                nn.init.ones_(p)
            elif is_adapter(name):
                nn.init.kaiming_uniform_(p, 5**0.5) if name.endswith("A") else nn.init.zeros_(p)
            else:
                residual = ".wo." in name or ".w2." in name
                nn.init.normal_(p, std=0.02 / (2 * self.config.n_layers) ** 0.5 if residual else 0.02)
        for p in self.norm.parameters():
            nn.init.ones_(p)
        if self.refine is not None:
            self.refine.init_weights()

    def new_cache(self, lanes: int, slots: int, dtype: torch.dtype) -> Cache:
        """An empty cache for `lanes` sequences of at most `slots` positions."""
        c, device = self.config, self.norm.weight.device
        return Cache(c.n_layers, lanes, c.kv_heads, slots, c.head_dim, device=device, dtype=dtype)

    def compile_layers(self):
        """Compiles each block by itself: one compilation serves all, the rest stays open to change in shape."""
        for layer in self.layers:
            # documents change from batch to batch, and so does how many patches there are; the size of rows does not
            layer.attention.varlen_attention = torch.compiler.disable(varlen_attention)
            layer.forward = torch.compile(layer.forward, dynamic=None if self.config.sorts else False)
        self.compiled = True


def build_model(config: ModelConfig, device: torch.device | str = "cpu") -> Transfusion:
    """A model on `device` with fresh weights from torch's global generator ("meta": no weights)."""
    with torch.device("meta"):
        model = Transfusion(config)
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        model.init_weights()
    return model


def parameter_counts(model: Transfusion) -> Iterator[tuple[str, int]]:
    """(part, number of parameters): the trunk (layers and last norm) as text goes through it, what patches have of it
    for themselves and adapters where there are any, text embedding and head, patch layers."""
    parts = {"trunk": 0, "image path": 0, "text adapters": 0, "image adapters": 0}
    for name, p in [*model.layers.named_parameters(), *model.norm.named_parameters()]:
        of_image = text_twin(name) is not None
        adapters = "image adapters" if of_image else "text adapters"
        parts[adapters if is_adapter(name) else "image path" if of_image else "trunk"] += p.numel()
    yield from ((name, n) for name, n in parts.items() if n)
    modules = {
        "text embedding and head": [model.tok_embeddings, model.output],
        "patches": [m for m in (model.patches, model.refine) if m is not None],
    }
    for name, of_part in modules.items():
        yield name, sum(p.numel() for m in of_part for p in m.parameters())


def row_mask(batch: Batch, model: Transfusion, queries: slice | None = None) -> Mask:
    """The mask of a batch: documents apart on a CPU, FlexAttention's tiles for compiled blocks on CUDA, else dense.

    `queries`: of these positions of each row alone.
    """
    on = batch.tokens.device.type
    build = varlen_mask if on == "cpu" and queries is None else masks.dense_mask
    if on == "cuda" and model.compiled:
        build = masks.block_mask  # only there: uncompiled, Flex would write out all scores, ten times slower
    some = {} if queries is None else {"queries": queries}
    return build(batch.document, batch.image, batch.hidden, not model.config.causal_images, **some)

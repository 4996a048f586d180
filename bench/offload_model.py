"""A checkpoint with random weights that is bigger than memory: a packed folder and a GGUF file with the same numbers.

Codes are random bytes in the order in which Herd packs them (herd/kernels/cpp/product.h); GGUF gets the same codes in
its order. Both have a scale for 32 numbers, Q4_0 in float16 and Herd in float32. Written layer by layer.

Shape suffixes: P panels of 32 outputs, N outputs, K inputs, G groups of inputs, D hidden.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType

from bench.checkpoints import SMALL, write_byte_tokenizer
from herd.checkpoint.files import companions
from herd.checkpoint.gguf_vocabulary import add_vocabulary
from herd.checkpoint.packed import EMBEDDING, NORM, Contents, write_packed
from herd.checkpoint.streaming import job
from herd.checkpoint.write_gguf import add_info, add_settings
from herd.config import TextConfig
from herd.formats import parse
from herd.kernels.layers import Layer, Mlp
from herd.kernels.native import PANEL, PackedWeight

GROUP, SEED = 32, 4
Array = npt.NDArray[np.generic]

# The shape of Scout at less than half its width.
SCOUT_LIKE = replace(
    SMALL,
    vocab_size=32768,
    hidden_size=2304,
    num_hidden_layers=48,
    num_attention_heads=18,
    num_key_value_heads=6,
    head_dim=128,
    intermediate_size=3840,
    intermediate_size_mlp=7680,
)
_Q4, _F16, _F32 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.F16, GGMLQuantizationType.F32


@dataclass(frozen=True)
class Random:
    """A weight: codes as panels have them, [P, K / 8, 32, 4], and scales [P, G, 32]."""

    cells: npt.NDArray[np.uint8]
    scale: npt.NDArray[np.float16]

    def packed(self) -> PackedWeight:
        """For Herd."""
        (P, _, _, _), (_, G, _) = self.cells.shape, self.scale.shape
        scale = torch.from_numpy(self.scale.astype(np.float32))
        codes = torch.from_numpy(self.cells.reshape(-1))
        return PackedWeight(codes, scale, (P * PANEL, G * GROUP), GROUP, 4)

    def q4_0(self) -> npt.NDArray[np.uint8]:
        """For llama.cpp: blocks of a scale and 16 bytes, of which byte i holds numbers i and i + 16; [N, G * 18]."""
        P, G, _ = self.scale.shape
        first, second = np.split(self.cells.reshape(P, G, 4, PANEL, 4), 2, axis=2)
        halves = np.stack([(first & 15) | (second << 4), (first >> 4) | (second & 0xF0)], 3)  # P G 2 2 32 4
        blocks = np.empty((P, PANEL, G, 18), np.uint8)
        blocks[..., :2] = self.scale.transpose(0, 2, 1)[..., None].copy().view(np.uint8)
        blocks[..., 2:] = halves.transpose(0, 4, 1, 2, 3, 5).reshape(P, PANEL, G, 16)
        return blocks.reshape(P * PANEL, G * 18)


def random_weight(rng: np.random.Generator, N: int, K: int) -> Random:
    """Numbers with mean 0, thanks to the signs of scales, and a variance of 1 / K."""
    P, G = N // PANEL, K // GROUP
    assert N % PANEL == 0 and K % GROUP == 0, (N, K)
    words = rng.integers(0, 1 << 64, P * PANEL * K // 16, np.uint64)
    cells = words.view(np.uint8).reshape(P, K // 8, PANEL, 4)
    step = rng.uniform(0.8, 1.2, (P, G, PANEL)) * rng.choice([-1, 1], (P, G, PANEL)) / (4.64 * K**0.5)
    return Random(cells, step.astype(np.float16))


def halves(gate_up: Random) -> tuple[Array, Array]:
    """Gates and ups, which take turns by 16, for llama.cpp."""
    blocks = gate_up.q4_0()
    gate, up = blocks.reshape(-1, 2, PANEL // 2, blocks.shape[1]).swapaxes(0, 1)
    return gate.reshape(-1, blocks.shape[1]), up.reshape(-1, blocks.shape[1])


class Gguf:
    """The file for llama.cpp, which is written beside the folder."""

    def __init__(self, cfg: TextConfig, path: Path, tokenizer: Path) -> None:
        self._path, self._partial = path, path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._writer = gguf.GGUFWriter(self._partial, "llama4")
        add_settings(self._writer, cfg)
        add_vocabulary(self._writer, tokenizer, companions(tokenizer), cfg)
        for name, shape, kind in _tensors(cfg):
            add_info(self._writer, f"{name}.weight", shape, kind)
        self._names = [name for name, _, _ in _tensors(cfg)]
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()

    def add(self, name: str, content: Array) -> None:
        assert self._names.pop(0) == name, name
        self._writer.write_tensor_data(content)

    def finish(self) -> None:
        assert not self._names
        self._writer.close()
        self._partial.rename(self._path)


def _tensors(cfg: TextConfig) -> Iterator[tuple[str, tuple[int, ...], GGMLQuantizationType]]:
    """Name, shape and type of every tensor, in the order in which they are written."""
    D, F, E, V = cfg.hidden_size, cfg.intermediate_size, cfg.num_local_experts, cfg.vocab_size
    q, kv = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    yield from (("token_embd", (V, D), _F16), ("output_norm", (D,), _F32), ("output", (V, D), _Q4))
    for at in range(cfg.num_hidden_layers):
        blk = f"blk.{at}."
        yield from ((f"{blk}attn_norm", (D,), _F32), (f"{blk}ffn_norm", (D,), _F32))
        yield f"{blk}ffn_gate_inp", (E, D), _F32
        yield from ((f"{blk}attn_{part}", (rows, D), _Q4) for part, rows in (("q", q), ("k", kv), ("v", kv)))
        yield f"{blk}attn_output", (D, q), _Q4
        shared = (("gate_shexp", (F, D)), ("up_shexp", (F, D)), ("down_shexp", (D, F)))
        routed = (("gate_exps", (E, F, D)), ("up_exps", (E, F, D)), ("down_exps", (E, D, F)))
        yield from ((f"{blk}ffn_{name}", shape, _Q4) for name, shape in (*shared, *routed))


def write(cfg: TextConfig, folder: Path, gguf_path: Path) -> None:
    """Both forms of the checkpoint, if they are not there."""
    if folder.exists() and gguf_path.exists():
        return
    rng = np.random.Generator(np.random.SFC64(SEED))
    with tempfile.TemporaryDirectory() as name:
        write_byte_tokenizer(Path(name), cfg.vocab_size)
        file, D = Gguf(cfg, gguf_path, Path(name)), cfg.hidden_size
        embedding = torch.from_numpy(rng.standard_normal((cfg.vocab_size, D), np.float32)).bfloat16()
        norm, head = _norm(rng, D), random_weight(rng, cfg.vocab_size, D)
        file.add("token_embd", embedding.half().numpy())
        file.add("output_norm", norm)
        file.add("output", head.q4_0())
        files = {path.name: path.read_bytes() for path in Path(name).iterdir()}
        plain = {EMBEDDING: embedding, NORM: torch.from_numpy(norm)}
        types = {name: (x.dtype, x.shape) for name, x in plain.items()}
        layer, formats = partial(_layer, cfg, rng, file), parse(f"int4:{GROUP}")
        contents = Contents(cfg, formats, layer, head.packed, types, plain.__getitem__, files)
        with job(folder, {"begun": time.time_ns()}) as made:  # numbers follow each other: it always begins anew
            write_packed(contents, made, _say)
        file.finish()


def _layer(cfg: TextConfig, rng: np.random.Generator, file: Gguf, at: int) -> Layer:
    D, F, E = cfg.hidden_size, cfg.intermediate_size, cfg.num_local_experts
    q, kv = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    norms = (_norm(rng, D), _norm(rng, D))
    router = rng.standard_normal((E, D), np.float32) * np.float32(D**-0.5)
    qkv, out = random_weight(rng, q + 2 * kv, D), random_weight(rng, D, q)
    blocks = [(random_weight(rng, 2 * F, D), random_weight(rng, D, F)) for _ in range(1 + E)]
    parts = np.split(qkv.q4_0(), [q, q + kv])
    names = ("attn_norm", "ffn_norm", "ffn_gate_inp", "attn_q", "attn_k", "attn_v", "attn_output")
    for name, content in zip(names, (*norms, router, *parts, out.q4_0()), strict=True):
        file.add(f"blk.{at}.{name}", content)
    columns = list(zip(*((*halves(gate_up), down.q4_0()) for gate_up, down in blocks), strict=True))
    for name, column in zip(("gate", "up", "down"), columns, strict=True):
        file.add(f"blk.{at}.ffn_{name}_shexp", column[0])
    for name, column in zip(("gate", "up", "down"), columns, strict=True):
        file.add(f"blk.{at}.ffn_{name}_exps", np.stack(column[1:]))
    shared, *experts = (Mlp(gate_up.packed(), down.packed()) for gate_up, down in blocks)
    return Layer(
        *(torch.from_numpy(norm) for norm in norms),
        qkv=qkv.packed(),
        out=out.packed(),
        shared=shared,
        experts=tuple(experts),
        router_ED=torch.from_numpy(router),
        top_k=cfg.num_experts_per_tok,
        local=cfg.is_local(at),
        qk_norm=cfg.use_qk_norm,
    )


def _norm(rng: np.random.Generator, D: int) -> npt.NDArray[np.float32]:
    return (1 + 0.1 * rng.standard_normal(D, np.float32)).astype(np.float32)


def _say(done: int, total: int) -> None:
    print(f"\rwriting {done / 1e9:.1f} of {total / 1e9:.1f} GB", end="\n" if done == total else "", flush=True)

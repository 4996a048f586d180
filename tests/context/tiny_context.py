"""A tiny model, a tokenizer whose tokens are bytes, and a context made with them."""

import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from herd.config import TextConfig
from herd.context.forward import ReadingCache
from herd.context.read import ReadReport, read
from herd.context.segment import KV, SEQUENTIAL, Spec, convert, pack
from herd.context.store import NewChunk, NewSource, Store, chunk_hash, spec_for
from herd.model import Transformer

CHUNK = 32
CONFIG = TextConfig(
    vocab_size=256,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=16,
    intermediate_size_mlp=32,
    num_local_experts=2,
    num_experts_per_tok=1,
    max_position_embeddings=1 << 20,
    no_rope_layers=(1, 1, 0, 1),
    attention_chunk_size=CHUNK,
    floor_scale=16,
)
# Three global layers: the first layer of all, one between local layers, and the last.
SEVERAL = replace(CONFIG, num_hidden_layers=5, no_rope_layers=(0, 1, 0, 1, 0))


class Bytes:
    """One token per byte of UTF-8."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


def tiny_model(config: TextConfig = CONFIG) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


class CountingModel:
    """The tiny model, counting the rows it reads."""

    def __init__(self, config: TextConfig = CONFIG) -> None:
        self.model, self.config, self.rows = tiny_model(config), config, 0

    def parameters(self) -> object:
        return self.model.parameters()

    def read(
        self, ids_BT: torch.Tensor, first: int = 0, cache: ReadingCache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.rows += len(ids_BT)
        return self.model.read(ids_BT, first, cache)


class MadeModel:
    """Reads without torch's threads, which a fork would not have; its K/V are those of `made_kv`."""

    def parameters(self) -> Iterator[torch.Tensor]:
        return iter([torch.zeros(1)])

    def read(self, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = ids_BT.float()[..., None, None] + torch.arange(16.0).view(2, 8)
        return x, -x


class MadeSequence:
    """As MadeModel, with two layers below: their K/V depend on all that was read before, and where this stands."""

    config = SEVERAL

    def __init__(self) -> None:
        self.rows = 0

    def parameters(self) -> Iterator[torch.Tensor]:
        return iter([torch.zeros(1)])

    def read(self, ids_BT: torch.Tensor, first: int, cache: ReadingCache) -> tuple[torch.Tensor, torch.Tensor]:
        self.rows += len(ids_BT)
        x = ids_BT.float()[..., None, None] + torch.arange(16.0).view(2, 8)
        # A sum of codes is exact, in whichever parts they come.
        seen = sum(int(kv.k_GNd.long().sum()) for kv in cache.before)
        for layer in range(2):
            cache.keys.append(x + first + seen % (97 + layer))
            cache.values.append(-x)
        return x, -x


def several(reading: str = SEQUENTIAL, dtype: str = "int8", config: TextConfig = SEVERAL) -> Spec:
    return spec_for(config, "tiny", dtype, reading)


def spec(fingerprint: str = "tiny", dtype: str = "int8"):
    return spec_for(CONFIG, fingerprint, dtype)


def read_paths(store: Store, *paths: Path, model: object = None) -> ReadReport:
    return read(paths, store, model or tiny_model(), Bytes())


def put(store: Store, name: str, texts: list[bytes]) -> None:
    """Store a source without a model: its K/V are made from its bytes, so they can be told apart and checked."""
    with store.writer() as writer:
        chunks = [new_chunk(text) for text in texts]
        fresh = {new.hash: (new, kv) for new, kv in chunks if new.hash not in writer.known}
        hashes = [new.hash for new, _ in chunks]
        kept = [(new, convert(kv, writer.spec)) for new, kv in fresh.values()]
        writer.commit(kept, [NewSource(name, name.encode(), "", hashes)])


def new_chunk(text: bytes) -> tuple[NewChunk, KV]:
    ids = list(text)
    return NewChunk(chunk_hash("tiny", ids), ids, 1, 1 + text.count(b"\n")), made_kv(ids)


def made_kv(ids: list[int]) -> KV:
    x = torch.tensor(ids).float()[:, None, None] + torch.arange(16.0).view(2, 8)
    return pack(x, -x, spec())


def contents(store: Store) -> dict[str, list[bytes]]:
    """Source name → its chunks' bytes, after checking that every chunk's K/V is that of its bytes."""
    found: dict[str, list[bytes]] = {}
    for index, source in enumerate(store.source_of):
        ids = store.ids(index)
        kv, made = store.kv(index), convert(made_kv(ids), store.spec)
        for a, b in zip(kv.arrays(), made.arrays(), strict=True):
            assert torch.equal(a, b)
        found.setdefault(store.sources[source].name, []).append(bytes(ids))
    return found


def forked(work: Callable[[], None]) -> int:
    """Process id of a child that does the work and exits with 0, or 1 if it raised. A fork imports nothing again."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def exit_status(pid: int) -> int:
    """Exit code of a child, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

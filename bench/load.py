"""Memory that loading takes beside what is loaded, from every kind of source: at most one layer is wanted.

    python -m bench.load [--only gguf-Q4_0] [--work build/load] [--out bench/results/load.json]

One model of Scout's shape, 2 billion parameters, as a Hugging Face folder, as Meta's two shards, and as GGUF files, is
loaded as it is and in four bits. A process for each imports Herd, sets the kernel's mark of its most memory (VmHWM)
back, and loads it as `herd.load` does, but for the tokenizer. "peak" is that mark, in which pages of mapped files count
for as long as they are in memory, and "own" the most of it that was of no file, looked at some thousand times a second
from outside. Both are given above what the loaded model takes, and compared with a layer as it is stored, in bfloat16.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.checkpoints import MID, write_folder, write_gguf
from bench.plan import load, status
from herd import checkpoint, kernels
from herd.config import TextConfig
from herd.formats import parse
from herd.plan.process import process

SHARDS = 2
SOURCES = ("hf", "meta", "gguf-F16", "gguf-Q8_0", "gguf-Q4_0")
FORMATS = ("bf16", "int4")


def params(cfg: TextConfig) -> dict[str, Any]:
    """A model of experts only, as Meta's params.json has it."""
    moe = {"num_experts": cfg.num_local_experts, "interleave_moe_layer_step": 1, "top_k": 1, "auto_scale_F": False}
    return {
        "dim": cfg.hidden_size,
        "n_layers": cfg.num_hidden_layers,
        "n_heads": cfg.num_attention_heads,
        "n_kv_heads": cfg.num_key_value_heads,
        "ffn_exp": 1.5 * cfg.intermediate_size / cfg.hidden_size,
        "attention_chunk_size": cfg.attention_chunk_size,
        "rope_theta": cfg.rope_theta,
        "nope_layer_interval": 4,
        "use_qk_norm": True,
        "moe_args": moe,
    }


def write(name: str, work: Path, cfg: TextConfig = MID) -> Path:
    """The model as one kind of source."""
    folder = write_folder(cfg, work / "hf", dtype=torch.bfloat16)
    if name == "meta":
        return write_meta(folder, work / "meta", cfg)
    return folder if name == "hf" else write_gguf(folder, work / f"{name}.gguf", name.removeprefix("gguf-"))


def write_meta(folder: Path, out: Path, cfg: TextConfig) -> Path:
    """As Meta has it (spec of the layout: `herd.checkpoint.meta`)."""
    if not (out / "params.json").exists():
        out.mkdir(exist_ok=True)
        with checkpoint.open_weights(folder) as weights:
            for rank in range(SHARDS):
                torch.save(_shard(weights, cfg.num_hidden_layers, rank), out / f"consolidated.{rank:02}.pth")
        (out / "params.json").write_text(json.dumps(params(cfg)))
    return out


def _shard(weights: checkpoint.Weights, layers: int, rank: int) -> dict[str, Tensor]:
    def cut(name: str, dim: int) -> Tensor:
        return weights.tensor(name).chunk(SHARDS, dim)[rank].clone()

    shard = {
        "tok_embeddings.weight": cut("model.embed_tokens.weight", 0),
        "output.weight": cut("lm_head.weight", 0),
        "norm.weight": weights.tensor("model.norm.weight"),
    }
    for layer in range(layers):
        a, b = f"model.layers.{layer}.", f"layers.{layer}."
        attn, mlp = f"{a}self_attn.", f"{a}feed_forward."
        gate, up = weights.tensor(f"{mlp}experts.gate_up_proj").chunk(2, -1)
        shard |= {
            f"{b}attention.wqkv.layer_norm_weight": weights.tensor(f"{a}input_layernorm.weight"),
            f"{b}attention.wqkv.weight": torch.cat([cut(f"{attn}{x}_proj.weight", 0) for x in "qkv"]),
            f"{b}attention.wo.weight": cut(f"{attn}o_proj.weight", 1),
            f"{b}feed_forward.norm.weight": weights.tensor(f"{a}post_attention_layernorm.weight"),
            f"{b}feed_forward.router_DE": weights.tensor(f"{mlp}router.weight").T.clone(),
            f"{b}feed_forward.experts.moe_w_in_eD_F": gate.chunk(SHARDS, 2)[rank].flatten(0, 1).clone(),
            f"{b}feed_forward.experts.moe_w_swiglu_eD_F": up.chunk(SHARDS, 2)[rank].flatten(0, 1).clone(),
            f"{b}feed_forward.experts.moe_w_out_eF_D": cut(f"{mlp}experts.down_proj", 1).flatten(0, 1),
            f"{b}feed_forward.w_in_shared_FD.weight": cut(f"{mlp}shared_expert.gate_proj.weight", 0),
            f"{b}feed_forward.w_swiglu_FD.weight": cut(f"{mlp}shared_expert.up_proj.weight", 0),
            f"{b}feed_forward.w_out_shared_DF.weight": cut(f"{mlp}shared_expert.down_proj.weight", 1),
        }
    return shard


def child(path: Path, formats: str) -> None:
    """Load in the process that this runs in; what it takes is said before and behind."""
    torch.ones(8, 8) @ torch.ones(8, 8)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes what is there now
    before = status()
    print("ready", flush=True)
    model = load(path, parse(formats))
    after = status()
    print(json.dumps({"before": before, "peak": after["VmHWM"], "layers": len(model.packed.layers)}), flush=True)  # type: ignore[union-attr]


def measure(name: str, formats: str, work: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.load", "--child", str(write(name, work)), "--formats", formats]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process_:
        assert process_.stdout is not None and process_.stdout.readline() == "ready\n"
        own = 0
        while process_.poll() is None:
            own = max(own, _own(process_.pid))
            time.sleep(0.0005)
        found = json.loads(process_.stdout.read())
    before, model = found["before"], loaded(formats)
    above = {"peak": found["peak"] - before["VmRSS"] - model, "own": own - before["RssAnon"] - model}
    return {
        **{name: round(size / 2**20, 1) for name, size in above.items()},
        **{f"{name}_within_a_layer": size <= layer() for name, size in above.items()},
    }


def _own(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return int(text.split("RssAnon:")[1].split()[0]) * 1024 if "RssAnon:" in text else 0


def loaded(formats: str) -> int:
    """Bytes of the model: packed weights, and the embedding as it is stored."""
    need = process(MID, parse(formats), 1)
    return need.weights + need.scales + need.norms_and_routers + 2 * MID.vocab_size * MID.hidden_size


def layer() -> int:
    """Bytes of the largest layer in bfloat16."""
    one = (MID.num_parameters() - 2 * MID.vocab_size * MID.hidden_size) // MID.num_hidden_layers
    return 2 * one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SOURCES)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--formats", choices=FORMATS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("bench/results/load.json"))
    parser.add_argument("--work", type=Path, default=Path("build/load"), help="keeps the checkpoints, 12 GB")
    args = parser.parse_args()
    if args.child:
        child(args.child, args.formats)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    results = dict[str, dict[str, Any]]()
    for name in [args.only] if args.only else SOURCES:
        for formats in FORMATS:
            results.setdefault(name, {})[formats] = one = measure(name, formats, args.work)
            print(f"{name:10} {formats}: peak {one['peak']:+8,.1f} MiB, own {one['own']:+8,.1f}", flush=True)
    if not args.only:
        about = {"torch": torch.__version__, "kernels": kernels.implementation(), "system": platform.platform()}
        models = {formats: round(loaded(formats) / 2**20, 1) for formats in FORMATS}
        sizes = {"model_mib": models, "layer_mib": round(layer() / 2**20, 1)}
        result = {"command": "python -m bench.load", **about, **sizes, "above_the_model_mib": results}
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

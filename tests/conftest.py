"""Settings of all tests, and a tiny model folder with random weights for what stands on a model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import settings
from tokenizers import decoders, models, pre_tokenizers

from herd import checkpoint
from herd.config import TextConfig
from herd.model import Transformer

# A busy machine is no failure: tests judge results, not the time one example took.
settings.register_profile("house", deadline=None)
settings.load_profile("house")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_config() -> TextConfig:
    """Three layers, the middle one global with experts; chunks of 64 tokens; one token per byte."""
    return TextConfig(
        vocab_size=259,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=16,
        intermediate_size_mlp=24,
        num_local_experts=4,
        num_experts_per_tok=1,
        max_position_embeddings=1 << 20,
        nope_layer_interval=2,
        interleave_moe_layer_step=2,
        attention_chunk_size=64,
        use_qk_norm=False,
        tie_word_embeddings=True,
        eos_token_id=(258,),
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: random weights, a byte-level tokenizer, ChatML."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    model = Transformer(tiny_config())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    checkpoint.save(model, folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    core.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": TEMPLATE, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def several_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with two more layers, and so with two global ones."""
    folder = tmp_path_factory.mktemp("model") / "several"
    torch.manual_seed(0)
    model = Transformer(replace(tiny_config(), num_hidden_layers=5))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    checkpoint.save(model, folder)
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def short_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with chunks of 512 tokens and positions for two of them and a question."""
    folder = tmp_path / "short"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    few = {"attention_chunk_size": 512, "max_position_embeddings": 3 * 512}
    (folder / "config.json").write_text(json.dumps({**config, **few}))
    return folder

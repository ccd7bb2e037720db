"""A student cut out of its teacher: some of its layers, and everything else of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DISTILBERT = "distilbert"
DISTILBERT_LAYERS = (0, 2, 4, 7, 9, 11)
"""Of the 12 layers of BERT-base: Sanh et al. 2019, section 3, and their extract_distilbert.py."""

# One entry per layer; Llama, Qwen, Gemma and others say there which kind of layer each one is.
PER_LAYER_SETTINGS = ("layer_types", "no_rope_layers", "mlp_layer_types")


def student_from_teacher(teacher: nn.Module, layers: Sequence[int] | str) -> Any:
    """A student with some of the teacher's layers, and a copy of everything else of it.

    For models of the library transformers with one stack of layers: BERT, RoBERTa, DistilBERT,
    GPT-2, Llama, Mistral and others of their making, with whatever head they have.

    Args:
        teacher: the model. It is left as it is, and shares no memory with the student.
        layers: which of its layers the student has, in the student's order, counted from 0. Or
            "distilbert", the choice of Sanh et al. 2019 ("DistilBERT, a distilled version of
            BERT"): of a BERT with 12 layers, layers 0, 2, 4, 7, 9 and 11, without token-type
            embeddings and pooler.

    Returns:
        A model of the teacher's class with `num_hidden_layers` of its config set, on its device,
        in its dtypes and mode (training or evaluation), all parameters trainable. For
        "distilbert": a `DistilBertModel` of a `BertModel`, a `DistilBertForMaskedLM` of a
        `BertForMaskedLM` or `BertForPreTraining`. Without token-type embeddings a BERT, which
        adds them at every position, no longer gives the same hidden states: its students learn
        that, as DistilBERT does.

    Raises:
        TypeError: not a model of transformers, or `layers` of another type.
        ImportError: transformers is not installed.
        ValueError: a layer that the teacher does not have, one named twice, or a teacher whose
            layers cannot be told apart (an encoder and a decoder, several stacks).
    """
    _check_teacher(teacher)
    if isinstance(layers, str):
        if layers != DISTILBERT:
            raise ValueError(f"layers: expected layer numbers or {DISTILBERT!r}, got {layers!r}")
        return _distilbert(teacher)
    config: Any = copy.deepcopy(teacher.config)
    stack = layer_stack(teacher, config.num_hidden_layers)
    chosen = _check_layers(layers, config.num_hidden_layers)
    for name in PER_LAYER_SETTINGS:
        values = getattr(config, name, None)
        if isinstance(values, (list, tuple)) and len(values) == config.num_hidden_layers:
            setattr(config, name, type(values)(values[i] for i in chosen))
    config.num_hidden_layers = len(chosen)
    places = {f"{stack}.{old}.": f"{stack}.{new}." for new, old in enumerate(chosen)}

    def new_name(name: str) -> str | None:
        """Of a tensor in the student; None if it belongs to a layer that the student lacks."""
        if not name.startswith(f"{stack}."):
            return name
        number = name.removeprefix(f"{stack}.").partition(".")[0]
        old = f"{stack}.{number}."
        return name.replace(old, places[old], 1) if old in places else None

    # Built anew, not cut from a copy: attention modules know their number, which the caches of
    # keys and values go by.
    return _filled(type(teacher), config, teacher, new_name)


def _filled(kind: Any, config: Any, teacher: nn.Module, new_name: Any) -> PreTrainedModel:
    """A model of class `kind` with all tensors from the teacher, under their new names."""
    with torch.random.fork_rng(devices=[]):  # its random start is overwritten at once
        student: Any = kind(config)
    with torch.no_grad():
        tensors = _renamed(teacher.state_dict(), new_name)
        student.load_state_dict(tensors, assign=True)  # with the teacher's dtypes and device
        student.tie_weights()
        student.to(next(teacher.parameters()).device)
        for name, buffer in _renamed(dict(teacher.named_buffers()), new_name).items():
            module, _, leaf = name.rpartition(".")  # those that are not saved, as positions
            student.get_submodule(module)._buffers[leaf] = buffer
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return cast("PreTrainedModel", student.train(teacher.training))


def _renamed(tensors: dict[str, Tensor], new_name: Any) -> dict[str, Tensor]:
    names = {name: new_name(name) for name in tensors}
    return {names[name]: x.detach().clone() for name, x in tensors.items() if names[name]}


def _check_teacher(teacher: nn.Module) -> None:
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise ImportError(
            "student_from_teacher needs transformers 4.48 or later: pip install 'fastdistill[text]'"
        ) from error
    if not isinstance(teacher, PreTrainedModel):
        raise TypeError(f"teacher: expected a model of transformers, got {type(teacher).__name__}")
    config = teacher.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"teacher: expected one stack of layers; {type(teacher).__name__} has an encoder and a "
            "decoder"
        )
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise ValueError(
            f"teacher: expected a config with num_hidden_layers; {type(config).__name__} has none"
        )
    if getattr(config, "pruned_heads", None):
        raise ValueError(f"teacher: expected all heads, got pruned_heads={config.pruned_heads}")


def layer_stack(teacher: nn.Module, count: int) -> str:
    """Name of the list of the teacher's layers: the one outermost list of that length.

    Raises:
        ValueError: there is none, or several.
    """
    found: list[str] = []
    for name, module in teacher.named_modules():  # outer modules come before inner ones
        inner = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == count and not inner:
            found.append(name)
    if len(found) != 1:
        what = f"{len(found)} lists of that length: {', '.join(found)}" if found else "none"
        raise ValueError(
            f"teacher: expected one list of {count} layers in {type(teacher).__name__}, "
            f"as its config says; found {what}"
        )
    return found[0]


def _check_layers(layers: object, count: int) -> list[int]:
    if not isinstance(layers, Sequence) or any(
        isinstance(i, bool) or not isinstance(i, int) for i in layers
    ):
        raise TypeError(f"layers: expected a list of layer numbers, got {layers!r}")
    if not layers:
        raise ValueError("layers: expected at least one layer, got none")
    for i in layers:
        if not 0 <= i < count:
            raise ValueError(f"layers: expected numbers from 0 to {count - 1}, got {i}")
    if len(set(layers)) != len(layers):
        raise ValueError(f"layers: expected each layer once, got {list(layers)}")
    return list(layers)


# DistilBERT's names for what BERT calls otherwise. Longer names before those they start with.
_DISTILBERT_NAMES = (
    ("bert.", "distilbert."),
    ("encoder.layer.", "transformer.layer."),
    ("attention.self.query.", "attention.q_lin."),
    ("attention.self.key.", "attention.k_lin."),
    ("attention.self.value.", "attention.v_lin."),
    ("attention.output.dense.", "attention.out_lin."),
    ("attention.output.LayerNorm.", "sa_layer_norm."),
    ("intermediate.dense.", "ffn.lin1."),
    ("output.dense.", "ffn.lin2."),
    ("output.LayerNorm.", "output_layer_norm."),
    ("cls.predictions.transform.dense.", "vocab_transform."),
    ("cls.predictions.transform.LayerNorm.", "vocab_layer_norm."),
    ("cls.predictions.decoder.", "vocab_projector."),
)
_DISTILBERT_DROPS = ("token_type", "pooler.", "cls.seq_relationship.", "cls.predictions.bias")


def _distilbert(teacher: nn.Module) -> PreTrainedModel:
    """See `student_from_teacher`."""
    import transformers

    kinds = {
        transformers.BertModel: transformers.DistilBertModel,
        transformers.BertForMaskedLM: transformers.DistilBertForMaskedLM,
        transformers.BertForPreTraining: transformers.DistilBertForMaskedLM,
    }
    kind = kinds.get(type(teacher))
    if kind is None:
        names = ", ".join(known.__name__ for known in kinds)
        raise ValueError(
            f"teacher: expected one of {names} for layers={DISTILBERT!r}, "
            f"got {type(teacher).__name__}"
        )
    old: Any = teacher.config
    needed = {
        "num_hidden_layers": 12,
        "layer_norm_eps": 1e-12,
        "is_decoder": False,
    }
    for name, value in needed.items():
        if getattr(old, name) != value:
            raise ValueError(
                f"teacher: expected config.{name}={value}, which DistilBERT's choice of layers "
                f"takes for granted, got {getattr(old, name)}"
            )
    if getattr(old, "position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            "teacher: expected absolute positions, got "
            f"position_embedding_type={old.position_embedding_type!r}"
        )
    config = transformers.DistilBertConfig(
        vocab_size=old.vocab_size,
        max_position_embeddings=old.max_position_embeddings,
        n_layers=len(DISTILBERT_LAYERS),
        n_heads=old.num_attention_heads,
        dim=old.hidden_size,
        hidden_dim=old.intermediate_size,
        dropout=old.hidden_dropout_prob,
        attention_dropout=old.attention_probs_dropout_prob,
        activation=old.hidden_act,
        initializer_range=old.initializer_range,
        pad_token_id=old.pad_token_id,
        tie_word_embeddings=old.tie_word_embeddings,
    )
    config._attn_implementation = old._attn_implementation
    numbers = {str(old): str(new) for new, old in enumerate(DISTILBERT_LAYERS)}

    def new_name(name: str) -> str | None:
        if any(part in name for part in _DISTILBERT_DROPS):
            return None
        before, layer, after = name.partition("encoder.layer.")
        if layer:
            number, _, rest = after.partition(".")
            if number not in numbers:
                return None
            name = f"{before}{layer}{numbers[number]}.{rest}"
        for theirs, ours in _DISTILBERT_NAMES:
            at_start = name.startswith(theirs)
            if at_start or f".{theirs}" in name:
                name = name.replace(theirs, ours, 1)
        return name

    return _filled(kind, config, teacher, new_name)

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
        ValueError: a layer that the teacher does not have, one named twice; a teacher whose
            layers cannot be told apart (an encoder and a decoder, several stacks, one layer in two
            places), that is quantised, without values or on several devices, or that has been
            changed since its config built it (adapters, parametrizations).
    """
    _check_teacher(teacher)
    if isinstance(layers, str):
        if layers != DISTILBERT:
            raise ValueError(f"layers: expected layer numbers or {DISTILBERT!r}, got {layers!r}")
        return _distilbert(teacher)
    config: Any = copy.deepcopy(teacher.config)
    stack = layer_stack(teacher, config.num_hidden_layers)
    chosen = _check_layers(layers, config.num_hidden_layers)
    _check_apart(teacher, stack)
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
        try:
            student: Any = kind(config)
        except TypeError as error:
            raise ValueError(
                f"teacher: expected a class that its config alone builds; {kind.__name__}: {error}"
            ) from error
    with torch.no_grad():
        tensors = _renamed(teacher.state_dict(), new_name)
        _check_unchanged(student, tensors)
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
    _check_values(teacher)


def _check_values(teacher: Any) -> None:
    """Refuse weights that a student could not be trained from."""
    quantised = getattr(teacher.config, "quantization_config", None) is not None
    if quantised or getattr(teacher, "is_quantized", False):
        raise ValueError("teacher: expected a model that is not quantised; load it without")
    for name, x in teacher.state_dict().items():
        # torch's quantised layers keep packed weights there, which are no tensors
        if not isinstance(x, Tensor) or x.is_quantized:
            raise ValueError(f"teacher: expected a model that is not quantised; {name} is")
    places = {}
    for name, x in teacher.named_parameters():
        if not x.is_floating_point():
            raise ValueError(f"teacher: expected floating-point parameters; {name} is {x.dtype}")
        places[x.device] = name
    if torch.device("meta") in places:
        name = places[torch.device("meta")]
        raise ValueError(f"teacher: expected parameters with values; {name} is on the device meta")
    if len(places) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise ValueError(f"teacher: expected all parameters on one device; got {found}")


def _check_apart(teacher: nn.Module, stack: str) -> None:
    """Refuse layers that share parameters: the student's would be copies that go their own ways."""
    owners: dict[int, int] = {}
    layers: Any = teacher.get_submodule(stack)
    for name, layer in enumerate(layers):
        for x in layer.parameters():
            other = owners.setdefault(id(x), name)
            if other != name:
                raise ValueError(
                    f"teacher: expected layers with parameters of their own; {stack}.{other} and "
                    f"{stack}.{name} share some"
                )


def _check_unchanged(student: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Refuse tensors that the config does not build."""
    built = student.state_dict()
    problems = [f"it has {name} besides" for name in tensors if name not in built]
    problems += [f"it lacks {name}" for name in built if name not in tensors]
    problems += [
        f"its {name} is {list(x.shape)}, not {list(built[name].shape)}"
        for name, x in tensors.items()
        if name in built and x.shape != built[name].shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            "teacher: expected the tensors that its config says, and no others (merge adapters and "
            f"parametrizations first); {'; '.join(problems[:3])}{more}"
        )


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
    if (
        not isinstance(layers, Sequence)
        or isinstance(layers, bytes | bytearray)
        or any(isinstance(i, bool) or not isinstance(i, int) for i in layers)
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

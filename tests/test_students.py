"""Students cut out of their teachers: which tensors they get, and what they compute."""

import pytest
import torch

from fastdistill.distill import student_from_teacher

transformers = pytest.importorskip("transformers")

WIDTH, VOCABULARY = 16, 40


def bert_config(layers=12, **settings):
    return transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32, **settings,
    )  # fmt: skip


def gpt2_config(layers=5):
    return transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=layers, n_head=2, n_positions=32
    )


def llama_config(layers=5, kind=transformers.LlamaConfig, **settings):
    return kind(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24, max_position_embeddings=32, **settings,
    )  # fmt: skip


def build(kind, config):
    """A model with weights in evaluation mode, each tensor unlike every other one."""
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


TOKENS = torch.randint(1, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(5))

FAMILIES = {
    "bert": (lambda: build(transformers.BertModel, bert_config(5)), "encoder.layer"),
    "bert mlm": (lambda: build(transformers.BertForMaskedLM, bert_config(5)), "bert.encoder.layer"),
    "bert classifier": (
        lambda: build(transformers.BertForSequenceClassification, bert_config(5)),
        "bert.encoder.layer",
    ),
    "gpt2": (lambda: build(transformers.GPT2LMHeadModel, gpt2_config()), "transformer.h"),
    "llama": (lambda: build(transformers.LlamaForCausalLM, llama_config()), "model.layers"),
    "llama, tied": (
        lambda: build(transformers.LlamaForCausalLM, llama_config(tie_word_embeddings=True)),
        "model.layers",
    ),
    "mistral": (
        lambda: build(transformers.MistralModel, llama_config(kind=transformers.MistralConfig)),
        "layers",
    ),
}


def output(model, tokens=TOKENS, **inputs):
    with torch.no_grad():
        found = model(input_ids=tokens, **inputs)
    return found.logits if "logits" in found else found.last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_give_the_teacher_again(family):
    teacher = FAMILIES[family][0]()
    student = student_from_teacher(teacher, list(range(5)))
    assert type(student) is type(teacher) and student is not teacher
    torch.testing.assert_close(output(student), output(teacher), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_layers_and_a_copy_of_the_rest(family):
    make, stack = FAMILIES[family]
    teacher = make()
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    student = student_from_teacher(teacher, [3, 1])
    assert student.config.num_hidden_layers == 2 and teacher.config.num_hidden_layers == 5
    theirs = teacher.state_dict()
    for name, x in student.state_dict().items():
        old = name.replace(f"{stack}.0.", f"{stack}.3.").replace(f"{stack}.1.", f"{stack}.@.")
        old = old.replace(f"{stack}.@.", f"{stack}.1.")
        assert torch.equal(x, theirs[old]), name
        assert x.data_ptr() != theirs[old].data_ptr() or x.numel() == 0
    layers, old_layers = student.get_submodule(stack), teacher.get_submodule(stack)
    assert len(layers) == 2

    wanted = output(student)
    parent = teacher.get_submodule(stack.rpartition(".")[0])
    setattr(parent, stack.rpartition(".")[2], torch.nn.ModuleList([old_layers[3], old_layers[1]]))
    teacher.config.num_hidden_layers, teacher.config.use_cache = 2, False
    torch.testing.assert_close(wanted, output(teacher), rtol=0, atol=0)
    setattr(parent, stack.rpartition(".")[2], old_layers)
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())


def test_student_learns_without_touching_the_teacher():
    teacher = FAMILIES["bert"][0]().requires_grad_(False)
    student = student_from_teacher(teacher, [0, 2])
    assert all(p.requires_grad for p in student.parameters())
    before = output(teacher)
    student(input_ids=TOKENS).last_hidden_state.square().sum().backward()
    torch.optim.SGD(student.parameters(), 0.1).step()
    torch.testing.assert_close(output(teacher), before, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama, tied"])
def test_tied_weights_stay_tied(family):
    student = student_from_teacher(FAMILIES[family][0](), [0, 4])
    assert student.get_input_embeddings().weight is student.get_output_embeddings().weight


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_caches_know_the_new_numbers(family):
    """Step by step with a cache of keys and values: the same as in one go."""
    student = student_from_teacher(FAMILIES[family][0](), [1, 4])
    with torch.no_grad():
        first = student(input_ids=TOKENS[:, :5], use_cache=True)
        rest = student(input_ids=TOKENS[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, output(student)[:, 5:], rtol=1e-4, atol=1e-5)


def test_dtype_mode_and_generation_settings_are_kept():
    teacher = FAMILIES["llama"][0]().bfloat16().train()
    teacher.generation_config.max_new_tokens = 17
    student = student_from_teacher(teacher, [0, 1])
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16} and student.training
    assert student.generation_config.max_new_tokens == 17
    wanted, found = dict(teacher.named_buffers()), dict(student.named_buffers())
    assert found and all(torch.equal(found[k], wanted[k]) for k in found)
    assert all(found[k].dtype == wanted[k].dtype for k in found)


def test_kinds_of_layers_follow_their_layers():
    kinds = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    config = llama_config(kind=transformers.Qwen2Config, layer_types=kinds, sliding_window=3)
    config.use_sliding_window = True
    teacher = build(transformers.Qwen2Model, config)
    student = student_from_teacher(teacher, [0, 2, 3])
    assert student.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert teacher.config.layer_types == kinds


def test_random_state_is_left_alone():
    teacher = FAMILIES["bert"][0]()
    state = torch.get_rng_state()
    student_from_teacher(teacher, [0])
    assert torch.equal(state, torch.get_rng_state())


# ---- DistilBERT's choice ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
def test_distilbert(kind):
    """What DistilBERT's class computes is BERT with the six layers and no token-type embedding."""
    teacher = build(getattr(transformers, kind), bert_config(12))
    bert = teacher if kind == "BertModel" else teacher.bert
    student = student_from_teacher(teacher, "distilbert")
    masked = kind != "BertModel"
    assert type(student).__name__ == ("DistilBertForMaskedLM" if masked else "DistilBertModel")
    assert student.config.num_hidden_layers == 6
    assert not [name for name, _ in student.named_parameters()
                if "token_type" in name or "pooler" in name]  # fmt: skip
    with torch.no_grad():
        bert.embeddings.token_type_embeddings.weight.zero_()
    layers = bert.encoder.layer
    bert.encoder.layer = torch.nn.ModuleList(layers[i] for i in (0, 2, 4, 7, 9, 11))
    bert.config.num_hidden_layers = 6
    mask = torch.ones_like(TOKENS)
    mask[0, 4:] = 0
    with torch.no_grad():
        wanted = teacher(input_ids=TOKENS, attention_mask=mask)
    wanted = wanted.prediction_logits if kind == "BertForPreTraining" else (
        wanted.logits if masked else wanted.last_hidden_state)  # fmt: skip
    found = output(student, attention_mask=mask)
    kept = mask.bool()
    torch.testing.assert_close(found[kept], wanted[kept], rtol=1e-5, atol=1e-5)
    if masked:
        tied = student.get_output_embeddings().weight
        assert tied is student.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: build(transformers.BertModel, bert_config(6)), "num_hidden_layers=12"),
        (lambda: build(transformers.GPT2Model, gpt2_config(12)), "one of BertModel, "),
        (lambda: build(transformers.BertModel, bert_config(12, layer_norm_eps=1e-5)), "1e-12"),
    ],
)
def test_distilbert_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        student_from_teacher(make(), "distilbert")


# ---- Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "error", "words"),
    [
        ([0, 5], ValueError, "numbers from 0 to 4, got 5"),
        ([-1], ValueError, "numbers from 0 to 4, got -1"),
        ([], ValueError, "at least one layer"),
        ([1, 1], ValueError, "each layer once"),
        ([True], TypeError, "a list of layer numbers"),
        ([0.0], TypeError, "a list of layer numbers"),
        (3, TypeError, "a list of layer numbers, got 3"),
        (b"\0\1", TypeError, "a list of layer numbers, got b"),
        ("tinybert", ValueError, "'distilbert', got 'tinybert'"),
    ],
)
def test_layers_are_checked(layers, error, words):
    teacher = FAMILIES["bert"][0]()
    with pytest.raises(error, match=f"layers: expected .*{words}"):
        student_from_teacher(teacher, layers)


def test_teachers_are_checked():
    with pytest.raises(TypeError, match="teacher: expected a model of transformers, got Linear"):
        student_from_teacher(torch.nn.Linear(2, 2), [0])
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=16, num_layers=2, num_heads=2
    )
    with pytest.raises(ValueError, match="an encoder and a decoder"):
        student_from_teacher(transformers.T5Model(config), [0])
    teacher = FAMILIES["bert"][0]()
    teacher.extra = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(5))
    with pytest.raises(ValueError, match="2 lists of that length: encoder.layer, extra"):
        student_from_teacher(teacher, [0])


def quantised(teacher):
    return torch.ao.quantization.quantize_dynamic(teacher, {torch.nn.Linear}, dtype=torch.qint8)


def with_integers(teacher):
    weight = torch.zeros(WIDTH, WIDTH, dtype=torch.int8)
    query = teacher.encoder.layer[1].attention.self.query
    query.weight = torch.nn.Parameter(weight, requires_grad=False)
    return teacher


def with_a_norm(teacher):
    parametrize = torch.nn.utils.parametrizations.weight_norm
    parametrize(teacher.encoder.layer[1].attention.self.query)
    return teacher


def changed(**parts):
    """What gives a teacher other attributes; `a__b` is b of its part a."""

    def change(teacher):
        for name, value in parts.items():
            where, _, leaf = name.rpartition("__")
            setattr(getattr(teacher, where) if where else teacher, leaf, value)
        return teacher

    return change


def with_one_layer_twice(teacher):
    teacher.encoder.layer[3] = teacher.encoder.layer[1]
    return teacher


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (quantised, "not quantised; .*packed_params.* is"),
        (changed(is_quantized=True), "that is not quantised"),
        (changed(config__quantization_config={"quant_method": "gptq"}), "that is not quantised"),
        (with_integers, "floating-point parameters; encoder.layer.1.*query.weight is torch.int8"),
        (with_a_norm, "merge .* it has encoder.layer.1.*query.parametrizations.* besides"),
        (changed(extra=torch.nn.Linear(2, 2)), "it has extra.weight besides; it has extra.bias"),
        (
            changed(embeddings__word_embeddings=torch.nn.Embedding(70, WIDTH)),
            r"its embeddings.word_embeddings.weight is \[70, \d+\], not \[",
        ),
        (lambda teacher: teacher.to("meta"), "parameters with values; .* is on the device meta"),
        (with_one_layer_twice, "encoder.layer.1 and encoder.layer.3 share some"),
    ],
)
def test_teachers_that_no_student_could_be_cut_from(change, words):
    teacher = change(FAMILIES["bert"][0]())
    with pytest.raises(ValueError, match=f"teacher: expected.*{words}"):
        student_from_teacher(teacher, [0, 1])


def test_a_class_that_wants_more_than_its_config_is_refused():
    class Wanting(transformers.BertModel):
        def __init__(self, config, more):
            super().__init__(config)

    with pytest.raises(ValueError, match="a class that its config alone builds; Wanting: .*more"):
        student_from_teacher(Wanting(bert_config(2), 1), [0])


def test_missing_transformers_is_said(monkeypatch):
    import sys

    teacher = FAMILIES["bert"][0]()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'fastdistill\[text\]'"):
        student_from_teacher(teacher, [0])

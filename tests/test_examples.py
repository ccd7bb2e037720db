"""The examples learn, the causal one accumulates gradients exactly, and the README runs."""

import ast
import importlib.util
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import fastdistill
from fastdistill.kd import native, native_cuda, reference

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(autouse=True)
def one_thread():
    """The networks here are tiny: threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- The examples -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("plain_loop", 0.2), ("causal_lm", 0.9), ("layer_by_layer", 0.2), ("private_training", 0.2),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Optimal order is")
def test_example_learns(name, share, capsys):
    before, after = load(name).main()
    assert after < share * before
    assert f"{before:.3f} -> {after:.3f}" in capsys.readouterr().out


def test_example_runs_as_a_script():
    code = "import sys; sys.argv = ['plain_loop.py']; import plain_loop; plain_loop.main(2)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout


def gradients(module, accumulate):
    module.zero_grad()
    accumulate()
    return torch.cat([p.grad.flatten() for p in module.parameters()])


def test_accumulated_gradients_equal_those_of_one_batch(backend):
    lm = load("causal_lm")
    torch.manual_seed(0)
    student, teacher = lm.LanguageModel(8).double(), lm.LanguageModel(16).double()
    tokens, labels = lm.sentences(12, torch.Generator().manual_seed(3))
    counts = [float((part[:, 1:] != -100).sum()) for part in labels.chunk(4)]
    assert max(counts) > 1.2 * min(counts)  # else the means below would do as well

    def backward(parts):
        return gradients(student, lambda: lm.backward(student, teacher, tokens, labels, parts))

    whole = backward(1)
    torch.testing.assert_close(backward(4), whole, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(backward(3), whole, rtol=1e-10, atol=1e-14)

    def means():  # what a mean in each micro-batch makes of it
        for part in zip(tokens.chunk(4), labels.chunk(4), strict=True):
            count = lm.predicted_tokens(part[1])
            (lm.distillation_loss(student, teacher, *part, count) / 4).backward()

    wrong = gradients(student, means)
    assert float((wrong - whole).norm()) > 1e-2 * float(whole.norm())


def test_normalizer_counts_the_predicted_tokens():
    """One batch with it is the plain mean over the tokens that are there."""
    lm = load("causal_lm")
    student, teacher = lm.LanguageModel(8), lm.LanguageModel(8)
    tokens, labels = lm.sentences(6, torch.Generator().manual_seed(3))
    got = lm.distillation_loss(student, teacher, tokens, labels, lm.predicted_tokens(labels))
    want = fastdistill.kd_loss(
        student(tokens)[:, :-1], teacher(tokens)[:, :-1], labels[:, 1:],
        temperature=2.0, hard_weight=0.5, soft_weight=0.5,
    )  # fmt: skip
    torch.testing.assert_close(got, want)


COPIES = {"aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy"}


def operations(f):
    """Names of all the operators that run in f, those inside ours too, with their input shapes."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as p:
        f()
    return [(e.name, e.input_shapes) for e in p.events()]


def copies_of(events, size):
    return [
        name
        for name, shapes in events
        if name in COPIES and any(len(s) and torch.Size(s).numel() >= size for s in shapes)
    ]


def test_shifted_logits_are_not_copied(cpu):
    s, t = torch.randn(3, 9, 50, requires_grad=True), torch.randn(3, 9, 50)
    labels = torch.randint(50, (3, 9))
    settings = {"hard_weight": 0.5, "temperature": 2.0}
    rows = 3 * 8 * 50
    losses = []

    def sliced():
        losses.append(fastdistill.kd_loss(s[:, :-1], t[:, :-1], labels[:, 1:], **settings))

    def whole():
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
        losses.append(fastdistill.kd_loss(s, t, shifted, **settings))

    assert not copies_of(operations(sliced), rows)
    assert not copies_of(operations(whole), rows)
    assert copies_of(operations(lambda: s[:, :-1].contiguous()), rows)  # it would be seen
    # The README: the gradient of a slice is a copy, that of shifted labels is not.
    by_slices, by_labels = (
        copies_of(operations(lambda loss=loss: torch.autograd.grad(loss, s)), rows)
        for loss in losses
    )
    assert by_slices and not by_labels
    torch.testing.assert_close(losses[0], losses[1])


def large_allocations(f, size):
    """How many bytes torch allocates in pieces of at least `size` bytes while f runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    made = [e.self_cpu_memory_usage for e in p.events() if e.self_cpu_memory_usage >= size]
    return sum(made)


def test_the_gradient_is_the_only_tensor_of_the_logits_size(cpu):
    s, t = torch.randn(64, 1000, requires_grad=True), torch.randn(64, 1000)
    labels = torch.randint(1000, (64,))
    settings = {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7}
    size = s.numel() * s.element_size()

    def step(loss):
        return lambda: torch.autograd.grad(loss(), s)

    ours = step(lambda: fastdistill.kd_loss(s, t, labels, **settings))
    assert size <= large_allocations(ours, size // 2) < 1.1 * size
    with torch.no_grad():
        assert not large_allocations(
            lambda: fastdistill.kd_loss(s, t, labels, **settings), size // 2
        )
    plain = step(lambda: F.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="sum"))
    assert large_allocations(plain, size // 2) > 3 * size  # they would be seen


# ---- The README ---------------------------------------------------------------------------------


def blocks(language):
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", README, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(code) for _, code in found]


def test_readme_python_runs():
    assert len(blocks("python")) >= 4
    names = {}
    for code in blocks("python"):
        if 'fastdistill.backend("cpu")' in code and fastdistill._native.cpu().module is None:
            continue
        exec(compile(code, "README.md", "exec"), names)
    assert names["teacher"].weight.grad is None
    assert names["student"].weight.grad is not None


def test_readme_two_line_change_changes_no_value():
    diff, _ = blocks("diff")  # the other is of private training
    old = "\n".join(line[1:] for line in diff.splitlines() if line.startswith("-"))
    new = "\n".join(line[1:] for line in diff.splitlines() if line.startswith("+"))
    names = {
        "F": F, "T": 2.5, "s": torch.randn(6, 10).double(), "t": torch.randn(6, 10).double(),
        "y": torch.randint(10, (6,)),
    }  # fmt: skip
    before, after = dict(names), dict(names)
    exec(old, before)
    exec(new, after)
    torch.testing.assert_close(after["loss"], before["loss"], rtol=1e-12, atol=0)
    assert len(new.splitlines()) == 2


def test_readme_names_files_that_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 10
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing


def assigned(path, name):
    """The literal that a module assigns to a name, without importing it."""
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path} assigns no {name}")


def test_readme_a_divergence_has_one_number_in_five_places():
    want = assigned("fastdistill/kd/triton.py", "_DIVERGENCES")
    assert set(want) == set(reference.DIVERGENCES)
    assert native._DIVERGENCES == want
    assert native_cuda._DIVERGENCES == want
    for header in ("csrc/cpu/kd.h", "csrc/cuda/kd.h"):
        (body,) = re.findall(r"enum class Divergence[^{]*\{([^}]*)\}", (ROOT / header).read_text())
        numbers = {k: int(v) for k, v in re.findall(r"(\w+) = (\d+)", body)}
        assert numbers == {"none": 0, **want}


def test_readme_names_what_the_code_has():
    """The places that "Add a divergence" sends one to."""
    section = README.partition("## Add a divergence")[2].partition("\n## ")[0]
    places = {
        "fastdistill/kd/triton.py": ["FORWARD_KL", "_soft_term", "_soft_slope", "DIVERGENCE"],
        "csrc/cpu/kd.inl": ["gradient", "Pass", "rows", "DIV"],
        "csrc/cuda/kd.cuh": ["kd_forward"],
        "csrc/cuda/kd.cu": ["forward_of"],
        "tests/test_kd_values.py": ["DIVERGENCES"],
    }
    for path, names in places.items():
        text = (ROOT / path).read_text()
        for name in names:
            assert re.search(rf"\b{name}\b", section), name
            assert re.search(rf"\b{name}\b", text), f"{name} in {path}"

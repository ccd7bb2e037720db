"""Per-sample gradients of weights, as the engine has them made."""

import itertools

import pytest
import torch
from torch.nn import grad as torch_grad

import fastdistill as fd
from fastdistill.privacy import products
from fastdistill.privacy.products import Patches

F32, F64 = torch.float32, torch.float64

# Samples, rows, inputs, outputs: ends of every length of vectors, of tiles and of blocks of rows.
LINEAR = [
    (3, 33, 17, 5), (2, 128, 64, 12), (2, 40, 63, 6), (1, 37, 80, 7), (2, 257, 65, 8),
    (1, 700, 31, 13), (4, 1, 1, 1), (2, 2, 130, 3), (0, 4, 3, 2), (2, 0, 3, 4), (2, 5, 0, 4),
    (2, 5, 3, 0),
]  # fmt: skip


def assert_products(made, square, want, reach, terms):
    """Each product errs by at most a rounding a term; the norms are of what has been stored."""
    allowed = (terms + 2) * torch.finfo(made.dtype).eps * reach
    assert made.isfinite().all() and ((made - want).abs() <= allowed).all()
    assert square.dtype is F64
    torch.testing.assert_close(square, made.double().flatten(1).square().sum(1), rtol=1e-13, atol=0)


def linear(a, g):
    made = torch.full((len(a), g.shape[2], a.shape[2]), torch.nan, dtype=a.dtype)
    return made, products.linear(a, g, made)


def check_linear(a, g):
    want, reach = (f(g).double().mT @ f(a).double() for f in (torch.clone, torch.abs))
    assert_products(*linear(a, g), want, reach, a.shape[1])


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("shape", LINEAR, ids=str)
def test_products_linear(host_backend, shape, dtype):
    samples, rows, inputs, outputs = shape
    check_linear(
        torch.randn(samples, rows, inputs, dtype=dtype),
        torch.randn(samples, rows, outputs, dtype=dtype),
    )


def test_products_linear_of_views(host_backend):
    """The batch in the second dimension, some columns, an expanded sample, a transposed one."""
    a, g = torch.randn(40, 3, 9), torch.randn(40, 3, 11)
    check_linear(a.transpose(0, 1), g.transpose(0, 1))
    check_linear(a[..., 1:7].transpose(0, 1), g[..., 3:4].transpose(0, 1))
    check_linear(a[:, 0].expand(4, 40, 9), g[:, 0].expand(4, 40, 11))
    check_linear(a.permute(2, 0, 1), torch.randn(9, 40, 5))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    "shape", [(256, 65, 131), (5, 3, 1), (1, 40, 24), (0, 3, 50), (300, 1, 47)]
)
def test_products_outer_sum(host_backend, shape, dtype):
    """Whatever the number of threads, and however the outputs are shared among them."""
    samples, inputs, outputs = shape
    a, g = torch.randn(samples, inputs, dtype=dtype), torch.randn(samples, outputs, dtype=dtype)
    factor = torch.rand(samples).double()
    want, reach = (
        (f(g).double() * factor[:, None]).t() @ f(a).double() for f in (torch.clone, torch.abs)
    )
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3) if host_backend == "cpu" else (1,):
            torch.set_num_threads(count)
            found.append(products.outer_sum(a, g, factor))
    finally:
        torch.set_num_threads(threads)
    for got in found:
        assert torch.equal(got, found[0]) and got.dtype is dtype and got.shape == want.shape
    allowed = (samples + 3) * torch.finfo(dtype).eps * reach
    assert ((found[0] - want).abs() <= allowed).all()


# Channels, outputs, groups, image, kernel, stride, dilation, padding.
CONVOLUTIONS = [
    (1, 32, 1, (9, 8), (3, 3), (1, 1), (1, 1), (1, 1)),
    (5, 64, 1, (7, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 70, 1, (6, 11), (2, 3), (2, 1), (1, 2), (0, 2)),
    (6, 9, 3, (8, 5), (3, 2), (1, 2), (2, 1), (2, 0)),
    (4, 4, 4, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1)),
    (2, 40, 2, (5, 5), (1, 1), (2, 2), (1, 1), (0, 0)),
    (2, 17, 1, (20, 30), (4, 4), (1, 1), (1, 1), (0, 0)),
    (7, 3, 1, (12,), (5,), (2,), (2,), (3,)),
    (2, 33, 1, (600,), (3,), (1,), (1,), (1,)),
]  # fmt: skip


def images(case, samples=3, dtype=F32):
    channels, outputs, groups, image, kernel, stride, dilation, padding = case
    patches = Patches.of(kernel, stride, dilation, padding, groups)
    shape = torch.Size((outputs, channels // groups, *kernel))
    x = torch.randn(samples, channels, *image, dtype=dtype)
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, d, p in zip(image, kernel, stride, dilation, padding, strict=True)
    ]
    return x, torch.randn(samples, outputs, *sizes, dtype=dtype), patches, shape


def convolution(x, g, patches, shape):
    made = torch.full((len(x), shape.numel()), torch.nan, dtype=x.dtype)
    kernel = products.by_kernel(x)
    square = products.convolution(x, g, patches, made, kernel)
    return products.weights(made, shape, patches.groups, kernel), square


def weights_of_sum(x, g, patches, shape):
    """As the engine has it: the order of the elements is put right after the sum."""
    kernel, made = products.by_kernel(x), x.new_empty(len(x), shape.numel())
    products.convolution(x, g, patches, made, kernel)
    return products.weights(made.sum(0), shape, patches.groups, kernel)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_products_convolution(host_backend, case, dtype):
    x, g, patches, shape = images(case, dtype=dtype)
    weight = torch_grad.conv1d_weight if x.ndim == 3 else torch_grad.conv2d_weight
    _, _, groups, _, _, stride, dilation, padding = case

    def truth(x, g):
        each = [
            weight(x[i : i + 1], shape, g[i : i + 1], stride, padding, dilation, groups)
            for i in range(len(x))
        ]
        return torch.stack(each)

    x64, g64 = x.double(), g.double()
    want, reach = truth(x64, g64), truth(x64.abs(), g64.abs())
    made, square = convolution(x, g, patches, shape)
    assert_products(made, square, want, reach, g.shape[2:].numel())
    assert torch.equal(weights_of_sum(x, g, patches, shape), made.sum(0))
    # Channels last: another view of the same numbers.
    if x.ndim == 4:
        last = [t.to(memory_format=torch.channels_last) for t in (x, g)]
        assert_products(*convolution(*last, patches, shape), want, reach, g.shape[2:].numel())


def test_products_convolution_of_nothing(host_backend):
    for channels, outputs, samples in ((2, 3, 0), (0, 3, 2), (2, 0, 2)):
        x, g = torch.randn(samples, channels, 5, 5), torch.randn(samples, outputs, 3, 3)
        shape = torch.Size((outputs, channels, 3, 3))
        made, square = convolution(x, g, Patches.of((3, 3), (1, 1), (1, 1), (0, 0), 1), shape)
        assert made.shape == (samples, *shape) and not square.any()


def test_products_convolution_of_other_outputs_cpu(cpu):
    """The kernel would follow the gradient out of the image."""
    x, g, patches, shape = images(CONVOLUTIONS[1])
    for less, fewer, size in ((1, 0, shape.numel()), (0, 1, shape.numel()), (0, 0, 7)):
        made = torch.empty(len(x), size)
        with pytest.raises(ValueError, match="g, made: expected a gradient of shape"):
            products.convolution(x[..., less:], g[..., fewer:], patches, made, True)


def calls(dtype=F32):
    """Two that are large enough for several threads: inputs, and what makes products of them."""
    a, g = torch.randn(9, 130, 70, dtype=dtype), torch.randn(9, 130, 50, dtype=dtype)
    x, y, patches, shape = images((5, 64, 1, (12, 12), (3, 3), (1, 1), (1, 1), (1, 1)), 9, dtype)
    return [((a, g), linear), ((x, y), lambda x, y: convolution(x, y, patches, shape))]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("which", [0, 1])
def test_products_have_the_same_bits_on_any_number_of_threads_cpu(cpu, which, dtype):
    inputs, make = calls(dtype)[which]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(make(*inputs))
    finally:
        torch.set_num_threads(before)
    for made, square in found[1:]:
        assert torch.equal(made, found[0][0]) and torch.equal(square, found[0][1])


@pytest.mark.parametrize("which", [0, 1])
def test_products_are_those_of_a_sample_alone_cpu(cpu, which):
    """Whatever the batch, the other samples, and where it lies in memory."""
    inputs, make = calls()[which]
    made, square = make(*inputs)
    for part in (slice(0, 1), slice(4, 5), slice(3, 9)):
        apart = [torch.cat([t.new_ones(3), t[part].flatten()])[3:].view_as(t[part]) for t in inputs]
        assert torch.equal(make(*apart)[0], made[part])
        assert torch.equal(make(*apart)[1], square[part])
    mixed = [torch.stack([t[8], 1e6 * t[1], t[2], t[2]]) for t in inputs]
    again, squares = make(*mixed)
    for i, j in ((0, 8), (2, 2), (3, 2)):
        assert torch.equal(again[i], made[j]) and squares[i] == square[j]


@pytest.mark.parametrize("which", [0, 1])
def test_products_that_are_not_finite_stay_with_their_sample(host_backend, which):
    inputs, make = calls()[which]
    made, square = make(*inputs)
    for bad, k in itertools.product((torch.nan, torch.inf, -torch.inf), (0, 1)):
        spoilt = [t.clone() for t in inputs]
        spoilt[k][4].flatten()[77] = bad
        again, squares = make(*spoilt)
        others = torch.arange(9) != 4
        assert not squares[4].isfinite() and torch.equal(squares[others], square[others])
        assert torch.equal(again[others], made[others])


def test_products_norms_beyond_float32(host_backend):
    """Squares are taken in float64: neither infinite nor zero."""
    for size in (1e15, 1e-15):
        a, g = torch.full((1, 33, 5), size), torch.full((1, 33, 4), size)
        made, square = linear(a, g)
        torch.testing.assert_close(square, made.double().square().sum((1, 2)), rtol=1e-13, atol=0)
        assert square.isfinite() and square > 0


def test_products_of_a_backend_that_cannot(cpu):
    with fd.backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' cannot run"):
        linear(torch.randn(2, 40, 3), torch.randn(2, 40, 4))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("samples, shape", [
    (9, (5, 7)), (16, (2051,)), (3, (1,)), (1, (64,)), (0, (4, 3)), (4, (0, 2)), (21, (3, 4100)),
])  # fmt: skip
def test_products_weighted_sum(host_backend, samples, shape, dtype):
    x = torch.randn(samples, *shape, dtype=dtype)
    factor = torch.rand(samples).double()
    got = products.weighted_sum(factor, x)
    terms = x.double() * factor.view(-1, *(1,) * len(shape))
    allowed = (samples + 2) * torch.finfo(dtype).eps * terms.abs().sum(0)
    assert got.dtype is dtype and got.shape == shape
    assert ((got - terms.sum(0)).abs() <= allowed).all()
    if len(shape) > 1:  # not dense
        assert torch.equal(products.weighted_sum(factor, x.mT.contiguous().mT), got)


def test_products_weighted_sum_on_any_number_of_threads_cpu(cpu):
    x, factor = torch.randn(9, 30_001), torch.rand(9).double()
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(products.weighted_sum(factor, x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("samples, rows, cols, groups", [
    (3, 6, 9, 0), (2, 1, 130, 0), (3, 40, 5, 0), (3, 6, 9, 2), (2, 12, 49, 12), (4, 8, 200, 1),
    (0, 4, 3, 0), (0, 4, 3, 2), (20, 64, 33, 4), (20, 64, 33, 0),
])  # fmt: skip
def test_products_norm_sums(host_backend, samples, rows, cols, groups, dtype):
    """Of inputs far from zero, in float64 from the mean that is given."""
    x, g = (torch.randn(samples, rows, cols, dtype=dtype) for _ in range(2))
    x = x + 30
    blocks = x.reshape(samples, groups or rows, rows * cols // (groups or rows))
    mean, rstd = blocks.mean(2), blocks.var(2).rsqrt() if samples else blocks.mean(2)
    got = products.norm_sums(x, g, mean, rstd, groups)
    apart = blocks.double() - mean.double()[..., None]
    normal = (apart * rstd.double()[..., None]).view(x.shape) * g.double()
    for value, terms in zip(got, (normal, g.double()), strict=True):
        over = 2 if groups else 1
        allowed = (terms.shape[over] + 4) * torch.finfo(dtype).eps * terms.abs().sum(over)
        assert value.dtype is dtype and ((value - terms.sum(over)).abs() <= allowed).all()
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, g)]
    again = products.norm_sums(*strided, mean, rstd, groups)
    if products.by_kernel(x):
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("groups", [0, 4])
def test_products_norm_sums_are_those_of_a_sample_alone_cpu(cpu, groups):
    """On any number of threads."""
    x, g = torch.randn(9, 64, 49), torch.randn(9, 64, 49)
    mean, rstd = torch.randn(9, groups or 64), torch.rand(9, groups or 64)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(products.norm_sums(x, g, mean, rstd, groups))
        alone = products.norm_sums(x[4:5], g[4:5], mean[4:5], rstd[4:5], groups)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert all(torch.equal(a[4], b[0]) for a, b in zip(found[0], alone, strict=True))


def test_products_of_shapes_that_do_not_belong_together_cpu(cpu):
    a, g = torch.randn(3, 40, 5), torch.randn(3, 40, 4)
    for b, h, made in ((a, g[:, :39], (3, 4, 5)), (a[:2], g, (2, 4, 5)), (a, g, (3, 4, 4))):
        with pytest.raises(ValueError, match="g, made: expected"):
            products.linear(b, h, torch.empty(made))
    mean = torch.randn(3, 40)
    for h, m, groups in ((a[:, 1:], mean, 0), (a, mean[:, 1:], 0), (a, mean, 4)):
        with pytest.raises(ValueError, match="g, mean, rstd: expected"):
            products.norm_sums(a, h, m, m, groups)

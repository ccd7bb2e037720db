"""The noise of clip_and_noise: vectors of the generators, bits, law, streams, audit."""

import os
import pickle
import threading

import privacy_checks as checks
import pytest
import torch
from privacy_checks import F64, call, chacha20, of_backend, philox

from fastdistill import _native
from fastdistill.privacy import mechanism, reference, source

# On GPUs: gpuless/triton_privacy_interpreted.py and gpuless/cuemu/probe_privacy.cu.
# Random123's kat_vectors, philox4x32 10: counter, key, result.
PHILOX = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]  # fmt: skip

# RFC 8439: key, counter and nonce, and the words of the block; 2.3.2 and A.1 (vectors 1, 2, 3, 5).
CHACHA20 = [
    (
        bytes(range(32)), (1, 0x09000000, 0x4A000000, 0),
        "e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3 "
        "466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2",
    ),
    (
        bytes(32), (0, 0, 0, 0),
        "ade0b876 903df1a0 e56a5d40 28bd8653 b819d2bd 1aed8da0 ccef36a8 c70d778b "
        "7c5941da 8d485751 3fe02477 374ad8b8 f4b8436a 1ca11815 69b687c3 8665eeb2",
    ),
    (
        bytes(32), (1, 0, 0, 0),
        "bee7079f 7a385155 7c97ba98 0d082d73 a0290fcb 6965e348 3e53c612 ed7aee32 "
        "7621b729 434ee69c b03371d5 d539d874 281fed31 45fb0a51 1f0ae1ac 6f4d794b",
    ),
    (
        bytes(31) + b"\1", (1, 0, 0, 0),
        "2452eb3a 9249f8ec 8d829d9b ddd4ceb1 e8252083 60818b01 f38422b8 5aaa49c9 "
        "bb00ca8e da3ba7b4 c4b592d1 fdf2732f 4436274e 2561b3c8 ebdd4aa6 a0136c00",
    ),
    (
        bytes(32), (0, 0, 0, 0x02000000),
        "374dc6c2 3736d58c b904e24a cd3f93ef 88228b1a 96a4dfb3 5b76ab72 c727ee54 "
        "0e0e978a f3145c95 1b748ea8 f786c297 99c28f5f 628314e8 398a19fa 6ded1b53",
    ),
]  # fmt: skip


def words_of(backend, kind, key, counter):
    if backend == "reference":
        generate = reference.philox if kind == source.PHILOX else reference.chacha20
        n = 2 if kind == source.PHILOX else 8
        return [int(w) for w in generate(key.tolist()[:n], [torch.tensor([w]) for w in counter])]
    return _native.cpu().module.random_words(kind, key.data_ptr(), counter[0], counter[1:])


@pytest.mark.parametrize("counter, key, want", PHILOX)
def test_privacy_philox_is_random123_s(host_backend, counter, key, want):
    key = torch.tensor([*key, 0, 0, 0, 0, 0, 0])
    assert tuple(words_of(host_backend, source.PHILOX, key, counter)) == want


@pytest.mark.parametrize("key, counter, want", CHACHA20)
def test_privacy_chacha20_is_rfc_8439_s(host_backend, key, counter, want):
    words = words_of(host_backend, source.CHACHA20, source._words(key), counter)
    assert words == [int(w, 16) for w in want.split()]


@pytest.mark.parametrize("bits", [philox, chacha20])
@pytest.mark.parametrize("sizes", [(1,), (127, 129), (4096, 4097, 31), (10_000,)])
def test_privacy_noise_has_the_same_bits_on_every_backend(backend, bits, sizes):
    samples = [torch.zeros(0, n, dtype=F64) for n in sizes]
    stream = (1 << 62) + 12345678901234567
    # At this noise the grid shows 50 bits of each value.
    one = of_backend(backend).release(samples, 1.0, 2.0**20, 1.0, bits(stream))
    two = of_backend("reference").release(samples, 1.0, 2.0**20, 1.0, bits(stream))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


def test_privacy_float32_noise_is_float64_noise_rounded(backend):
    shape = (0, 777)
    for bits in (philox(5), chacha20(5)):
        double = of_backend(backend).release([torch.zeros(shape, dtype=F64)], 1, 1.0, 3.0, bits)[0]
        single = of_backend(backend).release([torch.zeros(shape)], 1, 1.0, 3.0, bits)[0]
        assert torch.equal(double.float(), single)


@pytest.mark.parametrize("kind", ["philox", "chacha20"])
def test_privacy_counters_beyond_32_bits(cpu, kind):
    """The block's number goes on in the second word, and elements keep their places."""
    key = torch.arange(8) + 3
    number = source.PHILOX if kind == "philox" else source.CHACHA20
    for block in (0, (1 << 32) - 1, 1 << 32, (1 << 40) - 1):
        counter = (block & 0xFFFFFFFF, (5 << 8) + (block >> 32), 9, 10)
        want = words_of("reference", number, key, counter)
        assert _native.cpu().module.random_words(
            number, key.data_ptr(), block, (5 << 8, 9, 10)
        ) == (want)


@pytest.mark.parametrize(
    "check", [checks.check_noise, checks.check_streams, checks.check_tail],
    ids=lambda c: c.__name__,
)  # fmt: skip
def test_privacy_noise(backend, check, one_thread):
    check(of_backend(backend))


def test_privacy_audit(host_backend, one_thread):
    """On a GPU the noise is the same to the bit, and 320 releases take the emulation 18 s."""
    checks.check_audit(of_backend(host_backend))


def test_privacy_normals_are_accurate():
    """Against float64 functions of the same uniforms: relative error of the radius, 1e-15."""
    w = [torch.randint(1 << 32, (20_000,)) for _ in range(4)]
    w[1][:5000] >>= torch.randint(32, (5000,))  # deep into the tail
    a, b = reference.box_muller(*w)
    u = w[1].double() * 2.0**-32 + (w[0].double() + 0.5) * 2.0**-64
    radius = (-2 * u.log()).sqrt()
    got = torch.hypot(a, b)
    assert float(((got - radius) / radius).abs().max()) < 4e-15
    angle = (
        ((w[3] & 0x1FFFFFFF).double() * 2.0**-29 + (w[2].double() + 0.5) * 2.0**-61) * torch.pi / 4
    )
    small, large = (
        torch.minimum(a.abs(), b.abs()) / radius,
        torch.maximum(a.abs(), b.abs()) / radius,
    )
    torch.testing.assert_close(small, angle.sin(), rtol=1e-14, atol=0)
    torch.testing.assert_close(large, angle.cos(), rtol=1e-14, atol=0)


def test_privacy_generators_repeat_and_advance(backend):
    x = [torch.zeros(0, 50)]

    def draw(g):
        return call(backend, x, 1.0, 1.0, expected_batch_size=1, generator=g)[0]

    g = torch.Generator().manual_seed(1)
    state = g.get_state()
    first, second = draw(g), draw(g)
    assert not torch.equal(first, second)
    assert torch.equal(draw(torch.Generator().manual_seed(1)), first)
    g.set_state(state)
    assert torch.equal(draw(g), first) and torch.equal(draw(g), second)
    assert torch.equal(draw(g.manual_seed(1)), first)
    assert not torch.equal(draw(g.manual_seed(2)), first)
    assert not torch.equal(draw(g.manual_seed(1 + (1 << 40))), first)
    assert not torch.equal(draw(g.manual_seed(-1)), first)


def test_privacy_secure_noise_ignores_every_seed(backend):
    x = [torch.zeros(0, 50)]
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        draws.append(call(backend, x, 1.0, 1.0, expected_batch_size=1)[0])
    assert not torch.equal(*draws)


def test_privacy_without_noise_no_randomness_is_used(backend):
    g = torch.Generator().manual_seed(1)
    state = g.get_state()
    call(backend, [torch.ones(2, 3)], 1.0, 0.0, expected_batch_size=1, generator=g)
    assert torch.equal(g.get_state(), state)


def test_privacy_streams_are_unique_among_threads():
    streams = []

    def take():
        streams.extend(source.secure().stream for _ in range(500))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(set(streams)) == len(streams) == 2000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_privacy_a_forked_child_has_its_own_key():
    key = source.secure().key
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, bytes([torch.equal(source.secure().key, key)]))
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 1) == b"\0"
    assert torch.equal(source.secure().key, key)


def test_privacy_the_key_stays_in_the_process():
    source.secure()
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(source._secure)
    assert "key" not in repr(source._secure)
    with torch.profiler.profile(record_shapes=True, with_stack=False) as profile:
        call("auto", [torch.zeros(0, 3)], 1.0, 1.0, expected_batch_size=1)
    key = source._secure._key
    assert key is not None
    recorded = str([(e.name, getattr(e, "concrete_inputs", None)) for e in profile.events()])
    assert not any(str(w) in recorded for w in key.tolist())


def test_privacy_distant_elements_keep_their_places(cpu):
    """The noise of a tensor's start does not depend on its length."""
    for bits in (philox(8), chacha20(8)):
        planned = mechanism.plan(1.0, 1.0, 1.0, 100, False)
        runs = [
            of_backend("cpu").run([torch.zeros(0, n, dtype=F64)], planned, bits)[0]
            for n in (50, 4096, 9000)
        ]
        assert torch.equal(runs[0], runs[2][:50]) and torch.equal(runs[1], runs[2][:4096])

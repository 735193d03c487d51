"""Attention over whole rows: every backend against a dense mask, its memory, and which one is taken."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.attention
import torch.nn.attention.varlen
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat_pl.common.errors import UserError
from nanochat_pl.model.attention import (
    BACKENDS,
    Case,
    Documents,
    Kernels,
    attention_backend,
    choice,
    flex,
    kernels_of,
    products,
    sdpa,
    varlen,
    why_not,
    windowed_attention,
)
from nanochat_pl.model.attention.blocks import band_mask
from nanochat_pl.model.gpt import GPT
from tests.helpers.models import perturbed, random_ids, tiny_config


def dense(q, k, v, window, scale, documents=None):
    groups = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    distance = torch.arange(q.size(2), device=q.device)[:, None] - torch.arange(q.size(2), device=q.device)
    hidden = (distance < 0) | (distance > window)
    if documents is not None:
        hidden = hidden | (documents.numbers[:, None, :, None] != documents.numbers[:, None, None])
    return (q @ k.transpose(-2, -1) * scale).masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v


def cut(rows, length, seed=0, device="cpu"):
    """Documents of one to some fifty tokens, each row cut elsewhere."""
    random = torch.Generator().manual_seed(seed)
    starts = torch.rand(rows, length, generator=random) < 0.05
    numbers = starts.cumsum(dim=1, dtype=torch.int32).to(device)
    return Documents(numbers, varlen.document_ends(numbers))


def leaves(seed, kv_heads, length, device="cpu", dtype=torch.float32, width=64):
    """Queries, keys and values of two rows, as the model makes them: (B, T, H, D) seen as (B, H, T, D)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, length, heads, width) for heads in (4, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def check_against(function, expected_of, inputs, window, tolerance, documents=None):
    """Output and gradients, relative distances."""
    results = []
    for way in (function, expected_of):
        output = way(*(x.transpose(1, 2) for x in inputs), window, 0.2, documents)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("documents", [None, cut(2, 300)], ids=["one text", "documents"])
@pytest.mark.parametrize("backend", ["bands", "products"])
@pytest.mark.parametrize("window", [0, 1, 127, 128, 129, 150, 298, 299, 300, 10_000])
def test_equals_a_dense_mask_forward_and_backward(window, backend, documents):
    generator = torch.Generator().manual_seed(window)
    shapes = [(2, 4, 300, 8), (2, 2, 300, 8), (2, 2, 300, 8)]
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    outputs = [function(*inputs, window, 0.5, documents) for function in (BACKENDS[backend].attend, dense)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(output.square().sum(), inputs) for output in outputs]
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_other_types_and_numbers_of_heads(dtype, tolerance, kv_heads):
    inputs = leaves(kv_heads, kv_heads, 160, dtype=dtype)

    def exact(q, k, v, *arguments):
        return dense(q.double(), k.double(), v.double(), *arguments)

    for name, window, documents in itertools.product(["products", "bands"], [40, 160], [None, cut(2, 160)]):
        check_against(BACKENDS[name].attend, exact, inputs, window, tolerance, documents)
    check_against(BACKENDS["sdpa"].attend, exact, inputs, 160, tolerance)


class LargestTensor(TorchDispatchMode):
    """Records the number of entries of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("window", [128, 4096])
@pytest.mark.parametrize("documents", [False, True], ids=["one text", "documents"])
@pytest.mark.parametrize("backend", ["bands", "products"])
def test_no_mask_and_no_scores_of_all_pairs(backend, documents, window):
    """Elsewhere a T × T mask was built for a window of a few percent of T."""
    if backend == "bands" and window == 4096 and not documents:
        pytest.skip("one call of sdpa has no mask")
    length = 4096
    q, k, v = (torch.randn(1, 1, length, 8) for _ in range(3))
    cuts = cut(1, length) if documents else None
    with LargestTensor() as seen:
        BACKENDS[backend].attend(q, k, v, window, 1.0, cuts)
    assert seen.largest <= 4 * 128 * 128 if window == 128 else seen.largest <= length * 512


# --- which one is taken

HOPPER, BF16 = Kernels("cuda", (9, 0), True), torch.bfloat16
CASES = [
    (Kernels("cpu"), Case(BF16, 512, 1024, 128), "products"),
    (Kernels("cpu"), Case(BF16, 1024, 1024, 128), "products"),
    (Kernels("cpu"), Case(BF16, 512, 1024, 128, documents=True, compiled=True), "products"),
    (Kernels("cpu"), Case(BF16, 512, 2048, 128), "bands"),
    (Kernels("cpu"), Case(BF16, 2048, 2048, 128, documents=True), "bands"),
    (Kernels("cpu"), Case(torch.float32, 2048, 2048, 128), "sdpa"),
    (HOPPER, Case(BF16, 512, 2048, 128), "varlen"),
    (HOPPER, Case(BF16, 2048, 2048, 128, documents=True), "varlen"),
    (HOPPER, Case(torch.float16, 512, 2048, 128), "varlen"),
    (Kernels("cuda", (8, 0), True), Case(BF16, 2046, 2048, 256), "varlen"),
    (Kernels("cuda", (12, 0), True), Case(BF16, 512, 2048, 192), "varlen"),
    (HOPPER, Case(BF16, 2047, 2048, 128), "sdpa"),
    (HOPPER, Case(torch.float32, 512, 2048, 128), "bands"),
    (HOPPER, Case(torch.float32, 512, 2048, 128, compiled=True), "flex"),
    (HOPPER, Case(torch.float32, 2048, 2048, 128, compiled=True), "sdpa"),
    (HOPPER._replace(flex=False), Case(torch.float32, 512, 2048, 128, compiled=True), "bands"),
    (HOPPER, Case(BF16, 512, 2048, 12), "bands"),
    (Kernels("cuda", (8, 9), True), Case(BF16, 512, 2048, 256), "bands"),
    (Kernels("cuda", (7, 5), True), Case(torch.float16, 512, 2048, 128), "bands"),
    (Kernels("cuda", (9, 0), False), Case(BF16, 512, 2048, 128), "bands"),
    (Kernels("cuda", (9, 0), False), Case(BF16, 512, 2048, 128, documents=True, compiled=True), "flex"),
    (Kernels("cuda", None, True), Case(BF16, 512, 2048, 128), "bands"),
    (Kernels("mps"), Case(torch.float32, 512, 2048, 128), "bands"),
]


@pytest.mark.parametrize(("kernels", "case", "backend"), CASES)
def test_which_backend_is_taken(kernels, case, backend):
    assert attention_backend(kernels, case) == backend
    reasons = why_not(kernels, case)
    before = [*reasons][: [*reasons].index(backend)]
    assert all(reasons[each] for each in before), "what comes before it and is not taken says why"


def test_a_wanted_backend_is_taken_for_what_it_can_compute():
    windowed, whole = Case(BF16, 512, 2048, 128), Case(BF16, 2048, 2048, 128)
    assert [attention_backend(HOPPER, case, "sdpa") for case in (windowed, whole)] == ["varlen", "sdpa"]
    assert [attention_backend(HOPPER, case, "varlen") for case in (windowed, whole)] == ["varlen", "varlen"]
    assert [attention_backend(HOPPER, case, "products") for case in (windowed, whole)] == ["products", "products"]
    q, k, v = (x.transpose(1, 2) for x in leaves(0, 2, 100))
    expected = BACKENDS["bands"].attend(q, k, v, 30, 0.2, None)
    assert torch.equal(windowed_attention(q, k, v, 30, 0.2, wanted="bands"), expected)
    assert not torch.equal(windowed_attention(q, k, v, 30, 0.2), expected)


@pytest.mark.parametrize(
    ("kernels", "dtype", "head_dim", "word"),
    [
        (Kernels("cpu"), BF16, 128, "NVIDIA"),
        (Kernels("cuda", (7, 5), True), torch.float16, 128, "the GPU has 7.5"),
        (HOPPER, torch.float32, 128, "not in float32"),
        (HOPPER, BF16, 12, "not 12"),
        (Kernels("cuda", (9, 0), False), BF16, 128, torch.__version__),
    ],
)
def test_why_there_are_no_flash_kernels_with_windows(kernels, dtype, head_dim, word):
    assert word in varlen.cannot(kernels, Case(dtype, 512, 2048, head_dim))


def test_an_older_varlen_attn_without_windows_is_told_by_its_signature(monkeypatch):
    varlen.has_varlen_with_windows.cache_clear()
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", lambda query, key, value, scale=None: query)
    assert not varlen.has_varlen_with_windows()
    varlen.has_varlen_with_windows.cache_clear()


# --- trying a backend before it is taken


@pytest.fixture
def tried():
    """The trials of this test alone."""
    choice.what_is_wrong.cache_clear()
    yield
    choice.what_is_wrong.cache_clear()


def broken(kind):
    def attend(q, k, v, window, scale, documents):
        if kind == "raises":
            raise RuntimeError("no kernel image is available\nfor execution on the device")
        y = BACKENDS["products"].attend(q, k, v, window, scale, documents)
        return 1.01 * y - 0.01 * y.detach() if kind == "wrong gradient" else y.flip(2)

    return attend


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("raises", "does not run here: no kernel image is available"),
        ("wrong", "its output or gradients are"),
        ("wrong gradient", "off, more than 2e-03"),
    ],
)
def test_a_backend_that_is_wrong_here_is_passed_over_with_its_reason(kind, words, monkeypatch, tried):
    device, case = torch.device("cpu"), Case(torch.float32, 2048, 2048, 16)
    assert choice.choose(device, case) == "sdpa"
    choice.what_is_wrong.cache_clear()
    monkeypatch.setitem(BACKENDS, "sdpa", dataclasses.replace(BACKENDS["sdpa"], attend=broken(kind)))
    assert choice.choose(device, case) == "bands"
    assert words in dict(choice.refusals(device, case))["sdpa"]
    with pytest.raises(UserError, match=r"trainer.attention=sdpa: "):
        choice.require(device, [case], "sdpa", "trainer.attention")
    choice.what_is_wrong.cache_clear()
    monkeypatch.setitem(BACKENDS, "bands", dataclasses.replace(BACKENDS["bands"], attend=broken(kind)))
    with pytest.raises(UserError, match="attention on cpu: bands: "):
        choice.choose(device, case)


def test_a_wanted_backend_that_is_not_for_the_device_is_refused(tried):
    device, case = torch.device("cpu"), Case(torch.float32, 512, 2048, 16)
    with pytest.raises(UserError, match=r"trainer.attention=varlen: it is for GPUs of NVIDIA"):
        choice.require(device, [case], "varlen", "trainer.attention")
    choice.require(device, [case, case._replace(window=2048)], "sdpa", "trainer.attention")
    choice.require(device, [case], "auto", "trainer.attention")


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backends_of_a_cpu_pass_their_trial(dtype, documents, tried):
    random = torch.get_rng_state()
    for causal_alone in (False, True):
        for name in ("products", "bands", *(["sdpa"] if causal_alone and not documents else [])):
            traits = (torch.device("cpu"), dtype, 32, causal_alone, documents, False)
            with torch.inference_mode():
                assert choice.what_is_wrong(name, *traits) is None
    assert torch.equal(torch.get_rng_state(), random)


def test_a_trial_that_was_not_made_before_a_graph_is_made_beside_it(tried):
    compiled = torch.compile(windowed_attention, dynamic=False, fullgraph=True, backend="eager")
    q, k, v = (x.detach().transpose(1, 2) for x in leaves(0, 2, 1100, width=8))
    for window in (100, 1100):
        assert torch.equal(compiled(q, k, v, window, 0.2), windowed_attention(q, k, v, window, 0.2))
    assert choice.what_is_wrong.cache_info().misses == 2


def test_a_network_is_computed_by_the_wanted_backend():
    config = tiny_config(windows=(16, 16, 32), document_start_id=41)
    nets = [GPT(config, attention=wanted).materialise() for wanted in ("auto", "bands")]
    for net in nets:
        net.load_state_dict(perturbed(config).state_dict())
    for ids in (random_ids(config, 2, 32), random_ids(config, 2, 32) % 41):  # of several documents, and of one
        usual, other = (net.hidden(ids) for net in nets)
        assert not torch.equal(usual, other)
        torch.testing.assert_close(usual, other, atol=1e-4, rtol=1e-4)


class Newer:
    """PyTorch's switch between flash kernels; ``right`` are those whose results are."""

    def __init__(self, monkeypatch, right, capability=(9, 0), installed=("flash_attn_interface", "flash_attn.cute")):
        self.active, self.right = None, right
        monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", self.activate)
        monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda: self.activate(None))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(varlen, "_is_installed", lambda package: package in installed)

    def activate(self, name):
        self.active = name
        if name == "FA3" and "FA3" not in self.right:
            raise RuntimeError("undefined symbol: _ZN3c10")

    def reasons(self):
        return varlen.activate_newer_kernels(
            torch.device("cuda", 0), lambda: None if self.active in self.right else "its output is 1.0 off"
        )


def test_packages_that_are_not_installed():
    assert not varlen._is_installed("no_such_package.part") and varlen._is_installed("torch.nn")


def test_newer_flash_kernels_are_active_where_they_are_installed_and_right(monkeypatch):
    newer = Newer(monkeypatch, right={"FA3", "FA4"})
    assert newer.reasons() == {"FA3": None} and newer.active == "FA3"
    newer = Newer(monkeypatch, right={"FA4"})
    assert newer.reasons() == {"FA3": "undefined symbol: _ZN3c10", "FA4": None} and newer.active == "FA4"
    newer = Newer(monkeypatch, right=set())
    assert newer.reasons()["FA4"] == "its output is 1.0 off" and newer.active is None
    newer = Newer(monkeypatch, right={"FA4"}, capability=(10, 0))
    assert "compute capability 9.x" in newer.reasons()["FA3"] and newer.active == "FA4"
    newer = Newer(monkeypatch, right={"FA3", "FA4"}, installed=())
    assert newer.reasons()["FA3"] == "flash_attn_interface is not installed" and newer.active is None
    assert choice.use_newest_kernels(torch.device("cpu"), BF16, 64, False) == dict.fromkeys(
        ("FA3", "FA4"), "it is for GPUs of NVIDIA"
    )


# --- what GPUs are given, with a plain function in place of their kernels


def dense_varlen(query, key, value, ends, ends_of_keys, most, max_keys, *, scale, window_size, enable_gqa):
    """What PyTorch's varlen_attn promises: texts one after the other, (tokens, heads, width)."""
    assert ends.dtype == torch.int32 and torch.equal(ends, ends_of_keys) and most == max_keys
    assert enable_gqa == (query.size(1) != key.size(1)) and window_size[1] == 0
    outputs = []
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        assert stop - start <= most
        if start < stop:
            q, k, v = (tensor[start:stop].transpose(0, 1)[None] for tensor in (query, key, value))
            outputs.append(dense(q, k, v, window_size[0], scale)[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("documents", [None, cut(2, 32)], ids=["one text", "documents"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [0, 1, 7, 30])
def test_rows_are_handed_to_the_flash_kernels_as_they_want_them(window, kv_heads, documents, monkeypatch):
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", dense_varlen)
    inputs = leaves(window, kv_heads, 32, dtype=torch.float64)
    check_against(BACKENDS["varlen"].attend, dense, inputs, window, 1e-9, documents)


def test_ends_of_documents_have_few_sizes():
    numbers = torch.tensor([[0, 0, 1, 1, 2], [4, 4, 4, 5, 5]], dtype=torch.int32)
    ends = varlen.document_ends(numbers)
    assert ends.dtype == torch.int32 and ends[:5].tolist() == [0, 2, 4, 5, 8] and ends[5:].eq(10).all()
    sizes = {len(varlen.document_ends(torch.arange(count, dtype=torch.int32)[None])) for count in range(1, 300)}
    assert sizes == {64, 128, 256, 512}


@pytest.mark.parametrize("documents", [False, True], ids=["one text", "documents"])
@pytest.mark.parametrize(("window", "length"), [(0, 300), (100, 300), (128, 384), (299, 300), (200, 512)])
def test_blocks_of_flex_attention_are_those_where_something_is_seen(window, length, documents):
    numbers = cut(2, length).numbers if documents else torch.zeros(1, length, dtype=torch.int32)
    place = torch.arange(length)
    seen = (place <= place[:, None]) & (place[:, None] - place <= window)
    seen = seen & (numbers[:, :, None] == numbers[:, None])
    some, every = flex.block_pairs(length, window, numbers if documents else None, torch.device("cpu"))
    for i, j in itertools.product(range(some.size(1)), repeat=2):
        block = seen[:, 128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
        assert torch.equal(some[:, i, j], block.flatten(1).any(dim=1))
        whole = block.flatten(1).all(dim=1) & (block[0].numel() == 128 * 128)
        assert not (every[:, i, j] & ~whole).any()
        if not documents and whole.all() and 128 * (i + 1) <= length:
            assert every[:, i, j].all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("documents", [None, cut(2, 200)], ids=["one text", "documents"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_flex_attention_forward_without_a_compiler(kv_heads, documents):
    """On CPUs it has no backward, and not compiled it computes all blocks: the mask alone is tested here."""
    for window in (0, 70, 200):
        q, k, v = (x.detach().transpose(1, 2) for x in leaves(window, kv_heads, 200, width=16))
        found = BACKENDS["flex"].attend(q, k, v, window, 0.2, documents)
        torch.testing.assert_close(found, dense(q, k, v, window, 0.2, documents), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [None, cut(2, 300)], ids=["one text", "documents"])
def test_flex_attention_forward_compiled_and_other_documents_compile_nothing(documents):
    torch.compiler.reset()
    compiled = torch.compile(BACKENDS["flex"].attend, dynamic=False, fullgraph=True)
    others = None if documents is None else cut(2, 300, seed=1)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for cuts in (documents, others):
            q, k, v = (x.detach().transpose(1, 2) for x in leaves(3, 2, 300))
            found = compiled(q, k, v, 130, 0.2, cuts)
            torch.testing.assert_close(found, dense(q, k, v, 130, 0.2, cuts), atol=1e-5, rtol=1e-5)


# --- on a GPU


def plainly(q, k, v, window, scale, documents=None):
    """Products, in float32."""
    return BACKENDS["products"].attend(q.float(), k.float(), v.float(), window, scale, documents)


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [False, True], ids=["one text", "documents"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [0, 1, 100, 128, 129, 298, 299])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sdpa", "varlen", "bands"])
def test_every_backend_of_a_gpu_against_plain_products(name, dtype, window, kv_heads, documents):
    check_on_gpu(name, BACKENDS[name].attend, Case(dtype, window, 300, 64, documents), kv_heads)


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [False, True], ids=["one text", "documents"])
@pytest.mark.parametrize(("window", "kv_heads"), [(100, 1), (298, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_flex_attention_compiled_on_a_gpu_against_plain_products(dtype, window, kv_heads, documents):
    """Fewer cases, for each is compiled."""
    torch.compiler.reset()
    attend = torch.compile(BACKENDS["flex"].attend, dynamic=False, fullgraph=True)
    check_on_gpu("flex", attend, Case(dtype, window, 300, 64, documents, compiled=True), kv_heads)


def check_on_gpu(name, attend, case, kv_heads):
    device = torch.device("cuda")
    if reason := BACKENDS[name].cannot(kernels_of(device), case):
        pytest.skip(reason)
    cuts = cut(2, case.length, seed=case.window, device=device) if case.documents else None
    inputs = leaves(case.window, kv_heads, case.length, device, case.dtype)
    tolerance = 2e-3 if case.dtype == torch.float32 else 2e-2
    check_against(attend, plainly, inputs, case.window, tolerance, cuts)


@pytest.mark.gpu
def test_what_is_taken_on_a_gpu_is_right_there_and_says_why_others_are_not():
    device = torch.device("cuda")
    for window, documents in ((512, False), (2048, False), (2048, True)):
        reasons = dict(choice.refusals(device, Case(BF16, window, 2048, 128, documents, compiled=True)))
        assert [name for name, reason in reasons.items() if reason is None] == [[*reasons][-1]]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"])
@pytest.mark.parametrize("window", [100, 299])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_backend_of_sdpa_against_plain_products(dtype, window, backend):
    device, whole = torch.device("cuda"), window == 299
    inputs = leaves(window, 4, 300, device, dtype)
    mask = band_mask(300, 300, 0, window, device)

    def with_backend(q, k, v, window, scale, documents):
        with sdpa_kernel([getattr(SDPBackend, backend)]):
            return sdpa(q, k, v, scale, None if whole else mask, causal=whole)

    def in_one(q, k, v, window, scale, documents):
        return products(q, k, v, scale, mask)

    try:
        check_against(with_backend, in_one, inputs, window, 2e-5 if dtype == torch.float32 else 2e-2)
    except RuntimeError as error:
        if "No available kernel" not in str(error) and "No viable backend" not in str(error):
            raise
        pytest.skip(f"{backend} is not offered for this")

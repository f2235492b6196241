"""The Triton kernels against their plain PyTorch form: on a GPU compiled, elsewhere interpreted."""

import re

import pytest
import torch
from tests.tolerance import ROUNDING

from skillsd.kernels import reference, why_not
from skillsd.kernels.reference import NF4, Lora, Nf4Weight, Projection
from skillsd.kernels.workspace import Workspace

pytest.importorskip("triton")
from skillsd.kernels import attention, elementwise, projections

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
CLOSE = dict(atol=2e-2, rtol=2e-2) if GPU else dict(atol=ROUNDING, rtol=ROUNDING)


@pytest.fixture
def workspace():
    made = Workspace(torch.device(DEVICE))
    made.processors = 4  # so that small shapes are split too
    yield made
    assert not made.counters(1).any(), "every tile's count is back at 0"


def weight(n, k, nested, generator):
    packed = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8, generator=generator).to(DEVICE)
    blocks = n * k // 64
    if not nested:
        none = torch.empty(0, device=DEVICE)
        return Nf4Weight(packed, torch.rand(blocks, generator=generator).to(DEVICE), none, none, 0.0, (n, k))
    scales = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator).to(DEVICE)
    outer = 0.2 + torch.rand(-(-blocks // 256), generator=generator).to(DEVICE)
    return Nf4Weight(packed, scales, torch.linspace(-1, 1, 256, device=DEVICE), outer, 0.3, (n, k))


def normal(*shape, generator, scale=1.0):
    return (scale * torch.randn(*shape, generator=generator)).to(DEVICE)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("rows", "k", "sizes", "rank", "bias"),
    [
        (1, 64, [64], 0, False),
        (3, 128, [64], 8, False),
        (5, 640, [192, 32, 96], 16, True),
        (20, 576, [130, 64], 24, False),
        (33, 1280, [192], 8, True),
    ],
)
def test_projections(workspace, nested, rows, k, sizes, rank, bias):
    g = torch.Generator().manual_seed(rows)
    layers = []
    for i, n in enumerate(sizes):
        lora = Lora(normal(rank, k, generator=g, scale=0.1), normal(n, rank, generator=g, scale=0.1), 2.0) if rank else None
        layers.append(Projection(weight(n, k, nested, g), normal(n, generator=g).to(DTYPE) if bias and i != 1 else None, lora))
    x = normal(rows, k, generator=g, scale=k**-0.5).to(DTYPE)
    for _ in range(2):  # the second finds what the first left in the workspace
        for got, want in zip(projections.project_all(x, layers, workspace), reference.project_all(x, layers), strict=True):
            torch.testing.assert_close(got, want, **CLOSE)


def test_k_is_split_and_every_part_counts(workspace):
    """One block of W is not zero; its part of K may be anybody's."""
    assert projections.plan(3, [64], 1280, 4).splits == 5
    g = torch.Generator().manual_seed(0)
    x = normal(3, 1280, generator=g).to(DTYPE)
    for block in range(20):
        w = weight(64, 1280, False, g)
        keep = torch.zeros(64, 20, device=DEVICE)
        keep[:, block] = 1
        w = w._replace(scales=w.scales * keep.flatten())
        got = projections.project_all(x, [Projection(w, None, None)], workspace)[0]
        columns = slice(64 * block, 64 * block + 64)
        torch.testing.assert_close(got, (x[:, columns].float() @ reference.dequantise(w, DTYPE)[:, columns].T).to(DTYPE), **CLOSE)
        assert got.abs().max() > 1


def test_reference_reads_bitsandbytes():
    """The layout of packed weights and nested scales is bitsandbytes' own."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from skillsd.kernels.dequantise import dequantise
    from skillsd.policy.lora import nf4_weight

    w = torch.randn(96, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(DEVICE, torch.bfloat16)
    for nested in (True, False):
        packed, state = quantize_4bit(w, quant_type="nf4", blocksize=64, compress_statistics=nested)
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(packed, requires_grad=False)
        layer.weight.quant_state, layer.out_features, layer.in_features = state, 96, 192
        found = nf4_weight(layer)
        assert found is not None and found.shape == (96, 192) and bool(len(found.code)) == nested
        assert torch.equal(reference.dequantise(found).bfloat16(), dequantize_4bit(packed, state).view(96, 192))
        assert torch.equal(dequantise(found, DTYPE), reference.dequantise(found).to(DTYPE))
        layer.in_features = 200  # blocks would cross rows
        assert nf4_weight(layer) is None
    packed, state = quantize_4bit(w, quant_type="fp4", blocksize=64)
    layer.weight.quant_state, layer.in_features = state, 192
    assert nf4_weight(layer) is None and nf4_weight(torch.nn.Linear(64, 64)) is None


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_the_table_in_ptx(kind):
    """Run the assembly on all bytes, with prmt, and, or, shr as PTX defines them."""

    def prmt(a, b, selector):
        pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        assert not selector & 0x8888, "sign replication is not used"
        return int.from_bytes(bytes(pool[selector >> 4 * i & 7] for i in range(4)), "little")

    operations = {"prmt": prmt, "and": lambda a, b: a & b, "or": lambda a, b: a | b, "shr": lambda a, b: a >> b}
    for first in range(256):
        data = bytes([first, 255 - first, (7 * first) % 256, (first * first) % 256])
        registers = {"$4": int.from_bytes(data, "little")}
        for op, target, args in re.findall(r"(prmt|and|or|shr)\.[bu]32 ([$\w]+), ([^;]+);", projections.table_look_up(kind)):
            values = [registers[a] if a in registers else int(a, 0) for a in args.split(", ")]
            registers[target] = operations[op](*values) & 0xFFFFFFFF
        pairs = b"".join(registers[f"${i}"].to_bytes(4, "little") for i in range(4))
        got = torch.frombuffer(bytearray(pairs), dtype=getattr(torch, kind)).view(4, 2)
        assert torch.equal(got, torch.tensor([[NF4[b >> 4], NF4[b & 15]] for b in data]).to(got.dtype))


@pytest.mark.parametrize(
    ("shape", "window", "softcap"),
    [
        ((2, 4, 2, 1, 16, 300), None, None),
        ((3, 8, 2, 5, 8, 200), None, 3.0),
        ((2, 4, 4, 20, 32, 150), 17, None),
        ((3, 14, 2, 1, 64, 500), 100, 5.0),
        ((1, 2, 1, 70, 16, 80), None, None),
    ],
)
def test_attention(workspace, shape, window, softcap):
    batch, heads, kv_heads, queries, d, capacity = shape
    g = torch.Generator().manual_seed(d)
    q = normal(batch, queries, heads, d, generator=g).to(DTYPE).transpose(1, 2)
    k, v = (normal(batch, kv_heads, capacity + 1, d, generator=g).to(DTYPE)[:, :, :capacity] for _ in range(2))
    start = [capacity - queries, 0, 40][:batch]
    table = torch.tensor([[p, queries, b, 0, b] for b, p in enumerate(start)], device=DEVICE)
    for b in range(batch):  # nothing is read beyond a row's last query
        k[b, :, start[b] + queries :] = v[b, :, start[b] + queries :] = torch.nan
    args = dict(window=window, scale=0.3, softcap=softcap)
    for _ in range(2):
        got = attention.attend(q, k, v, table, workspace, **args)
        assert got.shape == (batch, queries, heads, d) and got.is_contiguous()
        torch.testing.assert_close(got, reference.attend(q, k.nan_to_num(), v.nan_to_num(), table, **args), **CLOSE)


@pytest.mark.parametrize("window", [None, 90])
def test_rows_share_their_first_keys(workspace, window):
    """Three rows in slots of any order; two continue the 70 keys of slot 3, one has its own."""
    g = torch.Generator().manual_seed(1)
    q, new_k, new_v = (normal(3, h, 2, 16, generator=g).to(DTYPE) for h in (4, 2, 2))
    stores = [normal(5, 2, 140, 16, generator=g).to(DTYPE) for _ in range(2)]
    table = torch.tensor([[200, 2, 4, 70, 3], [71, 1, 0, 70, 3], [100, 2, 1, 0, 1]], device=DEVICE)
    wanted = [t.clone() for t in stores]
    reference.write(new_k, new_v, *wanted, table)
    elementwise.write(new_k, new_v, *stores, table)
    assert all(torch.equal(a, b) for a, b in zip(stores, wanted, strict=True))
    assert torch.equal(wanted[0][4, :, 130:132], new_k[0]) and torch.equal(wanted[1][0, :, 1], new_v[1, :, 0])
    got = attention.attend(q, *stores, table, workspace, window)
    torch.testing.assert_close(got, reference.attend(q, *stores, table, window), **CLOSE)
    rows = [reference.keys_of(t, table, 202) for t in stores]
    assert torch.equal(rows[0][0], torch.cat([stores[0][3, :, :70], stores[0][4, :, :132]], 1))
    alone = torch.tensor([[200, 2, 0, 0, 0], [71, 1, 1, 0, 1], [100, 2, 2, 0, 2]], device=DEVICE)
    torch.testing.assert_close(reference.attend(q, *rows, alone, window)[:2, 0], reference.attend(q, *stores, table, window)[:2, 0])


def test_nothing_is_read_beyond_a_padded_row(workspace):
    """Five ids padded to 64 in the last slot of a cache that ends soon after them: what lies behind it is not the cache's."""
    g = torch.Generator().manual_seed(2)
    q = normal(1, 2, 64, 16, generator=g).to(DTYPE)
    memory = [torch.full((2, 3 * 80, 16), torch.nan, device=DEVICE, dtype=DTYPE) for _ in range(2)]
    k, v = (m[:, :80][None] for m in memory)
    for t in (k, v):
        t[:, :, :65] = normal(1, 2, 65, 16, generator=g).to(DTYPE)
    table = torch.tensor([[60, 5, 0, 0, 0]], device=DEVICE)
    got = attention.attend(q, k, v, table, workspace)
    assert got.isfinite().all()
    torch.testing.assert_close(got[:, :5], reference.attend(q, k.nan_to_num(), v.nan_to_num(), table)[:, :5], **CLOSE)


def test_reference_attention_is_sdpa():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, t, 8, generator=g) for h, t in ((4, 3), (2, 9), (2, 9)))
    table = torch.tensor([[2, 3, 0, 0, 0], [6, 3, 1, 0, 1]])
    seen = table[:, 0, None, None, None] + torch.arange(3)[:, None] >= torch.arange(9)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(reference.attend(q, k, v, table), want)
    only = reference.attend(q, k, v, table, window=1)  # a query that sees itself alone
    torch.testing.assert_close(only[1, 2, :2], v[1, :1, 8].expand(2, 8))


@pytest.mark.parametrize("shape", [(7, 48), (2, 3, 5, 128), (4, 576), (1, 3000)])
def test_rms_norm(shape):
    g = torch.Generator().manual_seed(0)
    x, w = normal(*shape, generator=g).to(DTYPE), normal(shape[-1], generator=g).to(DTYPE)
    torch.testing.assert_close(elementwise.rms_norm(x, w, 1e-6), reference.rms_norm(x, w, 1e-6), **CLOSE)
    many = x.repeat_interleave(2, -2)[..., ::2, :]  # not contiguous
    torch.testing.assert_close(elementwise.rms_norm(many, w, 1e-6), reference.rms_norm(many, w, 1e-6), **CLOSE)


@pytest.mark.parametrize("d", [16, 24])
def test_rotate(d):
    g = torch.Generator().manual_seed(d)
    q, k = (normal(2, 3, h, d, generator=g).to(DTYPE).transpose(1, 2) for h in (20, 2))
    cos, sin = (normal(2, 3, d, generator=g).to(DTYPE) for _ in range(2))
    for some in (slice(None), slice(1)):  # the second: positions that all rows have in common
        for got, want in zip(elementwise.rotate(q, k, cos[some], sin[some]), reference.rotate(q, k, cos[some], sin[some]), strict=True):
            assert got.is_contiguous()
            torch.testing.assert_close(got, want, **(dict(atol=0, rtol=0) if GPU else CLOSE))


def test_silu_mul():
    g = torch.Generator().manual_seed(0)
    gate, up = (normal(3, 700, generator=g, scale=3).to(DTYPE) for _ in range(2))
    torch.testing.assert_close(elementwise.silu_mul(gate, up), reference.silu_mul(gate, up), **CLOSE)


def test_why_not(monkeypatch):
    assert why_not(torch.device("cpu"), torch.bfloat16) == "there is no NVIDIA GPU"
    monkeypatch.setattr("skillsd.kernels.find_spec", lambda name: None)
    assert why_not(torch.device("cuda"), torch.bfloat16) == "Triton is not installed"
    monkeypatch.setattr("skillsd.kernels.find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "NVIDIA T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (7, 5))
    assert "NVIDIA T4 is older" in why_not(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (9, 0))
    assert "float32" in why_not(torch.device("cuda"), torch.float32) and why_not(torch.device("cuda"), torch.bfloat16) == ""

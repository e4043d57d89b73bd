"""What only a GPU can show: its kernels against float64, and whole runs beside the CPU's."""

import json
import os

import pytest
import torch
import torch.nn.functional as F
from test_attention import LENGTHS, Layer, reference, starts_of

from overture.models.attention import BLOCK, attention, mask_of
from overture.models.loss import cross_entropy_at

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def inputs(rows, tokens, dtype, size=64):
    torch.manual_seed(0)
    shapes = ((rows, tokens, heads, size) for heads in (4, 2, 2))
    return [torch.randn(s, dtype=dtype).cuda().transpose(1, 2).requires_grad_() for s in shapes]


def distance(one, other):
    """The error relative to the whole: |one - other| / |other|."""
    return ((one.double() - other).norm() / other.norm()).item()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"window": 6}, {"causal": False, "window": 9},
                {"softcap": 2.0}], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_equals_the_reference(lengths, options, dtype):
    tokens = max(BLOCK + 10, max(map(sum, lengths)))
    starts = starts_of(lengths, tokens)
    tensors = inputs(len(lengths), tokens, dtype)
    on_cpu = [x.detach().cpu().double().requires_grad_() for x in tensors]
    expected = reference(*on_cpu, starts, 0.3, **options)
    layer = Layer()
    layer.is_causal = options.get("causal", True)
    ours, _ = attention(
        layer, *tensors, mask_of(starts.cuda()), scaling=0.3,
        sliding_window=options.get("window"), softcap=options.get("softcap"),
    )  # fmt: skip
    real = starts >= 0
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert distance(ours.cpu()[real], expected[real]) < bound
    given = torch.randn(expected.shape).to(dtype) * real[..., None, None]
    mine = torch.autograd.grad(ours, tensors, given.cuda())
    theirs = torch.autograd.grad(expected, on_cpu, given.double())
    # Together: a document of one token gives its query none.
    one, other = (torch.cat([x.cpu().flatten() for x in three]) for three in (mine, theirs))
    assert distance(one, other) < bound
    assert all(x.isfinite().all() for x in mine)


def test_documents_do_not_see_each_other():
    tensors = inputs(1, 200, torch.bfloat16)
    ours, _ = attention(Layer(), *tensors, mask_of(starts_of([[70, 130]], 200).cuda(), spans=2))
    (of_key,) = torch.autograd.grad(ours[:, 70:].sum(), tensors[1], retain_graph=True)
    assert not of_key[:, :, :70].any()
    (of_query,) = torch.autograd.grad(ours[:, :70].sum(), tensors[0])
    assert not of_query[:, :, 70:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_loss_equals_torch_in_float64(dtype, softcap):
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 5000, bias=False).to(dtype).cuda()
    hidden = torch.randn(1300, 64, dtype=dtype, device="cuda", requires_grad=True)
    targets = torch.randint(0, 5000, (1300,), device="cuda")
    total, losses = cross_entropy_at(hidden, head, targets, softcap=softcap)
    exact = (
        hidden.detach().double().requires_grad_(),
        head.weight.detach().double().requires_grad_(),
    )
    logits = exact[0] @ exact[1].t()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = F.cross_entropy(logits, targets, reduction="none")
    bound = {torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-9}[dtype]
    assert distance(losses, expected.detach()) < bound
    for mine, theirs in zip(
        torch.autograd.grad(total, (hidden, head.weight)),
        torch.autograd.grad(expected.sum(), exact), strict=True,
    ):  # fmt: skip
        assert distance(mine, theirs) < bound


def test_adapters_over_bfloat16_equal_float64():
    from peft import LoraConfig, get_peft_model

    from overture.models.lora import _with_our_layers

    torch.manual_seed(0)
    whole = torch.nn.Sequential(torch.nn.Linear(96, 160, dtype=torch.bfloat16))
    adapted = get_peft_model(whole, LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
    layer = _with_our_layers(adapted).base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    layer.cuda()
    x = torch.randn(3, 50, 96, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    exact = [v.detach().double().requires_grad_() for v in (x, down, up)]
    base = layer.base_layer
    expected = F.linear(exact[0], base.weight.double(), base.bias.double())
    expected = expected + 2 * exact[0] @ exact[1].t() @ exact[2].t()
    ours = layer(x)
    assert distance(ours, expected.detach()) < 1e-2
    given = torch.randn_like(ours)
    mine = torch.autograd.grad(ours, (x, down, up), given)
    theirs = torch.autograd.grad(expected, exact, given.double())
    assert [v.dtype for v in mine] == [torch.bfloat16, torch.float32, torch.float32]
    for a, b in zip(mine, theirs, strict=True):
        assert distance(a, b) < 1e-2


@pytest.mark.parametrize(
    ("door", "path", "options"),
    [
        ("finetune.py", "yamls/smoke/finetune.yaml", ()),
        ("finetune.py", "yamls/smoke/finetune.yaml", ("compile=true",)),
        ("main.py", "yamls/smoke/pretrain.yaml", ("precision=amp_bf16",)),
        ("main.py", "yamls/smoke/mlm.yaml", ()),
        ("finetune.py", "yamls/smoke/seq2seq.yaml", ()),
        ("finetune.py", "yamls/smoke/classify.yaml", ()),
    ],
)
def test_a_run_ends_where_it_does_on_the_cpu(smoke, run_door, tmp_path, monkeypatch, door, path,
                                             options):  # fmt: skip
    found = {}
    for devices in (os.environ.get("CUDA_VISIBLE_DEVICES", "0"), ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
        folder = tmp_path / (devices or "cpu")
        more = [o for o in options if devices or not o.startswith("compile")]
        done = run_door(door, path, f"run_folder={folder}", *more)
        assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
        found[devices] = json.loads((folder / "result.json").read_text())["eval_cross_entropy"]
    one, other = found.values()
    assert one == pytest.approx(other, rel=0.02)


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_over_quantised_weights_are_used_continued_and_merged(smoke, run_door, tmp_path,
                                                                       bits):  # fmt: skip
    pytest.importorskip("bitsandbytes")

    def run(*command, wanted=""):
        done = run_door(*command)
        assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
        assert wanted in done.stdout, done.stdout
        return done

    base, one, more = (tmp_path / name for name in ("base", "one", "more"))
    run("main.py", "yamls/smoke/pretrain.yaml", f"run_folder={base}")
    tune = ("finetune.py", "yamls/smoke/finetune.yaml", "model.pretrained=true",
            f"model.name={base}", "model.config={}", f"model.load_in_{bits}bit=true")  # fmt: skip
    run(*tune, f"run_folder={one}")
    found = json.loads((one / "result.json").read_text())
    assert found["eval_cross_entropy"] < found["eval_cross_entropy_before"] - 0.1
    run(*tune, f"run_folder={more}", "lora=null", f"model.adapter={one}")
    further = json.loads((more / "result.json").read_text())
    assert further["eval_cross_entropy_before"] == pytest.approx(found["eval_cross_entropy"], 1e-3)
    run("src/generate_text.py", one, "--prompt", "Name a colour.", wanted="1 answers: ")
    run("src/export_model.py", one, "--out", tmp_path / "adapters", wanted="greedy tokens on 4")
    merged = tmp_path / "merged"
    run("src/export_model.py", one, "--out", merged, "--merge", wanted="greedy tokens on 4")
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())

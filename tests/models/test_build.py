"""Models by name; our loss equals the family's own; packed documents are apart."""

import importlib
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

from overture.config.schema import ModelConfig
from overture.data.collate import TokenCollator
from overture.errors import ConfigError
from overture.models import causal_lm
from overture.models.attention import document_mask
from overture.models.build import load_network, locate_model
from overture.models.causal_lm import CausalLM
from overture.models.isolation import prove_isolation
from overture.models.lora import add_lora
from overture.tokenizer import load_tokenizer

TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
FAMILIES = {
    "llama": {**TINY, "num_key_value_heads": 2},
    "qwen2": {**TINY, "num_key_value_heads": 2},
    "gpt_neox": TINY,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    # These two change their logits after the head: scaled down, and soft-capped.
    "granite": {**TINY, "num_key_value_heads": 2, "logits_scaling": 4.0},
    "gemma2": {**TINY, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 3.0},
}


@pytest.fixture(scope="module")
def tokenizer(smoke):
    return load_tokenizer(str(smoke / "tokenizer"))


def build(family: str, tokenizer, attention="auto"):
    torch.manual_seed(1)
    return load_network(
        ModelConfig(family, False, "float32", attention, FAMILIES[family]), tokenizer
    )


def packed_batch(tokenizer, lengths=(9, 5, 14)) -> dict[str, torch.Tensor]:
    import numpy as np

    rng = np.random.default_rng(0)
    ids = rng.integers(0, len(tokenizer), sum(lengths)).astype(np.uint16)
    row = {
        "input_ids": ids,
        "loss_mask": np.ones(len(ids), np.uint8),
        "document_ends": np.cumsum(lengths).astype(np.uint32),
        "sample_id": 0,
    }
    return TokenCollator(32, tokenizer.pad_token_id)([row])


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_loss_equals_each_document_alone(family, attention, tokenizer):
    network = build(family, tokenizer, attention).eval()
    assert network.config._attn_implementation == {"auto": "overture"}.get(attention, attention)
    prove_isolation(network, len(tokenizer), 512, packed=True)
    model = CausalLM(network, tokenizer, eval_samples=None).eval()
    batch = packed_batch(tokenizer)
    with torch.no_grad():
        ours = model(batch)["token_losses"]
        expected, start = [], 0
        for length in (9, 5, 14):
            ids = batch["input_ids"][:, start : start + length]
            logits = network(input_ids=ids, use_cache=False).logits[0, :-1]
            expected.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
            start += length
    torch.testing.assert_close(ours, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_bfloat16_rounding_is_not_taken_for_a_leak(tokenizer):
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 6,
             "num_attention_heads": 8, "initializer_range": 0.04}  # fmt: skip
    network = load_network(ModelConfig("llama", False, "bfloat16", "sdpa", shape), tokenizer)
    prove_isolation(network, len(tokenizer), 512, packed=True)


def test_families_that_ignore_packing_are_refused(tokenizer):
    config = GPTNeoConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_layers=2, num_heads=4,
        attention_types=[[["global", "local"], 1]], window_size=16,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"GPTNeoForCausalLM.*--packing none"):
        prove_isolation(GPTNeoForCausalLM(config), len(tokenizer), 512, packed=True)
    prove_isolation(GPTNeoForCausalLM(config), len(tokenizer), 512, packed=False)


def test_a_model_that_sees_what_comes_is_refused(tokenizer):
    network = build("llama", tokenizer)
    for layer in network.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(
        ConfigError, match=r"tokens of a LlamaForCausalLM see what comes after them"
    ):
        prove_isolation(network, len(tokenizer), 512, packed=False)


def test_logits_that_are_not_those_of_the_head_are_refused(tokenizer):
    network = build("llama", tokenizer)
    more = network.lm_head.register_forward_hook(lambda module, args, out: 1.1 * out)
    with pytest.raises(ConfigError, match="are not simply those of its output head"):
        CausalLM(network, tokenizer, None)  # the loss reads its weights alone
    more.remove()
    CausalLM(network, tokenizer, None)

    def shift(module, args, out):
        out.logits = out.logits + 1
        return out

    network.register_forward_hook(shift)
    with pytest.raises(ConfigError, match="are not simply those of its output head"):
        CausalLM(network, tokenizer, None)


@pytest.mark.parametrize("scheme", [{"scale_attn_weights": False},
                                    {"scale_attn_by_inverse_layer_idx": True}])  # fmt: skip
def test_gpt2_scales_its_scores_as_its_config_says(tokenizer, scheme):
    ids = torch.arange(40)[None]
    logits = []
    for attention in ("auto", "eager"):
        torch.manual_seed(1)
        shape = FAMILIES["gpt2"] | scheme
        network = load_network(
            ModelConfig("gpt2", False, "float32", attention, shape), tokenizer
        ).eval()
        mask = document_mask(network, torch.zeros(1, 40, dtype=torch.int32))
        logits.append(network(input_ids=ids, attention_mask=mask, use_cache=False).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_gemma2_generates_from_a_padded_batch_as_from_one_alone(tokenizer):
    network = build("gemma2", tokenizer).eval()
    long, short = torch.arange(20, 40)[None], torch.arange(50, 57)[None]
    padded = torch.cat([torch.zeros(1, 13, dtype=torch.long), short], 1)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :13] = 0
    both = network.generate(
        torch.cat([long, padded]), attention_mask=mask, max_new_tokens=5, do_sample=False
    )
    alone = network.generate(short, max_new_tokens=5, do_sample=False)
    assert both[1, 13:].tolist() == alone[0].tolist()


def test_gradients_of_lora_reach_every_adapter_and_nothing_else(tokenizer):
    network = add_lora(build("llama", tokenizer), 4, 8.0, 0.0, "all-linear")
    model = CausalLM(network, tokenizer, eval_samples=None)
    batch = packed_batch(tokenizer)
    model.loss(model(batch), batch).backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n for n in trained)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
    # B starts at zero, so only B has a gradient that differs from zero at first.
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)


def test_a_loss_lets_go_of_its_graph_once_it_has_given_its_gradients(tokenizer):
    model, batch = CausalLM(build("llama", tokenizer), tokenizer, None), packed_batch(tokenizer)
    weights = list(model.parameters())
    count = sum(batch["num_labels"])
    expected = torch.autograd.grad(model(batch)["loss"] / count, weights)
    outputs = model(batch)
    loss = model.loss(outputs, batch)
    value, again = loss.item(), model.loss(model(batch), batch)
    total = torch.zeros(1).add_(loss.mean())  # as Composer has it
    (3 * total).backward()
    assert (loss.grad_fn, loss.item()) == (None, value)
    assert not any(tensor.requires_grad for tensor in outputs.values())
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, 3 * gradient)
    again.backward()  # that of another loss is still there
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, 4 * gradient)


@pytest.mark.parametrize("switch", ["loss", "labels"])
def test_what_benchmarks_put_in_the_place_of_a_part_gives_the_same(tokenizer, monkeypatch, switch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    sides = importlib.import_module("sides")
    model, batch = CausalLM(build("llama", tokenizer), tokenizer, None), packed_batch(tokenizer)
    ours = model(batch)
    for name in ("cross_entropy_at", "label_positions"):  # put back when this ends
        monkeypatch.setattr(causal_lm, name, getattr(causal_lm, name))
    sides.switch_off(switch)
    theirs = model(batch)
    torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_equals_that_of_peft(tokenizer, dtype):
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    found = []
    for kind in ("ours", "theirs"):
        network = load_network(
            ModelConfig("llama", False, dtype, "auto", FAMILIES["llama"]), tokenizer
        )
        add = add_lora if kind == "ours" else None
        torch.manual_seed(2)
        network = (
            add(network, 4, 8.0, 0.0, "all-linear") if add else get_peft_model(network, config)
        )
        torch.manual_seed(3)
        for name, parameter in network.named_parameters():
            torch.nn.init.normal_(parameter, std=0.1 if "lora_" in name else 0.3)
        model = CausalLM(network, tokenizer, None)
        batch = packed_batch(tokenizer)
        loss = model.loss(model(batch), batch)
        loss.backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append((loss.item(), trained))
        with network.disable_adapter():
            found[-1] += (model.loss(model(batch), batch).item(),)
    (ours, our_grads, our_base), (theirs, their_grads, their_base) = found
    exact = {"float32": 1e-5, "bfloat16": 5e-2}[dtype]
    assert ours == pytest.approx(theirs, rel=exact)
    assert our_base == their_base != ours
    assert our_grads.keys() == their_grads.keys()
    for name, grad in our_grads.items():
        assert grad.dtype == torch.float32
        close = (grad - their_grads[name]).norm() / their_grads[name].norm()
        assert close < exact, name


def test_adapters_are_float32_over_a_bfloat16_base(tokenizer):
    network = load_network(
        ModelConfig("llama", False, "bfloat16", "auto", FAMILIES["llama"]), tokenizer
    )
    network = add_lora(network, 4, 8.0, 0.0, ["q_proj"])
    kinds = {"lora" if "lora_" in n else "base": p.dtype for n, p in network.named_parameters()}
    assert kinds == {"lora": torch.float32, "base": torch.bfloat16}


def test_cpu_autocast_is_close_to_float32(tokenizer):
    network = build("llama", tokenizer)
    batch = packed_batch(tokenizer)
    exact = CausalLM(network, tokenizer, None)
    fast = CausalLM(network, tokenizer, None, cpu_autocast=True)
    a, b = (m.loss(m(batch), batch).item() for m in (exact, fast))
    assert a == pytest.approx(b, abs=0.02)
    assert a != b
    fast.loss(fast(batch), batch).backward()
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())


def test_batch_without_labels_has_a_zero_loss(tokenizer):
    model = CausalLM(build("llama", tokenizer), tokenizer, None)
    batch = packed_batch(tokenizer)
    batch["labels"].fill_(-100)
    batch["num_labels"] = [0] * len(batch["num_labels"])
    loss = model.loss(model(batch), batch)
    loss.backward()
    assert loss.item() == 0.0


def test_flops_of_lora_are_about_two_thirds_of_full(tokenizer):
    batch = packed_batch(tokenizer)
    full = CausalLM(build("llama", tokenizer), tokenizer, None).flops_of(batch)
    adapted = add_lora(build("llama", tokenizer), 4, 8.0, 0.0, "all-linear")
    lora = CausalLM(adapted, tokenizer, None).flops_of(batch)
    assert 0.6 < lora / full < 0.7
    # By hand: 25 of the 28 tokens are labels, the head counts for those alone, attention besides.
    network = build("llama", tokenizer)
    head = len(tokenizer) * 32
    layers = sum(p.numel() for p in network.parameters()) - 2 * head
    attention = 3 * 2 * 2 * 32 * (9**2 + 5**2 + 14**2)
    assert full == pytest.approx(6 * (layers * 28 + head * 25) + attention)


def test_weights_come_back(tokenizer, tmp_path):
    network = build("llama", tokenizer)
    network.save_pretrained(tmp_path)
    again = load_network(ModelConfig(str(tmp_path), True, "float32", "auto", {}), tokenizer)
    for (name, a), (_, b) in zip(network.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("name", "pretrained", "overrides", "words"),
    [
        ("lama", False, {}, 'did you mean "llama"'),
        ("/no/such/model", True, {}, "no such folder"),
        ("llama", False, {"hidden_sise": 3}, 'no such key (did you mean "hidden_size"?)'),
    ],
)
def test_refusals(tokenizer, name, pretrained, overrides, words):
    with pytest.raises(ConfigError) as caught:
        load_network(ModelConfig(name, pretrained, "float32", "auto", overrides), tokenizer)
    assert words in str(caught.value)


def test_tokenizer_that_does_not_fit(tokenizer, tmp_path):
    small = AutoModelForCausalLM.from_config(build("llama", tokenizer).config)
    small.resize_token_embeddings(100)
    small.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"has 100 embeddings, but the tokenizer .* 1,024 pieces"):
        load_network(ModelConfig(str(tmp_path), True, "float32", "auto", {}), tokenizer)


def test_tokenizer_that_grew(tokenizer, tmp_path, smoke):
    build("llama", tokenizer).save_pretrained(tmp_path / "model")
    load = partial(load_network, ModelConfig(str(tmp_path / "model")))
    grown = load_tokenizer(str(smoke / "tokenizer"))
    load(grown)
    grown.add_special_tokens({"pad_token": "<a new one>"})
    with pytest.raises(ConfigError, match=r"has 1,024 embeddings, but the tokenizer .* 1,025 piec"):
        load(grown)


def test_tokenizer_that_cannot_pad(smoke, tmp_path):
    bare = load_tokenizer(str(smoke / "tokenizer"))
    bare.pad_token = bare.eos_token = bare.bos_token = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer_name: .* has no token to pad with"):
        build("llama", load_tokenizer(str(tmp_path)))


def test_wrong_lora_target(tokenizer):
    with pytest.raises(ConfigError, match=r"lora\.target_modules: .*nope"):
        add_lora(build("llama", tokenizer), 4, 8.0, 0.0, ["nope"])


def test_one_wrong_lora_target_among_right_ones(tokenizer):
    with pytest.raises(ConfigError, match=r"'v_porj' is the name of no module .*\"v_proj\""):
        add_lora(build("llama", tokenizer), 4, 8.0, 0.0, ["q_proj", "v_porj"])


def test_what_cannot_be_trained_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"the output head takes no adapter"):
        add_lora(build("llama", tokenizer), 4, 8.0, 0.0, ["q_proj", "lm_head"])
    with pytest.raises(ConfigError, match="the router's loss is not used"):
        load_network(
            ModelConfig("mixtral", False, "float32", "auto", {"output_router_logits": True}),
            tokenizer,
        )


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        locate_model(str(tmp_path))


@pytest.mark.slow  # a minute of compilation
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_equals_not_compiled_and_generation_is_left_alone(tokenizer):
    network = add_lora(build("llama", tokenizer), 4, 8.0, 0.0, "all-linear")
    model, batch = CausalLM(network, tokenizer, None), packed_batch(tokenizer)
    trained = [p for p in network.parameters() if p.requires_grad]
    plain = model.loss(model(batch), batch)
    expected = torch.autograd.grad(plain, trained)
    model.compile_backbone()
    loss = model.loss(model(batch), batch)
    torch.testing.assert_close(loss, plain)
    for ours, theirs in zip(torch.autograd.grad(loss, trained), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    graphs = dict(torch._dynamo.utils.counters["stats"])
    network.generate(batch["input_ids"][:1, :5], max_new_tokens=3, do_sample=False)
    assert dict(torch._dynamo.utils.counters["stats"]) == graphs


def test_compile_without_a_compiler_is_refused(tokenizer, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"compile: .*install g\+\+"):
        CausalLM(build("llama", tokenizer), tokenizer, None).compile_backbone()


@pytest.mark.parametrize("within", [False, True], ids=["", "within"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_attn_implementation_internal", "somebody/kernels"),
        ("auto_map", {"AutoConfig": "x.Y"}),
        ("trust_remote_code", True),
    ],
)
def test_config_that_names_code_is_refused_unless_trusted(tokenizer, tmp_path, key, value, within):
    build("llama", tokenizer).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    more = {"text_config": {key: value}} if within else {key: value}
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    with pytest.raises(ConfigError, match=rf"config\.json has {key}, which can run code"):
        load_network(ModelConfig(str(tmp_path), True, "float32", "auto", {}), tokenizer)
    with pytest.raises(ConfigError, match=r"model\.config\._attn_implementation_internal"):
        overrides = {"_attn_implementation_internal": "somebody/kernels"}
        load_network(ModelConfig("llama", False, "float32", "auto", overrides), tokenizer)
